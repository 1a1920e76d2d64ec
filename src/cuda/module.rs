//! Modules, their kernels, and launches.

use std::ffi::{CStr, c_int, c_void};
use std::ptr;

use cudarc::driver::sys;

use super::driver::{CudaResult, check};
use super::stream::StreamHandle;

/// A loaded module, never unloaded (its functions live as long as the process).
#[derive(Debug)]
pub(crate) struct Module(sys::CUmodule);

// SAFETY: a module handle may be used from any thread; the driver locks.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads a fatbin into the current context.
    pub(crate) fn load(image: &'static [u8]) -> CudaResult<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: `image` is a whole fatbin, whose header says how long it is.
        check(unsafe { sys::cuModuleLoadData(&mut handle, image.as_ptr().cast()) })?;
        Ok(Self(handle))
    }

    /// The kernel of this name.
    pub(crate) fn function(&self, name: &CStr) -> CudaResult<Function> {
        let mut handle = ptr::null_mut();
        // SAFETY: `name` is NUL-terminated, the module lives.
        check(unsafe { sys::cuModuleGetFunction(&mut handle, self.0, name.as_ptr()) })?;
        Ok(Function(handle))
    }
}

/// The extent of a launch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Shape {
    /// Blocks, x and y.
    pub grid: (u32, u32),
    /// Threads of a block, x and y.
    pub block: (u32, u32),
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

/// A kernel of a [`Module`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function(sys::CUfunction);

// SAFETY: a function handle may be used from any thread; the driver locks.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// Lets blocks of the kernel have `n_bytes` of dynamic shared memory. Loads the kernel, too, where the driver puts that
    /// off to the first use.
    pub(crate) fn allow_shared(self, n_bytes: usize) -> CudaResult<()> {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a function of a loaded module.
        check(unsafe { sys::cuFuncSetAttribute(self.0, attribute, n_bytes as c_int) })
    }

    /// Threads that a block may have.
    pub(crate) fn max_threads(self) -> CudaResult<usize> {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
        let mut n_threads = 0;
        // SAFETY: `n_threads` is a valid place, and this a function of a loaded module.
        check(unsafe { sys::cuFuncGetAttribute(&mut n_threads, attribute, self.0) })?;
        Ok(usize::try_from(n_threads).unwrap_or(0))
    }

    /// Blocks of so many threads and so much shared memory that a multiprocessor holds at once.
    pub(crate) fn occupancy(self, n_threads: u32, shared_bytes: usize) -> CudaResult<usize> {
        let mut n_blocks = 0;
        // SAFETY: `n_blocks` is a valid place.
        check(unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut n_blocks, self.0, n_threads as c_int, shared_bytes)
        })?;
        Ok(usize::try_from(n_blocks).unwrap_or(0))
    }

    /// Launches the kernel with one by-value argument.
    ///
    /// # Safety
    /// `args` is what the kernel takes, its pointers are good for what the kernel does with them until it has run,
    /// and `stream` is live and of the current context.
    pub(crate) unsafe fn launch<A>(self, shape: Shape, stream: StreamHandle, args: &A) -> CudaResult<()> {
        let mut params = [ptr::from_ref(args).cast_mut().cast::<c_void>()];
        // SAFETY: the caller vouches for the arguments; the driver copies them before it returns.
        check(unsafe {
            sys::cuLaunchKernel(
                self.0,
                shape.grid.0,
                shape.grid.1,
                1,
                shape.block.0,
                shape.block.1,
                1,
                shape.shared_bytes,
                stream,
                params.as_mut_ptr(),
                ptr::null_mut(),
            )
        })
    }
}

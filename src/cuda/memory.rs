//! Memory that kernels reach: of a device, of another process's device, of the host.

use std::ffi::{c_uint, c_void};
use std::ptr;

use cudarc::driver::sys;

use super::driver::{CudaResult, check, log_drop};
use super::stream::{Stream, StreamHandle};

/// Device memory. Freed when dropped, in the context that allocated it.
#[derive(Debug)]
pub struct DeviceMemory {
    address: sys::CUdeviceptr,
    n_bytes: usize,
}

impl DeviceMemory {
    /// Allocates `n_bytes` in the current context; 256-byte aligned.
    pub fn new(n_bytes: usize) -> CudaResult<Self> {
        let mut address = 0;
        // SAFETY: `address` is a valid place.
        check(unsafe { sys::cuMemAlloc_v2(&mut address, n_bytes) })?;
        Ok(Self { address, n_bytes })
    }

    /// Address of byte `offset`.
    pub fn at(&self, offset: usize) -> *mut c_void {
        debug_assert!(offset <= self.n_bytes);
        (self.address as usize + offset) as *mut c_void
    }

    /// Bytes allocated.
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// Copies `bytes` to `offset` on `stream`; `bytes` may be used again on return.
    pub fn write(&self, offset: usize, bytes: &[u8], stream: &Stream) -> CudaResult<()> {
        assert!(offset + bytes.len() <= self.n_bytes);
        let target = self.address + offset as u64;
        // SAFETY: the range lies in the allocation, the source in `bytes`; pageable memory is staged before return.
        check(unsafe { sys::cuMemcpyHtoDAsync_v2(target, bytes.as_ptr().cast(), bytes.len(), stream.handle()) })?;
        stream.synchronize()
    }

    /// Copies from `offset` into `bytes` on `stream`, finished on return.
    pub fn read(&self, offset: usize, bytes: &mut [u8], stream: &Stream) -> CudaResult<()> {
        assert!(offset + bytes.len() <= self.n_bytes);
        let source = self.address + offset as u64;
        // SAFETY: the range lies in the allocation, the target in `bytes`, which outlives the synchronization.
        check(unsafe { sys::cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr().cast(), source, bytes.len(), stream.handle()) })?;
        stream.synchronize()
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`, freed once; the driver waits for work that uses it.
        log_drop("free of device memory", unsafe { sys::cuMemFree_v2(self.address) });
    }
}

/// Copies on `stream` from where to where it may be: memory of a device, or of the host as a device reaches it.
///
/// # Safety
/// Both have so many bytes, and stay until the copy has run.
pub(crate) unsafe fn copy(
    target: *mut c_void,
    source: *const c_void,
    n_bytes: usize,
    stream: StreamHandle,
) -> CudaResult<()> {
    // SAFETY: as the caller vouches.
    check(unsafe { sys::cuMemcpyAsync(target as sys::CUdeviceptr, source as sys::CUdeviceptr, n_bytes, stream) })
}

/// What another process needs to map device memory of this one.
pub(crate) type IpcHandle = [u8; 64];

impl DeviceMemory {
    /// Sets every byte to 0 on `stream`, finished on return.
    pub fn clear(&self, stream: &Stream) -> CudaResult<()> {
        // SAFETY: the range is the allocation.
        check(unsafe { sys::cuMemsetD8Async(self.address, 0, self.n_bytes, stream.handle()) })?;
        stream.synchronize()
    }

    /// A handle for [`open_ipc`] in another process.
    pub fn export(&self) -> CudaResult<IpcHandle> {
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: `handle` is a valid place, the address that of a live allocation.
        check(unsafe { sys::cuIpcGetMemHandle(&mut handle, self.address) })?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }
}

/// Maps the device memory of another process, with peer access to its device, until [`close_ipc`].
pub(crate) fn open_ipc(handle: &IpcHandle) -> CudaResult<*mut c_void> {
    let mut address = 0;
    let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as std::ffi::c_char) };
    let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as c_uint;
    // SAFETY: `address` is a valid place; a handle that is none is refused.
    check(unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, handle, flags) })?;
    Ok(address as *mut c_void)
}

/// Unmaps what [`open_ipc`] has mapped in the current context. Waits for all work of the device.
pub(crate) fn close_ipc(address: *mut c_void) {
    // SAFETY: mapped, and nobody uses it any more.
    log_drop("unmapping another process's memory", unsafe { sys::cuIpcCloseMemHandle(address as sys::CUdeviceptr) });
}

/// Zeroed host memory that kernels of every context read and write.
#[derive(Debug)]
pub struct PinnedMemory {
    address: *mut c_void,
    n_bytes: usize,
}

// SAFETY: an allocation; whoever uses it synchronizes.
unsafe impl Send for PinnedMemory {}
// SAFETY: as above.
unsafe impl Sync for PinnedMemory {}

impl PinnedMemory {
    /// Allocates `n_bytes`, page-aligned.
    pub fn new(n_bytes: usize) -> CudaResult<Self> {
        let mut address = ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: `address` is a valid place.
        check(unsafe { sys::cuMemHostAlloc(&mut address, n_bytes, flags) })?;
        // SAFETY: that many bytes have just been allocated.
        unsafe { ptr::write_bytes(address.cast::<u8>(), 0, n_bytes) };
        Ok(Self { address, n_bytes })
    }

    /// Copies `n_bytes` of device memory to byte `offset` on `stream`, and does not wait.
    ///
    /// # Safety
    /// Both ranges are good until the copy has run; `stream` is live and of the current context.
    pub unsafe fn read_later(
        &self,
        offset: usize,
        source: *const c_void,
        n_bytes: usize,
        stream: StreamHandle,
    ) -> CudaResult<()> {
        let target = self.address.wrapping_byte_add(offset);
        // SAFETY: as the caller vouches.
        check(unsafe { sys::cuMemcpyDtoHAsync_v2(target, source as sys::CUdeviceptr, n_bytes, stream) })
    }

    /// Bytes allocated.
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// Its address, the same for the host and for kernels.
    pub fn address(&self) -> *mut c_void {
        self.address
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`, freed once.
        log_drop("free of host memory", unsafe { sys::cuMemFreeHost(self.address) });
    }
}

/// Host memory of the caller's, made known to every context; forgotten when dropped.
#[derive(Debug)]
pub(crate) struct Registered {
    host: *mut c_void,
    device: *mut c_void,
}

// SAFETY: two addresses.
unsafe impl Send for Registered {}
// SAFETY: as above.
unsafe impl Sync for Registered {}

impl Registered {
    /// Registers `n_bytes` at `host`, both whole pages.
    ///
    /// # Safety
    /// The range stays mapped until this is dropped.
    pub(crate) unsafe fn new(host: *mut c_void, n_bytes: usize) -> CudaResult<Self> {
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: as the caller vouches.
        check(unsafe { sys::cuMemHostRegister_v2(host, n_bytes, flags) })?;
        let mut registered = Self { host, device: ptr::null_mut() };
        let mut address = 0;
        // SAFETY: `address` is a valid place, the range has just been registered.
        check(unsafe { sys::cuMemHostGetDevicePointer_v2(&mut address, host, 0) })?;
        registered.device = address as *mut c_void;
        Ok(registered)
    }

    /// Its address for kernels.
    pub(crate) fn device_address(&self) -> *mut c_void {
        self.device
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: registered in `new`, once.
        log_drop("unregistering host memory", unsafe { sys::cuMemHostUnregister(self.host) });
    }
}

//! The simulated driver's functions, found as NCCL finds the driver's: by `dlopen` and `dlsym`.

use std::ffi::{CStr, c_int, c_void};

use once_cell::sync::OnceCell;

use crate::types::{Code, Result};

macro_rules! functions {
    ($($name:ident: fn($($arg:ty),*);)*) => {
        /// The functions.
        #[allow(non_snake_case, reason = "the driver's names")]
        pub struct Driver {
            $($name: unsafe extern "C" fn($($arg),*) -> c_int,)*
            resolve: unsafe extern "C" fn(usize, usize) -> *mut u8,
        }

        fn load() -> Option<Driver> {
            // SAFETY: a literal name; opening the driver library runs its constructors, of which it has none.
            let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
            let find = |name: &CStr| {
                // SAFETY: an open library, or null, which finds nothing but what is loaded globally.
                let address = unsafe { libc::dlsym(library, name.as_ptr()) };
                (!library.is_null() && !address.is_null()).then_some(address)
            };
            let name = |text: &str| std::ffi::CString::new(text).ok();
            Some(Driver {
                // SAFETY: functions of these names have these signatures.
                $($name: unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($arg),*) -> c_int>(
                    find(&name(stringify!($name))?)?) },)*
                // SAFETY: as above.
                resolve: unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(usize, usize) -> *mut u8>(
                    find(c"flashcomm_sim_resolve")?) },
            })
        }
    };
}

functions! {
    cuInit: fn(u32);
    cuCtxGetDevice: fn(*mut c_int);
    cuDeviceGetCount: fn(*mut c_int);
    cuDevicePrimaryCtxRetain: fn(*mut usize, c_int);
    cuCtxPushCurrent_v2: fn(usize);
    cuCtxPopCurrent_v2: fn(*mut usize);
    cuEventCreate: fn(*mut usize, u32);
    cuEventDestroy_v2: fn(usize);
    cuEventRecordWithFlags: fn(usize, usize, u32);
    cuStreamWaitEvent: fn(usize, usize, u32);
    cuEventSynchronize: fn(usize);
    cuStreamGetCaptureInfo_v2: fn(usize, *mut c_int, *mut u64, *mut c_void, *mut c_void, *mut c_void);
    cuMemAlloc_v2: fn(*mut usize, usize);
    cuMemFree_v2: fn(usize);
    flashcomm_sim_advance: fn(u64);
    flashcomm_sim_issue: fn(usize, extern "C" fn(*mut c_void) -> c_int, extern "C" fn(*mut c_void), *mut c_void);
}

/// The driver, or `ncclUnhandledCudaError` where there is no simulated one.
pub fn driver() -> Result<&'static Driver> {
    static DRIVER: OnceCell<Option<Driver>> = OnceCell::new();
    let driver = DRIVER.get_or_init(|| {
        let driver = load()?;
        // SAFETY: takes no pointers.
        (unsafe { (driver.cuInit)(0) } == 0).then_some(driver)
    });
    driver.as_ref().ok_or(Code::UNHANDLED_CUDA_ERROR)
}

fn check(result: c_int) -> Result<()> {
    if result == 0 { Ok(()) } else { Err(Code::UNHANDLED_CUDA_ERROR) }
}

/// A primary context, current on this thread until dropped.
pub struct Entered(&'static Driver);

impl Drop for Entered {
    fn drop(&mut self) {
        // SAFETY: undoes the push; null means that the popped context is not wanted.
        unsafe { (self.0.cuCtxPopCurrent_v2)(std::ptr::null_mut()) };
    }
}

/// `CU_EVENT_DISABLE_TIMING`.
const DISABLE_TIMING: u32 = 2;

impl Driver {
    /// The current device, the first where there is no context.
    pub fn current_device(&self) -> i32 {
        let mut device = 0;
        // SAFETY: a valid place.
        if unsafe { (self.cuCtxGetDevice)(&mut device) } == 0 { device } else { 0 }
    }

    /// Number of devices.
    pub fn device_count(&self) -> Result<i32> {
        let mut count = 0;
        // SAFETY: a valid place.
        check(unsafe { (self.cuDeviceGetCount)(&mut count) })?;
        Ok(count)
    }

    /// Makes a device's primary context current. It stays retained, as NCCL's runtime keeps it.
    pub fn enter(&'static self, device: i32) -> Result<Entered> {
        let mut context = 0;
        // SAFETY: a valid place.
        check(unsafe { (self.cuDevicePrimaryCtxRetain)(&mut context, device) })?;
        // SAFETY: a context of the driver's.
        check(unsafe { (self.cuCtxPushCurrent_v2)(context) })?;
        Ok(Entered(self))
    }

    /// A new event in the current context.
    pub fn event(&self) -> Result<usize> {
        let mut event = 0;
        // SAFETY: a valid place.
        check(unsafe { (self.cuEventCreate)(&mut event, DISABLE_TIMING) })?;
        Ok(event)
    }

    /// Destroys an event.
    pub fn destroy_event(&self, event: usize) {
        // SAFETY: an event of ours, destroyed once.
        unsafe { (self.cuEventDestroy_v2)(event) };
    }

    /// Records an event.
    pub fn record(&self, event: usize, stream: usize, external: bool) -> Result<()> {
        // SAFETY: handles, which the driver checks.
        check(unsafe { (self.cuEventRecordWithFlags)(event, stream, u32::from(external)) })
    }

    /// Makes a stream wait for an event.
    pub fn wait(&self, stream: usize, event: usize, external: bool) -> Result<()> {
        // SAFETY: handles, which the driver checks.
        check(unsafe { (self.cuStreamWaitEvent)(stream, event, u32::from(external)) })
    }

    /// Waits for an event.
    pub fn synchronize(&self, event: usize) -> Result<()> {
        // SAFETY: a handle, which the driver checks.
        check(unsafe { (self.cuEventSynchronize)(event) })
    }

    /// The id of the capture that a stream takes part in.
    pub fn capture(&self, stream: usize) -> Result<Option<u64>> {
        let (mut status, mut id) = (0, 0);
        let null = std::ptr::null_mut;
        // SAFETY: valid places, and null for what is not asked.
        check(unsafe { (self.cuStreamGetCaptureInfo_v2)(stream, &mut status, &mut id, null(), null(), null()) })?;
        match status {
            0 => Ok(None),
            1 => Ok(Some(id)),
            _ => Err(Code::UNHANDLED_CUDA_ERROR),
        }
    }

    /// Issues a task that may run more than once.
    pub fn issue(&self, stream: usize, task: Box<dyn Fn() -> c_int + Send + Sync>) -> Result<()> {
        type Boxed = Box<dyn Fn() -> c_int + Send + Sync>;
        extern "C" fn run(data: *mut c_void) -> c_int {
            // SAFETY: the box below, alive until its release.
            unsafe { (*data.cast::<Boxed>())() }
        }
        extern "C" fn release(data: *mut c_void) {
            // SAFETY: released once.
            drop(unsafe { Box::from_raw(data.cast::<Boxed>()) });
        }
        let data = Box::into_raw(Box::new(task));
        // SAFETY: the functions and the data belong together.
        check(unsafe { (self.flashcomm_sim_issue)(stream, run, release, data.cast()) })
    }

    /// What a task that runs does takes so many nanoseconds of virtual time. To be called in it.
    pub fn advance(&self, ns: u64) {
        // SAFETY: takes no pointers.
        unsafe { (self.flashcomm_sim_advance)(ns) };
    }

    /// The bytes of a device range.
    pub fn resolve(&self, address: usize, n_bytes: usize) -> Option<*mut u8> {
        // SAFETY: any numbers may be asked.
        let bytes = unsafe { (self.resolve)(address, n_bytes) };
        (!bytes.is_null()).then_some(bytes)
    }

    /// Allocates device memory in the current context.
    pub fn allocate(&self, n_bytes: usize) -> Result<usize> {
        let mut address = 0;
        // SAFETY: a valid place.
        check(unsafe { (self.cuMemAlloc_v2)(&mut address, n_bytes) })?;
        Ok(address)
    }

    /// Frees it.
    pub fn free(&self, address: usize) -> Result<()> {
        // SAFETY: an address, which the driver checks.
        check(unsafe { (self.cuMemFree_v2)(address) })
    }
}

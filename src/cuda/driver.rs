//! The driver itself: whether it is there, what it answers, and its errors.

use std::ffi::CStr;
use std::fmt;
use std::ptr;

use cudarc::driver::sys;
use once_cell::sync::Lazy;

/// What the driver answered, kept raw.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CudaError(pub sys::CUresult);

/// The driver's answer or its error.
pub type CudaResult<T> = Result<T, CudaError>;

impl fmt::Display for CudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = ptr::null();
        // SAFETY: `text` is a valid place; the driver fills it with a static string or null.
        let mut found = || unsafe { sys::cuGetErrorString(self.0, &mut text) } == sys::CUresult::CUDA_SUCCESS;
        if !is_available() || !found() || text.is_null() {
            return write!(f, "CUDA driver error {}", self.0 as u32);
        }
        // SAFETY: not null, so a NUL-terminated string of static storage.
        let text = unsafe { CStr::from_ptr(text) };
        write!(f, "CUDA driver error {} ({})", self.0 as u32, text.to_string_lossy())
    }
}

impl fmt::Debug for CudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for CudaError {}

/// What the driver answered, as a result.
pub(super) fn check(result: sys::CUresult) -> CudaResult<()> {
    if result == sys::CUresult::CUDA_SUCCESS { Ok(()) } else { Err(CudaError(result)) }
}

/// Initializes the driver; idempotent.
///
/// # Errors
/// `CUDA_ERROR_NO_DEVICE` also where there is no driver at all.
pub fn init() -> CudaResult<()> {
    if !is_available() {
        return Err(CudaError(sys::CUresult::CUDA_ERROR_NO_DEVICE));
    }
    // SAFETY: takes no pointers.
    check(unsafe { sys::cuInit(0) })
}

/// Whether there is a CUDA driver. The bindings, which open it at their first call, panic where there is none.
pub(super) fn is_available() -> bool {
    static IS_OPEN: Lazy<bool> = Lazy::new(|| {
        // SAFETY: only tries to open the driver library.
        let is_there = unsafe { sys::is_culib_present() };
        if is_there {
            // SAFETY: opens the library, which stays open.
            unsafe { sys::culib() };
        }
        is_there
    });
    *IS_OPEN
}

/// The newest CUDA that the driver knows, times 1000.
pub(crate) fn driver_version() -> CudaResult<i32> {
    let mut version = 0;
    // SAFETY: `version` is a valid place.
    check(unsafe { sys::cuDriverGetVersion(&mut version) })?;
    Ok(version)
}

/// Number of devices the driver shows.
pub fn device_count() -> CudaResult<i32> {
    let mut count = 0;
    // SAFETY: `count` is a valid place.
    check(unsafe { sys::cuDeviceGetCount(&mut count) })?;
    Ok(count)
}

/// A destructor cannot answer; what went wrong is logged (at process exit the driver may be gone already).
pub(super) fn log_drop(what: &str, result: sys::CUresult) {
    if result != sys::CUresult::CUDA_SUCCESS && result != sys::CUresult::CUDA_ERROR_DEINITIALIZED {
        log::debug!("{what}: {}", CudaError(result));
    }
}

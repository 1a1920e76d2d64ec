//! What the simulated NCCL and the tests need beyond the driver's functions, found by `dlsym`. No program may call these.

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{answer, stream};
use crate::cu_result::CuResult;
use crate::{clock, device, memory};

/// Data of a task that belongs to whoever issued it.
struct Owned {
    data: usize,
    release: extern "C" fn(*mut c_void),
}

impl Owned {
    /// A method, so that a closure holds the whole and not its field.
    fn data(&self) -> *mut c_void {
        self.data as *mut c_void
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        (self.release)(self.data());
    }
}

/// Issues `run(data)` to a stream, or to the graph that it captures. `release(data)` is called when it will not run any
/// more; also where this answers an error. What `run` returns, if not 0, is an error of the context.
///
/// # Safety
/// Both functions may be called with `data` from any thread, until the release.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashcomm_sim_issue(
    on: usize,
    run: extern "C" fn(*mut c_void) -> c_int,
    release: extern "C" fn(*mut c_void),
    data: *mut c_void,
) -> c_int {
    let owned = Owned { data: data as usize, release };
    answer(|| {
        stream(on)?.issue(Arc::new(move || match run(owned.data()) {
            0 => Ok(()),
            code => Err(CuResult(code)),
        }))
    })
}

/// The bytes behind a range that devices may access; null where there is no such range.
///
/// # Safety
/// None is needed; what is done with the answer is the caller's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashcomm_sim_resolve(address: usize, n_bytes: usize) -> *mut u8 {
    memory::resolve(address, n_bytes).unwrap_or(std::ptr::null_mut())
}

/// To be called in `run` of [`flashcomm_sim_issue`]: what it does takes so many nanoseconds of
/// virtual time. Answers 0.
#[unsafe(no_mangle)]
pub extern "C" fn flashcomm_sim_advance(ns: u64) -> c_int {
    clock::advance(ns);
    0
}

/// Blocks of the kernel that was launched last on a device; -1 where there is no such device.
#[unsafe(no_mangle)]
pub extern "C" fn flashcomm_sim_last_blocks(device: c_int) -> c_int {
    device::of(device).map_or(-1, |device| device.last_blocks.load(Ordering::Relaxed))
}

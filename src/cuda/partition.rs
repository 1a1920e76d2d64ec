//! Parts of a device: what of its multiprocessors a context or a stream may use.
//!
//! MPS bounds a whole process (`CUDA_MPS_ACTIVE_THREAD_PERCENTAGE`). Within a process an application makes *green contexts*,
//! which have some of the multiprocessors (CUDA 12.4 and newer). What is relied upon, by NVIDIA's documents:
//!
//! * A stream of a green context belongs to the device's primary context, too: `cuStreamGetCtx_v2` names both. So events
//!   that were created in the primary context are recorded on it, though `cuEventRecord` wants event and stream of one
//!   context. (The CUDA Programming Guide, 4.6.6, has `cudaEventRecord` on such streams, and the runtime creates events in
//!   the primary context; of `cuGreenCtxRecordEvent` the event "must be from the same primary context".)
//! * A launch runs on what the stream's context has, and a node of a graph on what the stream had that captured it; the stream
//!   that the graph is launched on decides nothing (4.6.5). The primary context has all multiprocessors.
//! * `cuCtxFromGreenCtx` gives a context that may be current. Streams created then are the green context's, and the special
//!   handles (null, legacy, per thread) mean *its* default stream (`cuStreamGetGreenCtx`). So who such a handle belongs to has
//!   to be asked, and work has to be issued to it, in the application's own context.

use std::ffi::c_void;
use std::{mem, ptr};

use cudarc::driver::sys;
use once_cell::sync::Lazy;

use super::context::Context;
use super::driver::is_available;
use super::stream::StreamHandle;

type GetGreenContext = unsafe extern "C" fn(StreamHandle, *mut *mut c_void) -> sys::CUresult;
type GetExecAffinity = unsafe extern "C" fn(*mut sys::CUexecAffinityParam, sys::CUexecAffinityType) -> sys::CUresult;

/// Functions that a driver may lack. (The bindings would panic.)
struct Functions {
    stream_get_green_context: Option<GetGreenContext>,
    get_exec_affinity: Option<GetExecAffinity>,
}

static FUNCTIONS: Lazy<Functions> = Lazy::new(|| {
    if !is_available() {
        return Functions { stream_get_green_context: None, get_exec_affinity: None };
    }
    // SAFETY: the driver is there, so that this does not panic.
    let driver = unsafe { sys::culib() };
    Functions {
        // SAFETY: the function of this name has this signature.
        stream_get_green_context: unsafe { driver.get(b"cuStreamGetGreenCtx\0") }.ok().map(|function| *function),
        // SAFETY: as above.
        get_exec_affinity: unsafe { driver.get(b"cuCtxGetExecAffinity\0") }.ok().map(|function| *function),
    }
});

/// Whether `stream` is of a green context. Not of one where the driver does not tell: whoever uses the stream next will hear
/// what is wrong with it.
///
/// # Safety
/// `stream` is live, or one of the driver's special handles; those mean the current context's.
pub(crate) unsafe fn is_of_green_context(stream: StreamHandle) -> bool {
    let Some(get) = FUNCTIONS.stream_get_green_context else { return false };
    let mut green = ptr::null_mut();
    // SAFETY: the caller vouches for the stream; `green` is a valid place.
    let result = unsafe { get(stream, &mut green) };
    result == sys::CUresult::CUDA_SUCCESS && !green.is_null()
}

impl Context {
    /// Multiprocessors that kernels of this, the current context may run on, where the driver bounds them.
    pub(super) fn affinity(&self) -> Option<usize> {
        let get = FUNCTIONS.get_exec_affinity?;
        // SAFETY: numbers, for which zeros will do.
        let mut affinity: sys::CUexecAffinityParam = unsafe { mem::zeroed() };
        // SAFETY: `affinity` is a valid place.
        let result = unsafe { get(&mut affinity, sys::CUexecAffinityType::CU_EXEC_AFFINITY_TYPE_SM_COUNT) };
        // SAFETY: what was asked for, and zeros where there is no answer.
        let multiprocessors = unsafe { affinity.param.smCount.val } as usize;
        // Where MPS is not used there is none: CUDA_ERROR_UNSUPPORTED_EXEC_AFFINITY.
        (result == sys::CUresult::CUDA_SUCCESS && multiprocessors != 0).then_some(multiprocessors)
    }
}

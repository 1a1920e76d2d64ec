//! Streams and events. Those of the application are borrowed as raw handles.

use std::ffi::{c_int, c_uint};
use std::ptr;

use cudarc::driver::sys;

use super::driver::{CudaError, CudaResult, check, log_drop};

/// A stream of the application, or one of ours, borrowed.
pub(crate) type StreamHandle = sys::CUstream;

/// A stream of ours. It does not synchronize with the legacy default stream.
#[derive(Debug)]
pub struct Stream(StreamHandle);

// SAFETY: a stream handle may be used from any thread; the driver locks.
unsafe impl Send for Stream {}

impl Stream {
    /// A new stream in the current context.
    pub fn new() -> CudaResult<Self> {
        Self::with_priority(0)
    }

    /// The same, of the highest priority: never in one queue with a stream of another.
    pub(crate) fn urgent() -> CudaResult<Self> {
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: both are valid places.
        check(unsafe { sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest) })?;
        Self::with_priority(greatest)
    }

    fn with_priority(priority: c_int) -> CudaResult<Self> {
        let mut handle = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: `handle` is a valid place.
        check(unsafe { sys::cuStreamCreateWithPriority(&mut handle, flags, priority) })?;
        Ok(Self(handle))
    }

    /// The raw handle.
    pub fn handle(&self) -> StreamHandle {
        self.0
    }

    /// Waits for its work, and for that of no other stream.
    pub fn synchronize(&self) -> CudaResult<()> {
        // SAFETY: the stream lives.
        check(unsafe { sys::cuStreamSynchronize(self.0) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once; the driver finishes its work first.
        log_drop("destruction of a stream", unsafe { sys::cuStreamDestroy_v2(self.0) });
    }
}

/// An event.
#[derive(Debug)]
pub(crate) struct Event(sys::CUevent);

// SAFETY: an event handle may be used from any thread; the driver locks.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// A new event in the current context, which takes no time.
    pub(crate) fn new() -> CudaResult<Self> {
        Self::with_flags(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// The same, which does.
    pub(crate) fn timed() -> CudaResult<Self> {
        Self::with_flags(sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn with_flags(flags: sys::CUevent_flags) -> CudaResult<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: `handle` is a valid place.
        check(unsafe { sys::cuEventCreate(&mut handle, flags as c_uint) })?;
        Ok(Self(handle))
    }

    /// Milliseconds from another event to this one, both of which take the time and are complete.
    pub(crate) fn milliseconds_since(&self, other: &Event) -> CudaResult<f32> {
        let mut ms = 0.0;
        // SAFETY: `ms` is a valid place; both events live.
        check(unsafe { sys::cuEventElapsedTime(&mut ms, other.0, self.0) })?;
        Ok(ms)
    }

    /// Records the work of `stream` so far. `external` makes it a node of the graph being captured, so that the
    /// replay, not the capture, records.
    ///
    /// # Safety
    /// `stream` is live and of the event's context, or of a green context within it.
    pub(crate) unsafe fn record(&self, stream: StreamHandle, external: bool) -> CudaResult<()> {
        let external_flag = sys::CUevent_record_flags::CU_EVENT_RECORD_EXTERNAL as c_uint;
        // SAFETY: the caller vouches for the stream; the event lives.
        check(unsafe { sys::cuEventRecordWithFlags(self.0, stream, if external { external_flag } else { 0 }) })
    }

    /// Makes `stream` wait for the event; `external` as in [`Event::record`].
    ///
    /// # Safety
    /// As for [`Event::record`].
    pub(crate) unsafe fn make_wait(&self, stream: StreamHandle, external: bool) -> CudaResult<()> {
        let external_flag = sys::CUevent_wait_flags::CU_EVENT_WAIT_EXTERNAL as c_uint;
        // SAFETY: the caller vouches for the stream; the event lives.
        check(unsafe { sys::cuStreamWaitEvent(stream, self.0, if external { external_flag } else { 0 }) })
    }

    /// Whether everything recorded has finished (also when nothing was recorded).
    pub(crate) fn is_complete(&self) -> CudaResult<bool> {
        // SAFETY: the event lives.
        match unsafe { sys::cuEventQuery(self.0) } {
            sys::CUresult::CUDA_SUCCESS => Ok(true),
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            error => Err(CudaError(error)),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        log_drop("destruction of an event", unsafe { sys::cuEventDestroy_v2(self.0) });
    }
}

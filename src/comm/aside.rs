//! A stream beside those of the application, for a group in which other calls stand on the same streams.
//!
//! NCCL launches what a group has of one communicator as one, one communicator after the other. Our operations come when
//! the real NCCL has launched all of its own. On the application's stream they would wait for those, also for calls that
//! another rank has behind ours, which wait for ours there. Here they wait only for what the application's stream had
//! before the group. What comes after the group waits for both.

use crate::cuda::{Capture, CudaResult, Event, Stream, StreamHandle, capture_of};

/// A communicator's stream of its own.
pub(crate) struct Aside {
    stream: Stream,
    /// Carries the order from stream to stream.
    event: Event,
}

impl Aside {
    /// In the current context.
    pub(super) fn new() -> CudaResult<Self> {
        Ok(Self { stream: Stream::new()?, event: Event::new()? })
    }

    /// Makes it wait for what the application's `stream` has now; its handle. Where `stream` captures, it takes part in
    /// the capture. `None` where it still takes part in another one, which has not ended.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// `stream` is live and of the communicator's context, which is current.
    pub(crate) unsafe fn fork(&self, stream: StreamHandle) -> CudaResult<Option<StreamHandle>> {
        let ours = self.stream.handle();
        // SAFETY: the caller vouches for the stream, and ours lives.
        let (theirs, mine) = unsafe { (capture_of(stream)?, capture_of(ours)?) };
        if mine != Capture::None && mine != theirs {
            return Ok(None);
        }
        // SAFETY: as above.
        unsafe {
            self.event.record(stream, false)?;
            self.event.make_wait(ours, false)?;
        }
        Ok(Some(ours))
    }

    /// Makes the application's `stream` wait for it.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// As for [`Aside::fork`], which was called with this stream.
    pub(crate) unsafe fn join(&self, stream: StreamHandle) -> CudaResult<()> {
        // SAFETY: as the caller vouches.
        unsafe {
            self.event.record(self.stream.handle(), false)?;
            self.event.make_wait(stream, false)
        }
    }
}

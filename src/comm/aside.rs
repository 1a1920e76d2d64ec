//! Aside: streams of ours beside the application's, for operations that must not stand on those. An event forks one off the
//! application's stream, another joins it back; in a capture they become edges of the graph.
//!
//! * *A stream of a green context* has some of the multiprocessors. That is known only at the call, when ranks cannot agree on
//!   another grid any more, and all must launch the same: a kernel that is larger than what it may run on is not resident at
//!   once (invariant I6). Ours are of the primary context, which has all of them, and so is the node of the kernel wherever a
//!   graph of it is launched.
//! * *A group with other calls.* NCCL launches what a group has of one communicator as one, one communicator after the other.
//!   Our operations come when the real NCCL has launched all of its own. On the application's stream they would wait for
//!   those, also for calls that another rank has behind ours, which wait for ours there. Aside they wait only for what the
//!   application's stream had before the group. What comes after the group waits for both.
//!
//! They have the highest priority. The driver puts streams of one priority in few queues (`CUDA_DEVICE_MAX_CONNECTIONS`), where
//! what is behind another stream's work waits for it: for what stands on the application's streams, ours must not.

use parking_lot::Mutex;

use crate::cuda::{self, Capture, Context, CudaResult, Event, RelaxedCapture, Stream, StreamHandle};

/// What a communicator has for it.
pub(crate) struct Aside(Mutex<Streams>);

struct Streams {
    /// Carries the order from stream to stream. Whoever waits for it does so at once, so one is enough.
    event: Event,
    /// One, as a rule: see [`Streams::free`].
    streams: Vec<Stream>,
}

impl Aside {
    /// In the current context. The stream is made here and not when one is first needed: then other ranks' kernels may be
    /// waiting, and what the driver does to make a stream may wait for the device.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn new() -> CudaResult<Self> {
        Ok(Self(Mutex::new(Streams { event: Event::new()?, streams: vec![Stream::urgent()?] })))
    }

    /// Forks a stream off the application's `stream`, which does `capture`: it waits for what is there now.
    ///
    /// `context`: the communicator's. Current is the one of which `stream` is, if it is one of the driver's special handles.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// `stream` is live and of the communicator's device.
    pub(crate) unsafe fn fork(
        &self,
        stream: StreamHandle,
        capture: Capture,
        context: &Context,
    ) -> CudaResult<StreamHandle> {
        let mut streams = self.0.lock();
        let ours = streams.free(capture, context)?;
        // SAFETY: the caller vouches for its stream.
        unsafe { streams.event.record(stream, false) }?;
        // SAFETY: a stream of ours.
        unsafe { streams.event.make_wait(ours, false) }?;
        Ok(ours)
    }

    /// Joins `ours` back: `stream` goes on when it is done. The context is the one of [`Aside::fork`].
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// As for [`Aside::fork`], which has answered `ours` to this stream.
    pub(crate) unsafe fn join(&self, ours: StreamHandle, stream: StreamHandle) -> CudaResult<()> {
        let streams = self.0.lock();
        // SAFETY: a stream of ours.
        unsafe { streams.event.record(ours, false) }?;
        // SAFETY: the caller vouches for its stream.
        unsafe { streams.event.make_wait(stream, false) }
    }
}

impl Streams {
    /// A stream that does nothing else. One that a capture has drawn in belongs to it until it ends: meanwhile other captures
    /// and what is not captured need another one, which is made then.
    fn free(&mut self, capture: Capture, context: &Context) -> CudaResult<StreamHandle> {
        // SAFETY: streams of ours.
        let does = |stream: &Stream| unsafe { cuda::capture_of(stream.handle()) }.ok();
        let same = self.streams.iter().find(|stream| does(stream) == Some(capture));
        if let Some(found) = same.or_else(|| self.streams.iter().find(|stream| does(stream) == Some(Capture::None))) {
            return Ok(found.handle());
        }
        let _entered = context.enter()?;
        let _relaxed = RelaxedCapture::enter()?;
        let new = Stream::urgent()?;
        let handle = new.handle();
        self.streams.push(new);
        Ok(handle)
    }
}

//! Aside: where a kernel that waits runs when the caller's stream has not got the whole GPU.
//!
//! A stream of a green context has some of the multiprocessors. That is known only at the call, when ranks cannot agree on
//! another grid any more, and all must launch the same: a kernel that is larger than what it may run on is not resident at
//! once (invariant I6). So it goes to a stream of ours in the primary context, which has all of them. An event forks that off
//! the caller's stream, another joins it back; in a capture they become edges of the graph, and the kernel's node stays one of
//! the primary context wherever the graph is launched.

use std::ops::Deref;

use parking_lot::{Mutex, MutexGuard};

use crate::cuda::{self, Capture, Context, CudaResult, Event, RelaxedCapture, Stream, StreamHandle};

/// What a communicator has for it.
pub(crate) struct Aside(Mutex<Streams>);

struct Streams {
    /// The caller's work so far.
    fork: Event,
    /// That and the kernel.
    join: Event,
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
        let streams = if cuda::has_green_contexts() { vec![Stream::new()?] } else { Vec::new() };
        Ok(Self(Mutex::new(Streams { fork: Event::new()?, join: Event::new()?, streams })))
    }

    /// Forks a stream off `stream`, which is of a green context and does `capture`.
    ///
    /// `context`: the communicator's. The application's is current, since `stream` may be one of its default streams.
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
    ) -> CudaResult<Forked<'_>> {
        let mut streams = self.0.lock();
        let free = streams.free(capture, context)?;
        // SAFETY: the caller vouches for its stream.
        unsafe { streams.fork.record(stream, false) }?;
        // SAFETY: a stream of ours.
        unsafe { streams.fork.make_wait(free, false) }?;
        Ok(Forked { streams, handle: free })
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
        let new = Stream::new()?;
        let handle = new.handle();
        self.streams.push(new);
        Ok(handle)
    }
}

/// A stream of ours that has been forked off and not joined.
pub(crate) struct Forked<'a> {
    streams: MutexGuard<'a, Streams>,
    handle: StreamHandle,
}

impl Deref for Forked<'_> {
    type Target = StreamHandle;
    fn deref(&self) -> &StreamHandle {
        &self.handle
    }
}

impl Forked<'_> {
    /// Joins it back: `stream` goes on when it is done. The context is the one of [`Aside::fork`].
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// As for [`Aside::fork`].
    pub(crate) unsafe fn join(self, stream: StreamHandle) -> CudaResult<()> {
        // SAFETY: a stream of ours.
        unsafe { self.streams.join.record(self.handle, false) }?;
        // SAFETY: the caller vouches for its stream.
        unsafe { self.streams.join.make_wait(stream, false) }
    }
}

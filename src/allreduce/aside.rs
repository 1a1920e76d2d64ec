//! Operations that run beside the caller's streams, on streams of ours (`src/comm/aside.rs`): those whose stream is of a green
//! context, and those of some groups.

use super::operation::{Operation, enter};
use crate::comm::Attached;
use crate::cuda::{self, Entered, StreamHandle};
use crate::error::{Error, Result};

impl Operation {
    /// Whether the application's stream has not got the whole GPU.
    pub(super) fn is_of_green_context(&self) -> bool {
        // Asked before the communicator's context is entered: a default stream is that of the context that is current.
        // SAFETY: the application's stream.
        unsafe { cuda::is_of_green_context(self.stream.cast()) }
    }

    /// The context in which the application's stream is what it means: that of a green context is current already.
    fn enter_its_context(&self, attached: &Attached) -> Result<Option<Entered>> {
        if self.is_of_green_context() { Ok(None) } else { enter(attached).map(Some) }
    }

    /// A stream of the communicator's own, behind what the application's has now.
    pub(super) fn fork(&self) -> Result<StreamHandle> {
        let (attached, stream) = (self.attached()?, self.stream.cast());
        let _entered = self.enter_its_context(attached)?;
        // SAFETY: the application's stream, and in its context.
        let capture = unsafe { cuda::capture_of(stream) }.map_err(Error::cuda("asking for a capture"))?;
        // SAFETY: as above.
        let forked = unsafe { attached.order.aside.fork(stream, capture, &attached.context) };
        forked.map_err(Error::cuda("leaving the application's stream"))
    }

    /// Puts the application's stream behind `ours`, which was forked off it.
    pub(super) fn join(&self, ours: StreamHandle) -> Result<()> {
        let attached = self.attached()?;
        let _entered = self.enter_its_context(attached)?;
        // SAFETY: as for `fork`.
        let joined = unsafe { attached.order.aside.join(ours, self.stream.cast()) };
        joined.map_err(Error::cuda("returning to the application's stream"))
    }
}

/// Takes a group's batch to streams of its communicators' own, before the real NCCL gets the rest of the group. So its
/// operations wait neither for those of other communicators nor for calls of the group that were forwarded
/// (`has_forwarded`). [`super::run`] or [`super::discard`] comes next.
///
/// Where each communicator of the batch has a stream of the application to itself, and nothing was forwarded, they stay.
/// (Bare jumps are not seen: NCCL's one-sided calls.)
///
/// Communicators that do not block may issue what was forwarded after [`join`], so behind what is compressed. That is no
/// harm on one communicator, since what is compressed waits for nothing of its group.
pub(crate) fn take_aside(batch: &mut [Operation], has_forwarded: bool) {
    let fits = |one: &Operation, other: &Operation| (other.stream == one.stream) == one.is_of_same_comm(other);
    let is_apart = |(i, one): (usize, &Operation)| {
        let before = &batch[..i];
        before.last().is_some_and(|last| last.is_alike(one)) || before.iter().all(|other| fits(one, other))
    };
    if !has_forwarded && batch.iter().enumerate().all(is_apart) {
        return;
    }
    for i in 0..batch.len() {
        let (before, operation) = (&batch[..i], &batch[i]);
        let alike = before.iter().find(|other| other.is_alike(operation));
        batch[i].aside = match alike {
            Some(alike) => alike.aside,
            None => operation.fork().inspect_err(|error| log::warn!("all-reduce in a group: {error}")).ok(),
        };
    }
}

/// Puts all of the application's streams behind what was taken aside; the first error.
pub(super) fn join(batch: &[Operation]) -> Result<()> {
    let mut result = Ok(());
    for (i, operation) in batch.iter().enumerate() {
        if let Some(ours) = operation.aside
            && !batch[..i].iter().any(|other| other.is_alike(operation))
        {
            result = result.and(operation.join(ours));
        }
    }
    result
}

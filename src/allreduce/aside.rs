//! Operations of a group that run beside the caller's streams, on streams of ours (`src/comm/aside.rs`).

use super::operation::{Operation, enter};
use crate::cuda::StreamHandle;
use crate::error::{Error, Result};

impl Operation {
    /// The communicator's own stream, behind what the application's has now; `None` where the driver does not let it.
    fn fork(&self) -> Option<StreamHandle> {
        let attached = self.attached().ok()?;
        let _entered = enter(attached).ok()?;
        // SAFETY: the application's stream, of the context just entered.
        unsafe { attached.order.aside.fork(self.stream.cast()) }.ok()?
    }

    /// Puts the application's stream behind the communicator's own.
    fn join(&self) -> Result<()> {
        let attached = self.attached()?;
        let _entered = enter(attached)?;
        // SAFETY: as for `fork`.
        unsafe { attached.order.aside.join(self.stream.cast()) }.map_err(Error::cuda("ordering the all-reduce"))
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
        batch[i].aside = alike.map_or_else(|| operation.fork(), |alike| alike.aside);
    }
}

/// Puts all of the application's streams behind what was taken aside; the first error.
pub(super) fn join(batch: &[Operation]) -> Result<()> {
    let mut result = Ok(());
    for (i, operation) in batch.iter().enumerate() {
        if operation.aside.is_some() && !batch[..i].iter().any(|other| other.is_alike(operation)) {
            result = result.and(operation.join());
        }
    }
    result
}

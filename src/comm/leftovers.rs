//! What outlives communicators, and its end with the last of them.
//!
//! Memory that other ranks reach is kept when a communicator ends, for the next one ([`crate::cuda::pool`],
//! [`crate::exchange::imports`]). After the last one nothing may be left that plain NCCL would not leave: a process that is to
//! be checkpointed, or to give its GPU to somebody else, destroys its communicators first.

use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{RwLock, RwLockReadGuard};

use super::table;
use crate::cuda::{self, RelaxedCapture};
use crate::exchange::imports;

/// How long the end of the last communicator waits for its last operations, and for the other ranks to let go of memory of
/// ours. NCCL's own destroy waits for those ranks, too.
const PATIENCE: Duration = Duration::from_secs(1);

/// Held by those that use leftovers or make new ones.
static IN_USE: RwLock<()> = RwLock::new(());

/// Nothing that is left is freed while this is held.
pub(super) fn keep() -> RwLockReadGuard<'static, ()> {
    IN_USE.read()
}

/// Frees what is left, if the communicator that has just ended was the last one of this process.
pub(crate) fn free_after_last() {
    let deadline = Instant::now() + PATIENCE;
    let until = |is_so: fn() -> bool| loop {
        if is_so() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    };
    // Whoever is in an attach has a communicator.
    let Some(_alone) = IN_USE.try_write() else { return };
    if !table::is_last() || !until(table::is_empty) {
        return;
    }
    let _relaxed = RelaxedCapture::enter();
    imports::close_all();
    match until(imports::is_ours_alone) {
        true => cuda::pool::free_idle(),
        false => log::info!("other processes still use memory of this one; it is kept for the next communicator"),
    }
}

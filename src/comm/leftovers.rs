//! What outlives communicators, and its end with the last of them.
//!
//! Memory that other ranks reach is kept when a communicator ends, for the next one ([`crate::cuda::pool`],
//! [`crate::exchange::imports`]). After the last one nothing may be left that plain NCCL would not leave: a process that is to
//! be checkpointed, or to give its GPU to somebody else, destroys its communicators first.
//!
//! What is not used any more goes at once. Memory of ours that other processes have mapped goes when they let go of it, which
//! they do with their own last communicator. Nobody waits for that but a thread of ours.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::{RwLock, RwLockReadGuard};

use super::table;
use crate::background;
use crate::cuda::{self, RelaxedCapture};
use crate::exchange::imports;

/// Held by those that use leftovers or make new ones.
static IN_USE: RwLock<()> = RwLock::new(());

/// Whether a thread waits for others to let go.
static IS_WAITING: AtomicBool = AtomicBool::new(false);

/// The longest pause of that thread.
const PAUSE: Duration = Duration::from_millis(100);

/// Nothing that is left is freed while this is held.
pub(super) fn keep() -> RwLockReadGuard<'static, ()> {
    IN_USE.read()
}

/// Frees what is left, now or as soon as that can be, if the communicator that has just ended was the last one of this
/// process.
pub(crate) fn free_after_last() {
    if free() == Progress::Waits && !IS_WAITING.swap(true, Ordering::AcqRel) {
        let wait = || loop {
            let mut pause = Duration::from_millis(1);
            while free() == Progress::Waits && !background::is_last_thread() {
                thread::sleep(pause);
                pause = (pause * 2).min(PAUSE);
            }
            IS_WAITING.store(false, Ordering::Release);
            // A communicator may have come and gone since it looked, and found this thread at work.
            if free() == Progress::Over || background::is_last_thread() || IS_WAITING.swap(true, Ordering::AcqRel) {
                return;
            }
        };
        if let Err(error) = background::spawn("flashcomm-free", wait) {
            log::info!("memory of ended communicators is kept for the next one: no thread to wait: {error}");
            IS_WAITING.store(false, Ordering::Release);
        }
    }
}

#[derive(PartialEq, Eq)]
enum Progress {
    /// Nothing is left, or what is left is in use again.
    Over,
    /// Something has not run yet, or another process has memory of ours.
    Waits,
}

/// Frees what may go.
fn free() -> Progress {
    // Whoever is in an attach has a communicator.
    let Some(_alone) = IN_USE.try_write() else { return Progress::Over };
    if !table::is_last() {
        return Progress::Over;
    }
    if !table::is_empty() {
        return Progress::Waits;
    }
    let _relaxed = RelaxedCapture::enter();
    imports::close_all();
    if !imports::is_ours_alone() {
        return Progress::Waits;
    }
    cuda::pool::free_idle();
    Progress::Over
}

//! Groups. A compressed all-reduce inside `ncclGroupStart/End` waits in a queue of its thread for the outermost end,
//! which forwards first and then runs the queue in the order of issue. A simulated or failed end discards it. So do
//! changes of width ([`super::control`]); they come before the all-reduces.
//!
//! The depth is counted here because NCCL does not tell it. Calls that NCCL makes to its own group functions are
//! balanced, so it does not matter that those of functions which are bare jumps are counted, too.

use std::cell::{Cell, RefCell};

use super::{guarded, in_real_nccl, is_reentered};
use crate::allreduce::{self, Operation};
use crate::comm::attach::{self, Change};
use crate::error;
use crate::nccl::{NcclResult, SimInfo, Symbol};
use crate::real::real;

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    /// Keeps its memory from group to group.
    static QUEUE: RefCell<Vec<Operation>> = const { RefCell::new(Vec::new()) };
    static CHANGES: RefCell<Vec<Change>> = const { RefCell::new(Vec::new()) };
}

/// Makes a change, now or, inside a group, at its outermost end: together with those of other communicators, since one
/// thread may drive several ranks.
pub(super) fn change(change: Change) -> NcclResult {
    CHANGES.with_borrow_mut(|changes| {
        match changes.iter_mut().find(|other| std::sync::Arc::ptr_eq(&other.comm, &change.comm)) {
            Some(other) => {
                other.widths = change.widths.or(other.widths);
                other.switched_off = change.switched_off.or(other.switched_off);
            }
            None => changes.push(change),
        }
        if DEPTH.get() > 0 { NcclResult::SUCCESS } else { make(changes) }
    })
}

fn make(changes: &mut Vec<Change>) -> NcclResult {
    let result = in_real_nccl(|| match attach::change_all(changes) {
        Ok(()) => NcclResult::SUCCESS,
        Err(error) => {
            error::remember(&error);
            NcclResult::from(&error)
        }
    });
    changes.clear();
    result
}

/// Runs an operation, now or, inside a group, at its outermost end.
pub(super) fn issue(operation: Operation) -> NcclResult {
    QUEUE.with_borrow_mut(|queue| {
        queue.push(operation);
        if DEPTH.get() > 0 { NcclResult::SUCCESS } else { in_real_nccl(|| allreduce::run(queue)) }
    })
}

fn start(real: unsafe extern "C" fn() -> NcclResult) -> NcclResult {
    // SAFETY: takes nothing.
    let result = in_real_nccl(|| unsafe { real() });
    if result == NcclResult::SUCCESS && !is_reentered() {
        DEPTH.set(DEPTH.get() + 1);
    }
    result
}

/// Ends a group by `end`, then runs the queue if that was the outermost level and `run_queue`.
fn end(run_queue: bool, end: impl FnOnce() -> NcclResult) -> NcclResult {
    let result = in_real_nccl(end);
    if is_reentered() || DEPTH.get() == 0 {
        return result; // NCCL's own, or an end without a start, which NCCL has answered
    }
    DEPTH.set(DEPTH.get() - 1);
    if DEPTH.get() > 0 {
        return result;
    }
    QUEUE.with_borrow_mut(|queue| {
        let is_good = run_queue && (result == NcclResult::SUCCESS || result == NcclResult::IN_PROGRESS);
        let changed = CHANGES.with_borrow_mut(|changes| match changes.is_empty() {
            true => NcclResult::SUCCESS,
            false if is_good => make(changes),
            false => {
                changes.clear();
                NcclResult::SUCCESS
            }
        });
        if queue.is_empty() || !is_good || changed != NcclResult::SUCCESS {
            queue.clear();
            return if changed == NcclResult::SUCCESS { result } else { changed };
        }
        match in_real_nccl(|| allreduce::run(queue)) {
            NcclResult::SUCCESS => result,
            error => error,
        }
    })
}

macro_rules! group_exports {
    ($($start:ident $end:ident $simulate_end:ident)*) => {$(
        #[doc = concat!("`", stringify!($start), "`.")]
        ///
        /// # Safety
        /// As NCCL documents.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $start() -> NcclResult {
            guarded(stringify!($start), || start(real!($start, fn())))
        }

        #[doc = concat!("`", stringify!($end), "`.")]
        ///
        /// # Safety
        /// As NCCL documents.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $end() -> NcclResult {
            // SAFETY: takes nothing.
            guarded(stringify!($end), || end(true, || unsafe { real!($end, fn())() }))
        }

        #[doc = concat!("`", stringify!($simulate_end), "`. Its estimate leaves out what is compressed.")]
        ///
        /// # Safety
        /// As NCCL documents.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $simulate_end(sim_info: *mut SimInfo) -> NcclResult {
            guarded(stringify!($simulate_end), || {
                // SAFETY: the caller's own argument.
                end(false, || unsafe { real!($simulate_end, fn(*mut SimInfo))(sim_info) })
            })
        }
    )*};
}

group_exports! {
    ncclGroupStart ncclGroupEnd ncclGroupSimulateEnd
    pncclGroupStart pncclGroupEnd pncclGroupSimulateEnd
}

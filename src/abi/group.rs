//! Groups. A compressed all-reduce inside `ncclGroupStart/End` waits in a queue of its thread for the outermost end,
//! which forwards first and then runs the queue in the order of issue. A simulated or failed end discards it.
//!
//! The depth is counted here because NCCL does not tell it. Calls that NCCL makes to its own group functions are
//! balanced, so it does not matter that those of functions which are bare jumps are counted, too.

use std::cell::{Cell, RefCell};

use super::{guarded, in_real_nccl, is_reentered};
use crate::allreduce::{self, Operation};
use crate::nccl::{NcclResult, SimInfo, Symbol, real};

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    /// Keeps its memory from group to group.
    static QUEUE: RefCell<Vec<Operation>> = const { RefCell::new(Vec::new()) };
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
        if queue.is_empty() {
            return result;
        }
        let is_good = result == NcclResult::SUCCESS || result == NcclResult::IN_PROGRESS;
        if !run_queue || !is_good {
            queue.clear();
            return result;
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

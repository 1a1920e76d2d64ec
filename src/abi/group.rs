//! Groups. A compressed all-reduce inside `ncclGroupStart/End` waits in a queue of its thread for the outermost end,
//! which forwards first and then runs the queue in the order of issue, beside the application's streams where it must
//! not wait for what else is in the group ([`allreduce::take_aside`]). A simulated or failed end discards it. So do the
//! ranks of communicators that the group creates ([`super::creation`]), which meet, and changes of width
//! ([`super::control`]); both come before the all-reduces.
//!
//! The depth is counted here because NCCL does not tell it. Calls that NCCL makes to its own group functions are
//! balanced, so it does not matter that those of functions which are bare jumps are counted, too.

use std::cell::{Cell, RefCell};

use super::boundary::{in_real_nccl, is_reentered, nccl_exports};
use crate::allreduce::{self, Operation};
use crate::comm::Origin;
use crate::comm::attach::{self, Change};
use crate::config::Config;
use crate::nccl::{CommPtr, NcclResult, SimInfo};
use crate::{comm, error, thread};

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    /// Calls that the thread had forwarded before the group.
    static N_FORWARDED: Cell<u64> = const { Cell::new(0) };
    /// Keeps its memory from group to group.
    static QUEUE: RefCell<Vec<Operation>> = const { RefCell::new(Vec::new()) };
    static CHANGES: RefCell<Vec<Change>> = const { RefCell::new(Vec::new()) };
    /// Where the handles of communicators in the making are, or will be at the group's end.
    static CREATED: RefCell<Vec<Created>> = const { RefCell::new(Vec::new()) };
}

/// A communicator in the making.
struct Created {
    place: *mut CommPtr,
    origin: Origin,
}

/// Creates communicators, whose handles `real` puts at `places`. Their ranks meet now or, inside a group, at its outermost
/// end.
pub(super) fn create(
    places: impl Iterator<Item = *mut CommPtr>,
    origin: impl FnOnce() -> Origin,
    real: impl FnOnce() -> NcclResult,
) -> NcclResult {
    let result = in_real_nccl(real);
    if is_reentered() || !is_good(result) || !Config::global().enable {
        return result;
    }
    let origin = origin();
    CREATED.with_borrow_mut(|created| {
        created.extend(places.map(|place| Created { place, origin }));
        if DEPTH.get() > 0 { result } else { meet(created, result) }
    })
}

/// The ranks of communicators, for which the real NCCL has answered `result`, meet.
fn meet(created: &mut Vec<Created>, result: NcclResult) -> NcclResult {
    let comm = |Created { place, origin }: Created| {
        // SAFETY: the application vouches for it until the communicator is made, which it is, or is about to be.
        let handle = unsafe { place.read() };
        (!handle.is_null()).then(|| comm::created(handle, origin))
    };
    let comms: Vec<_> = created.drain(..).filter_map(comm).collect();
    if result == NcclResult::IN_PROGRESS {
        attach::attach_in_background(comms);
        return result;
    }
    let attached = in_real_nccl(|| match attach::attach_all(&comms) {
        Ok(()) => NcclResult::SUCCESS,
        Err(error) => NcclResult::from(&error), // attach has told of it
    });
    if attached == NcclResult::SUCCESS { result } else { attached }
}

/// Whether the real NCCL has done, or is doing, what it was asked.
fn is_good(result: NcclResult) -> bool {
    result == NcclResult::SUCCESS || result == NcclResult::IN_PROGRESS
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

fn start(real: impl FnOnce() -> NcclResult) -> NcclResult {
    let result = in_real_nccl(real);
    if result == NcclResult::SUCCESS && !is_reentered() {
        if DEPTH.get() == 0 {
            N_FORWARDED.set(thread::current().n_forwarded());
        }
        DEPTH.set(DEPTH.get() + 1);
    }
    result
}

/// Ends a group by `end`, then runs the queue if that was the outermost level and `run_queue`.
fn end(run_queue: bool, end: impl FnOnce() -> NcclResult) -> NcclResult {
    // Not where a change comes first: it may forward what is in the queue.
    if run_queue && !is_reentered() && DEPTH.get() == 1 && CHANGES.with_borrow(Vec::is_empty) {
        let has_forwarded = thread::current().n_forwarded() != N_FORWARDED.get();
        QUEUE.with_borrow_mut(|queue| allreduce::take_aside(queue, has_forwarded));
    }
    let result = in_real_nccl(end);
    if is_reentered() || DEPTH.get() == 0 {
        return result; // NCCL's own, or an end without a start, which NCCL has answered
    }
    DEPTH.set(DEPTH.get() - 1);
    if DEPTH.get() > 0 {
        return result;
    }
    let is_good = run_queue && is_good(result);
    let result = CREATED.with_borrow_mut(|created| match is_good && !created.is_empty() {
        true => meet(created, result),
        false => {
            created.clear();
            result
        }
    });
    QUEUE.with_borrow_mut(|queue| {
        let is_good = is_good && self::is_good(result);
        let changed = CHANGES.with_borrow_mut(|changes| match changes.is_empty() {
            true => NcclResult::SUCCESS,
            false if is_good => make(changes),
            false => {
                changes.clear();
                NcclResult::SUCCESS
            }
        });
        if queue.is_empty() || !is_good || changed != NcclResult::SUCCESS {
            allreduce::discard(queue);
            return if changed == NcclResult::SUCCESS { result } else { changed };
        }
        match in_real_nccl(|| allreduce::run(queue)) {
            NcclResult::SUCCESS => result,
            error => error,
        }
    })
}

nccl_exports! {
    /// `ncclGroupStart`.
    pub fn ncclGroupStart / pncclGroupStart(real;) {
        start(real)
    }

    /// `ncclGroupEnd`.
    pub fn ncclGroupEnd / pncclGroupEnd(real;) {
        end(true, real)
    }

    /// `ncclGroupSimulateEnd`. Its estimate leaves out what is compressed.
    pub fn ncclGroupSimulateEnd / pncclGroupSimulateEnd(real; sim_info: *mut SimInfo) {
        end(false, real)
    }
}

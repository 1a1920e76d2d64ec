//! The C boundary: everything an application can call. No other module has a `no_mangle`.
//!
//! * [`forward`]: the functions that the shim has nothing to say about, as bare jumps into the real library;
//! * [`collectives`]: all-reduce, which may be compressed, and the others, which are counted;
//! * [`group`]: group nesting, since a compressed all-reduce inside a group waits for its end;
//! * [`lifecycle`]: the ends of communicators, where our state goes first;
//! * [`control`]: flashcomm's own calls, `include/flashcomm.h`.
//!
//! Nothing unwinds into the caller, and nothing exits: each body of ours runs in [`guarded`]. NCCL calls its own public
//! functions, which land here again; such re-entered calls go straight through ([`in_real_nccl`]).

pub mod collectives;
pub mod control;
pub mod forward;
pub mod group;
pub mod lifecycle;
#[cfg(test)]
mod prototypes;

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::nccl::NcclResult;
use crate::thread::{self, Thread};

/// Runs the body of an export. A panic is a bug of ours; it is logged and answered with `ncclInternalError`.
fn guarded(function: &'static str, body: impl FnOnce() -> NcclResult) -> NcclResult {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(result) => result,
        Err(_) => {
            log::error!("{function}: an internal error of flashcomm; please report it. FLASHCOMM_ENABLE=0 avoids it");
            NcclResult::INTERNAL_ERROR
        }
    }
}

/// Whether this thread is inside the real library, called by one of our exports.
fn is_reentered() -> bool {
    thread::current().real_depth.get() > 0
}

/// Calls the real library such that calls it makes back to us are recognized.
fn in_real_nccl(call: impl FnOnce() -> NcclResult) -> NcclResult {
    in_real_nccl_after(|_| {}, call)
}

/// As [`in_real_nccl`], after `first` where this is no re-entered call.
#[inline]
fn in_real_nccl_after(first: impl FnOnce(&Thread), call: impl FnOnce() -> NcclResult) -> NcclResult {
    let thread = thread::current();
    let depth = thread.real_depth.get();
    if depth == 0 {
        first(thread);
    }
    thread.real_depth.set(depth + 1);
    let result = call();
    thread.real_depth.set(depth);
    result
}

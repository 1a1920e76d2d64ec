//! The ends of communicators, and what has become of them. Our entry is dropped before the call is forwarded, since NCCL
//! uses addresses again; what it held is freed once its last operation has run. Where operations are aborted, our
//! waiting kernels are told before NCCL is (invariant I5).
//!
//! Finalize leaves a handle that may only be destroyed: a bare jump.

use std::ffi::{c_char, c_int};

use super::boundary::{in_real_nccl, is_reentered, nccl_exports};
use crate::nccl::{CommPtr, NcclResult};
use crate::{comm, error, record, stats};

/// Ends a communicator: `ours` drops our entry and tells its device, then `real` ends NCCL's.
fn end(comm: CommPtr, ours: fn(CommPtr) -> Option<i32>, real: impl FnOnce() -> NcclResult) -> NcclResult {
    let device = ours(comm);
    stats::end(comm);
    let result = in_real_nccl(real);
    if let Some(device) = device {
        comm::reap(device);
        comm::leftovers::free_after_last();
    }
    record::poll();
    result
}

nccl_exports! {
    /// `ncclCommDestroy`: our state goes first.
    pub fn ncclCommDestroy / pncclCommDestroy(real; comm: CommPtr) {
        end(comm, comm::retire, real)
    }

    /// `ncclCommAbort`: our state goes first, and our waiting kernels end.
    pub fn ncclCommAbort / pncclCommAbort(real; comm: CommPtr) {
        end(comm, comm::abort, real)
    }

    /// `ncclCommRevoke`: the handle stays, and the real NCCL answers what is done with it.
    pub fn ncclCommRevoke / pncclCommRevoke(real; comm: CommPtr, revoke_flags: c_int) {
        if !comm.is_null() {
            comm::turn_off(comm);
        }
        in_real_nccl(real)
    }

    /// `ncclCommGetAsyncError`: tells also of a kernel of ours that gave up waiting, and of ranks that could not meet. A
    /// communicator that does not block is in progress until its ranks have met.
    pub fn ncclCommGetAsyncError / pncclCommGetAsyncError(
        real;
        comm: CommPtr,
        async_error: *mut NcclResult,
    ) {
        if is_reentered() || async_error.is_null() {
            return in_real_nccl(real);
        }
        if let Some(error) = comm::failure(comm) {
            error::remember(&error);
            // SAFETY: not null, and so valid, says the caller.
            unsafe { async_error.write(NcclResult::from(&error)) };
            return NcclResult::SUCCESS;
        }
        if comm::is_meeting(comm) {
            // The real NCCL is not asked: a thread of ours is in calls on the communicator, and asking takes part in those.
            // SAFETY: as above.
            unsafe { async_error.write(NcclResult::IN_PROGRESS) };
            return NcclResult::SUCCESS;
        }
        in_real_nccl(real)
    }

    /// `ncclGetLastError`: our last error where it is the newest, else what the real NCCL answers.
    pub fn ncclGetLastError / pncclGetLastError(real; comm: CommPtr) -> *const c_char {
        let ours = if is_reentered() { None } else { error::newest() };
        ours.map_or_else(real, |text| text.as_ptr())
    }
}

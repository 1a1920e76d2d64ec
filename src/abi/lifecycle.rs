//! The ends of communicators, and what has become of them. Our entry is dropped before the call is forwarded, since NCCL
//! uses addresses again; what it held is freed once its last operation has run. Where operations are aborted, our
//! waiting kernels are told before NCCL is (invariant I5).
//!
//! Creation needs nothing of ours: a communicator attaches when it is first used, however it was made (InitRank and its
//! kin, InitAll, Split, Shrink, Grow). Finalize leaves a handle that may only be destroyed. Those are bare jumps.

use std::ffi::c_int;

use super::{guarded, in_real_nccl, is_reentered};
use crate::nccl::{CommConfig, CommPtr, NcclResult, Symbol};
use crate::real::real;
use crate::{comm, error, record, stats};

macro_rules! end_exports {
    ($($name:ident: $ours:ident)*) => {$(
        #[doc = concat!("`", stringify!($name), "`: our state goes first.")]
        ///
        /// # Safety
        /// As NCCL documents.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(comm: CommPtr) -> NcclResult {
            guarded(stringify!($name), || {
                let device = comm::$ours(comm);
                stats::end(comm);
                // SAFETY: the caller's own argument.
                let result = in_real_nccl(|| unsafe { real!($name, fn(CommPtr))(comm) });
                device.map(comm::reap);
                record::poll();
                result
            })
        }
    )*};
}

end_exports! {
    ncclCommDestroy: retire
    pncclCommDestroy: retire
    ncclCommAbort: abort
    pncclCommAbort: abort
}

macro_rules! revoke_exports {
    ($($name:ident)*) => {$(
        #[doc = concat!("`", stringify!($name), "`: the handle stays, and the real NCCL answers what is done with it.")]
        ///
        /// # Safety
        /// As NCCL documents.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(comm: CommPtr, revoke_flags: c_int) -> NcclResult {
            guarded(stringify!($name), || {
                if !comm.is_null() {
                    comm::turn_off(comm);
                }
                // SAFETY: the caller's own arguments.
                in_real_nccl(|| unsafe { real!($name, fn(CommPtr, c_int))(comm, revoke_flags) })
            })
        }
    )*};
}

revoke_exports! { ncclCommRevoke pncclCommRevoke }

/// `NCCL_SHRINK_ABORT`: operations of the parent are aborted first.
const SHRINK_ABORT: c_int = 1;

macro_rules! shrink_exports {
    ($($name:ident)*) => {$(
        #[doc = concat!("`", stringify!($name), "`: where it aborts the parent's operations, ours end, too.")]
        ///
        /// # Safety
        /// As NCCL documents.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            comm: CommPtr,
            exclude_ranks: *mut c_int,
            exclude_ranks_count: c_int,
            new_comm: *mut CommPtr,
            config: *mut CommConfig,
            shrink_flags: c_int,
        ) -> NcclResult {
            guarded(stringify!($name), || {
                if !comm.is_null() && shrink_flags & SHRINK_ABORT != 0 {
                    comm::turn_off(comm);
                }
                // SAFETY: the caller's own arguments.
                in_real_nccl(|| unsafe {
                    real!($name, fn(CommPtr, *mut c_int, c_int, *mut CommPtr, *mut CommConfig, c_int))(
                        comm, exclude_ranks, exclude_ranks_count, new_comm, config, shrink_flags,
                    )
                })
            })
        }
    )*};
}

shrink_exports! { ncclCommShrink pncclCommShrink }

macro_rules! async_error_exports {
    ($($name:ident)*) => {$(
        #[doc = concat!("`", stringify!($name), "`: tells also of a kernel of ours that gave up waiting.")]
        ///
        /// # Safety
        /// As NCCL documents.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(comm: CommPtr, async_error: *mut NcclResult) -> NcclResult {
            guarded(stringify!($name), || {
                if !is_reentered() && !async_error.is_null() {
                    if let Some(error) = comm::failure(comm) {
                        error::remember(&error);
                        // SAFETY: not null, and so valid, says the caller.
                        unsafe { async_error.write(NcclResult::from(&error)) };
                        return NcclResult::SUCCESS;
                    }
                }
                // SAFETY: the caller's own arguments.
                in_real_nccl(|| unsafe { real!($name, fn(CommPtr, *mut NcclResult))(comm, async_error) })
            })
        }
    )*};
}

async_error_exports! { ncclCommGetAsyncError pncclCommGetAsyncError }

//! The ends of communicators. Our entry is dropped before the call is forwarded, since NCCL uses addresses again; what
//! it held is freed once its last operation has run.
//!
//! Creation needs nothing of ours: a communicator attaches when it is first used, however it was made (InitRank and its
//! kin, InitAll, Split, Shrink, Grow). Finalize leaves a handle that may only be destroyed. Those are bare jumps.

use std::ffi::c_int;

use super::{guarded, in_real_nccl};
use crate::comm;
use crate::nccl::{CommPtr, NcclResult, Symbol, real};

macro_rules! end_exports {
    ($($name:ident)*) => {$(
        #[doc = concat!("`", stringify!($name), "`: our state goes first.")]
        ///
        /// # Safety
        /// As NCCL documents.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(comm: CommPtr) -> NcclResult {
            guarded(stringify!($name), || {
                comm::retire(comm);
                // SAFETY: the caller's own argument.
                let result = in_real_nccl(|| unsafe { real!($name, fn(CommPtr))(comm) });
                comm::reap();
                result
            })
        }
    )*};
}

end_exports! { ncclCommDestroy pncclCommDestroy ncclCommAbort pncclCommAbort }

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

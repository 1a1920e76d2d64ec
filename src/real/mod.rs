//! Calls into the real library, those of the application and those that the shim makes itself.
//!
//! All go through the jump table ([`table`]), so a function is resolved once and a missing one has
//! an answer. The first of them, whichever it is, sets up the log and the statistics.

pub(crate) mod table;

use std::ffi::{c_int, c_void};

use crate::nccl::{CommPtr, DataType, NcclResult, RedOp, StreamPtr};
pub(crate) use table::real;

macro_rules! calls {
    ($($symbol:ident as $name:ident($($arg:ident: $type:ty),*);)*) => {$(
        #[doc = concat!("The real `", stringify!($symbol), "`.")]
        ///
        /// # Safety
        /// As NCCL documents.
        pub(crate) unsafe fn $name($($arg: $type),*) -> NcclResult {
            // SAFETY: as the caller vouches.
            unsafe { real!($symbol, fn($($type),*))($($arg),*) }
        }
    )*};
}

calls! {
    ncclGetVersion as get_version(version: *mut c_int);
    ncclGroupStart as group_start();
    ncclGroupEnd as group_end();
    ncclAllReduce as all_reduce(
        input: *const c_void, output: *mut c_void, count: usize, datatype: DataType, op: RedOp, comm: CommPtr,
        stream: StreamPtr);
    ncclAllGather as all_gather(
        input: *const c_void, output: *mut c_void, count: usize, datatype: DataType, comm: CommPtr, stream: StreamPtr);
    ncclSend as send(
        input: *const c_void, count: usize, datatype: DataType, peer: c_int, comm: CommPtr, stream: StreamPtr);
    ncclRecv as recv(
        output: *mut c_void, count: usize, datatype: DataType, peer: c_int, comm: CommPtr, stream: StreamPtr);
    ncclCommCount as comm_count(comm: CommPtr, count: *mut c_int);
    ncclCommUserRank as comm_user_rank(comm: CommPtr, rank: *mut c_int);
    ncclCommCuDevice as comm_cu_device(comm: CommPtr, device: *mut c_int);
    ncclCommGetAsyncError as comm_get_async_error(comm: CommPtr, result: *mut NcclResult);
}

/// The version of the real library, as it tells it; 0 where it does not.
pub(crate) fn version() -> c_int {
    let mut version = 0;
    // SAFETY: a valid place.
    match unsafe { get_version(&mut version) } {
        NcclResult::SUCCESS => version,
        _ => 0,
    }
}

/// What a communicator that the application has not ended says of itself: how far it is, or what is wrong with it.
pub(crate) fn state(comm: CommPtr) -> NcclResult {
    let mut state = NcclResult::SUCCESS;
    // SAFETY: the handle lives.
    match unsafe { comm_get_async_error(comm, &mut state) } {
        NcclResult::SUCCESS => state,
        error => error,
    }
}

/// Rank and world size of a communicator that the application is using; `None` where the real NCCL
/// does not tell (yet).
pub(crate) fn identity(comm: CommPtr) -> Option<(usize, usize)> {
    if comm.is_null() {
        return None;
    }
    let (mut rank, mut world) = (0, 0);
    // SAFETY: the application is using the communicator in this very call.
    let results = unsafe { [comm_user_rank(comm, &mut rank), comm_count(comm, &mut world)] };
    (results == [NcclResult::SUCCESS; 2]).then_some((rank as usize, world as usize))
}

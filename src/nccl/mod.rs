//! The real NCCL: its types, its symbols, how it is found, and the calls that the shim itself makes.
//!
//! Everything goes through the jump table, so a function is resolved once and a missing one has an answer.

pub mod load;
pub mod symbols;
pub(crate) mod table;
pub mod types;

use std::ffi::{c_int, c_void};

pub use symbols::Symbol;
pub(crate) use table::real;
pub use types::{CollConfig, CommConfig, CommPtr, DataType, NcclResult, RedOp, SimInfo, StreamPtr};

macro_rules! calls {
    ($($symbol:ident as $name:ident($($arg:ident: $type:ty),*);)*) => {$(
        #[doc = concat!("The real `", stringify!($symbol), "`.")]
        ///
        /// # Safety
        /// As NCCL documents.
        pub unsafe fn $name($($arg: $type),*) -> NcclResult {
            // SAFETY: as the caller vouches.
            unsafe { real!($symbol, fn($($type),*))($($arg),*) }
        }
    )*};
}

calls! {
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

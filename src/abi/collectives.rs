//! The collectives. An all-reduce is routed; the others, and send and receive, are counted and forwarded.

use std::ffi::{c_int, c_void};

use super::{group, guarded, in_real_nccl, in_real_nccl_after, is_reentered};
use crate::allreduce::Operation;
use crate::comm;
use crate::config::Config;
use crate::nccl::{CollConfig, CommPtr, DataType, NcclResult, RedOp, StreamPtr, Symbol};
use crate::real::real;
use crate::route::{self, Reason, Request, Route};
use crate::stats::Call;
use crate::thread::{self, Thread};

/// What an all-reduce call is to become.
enum Decision {
    /// The real NCCL gets the original arguments.
    Forward,
    /// Ours; done, or queued for the end of the group.
    Taken(NcclResult),
}

/// Routes one all-reduce.
fn all_reduce(
    input: *const c_void,
    output: *mut c_void,
    request: Request,
    comm: CommPtr,
    stream: StreamPtr,
) -> Decision {
    if is_reentered() {
        return Decision::Forward;
    }
    let element = match route::candidate(&request, Config::global()) {
        Ok(element) => element,
        Err(reason) => return forward(reason, request, comm),
    };
    if comm.is_null() {
        return forward(Reason::NoCommunicator, request, comm); // the real NCCL says what is wrong
    }
    let operation = Operation::new(comm::of(comm), input, output, request, element, stream);
    match operation.route() {
        Route::Forward(reason) => {
            operation.record();
            forward(reason, request, comm)
        }
        Route::Attach(_) | Route::Compress(_) => Decision::Taken(group::issue(operation)),
    }
}

fn forward(reason: Reason, request: Request, comm: CommPtr) -> Decision {
    thread::current().counters(comm).count_forwarded(reason, request.n_bytes());
    Decision::Forward
}

/// Exports a function and its `pnccl` twin (NCCL's profiling interface; the same, so that a profiler's layer above us
/// does not lose the compression).
macro_rules! all_reduce_exports {
    ($($name:ident, $symbol:ident)*) => {$(
        #[doc = concat!("`", stringify!($name), "`: compressed where all ranks agree on it, else forwarded.")]
        ///
        /// # Safety
        /// As NCCL documents.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            sendbuff: *const c_void,
            recvbuff: *mut c_void,
            count: usize,
            datatype: DataType,
            op: RedOp,
            comm: CommPtr,
            stream: StreamPtr,
        ) -> NcclResult {
            let request = Request { count, datatype, op };
            guarded(stringify!($name), || match all_reduce(sendbuff, recvbuff, request, comm, stream) {
                Decision::Taken(result) => result,
                // SAFETY: the caller's own arguments.
                Decision::Forward => in_real_nccl(|| unsafe {
                    real!($symbol, fn(*const c_void, *mut c_void, usize, DataType, RedOp, CommPtr, StreamPtr))(
                        sendbuff, recvbuff, count, datatype, op, comm, stream,
                    )
                }),
            })
        }
    )*};
}

all_reduce_exports! {
    ncclAllReduce, ncclAllReduce
    pncclAllReduce, pncclAllReduce
}

macro_rules! all_reduce_config_exports {
    ($($name:ident, $symbol:ident)*) => {$(
        #[doc = concat!("`", stringify!($name), "`: as `ncclAllReduce`, unless the configuration asks for more.")]
        ///
        /// # Safety
        /// As NCCL documents.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            sendbuff: *const c_void,
            recvbuff: *mut c_void,
            count: usize,
            datatype: DataType,
            op: RedOp,
            comm: CommPtr,
            stream: StreamPtr,
            config: *const CollConfig,
        ) -> NcclResult {
            let request = Request { count, datatype, op };
            guarded(stringify!($name), || {
                // A null configuration asks for nothing; any other may pick an algorithm or want an event, which only
                // the real NCCL can serve. NCCL wants the same configuration on every rank.
                let decision = match config.is_null() {
                    true => all_reduce(sendbuff, recvbuff, request, comm, stream),
                    false if is_reentered() => Decision::Forward,
                    false => forward(Reason::Configuration, request, comm),
                };
                match decision {
                    Decision::Taken(result) => result,
                    // SAFETY: the caller's own arguments.
                    Decision::Forward => in_real_nccl(|| unsafe {
                        real!(
                            $symbol,
                            fn(*const c_void, *mut c_void, usize, DataType, RedOp, CommPtr, StreamPtr, *const CollConfig)
                        )(sendbuff, recvbuff, count, datatype, op, comm, stream, config)
                    }),
                }
            })
        }
    )*};
}

all_reduce_config_exports! {
    ncclAllReduceConfig, ncclAllReduceConfig
    pncclAllReduceConfig, pncclAllReduceConfig
}

/// Exports functions that are counted and forwarded; `for` names the argument that is the communicator.
macro_rules! counted {
    (for $comm:ident; $($call:ident: $($name:ident)+ ($($arg:ident: $type:ty),* $(,)?);)*) => {$(
        counted!(@each $comm, $call, ($($name)+), ($($arg: $type),*));
    )*};
    (@each $comm:ident, $call:ident, ($name:ident $($more:ident)*), $args:tt) => {
        counted!(@one $comm, $call, $name, $args);
        counted!(@each $comm, $call, ($($more)*), $args);
    };
    (@each $comm:ident, $call:ident, (), $args:tt) => {};
    (@one $comm:ident, $call:ident, $name:ident, ($($arg:ident: $type:ty),*)) => {
        #[doc = concat!("`", stringify!($name), "`, counted and forwarded.")]
        ///
        /// # Safety
        /// As NCCL documents.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> NcclResult {
            // Nothing here can panic, so this needs no guard; it must cost next to nothing.
            let count = |thread: &Thread| thread.counters($comm).count(Call::$call);
            // SAFETY: the caller's own arguments.
            in_real_nccl_after(count, || unsafe { real!($name, fn($($type),*))($($arg),*) })
        }
    };
}

counted! {
    for comm;
    Broadcast: ncclBcast pncclBcast
        (buff: *mut c_void, count: usize, datatype: DataType, root: c_int, comm: CommPtr, stream: StreamPtr);
    Broadcast: ncclBroadcast pncclBroadcast
        (sendbuff: *const c_void, recvbuff: *mut c_void, count: usize, datatype: DataType, root: c_int, comm: CommPtr,
         stream: StreamPtr);
    Broadcast: ncclBroadcastConfig pncclBroadcastConfig
        (sendbuff: *const c_void, recvbuff: *mut c_void, count: usize, datatype: DataType, root: c_int, comm: CommPtr,
         stream: StreamPtr, config: *const CollConfig);
    Reduce: ncclReduce pncclReduce
        (sendbuff: *const c_void, recvbuff: *mut c_void, count: usize, datatype: DataType, op: RedOp, root: c_int,
         comm: CommPtr, stream: StreamPtr);
    Reduce: ncclReduceConfig pncclReduceConfig
        (sendbuff: *const c_void, recvbuff: *mut c_void, count: usize, datatype: DataType, op: RedOp, root: c_int,
         comm: CommPtr, stream: StreamPtr, config: *const CollConfig);
    AllGather: ncclAllGather pncclAllGather
        (sendbuff: *const c_void, recvbuff: *mut c_void, sendcount: usize, datatype: DataType, comm: CommPtr,
         stream: StreamPtr);
    AllGather: ncclAllGatherConfig pncclAllGatherConfig
        (sendbuff: *const c_void, recvbuff: *mut c_void, sendcount: usize, datatype: DataType, comm: CommPtr,
         stream: StreamPtr, config: *const CollConfig);
    ReduceScatter: ncclReduceScatter pncclReduceScatter
        (sendbuff: *const c_void, recvbuff: *mut c_void, recvcount: usize, datatype: DataType, op: RedOp,
         comm: CommPtr, stream: StreamPtr);
    ReduceScatter: ncclReduceScatterConfig pncclReduceScatterConfig
        (sendbuff: *const c_void, recvbuff: *mut c_void, recvcount: usize, datatype: DataType, op: RedOp,
         comm: CommPtr, stream: StreamPtr, config: *const CollConfig);
    AlltoAll: ncclAlltoAll pncclAlltoAll
        (sendbuff: *const c_void, recvbuff: *mut c_void, count: usize, datatype: DataType, comm: CommPtr,
         stream: StreamPtr);
    AlltoAll: ncclAlltoAllConfig pncclAlltoAllConfig
        (sendbuff: *const c_void, recvbuff: *mut c_void, count: usize, datatype: DataType, comm: CommPtr,
         stream: StreamPtr, config: *const CollConfig);
    Gather: ncclGather pncclGather
        (sendbuff: *const c_void, recvbuff: *mut c_void, count: usize, datatype: DataType, root: c_int, comm: CommPtr,
         stream: StreamPtr);
    Gather: ncclGatherConfig pncclGatherConfig
        (sendbuff: *const c_void, recvbuff: *mut c_void, count: usize, datatype: DataType, root: c_int, comm: CommPtr,
         stream: StreamPtr, config: *const CollConfig);
    Scatter: ncclScatter pncclScatter
        (sendbuff: *const c_void, recvbuff: *mut c_void, count: usize, datatype: DataType, root: c_int, comm: CommPtr,
         stream: StreamPtr);
    Scatter: ncclScatterConfig pncclScatterConfig
        (sendbuff: *const c_void, recvbuff: *mut c_void, count: usize, datatype: DataType, root: c_int, comm: CommPtr,
         stream: StreamPtr, config: *const CollConfig);
    Send: ncclSend pncclSend
        (sendbuff: *const c_void, count: usize, datatype: DataType, peer: c_int, comm: CommPtr, stream: StreamPtr);
    Recv: ncclRecv pncclRecv
        (recvbuff: *mut c_void, count: usize, datatype: DataType, peer: c_int, comm: CommPtr, stream: StreamPtr);
}

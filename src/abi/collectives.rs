//! The collectives. An all-reduce is routed; the others, and send and receive, are counted and forwarded.

use std::ffi::{c_int, c_void};

use super::boundary::{forward_after, is_reentered, nccl_exports};
use super::group;
use crate::allreduce::Operation;
use crate::comm;
use crate::config::Config;
use crate::error;
use crate::nccl::{CollConfig, CommPtr, DataType, NcclResult, RedOp, StreamPtr};
use crate::route::{self, Reason, Request, Route};
use crate::stats::Call;
use crate::thread;

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
    if let Some(result) = refusal(comm) {
        return Decision::Taken(result);
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
        Route::Exact { .. } | Route::Compress(_) => Decision::Taken(group::issue(operation)),
    }
}

fn forward(reason: Reason, request: Request, comm: CommPtr) -> Decision {
    thread::current().counters(comm).count_forwarded(reason, request.n_bytes());
    Decision::Forward
}

/// The answer of a communicator whose ranks failed to meet. Something of that may still be under way on it, into which
/// any call would run.
#[inline(always)]
fn refusal(comm: CommPtr) -> Option<NcclResult> {
    if comm::has_any_failed() { failed(comm) } else { None }
}

#[cold]
fn failed(comm: CommPtr) -> Option<NcclResult> {
    let error = comm::failed_attach(comm)?;
    error::remember(&error);
    Some(NcclResult::from(&error))
}

/// Counts a call and forwards it.
#[inline]
fn counted(call: Call, comm: CommPtr, real: impl FnOnce() -> NcclResult) -> NcclResult {
    if !is_reentered()
        && let Some(result) = refusal(comm)
    {
        return result;
    }
    forward_after(|thread| thread.counters(comm).count(call), real)
}

nccl_exports! {
    /// `ncclAllReduce`: compressed where all ranks agree on it, else forwarded.
    pub fn ncclAllReduce / pncclAllReduce(
        real;
        sendbuff: *const c_void,
        recvbuff: *mut c_void,
        count: usize,
        datatype: DataType,
        op: RedOp,
        comm: CommPtr,
        stream: StreamPtr,
    ) {
        match all_reduce(sendbuff, recvbuff, Request { count, datatype, op }, comm, stream) {
            Decision::Taken(result) => result,
            Decision::Forward => forward_after(|_| {}, real),
        }
    }

    /// `ncclAllReduceConfig`: as `ncclAllReduce`, unless the configuration asks for more.
    pub fn ncclAllReduceConfig / pncclAllReduceConfig(
        real;
        sendbuff: *const c_void,
        recvbuff: *mut c_void,
        count: usize,
        datatype: DataType,
        op: RedOp,
        comm: CommPtr,
        stream: StreamPtr,
        config: *const CollConfig,
    ) {
        let request = Request { count, datatype, op };
        // A null configuration asks for nothing; any other may pick an algorithm or want an event, which only the real
        // NCCL can serve. NCCL wants the same configuration on every rank.
        let decision = match config.is_null() {
            true => all_reduce(sendbuff, recvbuff, request, comm, stream),
            false if is_reentered() => Decision::Forward,
            false => forward(Reason::Configuration, request, comm),
        };
        match decision {
            Decision::Taken(result) => result,
            Decision::Forward => forward_after(|_| {}, real),
        }
    }

    /// `ncclBcast`, counted and forwarded.
    pub fn ncclBcast / pncclBcast(
        real;
        buff: *mut c_void,
        count: usize,
        datatype: DataType,
        root: c_int,
        comm: CommPtr,
        stream: StreamPtr,
    ) {
        counted(Call::Broadcast, comm, real)
    }

    /// `ncclBroadcast`, counted and forwarded.
    pub fn ncclBroadcast / pncclBroadcast(
        real;
        sendbuff: *const c_void,
        recvbuff: *mut c_void,
        count: usize,
        datatype: DataType,
        root: c_int,
        comm: CommPtr,
        stream: StreamPtr,
    ) {
        counted(Call::Broadcast, comm, real)
    }

    /// `ncclBroadcastConfig`, counted and forwarded.
    pub fn ncclBroadcastConfig / pncclBroadcastConfig(
        real;
        sendbuff: *const c_void,
        recvbuff: *mut c_void,
        count: usize,
        datatype: DataType,
        root: c_int,
        comm: CommPtr,
        stream: StreamPtr,
        config: *const CollConfig,
    ) {
        counted(Call::Broadcast, comm, real)
    }

    /// `ncclReduce`, counted and forwarded.
    pub fn ncclReduce / pncclReduce(
        real;
        sendbuff: *const c_void,
        recvbuff: *mut c_void,
        count: usize,
        datatype: DataType,
        op: RedOp,
        root: c_int,
        comm: CommPtr,
        stream: StreamPtr,
    ) {
        counted(Call::Reduce, comm, real)
    }

    /// `ncclReduceConfig`, counted and forwarded.
    pub fn ncclReduceConfig / pncclReduceConfig(
        real;
        sendbuff: *const c_void,
        recvbuff: *mut c_void,
        count: usize,
        datatype: DataType,
        op: RedOp,
        root: c_int,
        comm: CommPtr,
        stream: StreamPtr,
        config: *const CollConfig,
    ) {
        counted(Call::Reduce, comm, real)
    }

    /// `ncclAllGather`, counted and forwarded.
    pub fn ncclAllGather / pncclAllGather(
        real;
        sendbuff: *const c_void,
        recvbuff: *mut c_void,
        sendcount: usize,
        datatype: DataType,
        comm: CommPtr,
        stream: StreamPtr,
    ) {
        counted(Call::AllGather, comm, real)
    }

    /// `ncclAllGatherConfig`, counted and forwarded.
    pub fn ncclAllGatherConfig / pncclAllGatherConfig(
        real;
        sendbuff: *const c_void,
        recvbuff: *mut c_void,
        sendcount: usize,
        datatype: DataType,
        comm: CommPtr,
        stream: StreamPtr,
        config: *const CollConfig,
    ) {
        counted(Call::AllGather, comm, real)
    }

    /// `ncclReduceScatter`, counted and forwarded.
    pub fn ncclReduceScatter / pncclReduceScatter(
        real;
        sendbuff: *const c_void,
        recvbuff: *mut c_void,
        recvcount: usize,
        datatype: DataType,
        op: RedOp,
        comm: CommPtr,
        stream: StreamPtr,
    ) {
        counted(Call::ReduceScatter, comm, real)
    }

    /// `ncclReduceScatterConfig`, counted and forwarded.
    pub fn ncclReduceScatterConfig / pncclReduceScatterConfig(
        real;
        sendbuff: *const c_void,
        recvbuff: *mut c_void,
        recvcount: usize,
        datatype: DataType,
        op: RedOp,
        comm: CommPtr,
        stream: StreamPtr,
        config: *const CollConfig,
    ) {
        counted(Call::ReduceScatter, comm, real)
    }

    /// `ncclAlltoAll`, counted and forwarded.
    pub fn ncclAlltoAll / pncclAlltoAll(
        real;
        sendbuff: *const c_void,
        recvbuff: *mut c_void,
        count: usize,
        datatype: DataType,
        comm: CommPtr,
        stream: StreamPtr,
    ) {
        counted(Call::AlltoAll, comm, real)
    }

    /// `ncclAlltoAllConfig`, counted and forwarded.
    pub fn ncclAlltoAllConfig / pncclAlltoAllConfig(
        real;
        sendbuff: *const c_void,
        recvbuff: *mut c_void,
        count: usize,
        datatype: DataType,
        comm: CommPtr,
        stream: StreamPtr,
        config: *const CollConfig,
    ) {
        counted(Call::AlltoAll, comm, real)
    }

    /// `ncclGather`, counted and forwarded.
    pub fn ncclGather / pncclGather(
        real;
        sendbuff: *const c_void,
        recvbuff: *mut c_void,
        count: usize,
        datatype: DataType,
        root: c_int,
        comm: CommPtr,
        stream: StreamPtr,
    ) {
        counted(Call::Gather, comm, real)
    }

    /// `ncclGatherConfig`, counted and forwarded.
    pub fn ncclGatherConfig / pncclGatherConfig(
        real;
        sendbuff: *const c_void,
        recvbuff: *mut c_void,
        count: usize,
        datatype: DataType,
        root: c_int,
        comm: CommPtr,
        stream: StreamPtr,
        config: *const CollConfig,
    ) {
        counted(Call::Gather, comm, real)
    }

    /// `ncclScatter`, counted and forwarded.
    pub fn ncclScatter / pncclScatter(
        real;
        sendbuff: *const c_void,
        recvbuff: *mut c_void,
        count: usize,
        datatype: DataType,
        root: c_int,
        comm: CommPtr,
        stream: StreamPtr,
    ) {
        counted(Call::Scatter, comm, real)
    }

    /// `ncclScatterConfig`, counted and forwarded.
    pub fn ncclScatterConfig / pncclScatterConfig(
        real;
        sendbuff: *const c_void,
        recvbuff: *mut c_void,
        count: usize,
        datatype: DataType,
        root: c_int,
        comm: CommPtr,
        stream: StreamPtr,
        config: *const CollConfig,
    ) {
        counted(Call::Scatter, comm, real)
    }

    /// `ncclSend`, counted and forwarded.
    pub fn ncclSend / pncclSend(
        real;
        sendbuff: *const c_void,
        count: usize,
        datatype: DataType,
        peer: c_int,
        comm: CommPtr,
        stream: StreamPtr,
    ) {
        counted(Call::Send, comm, real)
    }

    /// `ncclRecv`, counted and forwarded.
    pub fn ncclRecv / pncclRecv(
        real;
        recvbuff: *mut c_void,
        count: usize,
        datatype: DataType,
        peer: c_int,
        comm: CommPtr,
        stream: StreamPtr,
    ) {
        counted(Call::Recv, comm, real)
    }
}

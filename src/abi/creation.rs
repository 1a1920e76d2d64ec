//! The beginnings of communicators. To create one is a collective of all its ranks and waits for all of them anyway, so
//! that is where they meet ([`crate::comm::attach`]): when the real NCCL has made it, at the outermost end of the group if
//! there is one. Afterwards no call of ours waits on the host for another rank.

use std::ffi::c_int;

use super::boundary::nccl_exports;
use super::group;
use crate::comm;
use crate::nccl::{CommConfig, CommPtr, NcclResult, UniqueId};
use crate::variables::Variables;

/// `NCCL_SHRINK_ABORT`: operations of the parent are aborted first.
const SHRINK_ABORT: c_int = 1;

/// Creates one communicator; `mixes_graphs`: whether its captured calls keep their order with others.
fn one(place: *mut CommPtr, mixes_graphs: impl FnOnce() -> bool, real: impl FnOnce() -> NcclResult) -> NcclResult {
    group::create((!place.is_null()).then_some(place).into_iter(), mixes_graphs, real)
}

/// What a configuration, with which the real NCCL was content, and the environment say of graphs. In NCCL the configuration
/// comes first.
fn mixes_graphs(config: *const CommConfig) -> bool {
    // SAFETY: null or the application's, of the size that it says.
    let configured = unsafe { CommConfig::mixes_graphs(config) };
    configured.unwrap_or_else(|| Variables::global().graph_mixing)
}

/// The same of a child, which without a configuration has its parent's.
fn child_mixes_graphs(parent: CommPtr, config: *const CommConfig) -> bool {
    match comm::known(parent) {
        Some(parent) if config.is_null() => parent.mixes_graphs(),
        _ => mixes_graphs(config),
    }
}

nccl_exports! {
    /// `ncclCommInitRank`: then the ranks meet.
    pub fn ncclCommInitRank / pncclCommInitRank(
        real;
        comm: *mut CommPtr,
        nranks: c_int,
        comm_id: UniqueId,
        rank: c_int,
    ) {
        one(comm, || Variables::global().graph_mixing, real)
    }

    /// `ncclCommInitRankConfig`: then the ranks meet.
    pub fn ncclCommInitRankConfig / pncclCommInitRankConfig(
        real;
        comm: *mut CommPtr,
        nranks: c_int,
        comm_id: UniqueId,
        rank: c_int,
        config: *mut CommConfig,
    ) {
        one(comm, || mixes_graphs(config), real)
    }

    /// `ncclCommInitRankScalable`: then the ranks meet.
    pub fn ncclCommInitRankScalable / pncclCommInitRankScalable(
        real;
        newcomm: *mut CommPtr,
        nranks: c_int,
        myrank: c_int,
        n_id: c_int,
        comm_ids: *mut UniqueId,
        config: *mut CommConfig,
    ) {
        one(newcomm, || mixes_graphs(config), real)
    }

    /// `ncclCommInitAll`: then the ranks meet, each on a thread of its own.
    pub fn ncclCommInitAll / pncclCommInitAll(
        real;
        comm: *mut CommPtr,
        ndev: c_int,
        devlist: *const c_int,
    ) {
        let n_places = if comm.is_null() { 0 } else { usize::try_from(ndev).unwrap_or(0) };
        group::create((0..n_places).map(|i| comm.wrapping_add(i)), || Variables::global().graph_mixing, real)
    }

    /// `ncclCommSplit`: then the ranks of each child meet.
    pub fn ncclCommSplit / pncclCommSplit(
        real;
        comm: CommPtr,
        color: c_int,
        key: c_int,
        newcomm: *mut CommPtr,
        config: *mut CommConfig,
    ) {
        one(newcomm, || child_mixes_graphs(comm, config), real)
    }

    /// `ncclCommShrink`: where it aborts the parent's operations, ours end, too. Then the ranks that stay meet.
    pub fn ncclCommShrink / pncclCommShrink(
        real;
        comm: CommPtr,
        exclude_ranks: *mut c_int,
        exclude_ranks_count: c_int,
        new_comm: *mut CommPtr,
        config: *mut CommConfig,
        shrink_flags: c_int,
    ) {
        if !comm.is_null() && shrink_flags & SHRINK_ABORT != 0 {
            comm::turn_off(comm);
        }
        one(new_comm, || child_mixes_graphs(comm, config), real)
    }

    /// `ncclCommGrow`: then the old ranks and the new ones meet.
    pub fn ncclCommGrow / pncclCommGrow(
        real;
        comm: CommPtr,
        n_ranks: c_int,
        unique_id: *const UniqueId,
        rank: c_int,
        newcomm: *mut CommPtr,
        config: *mut CommConfig,
    ) {
        one(newcomm, || child_mixes_graphs(comm, config), real)
    }
}

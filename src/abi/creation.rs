//! The beginnings of communicators. To create one is a collective of all its ranks and waits for all of them anyway, so
//! that is where they meet ([`crate::comm::attach`]): when the real NCCL has made it, at the outermost end of the group if
//! there is one. Afterwards no call of ours waits on the host for another rank.

use std::ffi::c_int;
use std::sync::Arc;
use std::{ptr, slice};

use super::boundary::nccl_exports;
use super::group;
use crate::comm::{self, Comm, Origin};
use crate::nccl::{CommConfig, CommPtr, NcclResult, UniqueId};
use crate::negotiation::key::{Birth, Key};
use crate::variables::Variables;

/// `NCCL_SHRINK_ABORT`: operations of the parent are aborted first.
const SHRINK_ABORT: c_int = 1;

/// Creates one communicator, of this origin.
fn one(place: *mut CommPtr, origin: impl FnOnce() -> Origin, real: impl FnOnce() -> NcclResult) -> NcclResult {
    group::create((!place.is_null()).then_some(place).into_iter(), origin, real)
}

/// Of a communicator of ranks that were given the same ids.
fn of_ids(ids: &[UniqueId], config: *const CommConfig) -> Origin {
    Origin { mixes_graphs: mixes_graphs(config), key: Some(Key::of_ids(ids)) }
}

/// Of a communicator that ranks make of another one, which knows their key. Without a configuration it has its parent's.
fn of_parent(parent: Option<Arc<Comm>>, config: *const CommConfig, key: impl FnOnce(&Comm) -> Option<Key>) -> Origin {
    let mixes_graphs = match &parent {
        Some(parent) if config.is_null() => parent.mixes_graphs(),
        _ => mixes_graphs(config),
    };
    Origin { mixes_graphs, key: parent.and_then(|parent| key(&parent)) }
}

/// What a configuration, with which the real NCCL was content, and the environment say of graphs. In NCCL the configuration
/// comes first.
fn mixes_graphs(config: *const CommConfig) -> bool {
    // SAFETY: null or the application's, of the size that it says.
    let configured = unsafe { CommConfig::mixes_graphs(config) };
    configured.unwrap_or_else(|| Variables::global().graph_mixing)
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
        one(comm, || of_ids(&[comm_id], ptr::null()), real)
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
        one(comm, || of_ids(&[comm_id], config), real)
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
        // SAFETY: as many ids, says the caller, and the real NCCL was content with them.
        let ids = || unsafe { slice::from_raw_parts(comm_ids, usize::try_from(n_id).unwrap_or(0)) };
        one(newcomm, || of_ids(ids(), config), real)
    }

    /// `ncclCommInitAll`: then the ranks meet, each on a thread of its own.
    pub fn ncclCommInitAll / pncclCommInitAll(
        real;
        comm: *mut CommPtr,
        ndev: c_int,
        devlist: *const c_int,
    ) {
        let n_places = if comm.is_null() { 0 } else { usize::try_from(ndev).unwrap_or(0) };
        let origin = || Origin { mixes_graphs: mixes_graphs(ptr::null()), key: Some(Key::of_process()) };
        group::create((0..n_places).map(|i| comm.wrapping_add(i)), origin, real)
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
        one(newcomm, || of_parent(comm::known(comm), config, |parent| parent.child_key(Birth::Split, color)), real)
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
        let parent = comm::known(comm);
        if !comm.is_null() && shrink_flags & SHRINK_ABORT != 0 {
            comm::turn_off(comm);
        }
        let key = |parent: &Comm| {
            let n_ranks = usize::try_from(exclude_ranks_count).ok().filter(|_| !exclude_ranks.is_null())?;
            // SAFETY: as many ranks, says the caller, and the real NCCL was content with them.
            let mut without = unsafe { slice::from_raw_parts(exclude_ranks, n_ranks) }.to_vec();
            without.sort_unstable();
            parent.child_key(Birth::Shrink(without), 0)
        };
        one(new_comm, || of_parent(parent, config, key), real)
    }

    /// `ncclCommGrow`: then the old ranks and the new ones meet. The new ones know nothing that the old ones know.
    pub fn ncclCommGrow / pncclCommGrow(
        real;
        comm: CommPtr,
        n_ranks: c_int,
        unique_id: *const UniqueId,
        rank: c_int,
        newcomm: *mut CommPtr,
        config: *mut CommConfig,
    ) {
        one(newcomm, || of_parent(comm::known(comm), config, |_| None), real)
    }
}

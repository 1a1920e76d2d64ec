//! What carries payloads between ranks. So far: the real NCCL ([`nccl`]), which reaches wherever it does.

pub mod nccl;

use std::ffi::c_void;

use crate::cuda::StreamHandle;
use crate::nccl::CommPtr;

/// One hop of one rank.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// The communicator.
    pub comm: CommPtr,
    /// This rank in it.
    pub rank: usize,
    /// Ranks in it.
    pub world: usize,
    /// In hop 1 a slot for each other rank; in hop 2 one slot, for all.
    pub outgoing: *mut c_void,
    /// A slot from each rank; the rank's own holds nothing to be read after hop 1.
    pub incoming: *mut c_void,
    /// Bytes of every slot.
    pub slot_bytes: usize,
    /// The stream.
    pub stream: StreamHandle,
}

/// From how many bytes on an all-reduce over the real NCCL is compressed by default.
///
/// Between hosts the bytes decide (measured; see the README). Between ranks of one host NCCL's own all-reduce is
/// faster than three kernels with two of its calls between, so there it takes an explicit `FLASHCOMM_MIN_BYTES`.
pub const fn default_min_bytes(one_host: bool) -> u64 {
    if one_host { u64::MAX } else { 1 << 20 }
}

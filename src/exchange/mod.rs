//! What carries payloads between ranks. So far: the real NCCL ([`nccl`]), which reaches wherever it does.

pub mod nccl;

use std::ffi::c_void;

use crate::cuda::StreamHandle;
use crate::nccl::CommPtr;

/// Payload to and from one peer.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// The communicator.
    pub comm: CommPtr,
    /// The peer's rank in it.
    pub peer: usize,
    /// What goes there.
    pub send: *mut c_void,
    /// How much; 0 sends nothing.
    pub send_bytes: usize,
    /// Where what comes from there goes.
    pub receive: *mut c_void,
    /// How much; 0 receives nothing.
    pub receive_bytes: usize,
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

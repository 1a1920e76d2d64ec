//! What carries payloads between ranks: memory that every rank of the host can write ([`fused`]), or the real NCCL
//! ([`nccl`]), which reaches wherever it does.

pub mod fused;
pub mod nccl;
pub mod shared;

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

/// The exchange of a communicator.
#[allow(clippy::large_enum_variant, reason = "a communicator has one, and it is boxed with it")]
pub enum Exchange {
    /// One kernel does it all.
    Fused(fused::Fused),
    /// Three kernels, and calls of the real NCCL between them.
    Nccl(nccl::Staging),
}

impl Exchange {
    /// As in settings and in the log.
    pub const fn name(&self) -> &'static str {
        match self {
            Exchange::Fused(fused) => fused.kind.name(),
            Exchange::Nccl(_) => "nccl",
        }
    }

    /// The same for C.
    pub const fn c_name(&self) -> &'static std::ffi::CStr {
        match self {
            Exchange::Fused(fused::Fused { kind: fused::Kind::Peer, .. }) => c"peer",
            Exchange::Fused(fused::Fused { kind: fused::Kind::Host, .. }) => c"host",
            Exchange::Nccl(_) => c"nccl",
        }
    }

    /// As [`default_min_bytes`].
    pub const fn default_min_bytes(&self, world: usize, one_host: bool) -> u64 {
        match self {
            Exchange::Fused(fused) => default_min_bytes(Some(fused.kind), world, one_host),
            Exchange::Nccl(_) => default_min_bytes(None, world, one_host),
        }
    }
}

/// From how many bytes on an all-reduce is compressed by default. `kind`: the fused exchange, `None` for the real NCCL.
///
/// Over the real NCCL, as measured (see docs/tuning.md): the bytes decide between hosts; between ranks of one host NCCL's own
/// all-reduce is faster than three kernels with two of its calls between, so there it takes an explicit
/// `FLASHCOMM_MIN_BYTES`.
pub const fn default_min_bytes(kind: Option<fused::Kind>, world: usize, one_host: bool) -> u64 {
    match kind {
        None if one_host => u64::MAX,
        None => 1 << 20,
        // Peer memory is never slower from half of that on, whether ranks share a GPU or two have one each, but for graphs of
        // 2 ranks that share one; between more GPUs it has not been measured, hence a reserve.
        Some(fused::Kind::Peer) if world == 2 => 2 << 20,
        Some(fused::Kind::Peer) => 4 << 20,
        // Between two GPUs, where NCCL goes over host memory, too.
        Some(fused::Kind::Host) => 256 << 10,
    }
}

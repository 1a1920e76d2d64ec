//! What carries payloads between ranks: memory that every rank of the host can write ([`fused`]), or the real NCCL
//! ([`nccl`]), which reaches wherever it does.

pub(crate) mod area;
pub(crate) mod copies;
pub(crate) mod fused;
pub(crate) mod imports;
pub(crate) mod nccl;
pub(crate) mod residency;
pub(crate) mod shared;
pub(crate) mod timing;
pub(crate) mod trial;

use crate::config::ExchangeKind;
use crate::kernels::Areas;

/// The exchange of a communicator.
#[allow(clippy::large_enum_variant, reason = "a communicator has one, and it is boxed with it")]
pub enum Exchange {
    /// One kernel does it all.
    Fused(fused::Fused),
    /// Three kernels, and calls of the real NCCL between them.
    Nccl(nccl::Staging),
}

impl Exchange {
    /// Which it is.
    pub fn kind(&self) -> ExchangeKind {
        match self {
            Exchange::Fused(fused) => fused.memory().exchange(),
            Exchange::Nccl(_) => ExchangeKind::Nccl,
        }
    }
}

impl Areas {
    /// The exchange whose areas live there.
    pub fn exchange(self) -> ExchangeKind {
        match self {
            Areas::InGpuMemory => ExchangeKind::Peer,
            Areas::InHostMemory => ExchangeKind::Host,
        }
    }
}

//! The one door to the library for Rust: what the programs of this workspace share with it.
//!
//! flashcomm is a C library, and its interface is `include/flashcomm.h`; its modules are private.
//! But the command, the bench of a call's overhead, the fuzz targets and the tests know things that
//! the library knows, and none of these may be written twice: the copy would drift, and a doctor
//! that is not the library's own would say what does not happen. So there are re-exports here, by
//! subject, and nothing else: no code, and nothing that the library does not run itself.
//!
//! It is no interface for others: it changes with the library.

/// The table of settings and its parser. The command makes the options of `run` of it and refuses
/// what the library would; the documentation is compared with it; fuzzing feeds the parser. A
/// second table would accept other values.
pub mod settings {
    pub use crate::config::table::{SETTINGS, Setting};
    pub use crate::config::{Config, ExchangeKind, Tune};
}

/// NCCL's functions by version, and how a real NCCL is found and refused. `run` and `doctor` name
/// the NCCL that the library would take, and tests compare its exports with the list. A second
/// search would find another library.
pub mod nccl {
    pub use crate::nccl::load::RealLibrary;
    pub use crate::nccl::symbols::{SYMBOLS, Version};
    pub use crate::nccl::types::CommPtr;
}

/// Contexts, streams and memory of the driver. `doctor`, `bench --kernels` and the tests of the
/// kernels launch the library's kernels, which take these; two bindings of the driver would differ
/// in version.
pub mod cuda {
    pub use crate::cuda::context::Context;
    pub use crate::cuda::driver::{CudaResult, device_count, init};
    pub use crate::cuda::memory::{DeviceMemory, PinnedMemory};
    pub use crate::cuda::stream::Stream;
    pub use cudarc::driver::sys;
}

/// The kernels as the library loads and launches them. `bench --kernels` times them, `doctor` sees
/// whether the driver takes them, and tests compare their bits with the specification. Other
/// launches would prove other kernels.
pub mod kernels {
    pub use crate::element::ElementType;
    pub use crate::kernels::{ExactArgs, Kernels, Piece};
}

/// How ranks come to an exchange. `doctor` goes through the rounds of an attach over pipes, and says
/// what the library's own choice says: one of its own would say what does not happen. Fuzzing and
/// tests damage what ranks tell each other: peers are not to be trusted.
pub mod negotiation {
    pub use crate::error::{Error, Result};
    pub use crate::exchange::residency::Seat;
    pub use crate::kernels::Areas;
    pub use crate::negotiation::agreement::Agreement;
    pub use crate::negotiation::choice::{Against, Choice, choose};
    pub use crate::negotiation::disagreement::Disagreement;
    pub use crate::negotiation::facts::{BLOB_BYTES, Blob, Location, agree};
    pub use crate::negotiation::meeting::{Meeting, Rounds};
    pub use crate::negotiation::ranges::{default_exact_max_bytes, default_min_bytes};
    pub use crate::negotiation::setup::{Local, NotSetUp};
    pub use crate::negotiation::sizes::layout;
}

/// The structures of a communicator's state, which `flashcomm tune` reads from the library that it opens and must have in the
/// library's layout.
pub mod control {
    pub use crate::abi::control::flashcommCommInfo_t;
    pub use crate::abi::way::flashcommWay_t;
}

/// The structure of `flashcommGetStats`, which the command reads from the library that it opens and
/// must have in the library's layout; and counting, whose nanoseconds the bench of the overhead
/// holds to a budget.
pub mod stats {
    pub use crate::abi::control::flashcommStats_t;
    pub use crate::route::Reason;
    pub use crate::thread::current as this_thread;
}

/// The names in the header of a recorded input, which the library writes and `flashcomm codec`
/// reads.
pub mod recordings {
    pub use crate::record::header::*;
}

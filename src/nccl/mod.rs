//! The real NCCL: its types, its symbols, and how it is found. Calls into it are in [`crate::real`].

pub mod load;
pub mod symbols;
pub mod types;

pub use symbols::Symbol;
pub use types::{CollConfig, CommConfig, CommPtr, DataType, NcclResult, RedOp, SimInfo, StreamPtr};

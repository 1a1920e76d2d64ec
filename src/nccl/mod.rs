//! The real NCCL: its types, its symbols, and how it is found. Calls into it are in [`crate::real`].

pub(crate) mod load;
mod search_path;
pub(crate) mod symbols;
pub(crate) mod types;

pub(crate) use symbols::Symbol;
pub(crate) use types::{CollConfig, CommConfig, CommPtr, DataType, NcclResult, RedOp, SimInfo, StreamPtr, UniqueId};

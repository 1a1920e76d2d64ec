//! The one unsafe edge to the CUDA driver: small owned types over `cudarc::driver::sys`, and nothing else.
//!
//! The driver is bound at run time, symbol by symbol, so that a machine without one can load the library. [`init`] comes
//! first: it finds out whether there is one.
//!
//! Streams and contexts of the application are borrowed as raw handles. Everything that allocates or waits here is
//! used in attach and at the end of a communicator only; the hot path launches kernels and records events.

pub(crate) mod capture;
pub(crate) mod context;
pub(crate) mod driver;
pub(crate) mod memory;
pub(crate) mod module;
pub(crate) mod partition;
pub(crate) mod pool;
pub(crate) mod stream;
mod topology;

pub(crate) use capture::{
    Capture, Dependencies, GraphNode, RelaxedCapture, capture_dependencies, capture_of, update_capture_dependencies,
};
pub(crate) use context::{Context, Entered, ordinal_of};
pub(crate) use driver::{CudaError, CudaResult, driver_version, init};
pub(crate) use memory::{DeviceMemory, IpcHandle, PinnedMemory, Registered, close_ipc, copy, open_ipc};
pub(crate) use module::{Function, Module, Shape};
pub(crate) use partition::is_of_green_context;
pub(crate) use pool::Lent;
pub(crate) use stream::{Event, Stream, StreamHandle};
pub(crate) use topology::Distance;

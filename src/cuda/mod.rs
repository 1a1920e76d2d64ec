//! The one unsafe edge to the CUDA driver: small owned types over `cudarc::driver::sys`, and nothing else.
//!
//! The driver is bound at run time, symbol by symbol, so that a machine without one can load the library. [`init`] comes
//! first: it finds out whether there is one.
//!
//! Streams and contexts of the application are borrowed as raw handles. Everything that allocates or waits here is
//! used in attach and at the end of a communicator only; the hot path launches kernels and records events.

mod capture;
mod context;
mod driver;
mod memory;
mod module;
mod pool;
mod stream;

/// The driver's own names, for what has no type here: of the version of the bindings that these types are over.
pub use cudarc::driver::sys;

pub use capture::{
    Capture, Dependencies, GraphNode, RelaxedCapture, capture_dependencies, capture_of, update_capture_dependencies,
};
pub use context::{Context, Entered, ordinal_of};
pub use driver::{CudaError, CudaResult, device_count, init};
pub use memory::{DeviceMemory, IpcHandle, PinnedMemory, Registered, open_ipc};
pub use module::{Function, Module, Shape};
pub use pool::Lent;
pub use stream::{Event, Stream, StreamHandle};

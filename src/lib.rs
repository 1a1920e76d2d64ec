//! flashcomm: an NCCL-compatible shim whose tensor-parallel all-reduces travel at 2 to 8 bits per element.
//!
//! # The life of a call
//!
//! 1. An application's `ncclAllReduce` enters [`abi::collectives`]. Every other call is a jump into the real library,
//!    or is counted and forwarded.
//! 2. [`route`] decides, from facts that are the same on every rank, whether it is compressed. If not, the real NCCL
//!    gets the original arguments.
//! 3. At the first call that may be compressed, the ranks of the communicator agree, once: [`comm::attach`].
//! 4. [`allreduce`] runs it: quantize, hop 1, reduce, hop 2, dequantize, all on the caller's stream, over an
//!    [`exchange`]. Inside a group it waits for the group's end: [`abi::group`].
//!
//! Dependencies point one way: `abi -> allreduce -> {route, comm, exchange} -> {cuda, kernels, nccl} -> {element, wire}`.
//!
//! # Safety
//!
//! The C boundary is [`abi`], the driver's is [`cuda`], NCCL's is [`nccl`]. Device pointers are never dereferenced here:
//! the application vouches for its buffers, [`flashcomm_wire::Plan`] for ours. Handles are borrowed from the application
//! and used only in calls on their communicator; the side table forgets a communicator before NCCL does.

pub mod abi;
pub mod allreduce;
pub mod comm;
pub mod config;
pub mod cuda;
pub mod element;
pub mod error;
pub mod exchange;
pub mod kernels;
mod logging;
pub mod nccl;
pub mod nvtx;
pub mod record;
pub mod route;
pub mod stats;
pub mod thread;

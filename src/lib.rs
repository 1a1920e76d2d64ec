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
//! Dependencies point one way: `abi -> allreduce -> {route, comm, exchange} -> {cuda, kernels, nccl} -> wire`.
//!
//! The modules are private: what applications see is C, `include/flashcomm.h` and NCCL's own functions. What the command and
//! the tests share with them is in [`tooling`].
//!
//! # Safety
//!
//! The C boundary is [`abi`], the driver's is [`cuda`], NCCL's is [`nccl`]. Device pointers are never dereferenced here:
//! the application vouches for its buffers, [`flashcomm_wire::Plan`] for ours. Handles are borrowed from the application
//! and used only in calls on their communicator; the side table forgets a communicator before NCCL does.

mod abi;
mod allreduce;
mod comm;
mod config;
mod cuda;
mod error;
mod exchange;
mod kernels;
mod logging;
mod nccl;
mod nvtx;
mod record;
mod route;
mod stats;
mod thread;
pub mod tooling;

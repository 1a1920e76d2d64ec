//! A CUDA driver for machines without a GPU: the calls of `libcuda.so.1` that NCCL programs and the shim make, over
//! host memory and threads.
//!
//! * [`memory`]: device addresses fault when the host touches them; the bytes lie elsewhere, in a shared-memory file, so
//!   that other processes can map them by an IPC handle. Every access of a copy or a kernel is checked against the live
//!   allocations.
//! * [`stream`]: a stream is a queue with a thread of its own; events, the legacy stream, capture and graphs.
//! * [`kernels`]: a kernel is a Rust function, found by its name; [`fused`]: the one that waits for other ranks.
//! * [`clock`]: virtual time, of which [`durations`] tells how much of it kernels and copies take.
//! * [`green`]: green contexts, which have some of a device's multiprocessors.
//! * [`api`]: the C functions, by NVIDIA's names, and a few `flashcomm_sim_*` for the simulated NCCL.
//!
//! It is as strict as the driver where a program could go wrong: what synchronizes there does so here (freeing waits
//! for the device), what a capture forbids is refused and invalidates the capture, a wrong access is sticky for the
//! context. Devices: `FLASHCOMM_SIM_DEVICES` (8), of `FLASHCOMM_SIM_MEMORY_MIB` (16384); with
//! `FLASHCOMM_SIM_PEER_ACCESS=0` they cannot use each other's memory. `FLASHCOMM_SIM_THREAD_PERCENTAGE` (100) is what MPS lets
//! the process have of their multiprocessors.
//!
//! It says nothing about speed. Events tell what the wall clock does. Where `FLASHCOMM_SIM_FABRIC`
//! names a file that describes a machine (`flashcomm-sim-fabric`), they tell virtual time, in which
//! kernels, copies and collectives take what they would on that machine as described. So a test can
//! prove that a decision is right on a machine that nobody here has. That the machine is as
//! described it cannot prove, and no speed. The fabric also has the defaults of how many devices
//! there are and whether they reach each other, and how. With `FLASHCOMM_SIM_SLOW=device:factor`
//! everything takes so many times as long on one device.
//!
//! Delays and faults: `flashcomm-sim-schedule`; the kinds are alloc, hostalloc, register, ipc, module, stream, event,
//! launch, copy.

pub mod access;
pub mod api;
pub mod clock;
pub mod copies;
pub mod cu_result;
pub mod device;
pub mod durations;
pub mod exact;
pub mod fused;
pub mod green;
pub mod kernels;
pub mod memory;
pub mod one_hop;
pub mod stream;
pub mod turns;

// Which kernels there are and what they get: the library's own files.
#[path = "../../../src/element.rs"]
#[allow(dead_code, reason = "the library uses the rest")]
mod element;
#[path = "../../../src/kernels/instances.rs"]
#[allow(dead_code, reason = "the library and build.rs use the rest")]
mod instances;
#[path = "../../../src/kernels/shared.rs"]
#[allow(dead_code, reason = "the library and build.rs use the rest")]
mod shared;

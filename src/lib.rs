//! flashcomm: an NCCL-compatible shim whose tensor-parallel all-reduces travel at 2 to 8 bits per element.
//!
//! # The life of a call
//!
//! 0. When a communicator is created ([`abi::creation`]) its ranks agree, once: [`comm::attach`]. What they tell each
//!    other and what follows from it is in [`negotiation`].
//! 1. An application's `ncclAllReduce` enters [`abi::collectives`]. Every other call is a jump into the real library,
//!    or is counted and forwarded.
//! 2. [`route`] decides, from facts that are the same on every rank, whether it is compressed. If not, the real NCCL
//!    gets the original arguments. (Calls of NCCL itself, a null communicator and a configuration never come so far.)
//! 3. [`allreduce`] runs it: quantize, hop 1, reduce, hop 2, dequantize, all on the caller's stream, over an
//!    [`exchange`]. Inside a group it waits for the group's end: [`abi::group`]. Beside other calls of a group it runs on a
//!    stream of ours.
//!
//! The invariants that the files cite as I1 to I8 are in `docs/design/invariants.md`, the words in `docs/design/glossary.md`.
//!
//! # The map
//!
//! A room is a folder or a file beside this one. It uses only rooms of later lines (`tests/cpu/map.rs` reads this):
//!
//! ```text
//! tooling                        the door for the command and the tests
//! abi                            what an application can call
//! allreduce                      a compressed all-reduce, top to bottom
//! comm                           communicators: what they have agreed on and hold; attach
//! negotiation                    how ranks come to do the same: facts, choice, meeting, set-up
//! exchange, thread               what carries payloads; what a thread keeps between calls
//! real                           calls into the real NCCL, through the jump table
//! stats                          what was compressed, forwarded, and why
//! record, route, nvtx, logging   inputs saved; pure: forward or compress; ranges for profilers
//! error, config, variables       what can go wrong; the settings, ours and those of NCCL's
//! kernels, background            launches; threads of our own
//! cuda, nccl, verdict, element   the driver; the real library, found; what ranks agreed on; types
//! ```
//!
//! Below all of them is the crate `flashcomm-wire`: the specification of what travels.
//!
//! The modules are private: what applications see is C, `include/flashcomm.h` and NCCL's own functions. What the command and
//! the tests share with them is in [`tooling`].
//!
//! # Safety
//!
//! The C boundary is [`abi`], the driver's is [`cuda`], NCCL's is [`real`]. Device pointers are never dereferenced here:
//! the application vouches for its buffers, [`flashcomm_wire::Plan`] for ours. Handles are borrowed from the application
//! and used only in calls on their communicator; the side table forgets a communicator before NCCL does.

#![deny(unreachable_pub)]
#![allow(rustdoc::private_intra_doc_links, reason = "read it with --document-private-items")]

#[allow(unreachable_pub, reason = "what C calls is public; cbindgen makes the header of no other")]
mod abi;
mod allreduce;
mod background;
mod comm;
mod config;
mod cuda;
mod element;
mod error;
mod exchange;
mod kernels;
mod logging;
mod nccl;
mod negotiation;
mod nvtx;
mod real;
mod record;
mod route;
mod stats;
mod thread;
pub mod tooling;
mod variables;
mod verdict;

//! What needs neither a GPU nor a simulator: the shim in front of real NCCLs, its C face, and what comes from outside.
//!
//! `FLASHCOMM_TEST_NCCL` and `FLASHCOMM_TEST_NCCL_OLD` name the real libraries; scripts/test.sh sets them.

mod example_cpp; // the C++ example builds, and changes widths on the simulators
mod header; // include/flashcomm.h is generated, compiles, and agrees with nccl.h
mod lookup; // whose NCCL is behind the shim where others are preloaded beside it
mod map; // the map of the library is true; no circles; long files and functions say why
mod passthrough; // forwarded calls answer as the real NCCL does, however the shim is loaded
mod soname; // who opens NCCL by its name meets the shim, and the shim finds what they would have
mod untrusted; // settings and blobs of whatever kind

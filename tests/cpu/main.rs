//! What needs neither a GPU nor a simulator: the shim in front of real NCCLs, its C face, and what comes from outside.
//!
//! `FLASHCOMM_TEST_NCCL` and `FLASHCOMM_TEST_NCCL_OLD` name the real libraries; scripts/test.sh sets them.

mod example_cpp; // the C++ example builds, and changes widths on the simulators
mod header; // include/flashcomm.h is generated, compiles, and agrees with nccl.h
mod passthrough; // forwarded calls answer as the real NCCL does, however the shim is loaded
mod prototypes; // what the shim exports and calls has the prototypes of nccl.h
mod untrusted; // settings and blobs of whatever kind

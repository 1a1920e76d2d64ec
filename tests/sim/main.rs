//! Whole jobs: ranks that are threads or processes, with the unmodified shim, on the simulated driver and NCCL.
//!
//! No GPU is needed. The same program runs on one with `FLASHCOMM_TEST_REAL=1` (scripts/gpu/test_packed.py), and most
//! of it under ThreadSanitizer (scripts/tsan.sh). Each test runs its jobs in processes of its own.

mod allreduce; // the reference's bits on every rank, for every world, size, code and way of calling
mod aside; // groups of compressed and of other calls
mod batch; // what rows of a batch have to do with each other
mod control; // widths, on and off, changed while a job runs
mod endings; // what is left of processes that are killed, left by _exit, forked
mod exact; // small sums in one hop, uncompressed
mod fabrics; // virtual time, on machines that files describe
mod faults; // a rank killed at every step, every call of a rank refused once
mod field; // what NCCL's variables say of the machine
mod groups; // groups, captures, streams
mod leftovers; // nothing, after the last communicator
mod lifecycle; // communicators to their end
mod meeting; // at creation; late ranks, first sums in any order
mod partitions; // fewer multiprocessors than the whole GPU: green contexts, MPS
mod programs; // random programs run as plain NCCL runs them
mod record; // inputs saved as they were passed
mod shares; // the first communicator that is used has the larger grid
mod soak; // random operations against a model
mod stats; // what the shim counts, and what a profiler hears
mod tuning; // decisions, on machines that files describe
mod watch; // sums that become slow are told of

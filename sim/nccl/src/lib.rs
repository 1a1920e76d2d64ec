//! An NCCL for machines without a GPU: communicators over threads and processes, on the streams of the simulated driver.
//!
//! * [`segment`]: what the ranks of a communicator share: a nameless file in memory, which the unique id leads to.
//! * [`comm`]: communicators, how they are made and end.
//! * [`group`]: groups: calls are queued and go out together at the outermost end, one launch per communicator.
//! * [`engine`]: what a launch does when its stream comes to it. It blocks the stream until its peers are there, so
//!   what is a deadlock in NCCL is one here.
//! * [`durations`]: how long it takes in the simulated driver's virtual time, where there is a fabric.
//! * [`reduce`]: the arithmetic of all data types and operations.
//! * [`api`]: the C functions. Only what is simulated is exported.
//!
//! Launches of a communicator are ordered as NCCL orders them: in the order of issue, across streams, with events; in a
//! captured graph with event nodes. Sums are taken in double precision in rank order. When a rank's process has died,
//! its peers' `ncclCommGetAsyncError` tells `ncclRemoteError`, and what waits for it waits until an abort. Collectives
//! that do not match between ranks hang, with a word on stderr; NCCL may also mix up data. Delays and faults:
//! `flashcomm-sim-schedule`; the kind is nccl.

pub mod api;
pub mod comm;
pub mod driver;
pub mod durations;
pub mod engine;
pub mod group;
pub mod reduce;
pub mod segment;
pub mod types;

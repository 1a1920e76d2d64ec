//! Counts of what was compressed and what was forwarded, and why: by communicator and size class.
//!
//! A communicator has [`Counters`] of its own, which a thread finds in a small table of its own by the handle: counting is a
//! look-up and plain additions, no lock, no allocation, no cache line that another rank writes. NCCL wants a communicator
//! used by one thread at a time, so nobody else adds to its counters; threads that break that rule lose counts, nothing
//! else. The first call of a thread on a communicator takes a lock for a moment and may allocate.
//!
//! A block is used again by another communicator when its own has ended, and never freed: a thread that still knows it sees
//! from its owner that it is another's. What ended communicators counted is kept by [`registry`].
//!
//! An operation that is captured into a graph is counted when it is captured; replays are not seen.

mod counters;
mod file;
mod registry;
pub(crate) mod report;

pub(crate) use counters::{Call, Counters, Counts, SIZE_CLASSES};
pub(crate) use registry::{Attached, Known, Slow, describe, end, note_slow};

//! Jobs of ranks, as applications run them: what `demo` and `bench` share.
//!
//! Libraries read their environment once per process, so every configuration of the shim is a job of child
//! processes of its own: [`job`] starts them (this very executable, as `flashcomm rank`), gives them tasks and reads
//! their answers, all as lines of JSON over pipes, and kills what does not answer in time. In a child, [`party`] runs
//! its ranks as threads (all of a job's, or one) and lets the ranks of a job meet, also across processes. [`rank`] is a
//! rank's device, stream and communicator, over the functions in [`api`]. [`machine`] finds the libraries.

pub mod api;
pub mod job;
pub mod machine;
pub mod party;
pub mod rank;
pub mod values;

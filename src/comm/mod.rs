//! What the shim knows of a communicator: a side table keyed by the real `ncclComm_t` (invariant I2: the handle is
//! never wrapped).
//!
//! An entry appears when the communicator is created and is dropped before a destroy or an abort is forwarded, since
//! NCCL uses addresses again.

mod aside;
pub(crate) mod attach;
mod communicator;
pub(crate) mod leftovers;
mod order;
mod share;
mod table;
mod wait;
mod watch;

pub(crate) use communicator::{Attached, Comm, has_any_failed};
pub(crate) use table::{Origin, abort, created, failed_attach, failure, is_meeting, known, of, reap, retire, turn_off};

//! The C boundary: everything an application can call. No other module has a `no_mangle`.
//!
//! * [`forward`]: the functions that the shim has nothing to say about, as bare jumps into the real library;
//! * [`collectives`]: all-reduce, which may be compressed, and the others, which are counted;
//! * [`group`]: group nesting, since a compressed all-reduce inside a group waits for its end;
//! * [`creation`]: the beginnings of communicators, where their ranks meet;
//! * [`lifecycle`]: their ends, where our state goes first;
//! * [`control`] and [`way`]: flashcomm's own calls, `include/flashcomm.h`;
//! * [`boundary`]: what holds for every one of them.

mod boundary;
pub mod collectives;
pub mod control;
pub mod creation;
pub mod forward;
pub mod group;
pub mod lifecycle;
#[cfg(test)]
mod prototypes;
pub mod way;

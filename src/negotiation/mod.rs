//! How the ranks of a communicator come to do the same: what each says of itself, what follows from
//! all of it, and how they get there together (invariant I3).
//!
//! * [`facts`]: what a rank says, as bytes, and what of it keeps the ranks from going on (`agree`);
//! * [`choice`], [`ranges`] and [`sizes`], pure: the exchange, which sums it takes and how large it is, which follow from
//!   everyone's facts;
//! * [`meeting`]: everyone's word to everyone, and the rounds that are made of it;
//! * [`page`]: meeting over a page of shared memory, by ranks of one host that find each other by a [`key`];
//! * [`over_nccl`]: meeting by a real all-gather, by all others;
//! * [`setup`]: an exchange is set up in rounds, and taken when every rank could;
//! * [`tuning`]: which exchange, and which way of each size, was measured to be the fastest here.
//!
//! Attach (`comm::attach`) and `flashcomm doctor` go through the same rounds, over other meetings.

pub(crate) mod agreement;
pub(crate) mod choice;
pub(crate) mod disagreement;
pub(crate) mod facts;
mod identity;
pub(crate) mod key;
pub(crate) mod meeting;
pub(crate) mod over_nccl;
pub(crate) mod page;
pub(crate) mod ranges;
#[cfg(test)]
mod samples;
pub(crate) mod setup;
pub(crate) mod sizes;
pub(crate) mod tuning;

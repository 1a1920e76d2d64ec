//! The wire format of flashcomm: how an all-reduce is cut into pieces, and how the elements of a piece are coded.
//!
//! * [`plan`] cuts: the operation into one chunk per rank, a chunk into slices that fit the staging buffers, both
//!   at multiples of a tile of [`TILE_ELEMS`] elements.
//! * [`codec`] codes one tile at 2 to 8 bits per element: the scalar specification that the GPU kernels equal bit
//!   for bit.
//! * [`reference`] puts the two together: the all-reduce as a pure function of the inputs by rank, the world size
//!   and the codec. What the library computes, over whatever exchange, is this.
//! * [`rings`] and [`mailboxes`] say where ranks that share memory put what they tell each other, and hold the two protocols.
//! * [`peers`] is what others send, to compare with.
//!
//! The crate is pure: no unsafe code, no I/O, no environment, no global state.

pub mod codec;
pub mod element;
pub mod mailboxes;
pub mod peers;
pub mod plan;
pub mod reference;
pub mod rings;

pub use codec::{Code, Codec, GroupSize, Legs, TILE_ELEMS, Width};
pub use element::{Element, Summand};
pub use mailboxes::Mailboxes;
pub use plan::Plan;
pub use reference::Op;
pub use rings::Rings;

/// Version of everything that ranks must agree on byte for byte: tile layout, chunking, attach blob.
pub const WIRE_VERSION: u32 = 19;

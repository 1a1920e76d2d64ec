//! How one all-reduce is cut.
//!
//! The operation is `count` elements, in tiles of [`TILE_ELEMS`] (the last may be short). Rank `r` owns *chunk* `r`:
//! `ceil(n_tiles / world)` consecutive tiles; the last chunks may be shorter, or empty. A chunk travels in *slices*
//! of at most `slice_tiles` tiles, so that the staging buffers stay within their bound whatever the count. Chunks are
//! cut before slices and both at tiles, hence the result does not depend on the buffers' size (invariant I1).
//!
//! Where two ranks need one hop ([`Legs::one_hop`]), nobody owns anything: the operation is one chunk, that of rank 0, and rank 1
//! has an empty one.
//!
//! # Staging
//!
//! Two areas of slots, a slot being `slice_tiles` payload tiles of the wider leg:
//!
//! * `outgoing`, a slot per other rank: hop 1's payloads by owner; afterwards, in its first slot, what this rank sends
//!   in hop 2 (hop 1's are spent by then);
//! * `incoming`, a slot per rank: hop 1's payloads by sender (this rank's own slot is not read); afterwards hop 2's,
//!   by owner.
//!
//! The slots of one slice are contiguous, as an all-gather wants them. In one hop there is no `outgoing`: each rank puts its
//! payloads into its own slot of `incoming`, from where the all-gather takes them.

use std::fmt;
use std::ops::Range;

use crate::codec::{Codec, Legs, TILE_ELEMS};

/// The cut of one all-reduce; see the [module](self).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Plan {
    count: usize,
    world: usize,
    legs: Legs,
    chunk_tiles: usize,
    slice_tiles: usize,
    n_slices: usize,
}

/// The staging buffer cannot hold one tile per rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BufferTooSmall {
    /// Bytes that one tile per rank needs.
    pub needed_bytes: usize,
}

impl fmt::Display for BufferTooSmall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the staging buffer needs at least {} bytes for this many ranks", self.needed_bytes)
    }
}

impl std::error::Error for BufferTooSmall {}

impl Plan {
    /// The cut of an all-reduce of `count` elements over `world` ranks with `buffer_bytes` of staging.
    ///
    /// # Errors
    /// [`BufferTooSmall`] when the buffer holds less than one tile per rank in both areas.
    ///
    /// # Panics
    /// When `count` or `world` is 0.
    pub fn new(count: usize, world: usize, legs: Legs, buffer_bytes: usize) -> Result<Self, BufferTooSmall> {
        assert!(count > 0 && world > 0, "an all-reduce has elements and ranks");
        let needed_bytes = Self::staging_bytes_per_tile(world, legs);
        let max_slice_tiles = buffer_bytes / needed_bytes;
        if max_slice_tiles == 0 {
            return Err(BufferTooSmall { needed_bytes });
        }
        let n_chunks = if legs.one_hop(world).is_some() { 1 } else { world };
        let chunk_tiles = count.div_ceil(TILE_ELEMS).div_ceil(n_chunks);
        let n_slices = chunk_tiles.div_ceil(max_slice_tiles);
        let slice_tiles = chunk_tiles.div_ceil(n_slices); // slices of equal size, not one small remainder
        Ok(Plan { count, world, legs, chunk_tiles, slice_tiles, n_slices: chunk_tiles.div_ceil(slice_tiles) })
    }

    /// Staging bytes that a slice of one tile takes: the slots of both areas.
    pub fn staging_bytes_per_tile(world: usize, legs: Legs) -> usize {
        (Self::n_outgoing(world, legs) + world) * slot_tile_bytes(legs)
    }

    /// Slots of the `outgoing` area.
    fn n_outgoing(world: usize, legs: Legs) -> usize {
        if legs.one_hop(world).is_some() { 0 } else { world - 1 }
    }

    /// Elements of the whole operation.
    pub const fn count(&self) -> usize {
        self.count
    }

    /// Tiles of the longest chunk.
    pub const fn chunk_tiles(&self) -> usize {
        self.chunk_tiles
    }

    /// First tile of slice `slice` within every chunk.
    pub const fn first_tile(&self, slice: usize) -> usize {
        slice * self.slice_tiles
    }

    /// Slices of the operation, processed in order.
    pub const fn n_slices(&self) -> usize {
        self.n_slices
    }

    /// Elements of the whole operation that rank `owner` reduces.
    pub fn chunk(&self, owner: usize) -> Range<usize> {
        self.elements(owner * self.chunk_tiles..(owner + 1) * self.chunk_tiles)
    }

    /// Elements of slice `slice` of the chunk of rank `owner`; empty where the chunk is that short.
    pub fn slice(&self, owner: usize, slice: usize) -> Range<usize> {
        let first = owner * self.chunk_tiles;
        let start = (slice * self.slice_tiles).min(self.chunk_tiles);
        let end = (start + self.slice_tiles).min(self.chunk_tiles);
        self.elements(first + start..first + end)
    }

    /// Tiles that slice `slice` has in the chunk of rank `owner`.
    pub fn slice_tiles(&self, owner: usize, slice: usize) -> usize {
        self.slice(owner, slice).len().div_ceil(TILE_ELEMS)
    }

    /// Tiles that slice `slice` has in the longest chunk, that of rank 0: what equal-sized collectives carry.
    pub fn max_slice_tiles(&self, slice: usize) -> usize {
        self.slice_tiles(0, slice)
    }

    /// Bytes of a slot during hop 1 of slice `slice`.
    pub fn reduce_slot_bytes(&self, slice: usize) -> usize {
        self.max_slice_tiles(slice) * self.legs.reduce.tile_bytes()
    }

    /// Bytes of a slot during hop 2 of slice `slice`.
    pub fn gather_slot_bytes(&self, slice: usize) -> usize {
        self.max_slice_tiles(slice) * self.legs.gather.tile_bytes()
    }

    /// Number of the slot in the `outgoing` area of rank `rank` that holds hop 1's payload for `owner`, another rank.
    pub const fn outgoing_slot(rank: usize, owner: usize) -> usize {
        if owner > rank { owner - 1 } else { owner }
    }

    /// Bytes of the `outgoing` area when the buffer has `buffer_bytes`, a multiple of 128; `incoming` follows it.
    pub fn outgoing_bytes(world: usize, legs: Legs, buffer_bytes: usize) -> usize {
        buffer_bytes / Self::staging_bytes_per_tile(world, legs) * Self::n_outgoing(world, legs) * slot_tile_bytes(legs)
    }

    /// Bytes of both areas together, at most `buffer_bytes`; 0 where not even one tile per rank fits.
    pub fn staging_bytes(world: usize, legs: Legs, buffer_bytes: usize) -> usize {
        let per_tile = Self::staging_bytes_per_tile(world, legs);
        buffer_bytes / per_tile * per_tile
    }

    /// The codecs of the two legs.
    pub const fn legs(&self) -> Legs {
        self.legs
    }

    /// Ranks that take part.
    pub const fn world(&self) -> usize {
        self.world
    }

    /// The codec of the one hop, where that is enough.
    pub fn one_hop(&self) -> Option<Codec> {
        self.legs.one_hop(self.world)
    }

    /// Bytes that this operation puts on the wire from one rank, all hops (the longest chunks' sizes).
    pub fn wire_bytes(&self) -> usize {
        let tile_bytes = match self.one_hop() {
            Some(codec) => codec.tile_bytes(),
            None => self.legs.reduce.tile_bytes() + self.legs.gather.tile_bytes(),
        };
        (self.world - 1) * self.chunk_tiles * tile_bytes
    }

    fn elements(&self, tiles: Range<usize>) -> Range<usize> {
        (tiles.start * TILE_ELEMS).min(self.count)..(tiles.end * TILE_ELEMS).min(self.count)
    }
}

/// Payload bytes of a tile in the wider leg.
const fn slot_tile_bytes(legs: Legs) -> usize {
    let (reduce, gather) = (legs.reduce.tile_bytes(), legs.gather.tile_bytes());
    if reduce > gather { reduce } else { gather }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::{Codec, GroupSize, Width};

    fn legs(reduce: u8, gather: u8) -> Legs {
        let codec = |bits| Codec::plain(Width::new(bits).unwrap(), GroupSize::new(128).unwrap());
        Legs { reduce: codec(reduce), gather: codec(gather), batch_invariant: false }
    }

    proptest! {
        #[test]
        fn chunks_and_slices_partition_the_operation(
            count in 1usize..3_000_000,
            world in 1usize..20,
            bits in (2u8..=8, 2u8..=8),
            mib in 1usize..70,
        ) {
            let plan = Plan::new(count, world, legs(bits.0, bits.1), mib << 20).unwrap();
            let mut at = 0;
            for owner in 0..world {
                prop_assert_eq!(plan.chunk(owner).start, at);
                for slice in 0..plan.n_slices() {
                    let range = plan.slice(owner, slice);
                    prop_assert_eq!(range.start, at);
                    prop_assert!(range.is_empty() || range.start.is_multiple_of(TILE_ELEMS));
                    prop_assert!(plan.slice_tiles(owner, slice) <= plan.max_slice_tiles(slice));
                    at = range.end;
                }
                prop_assert_eq!(plan.chunk(owner).end, at);
            }
            prop_assert_eq!(at, count);
        }

        #[test]
        fn slots_stay_within_their_area(
            count in 1usize..3_000_000,
            world in 2usize..20,
            bits in (2u8..=8, 2u8..=8),
            mib in 1usize..4,
        ) {
            let legs = legs(bits.0, bits.1);
            let plan = Plan::new(count, world, legs, mib << 20).unwrap();
            let outgoing = Plan::outgoing_bytes(world, legs, mib << 20);
            let incoming = Plan::staging_bytes(world, legs, mib << 20) - outgoing;
            prop_assert!(outgoing + incoming <= mib << 20);
            prop_assert_eq!(outgoing % 128, 0);
            for slice in 0..plan.n_slices() {
                let (reduce_slot, gather_slot) = (plan.reduce_slot_bytes(slice), plan.gather_slot_bytes(slice));
                let n_outgoing = if plan.one_hop().is_some() { 0 } else { world - 1 };
                prop_assert!(n_outgoing * reduce_slot <= outgoing && n_outgoing.min(1) * gather_slot <= outgoing);
                prop_assert!(world * reduce_slot.max(gather_slot) <= incoming);
                for owner in 0..world {
                    prop_assert!(plan.slice_tiles(owner, slice) * legs.reduce.tile_bytes() <= reduce_slot);
                    prop_assert!(plan.slice_tiles(owner, slice) * legs.gather.tile_bytes() <= gather_slot);
                }
            }
            for rank in 0..world {
                let owners = (0..world).filter(|owner| *owner != rank);
                let slots: Vec<_> = owners.map(|owner| Plan::outgoing_slot(rank, owner)).collect();
                prop_assert_eq!(slots, (0..world - 1).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn the_chunks_do_not_depend_on_the_buffer() {
        let small = Plan::new(10_000_000, 3, legs(4, 4), 1 << 20).unwrap();
        let large = Plan::new(10_000_000, 3, legs(4, 4), 64 << 20).unwrap();
        assert!(small.n_slices() > large.n_slices());
        for owner in 0..3 {
            assert_eq!(small.chunk(owner), large.chunk(owner));
        }
    }

    #[test]
    fn a_buffer_below_one_tile_per_rank_is_refused() {
        let needed_bytes = (2 * 300 - 1) * 4224;
        assert_eq!(Plan::new(1, 300, legs(4, 8), needed_bytes - 1), Err(BufferTooSmall { needed_bytes }));
        assert!(Plan::new(1, 300, legs(4, 8), needed_bytes).is_ok());
    }

    #[test]
    fn in_one_hop_there_is_one_chunk() {
        let plan = Plan::new(5 * TILE_ELEMS + 3, 2, legs(4, 4), 2 * 2176 * 3).unwrap();
        assert_eq!((plan.chunk(0), plan.chunk(1).len(), plan.n_slices()), (0..plan.count(), 0, 2));
        assert_eq!(Plan::new(5 * TILE_ELEMS, 2, legs(4, 8), 64 << 20).unwrap().chunk(0), 0..3 * TILE_ELEMS);
    }

    #[test]
    fn the_default_buffer_takes_64_mib_of_fp16_at_8_bits_in_one_slice() {
        for world in [3, 4, 8] {
            assert_eq!(Plan::new(32 << 20, world, legs(8, 8), 64 << 20).unwrap().n_slices(), 1, "{world} ranks");
        }
    }

    #[test]
    fn four_bits_of_64_mib_over_two_ranks_are_26_6_percent_of_the_bytes() {
        let plan = Plan::new(32 << 20, 2, legs(4, 4), 64 << 20).unwrap();
        assert_eq!(plan.n_slices(), 1);
        assert_eq!(plan.wire_bytes(), (32 << 20) / 4096 * 2176);
    }
}

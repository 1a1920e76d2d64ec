//! Where the fused kernel's receive areas have what.
//!
//! Every rank has an *area* that all ranks can write: for each channel a row of signals, [`SIGNAL_BYTES`] with a 32-bit
//! word for each sender; behind them, for each channel, hop and sender, a *ring* of [`SLOTS`] slots of one tile's payload.
//! The rings are as many and as long whatever the size of an operation, so an area is small enough for a GPU's L2 cache.
//! `kernels/all_reduce.cu` computes the same offsets.

use crate::codec::Legs;

/// Ranks that a fused all-reduce takes at most.
pub const MAX_WORLD: usize = 16;

/// Tiles that a ring holds.
pub const SLOTS: usize = 4;

/// Bytes of a channel's row of signals.
pub const SIGNAL_BYTES: usize = 128;

/// The receive area of one rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rings {
    /// Ranks that send, this one included (its own rings are not used).
    pub world: usize,
    /// The codecs of the two legs.
    pub legs: Legs,
    /// Channels that there is room for.
    pub channels: usize,
}

impl Rings {
    /// The area of as many channels as fit in `buffer_bytes`, but at most `channels`; `None` where not even one does.
    pub fn within(world: usize, legs: Legs, channels: usize, buffer_bytes: usize) -> Option<Self> {
        let per_channel = Rings { world, legs, channels: 1 }.area_bytes();
        // The kernel computes offsets in 32 bits.
        let fit = buffer_bytes.min(u32::MAX as usize) / per_channel;
        Some(Rings { world, legs, channels: channels.min(fit) }).filter(|rings| rings.channels > 0)
    }

    /// Bytes of the area, a multiple of 128.
    pub fn area_bytes(&self) -> usize {
        self.channels * (SIGNAL_BYTES + 2 * self.world * SLOTS * self.slot_bytes())
    }

    /// Bytes of a slot: a tile's payload in the wider leg, and the rest of its last cache line.
    pub fn slot_bytes(&self) -> usize {
        self.legs.reduce.tile_bytes().max(self.legs.gather.tile_bytes()).next_multiple_of(128)
    }

    /// Offset of the signal of `sender` to `channel`.
    pub fn signal(&self, channel: usize, sender: usize) -> usize {
        channel * SIGNAL_BYTES + sender * 4
    }

    /// Offset of the slot of `round` for what `sender` sends in `hop`, 0 or 1, over `channel`.
    pub fn slot(&self, channel: usize, hop: usize, sender: usize, round: usize) -> usize {
        let ring = (channel * 2 + hop) * self.world + sender;
        self.channels * SIGNAL_BYTES + (ring * SLOTS + round % SLOTS) * self.slot_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Codec, GroupSize, Width};

    fn legs(reduce: u8, gather: u8) -> Legs {
        let codec = |bits| Codec::plain(Width::new(bits).unwrap(), GroupSize::new(128).unwrap());
        Legs { reduce: codec(reduce), gather: codec(gather) }
    }

    #[test]
    fn signals_and_slots_do_not_overlap_and_fill_the_area() {
        let rings = Rings { world: 3, legs: legs(4, 8), channels: 5 };
        let mut ranges = Vec::new();
        for channel in 0..5 {
            for sender in 0..3 {
                ranges.push((rings.signal(channel, sender), 4));
                for hop in 0..2 {
                    for round in 0..SLOTS {
                        ranges.push((rings.slot(channel, hop, sender, round), rings.slot_bytes()));
                        assert_eq!(rings.slot(channel, hop, sender, round) % 128, 0);
                    }
                    assert_eq!(rings.slot(channel, hop, sender, 1), rings.slot(channel, hop, sender, 1 + SLOTS));
                }
            }
        }
        ranges.sort_unstable();
        assert!(ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
        let (at, n_bytes) = ranges[ranges.len() - 1];
        assert_eq!(at + n_bytes, rings.area_bytes());
    }

    #[test]
    fn a_buffer_bounds_the_channels() {
        let one = Rings { world: 2, legs: legs(4, 4), channels: 1 }.area_bytes();
        assert_eq!(Rings::within(2, legs(4, 4), 100, 10 * one + 5).unwrap().channels, 10);
        assert_eq!(Rings::within(2, legs(4, 4), 7, 10 * one).unwrap().channels, 7);
        assert_eq!(Rings::within(2, legs(4, 4), 7, one - 1), None);
        assert!(Rings::within(16, legs(8, 8), 100_000, usize::MAX).unwrap().area_bytes() <= u32::MAX as usize);
    }
}

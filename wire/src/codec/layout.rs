//! Where what stands in the payload of a tile.
//!
//! A tile is always encoded whole: past the last element, that element repeats. (So a short tile
//! needs no special case anywhere; a receiver ignores the repeats.) A payload is the *planes* of
//! the quants, widest first, then the groups' parameters; every part is a multiple of 64 bytes, and
//! of 128 in the plain code.
//!
//! Quants are split by bits (*FlashCommunication V2*, arXiv 2508.03760): 8; 4+2+1; 4+2; 4+1; 4;
//! 2+1; 2. The widest plane holds the lowest bits. Within a tile the elements are dealt to 128
//! threads so that every access of the kernels is one vector per thread: element `i` is quant `k`
//! of thread `t`, where (`warp`, `row`, `lane`, `e`) are the digits of `i` in the bases (4, 4, 32,
//! 8), `t = warp * 32 + lane` and `k = row * 8 + e`. Thread `t` owns p consecutive 32-bit words of
//! a plane of p bits, little-endian (the plane of 8 bits is two half planes of 4 words a thread).
//! With `n = k / 4`, quant `k` stands in word `n * p / 8`, in byte `k % 4`, from bit `n * p % 8`
//! on: so four quants, one in each byte, move at a time. Whatever there is per group lies in the
//! order (warp, lane / (g / 8), row), so that a thread's four groups are one access.

use super::{Codec, TILE_ELEMS, Width};
use crate::element::Element;

/// Elements of a tile that one warp codes.
pub const WARP_ELEMS: usize = 1024;
/// Elements that a warp loads at once: 32 lanes, 8 elements (16 bytes) each.
pub const ROW_ELEMS: usize = 256;
/// Elements that a lane loads at once.
pub const LANE_ELEMS: usize = 8;

impl Width {
    /// The bit planes, widest first: (bits of the plane, position of its lowest bit in the quant).
    fn planes(self) -> impl Iterator<Item = (usize, u32)> {
        let bits = self.bits();
        let mut shift = 0;
        [8u8, 4, 2, 1].into_iter().filter(move |plane| bits & plane != 0).map(move |plane| {
            let at = shift;
            shift += u32::from(plane);
            (usize::from(plane), at)
        })
    }
}

impl Codec {
    /// The how-many-eth of the groups, as their parameters lie, is the one that starts at element
    /// `start`.
    pub(super) fn group_at(self, start: usize) -> usize {
        let Place { warp, row, lane, .. } = Place::of(start);
        let groups_per_row = ROW_ELEMS / self.group.n_elems();
        let column = lane * LANE_ELEMS / self.group.n_elems();
        (warp * groups_per_row + column) * (WARP_ELEMS / ROW_ELEMS) + row
    }

    pub(super) fn write_quant(self, i: usize, quant: u8, payload: &mut [u8]) {
        self.for_each_plane(i, |byte, bit, mask, shift| payload[byte] |= ((quant >> shift) & mask) << bit);
    }

    pub(super) fn read_quant(self, i: usize, payload: &[u8]) -> u8 {
        let mut quant = 0;
        self.for_each_plane(i, |byte, bit, mask, shift| quant |= ((payload[byte] >> bit) & mask) << shift);
        quant
    }

    /// Calls `visit(byte of the payload, bit in it, mask of the plane, shift in the quant)` for
    /// each plane of quant `i`.
    fn for_each_plane(self, i: usize, mut visit: impl FnMut(usize, usize, u8, u32)) {
        let place = Place::of(i);
        let (thread, k) = (place.thread(), place.row * LANE_ELEMS + place.e);
        let mut plane_at = 0;
        for (plane_bits, shift) in self.width.planes() {
            let n = k / 4;
            let word = n * plane_bits / 8;
            let word_at = match plane_bits {
                8 => word / 4 * TILE_ELEMS / 2 + (thread * 4 + word % 4) * 4,
                _ => (thread * plane_bits + word) * 4,
            };
            visit(plane_at + word_at + k % 4, n * plane_bits % 8, u8::MAX >> (8 - plane_bits), shift);
            plane_at += TILE_ELEMS / 8 * plane_bits;
        }
    }
}

/// The element that stands at byte `at`.
pub(super) fn stored<E: Element>(payload: &[u8], at: usize) -> E {
    E::from_bits(u16::from_le_bytes([payload[at], payload[at + 1]]))
}

/// Stores an element at byte `at`.
pub(super) fn store<E: Element>(payload: &mut [u8], at: usize, x: E) {
    payload[at..at + 2].copy_from_slice(&x.to_bits().to_le_bytes());
}

/// The digits of an element's index in a tile, in the bases (4, 4, 32, 8).
pub(super) struct Place {
    pub warp: usize,
    pub row: usize,
    pub lane: usize,
    pub e: usize,
}

impl Place {
    pub fn of(i: usize) -> Self {
        Place {
            warp: i / WARP_ELEMS,
            row: i % WARP_ELEMS / ROW_ELEMS,
            lane: i % ROW_ELEMS / LANE_ELEMS,
            e: i % LANE_ELEMS,
        }
    }

    pub fn thread(&self) -> usize {
        self.warp * 32 + self.lane
    }
}

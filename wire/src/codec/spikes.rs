//! Spike reserving (*FlashCommunication V2*, arXiv 2508.03760): the minimum and the maximum of a group travel in the
//! storage type, with their places; scale and zero point come from the rest.
//!
//! ```text
//! k      = x with the last 7 bits of its fp32 replaced by its place in the group: no two are equal
//! i, j   = the places of the least and of the greatest k; below, k stands for it with those bits cleared
//! z, s   = as in the plain code, of the second least k as minimum and the second greatest as maximum
//! r      = 1 / (s * (2^b - 1)), or 0 where that is not finite
//! t      = fma(x, r, -(z * r)), but at least 0 and at most 1
//! q      = rint(t * (2^b - 1)), rounded once
//! x'     = fma(q, s, z), but at i the least k and at j the greatest, rounded to nearest; -0 is written as +0
//! ```
//!
//! Elements have zeros in their last bits, so nothing is lost of them; of sums, 2^-16. Thus a GPU finds extremes and
//! places at once: of equal elements the first is the least and the last the greatest, the other way round below 0. The
//! bounds of `t` cost it nothing, and give the spikes codes, 0 and 2^b - 1, without a case of their own (where `r` is
//! 0, all are 0).
//!
//! A group that holds a NaN or an infinity, or whose `z` or `s * (2^b - 1)` is not finite, is written with NaN for `s`,
//! `z` and both spikes, and 0 for codes and places: it decodes to NaN throughout. A spike of a sum that the storage
//! type cannot hold is an infinity, there only.
//!
//! Behind scales and zeros stand the spikes, minimum first, 4 bytes per group, then their places, 2 bytes per group; a
//! thread's are vectors of 16, 16 and 8 bytes. In all 80 bits per group, 0.625 per element at 128.

use super::{Codec, GroupParams, META_BYTES, TILE_ELEMS, store, stored};
use crate::element::Element;

/// Bytes of one group's spikes and their places.
pub(super) const GROUP_BYTES: usize = 6;

/// The bits of an fp32 that a place in a group takes.
const PLACE_BITS: u32 = 127;

/// One value that travels by itself.
#[derive(Clone, Copy)]
struct Spike {
    place: usize,
    value: f32,
}

impl Codec {
    pub(super) fn encode_spikes<E: Element>(self, group: &[f32], start: usize, payload: &mut [u8]) {
        let mut keys: Vec<f32> = group.iter().zip(0..).map(|(x, place)| with_place(*x, place)).collect();
        keys.sort_by(f32::total_cmp);
        let (mut low, mut high) = (Spike::of(keys[0]), Spike::of(keys[keys.len() - 1]));
        let rest = [keys[1], keys[keys.len() - 2]].map(|key| with_place(key, 0));
        let mut params = self.group_params::<E>(rest.into_iter());
        let max_code = f32::from(self.width.max_code());
        let range = params.scale * max_code;
        if !group.iter().all(|x| x.is_finite()) || !range.is_finite() {
            params = GroupParams { scale: f32::NAN, zero: f32::NAN };
            low = Spike { place: 0, value: f32::NAN };
            high = low;
        }
        self.write_params::<E>(start, params, payload);
        let (values_at, places_at) = self.spikes_at(start);
        for (n, spike) in [low, high].into_iter().enumerate() {
            store::<E>(payload, values_at + n * 2, spike.value + 0.0);
            payload[places_at + n] = spike.place as u8;
        }
        let inverse = 1.0 / range;
        let inverse = if inverse.is_finite() { inverse } else { 0.0 };
        for (i, x) in group.iter().enumerate() {
            let t = if params.scale.is_nan() { 0.0 } else { x.mul_add(inverse, -(params.zero * inverse)) };
            let exact = f64::from(t.clamp(0.0, 1.0)) * f64::from(max_code);
            self.write_code(start + i, exact.round_ties_even() as u8, payload);
        }
    }

    pub(super) fn decode_spikes<E: Element>(self, payload: &[u8], start: usize, group: &mut [f32]) {
        self.decode_plain::<E>(payload, start, group);
        for (place, value) in self.read_spikes::<E>(payload, start) {
            if let Some(x) = group.get_mut(place) {
                *x = value.to_f32();
            }
        }
    }

    pub(super) fn decode_spikes_to<E: Element>(self, payload: &[u8], start: usize, group: &mut [E]) {
        self.decode_plain_to(payload, start, group);
        for (place, value) in self.read_spikes(payload, start) {
            if let Some(x) = group.get_mut(place) {
                *x = value;
            }
        }
    }

    /// Places and values of the group's minimum and maximum.
    fn read_spikes<E: Element>(self, payload: &[u8], start: usize) -> [(usize, E); 2] {
        let (values_at, places_at) = self.spikes_at(start);
        [0, 1].map(|n| (usize::from(payload[places_at + n]), stored(payload, values_at + n * 2)))
    }

    /// Bytes of the payload where the spikes and their places stand of the group that starts at element `start`.
    fn spikes_at(self, start: usize) -> (usize, usize) {
        let n_groups = TILE_ELEMS / self.group.n_elems();
        let values = self.codes_bytes() + n_groups * META_BYTES;
        (values + self.group_at(start) * 4, values + n_groups * 4 + self.group_at(start) * 2)
    }
}

impl Spike {
    fn of(key: f32) -> Self {
        Spike { place: (key.to_bits() & PLACE_BITS) as usize, value: with_place(key, 0) }
    }
}

/// `x` with `place` in its last bits.
fn with_place(x: f32, place: u32) -> f32 {
    f32::from_bits(x.to_bits() & !PLACE_BITS | place)
}

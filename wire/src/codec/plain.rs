//! The code `plain`: a scale and a zero point for each group, from its extremes.
//!
//! # Arithmetic
//!
//! A quantization group is g consecutive elements (Flash Communication, arXiv 2412.04964,
//! asymmetric). All arithmetic is IEEE fp32, rounding to nearest even unless said otherwise, with
//! subnormals kept:
//!
//! ```text
//! z  = min(group) rounded toward -inf to the storage type
//! s  = (max(group) - z) / (2^b - 1) rounded toward +inf to the storage type; in both, -0 is written as +0
//! q  = rint((x - z) * (1/s)), or 0 where 1/s is not finite
//! x' = fma(q, s, z)
//! ```
//!
//! The directed roundings see to it that q stays within 0 and 2^b - 1 without a clamp. A group that
//! holds a NaN or an infinity, or whose `z` or `s` is not finite, is written with `s = z = NaN` and
//! `q = 2^b - 1`: it decodes to NaN throughout, so overflow checks downstream still fire.
//!
//! # Layout
//!
//! Behind the quants stand `s` and `z` of each group, 2 bytes each: 16 bytes per thread.

use super::Codec;
use super::layout::{store, stored};
use crate::element::Element;

/// Bytes of one group's scale and zero.
pub(super) const GROUP_BYTES: usize = 4;

/// Scale and zero point of one group, as fp32 values that the storage type holds exactly.
#[derive(Clone, Copy, Debug)]
struct GroupParams {
    scale: f32,
    zero: f32,
}

impl Codec {
    pub(super) fn encode_plain<E: Element>(self, group: &[f32], start: usize, payload: &mut [u8]) {
        let params = self.group_params::<E>(group.iter().copied());
        self.write_params::<E>(start, params, payload);
        for (i, x) in group.iter().enumerate() {
            self.write_quant(start + i, self.quantize(*x, params), payload);
        }
    }

    pub(super) fn decode_plain<E: Element>(self, payload: &[u8], start: usize, group: &mut [f32]) {
        let GroupParams { scale, zero } = self.read_params::<E>(start, payload);
        for (i, value) in group.iter_mut().enumerate() {
            *value = f32::from(self.read_quant(start + i, payload)).mul_add(scale, zero);
        }
    }

    pub(super) fn decode_plain_to<E: Element>(self, payload: &[u8], start: usize, group: &mut [E]) {
        let GroupParams { scale, zero } = self.read_params::<E>(start, payload);
        for (i, x) in group.iter_mut().enumerate() {
            *x = E::fused(f32::from(self.read_quant(start + i, payload)), scale, zero);
        }
    }

    /// In fp32: both values, their sum, its product with `scale`; rounded to the storage type at the end.
    pub(super) fn decode_both_plain<E: Element>(self, payloads: [&[u8]; 2], start: usize, scale: f32, group: &mut [E]) {
        let mut values = [(); 2].map(|()| vec![0.0; group.len()]);
        for (payload, values) in payloads.into_iter().zip(&mut values) {
            self.decode_plain::<E>(payload, start, values);
        }
        for (i, x) in group.iter_mut().enumerate() {
            *x = E::from_f32_nearest((values[0][i] + values[1][i]) * scale);
        }
    }

    fn group_params<E: Element>(self, values: impl Iterator<Item = f32>) -> GroupParams {
        let (mut min, mut max, mut all_finite) = (f32::INFINITY, f32::NEG_INFINITY, true);
        for x in values {
            (min, max) = (min.min(x), max.max(x));
            all_finite &= x.is_finite();
        }
        // Adding +0 turns -0 into +0: which of the two is the minimum, or the maximum, depends on
        // the order of comparison.
        let zero = E::from_f32_down(min).to_f32() + 0.0;
        let scale = E::from_f32_up((max - zero) / f32::from(self.width.max_quant())).to_f32() + 0.0;
        if all_finite && zero.is_finite() && scale.is_finite() {
            GroupParams { scale, zero }
        } else {
            GroupParams { scale: f32::NAN, zero: f32::NAN }
        }
    }

    fn quantize(self, x: f32, GroupParams { scale, zero }: GroupParams) -> u8 {
        if scale.is_nan() {
            return self.width.max_quant(); // a group that is not finite; its quants do not matter
        }
        let inverse = 1.0 / scale;
        if !inverse.is_finite() {
            return 0; // a constant group, or a scale so small that its inverse overflows
        }
        let q = ((x - zero) * inverse).round_ties_even();
        debug_assert!((0.0..=f32::from(self.width.max_quant())).contains(&q), "{x} {zero} {scale}");
        q as u8
    }

    fn write_params<E: Element>(self, start: usize, params: GroupParams, payload: &mut [u8]) {
        let at = self.quants_bytes() + self.group_at(start) * GROUP_BYTES;
        store(payload, at, E::from_f32_nearest(params.scale));
        store(payload, at + 2, E::from_f32_nearest(params.zero));
    }

    fn read_params<E: Element>(self, start: usize, payload: &[u8]) -> GroupParams {
        let at = self.quants_bytes() + self.group_at(start) * GROUP_BYTES;
        GroupParams { scale: stored::<E>(payload, at).to_f32(), zero: stored::<E>(payload, at + 2).to_f32() }
    }
}

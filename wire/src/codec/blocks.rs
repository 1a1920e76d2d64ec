//! The code `blocks`. Its name comes from blocks of 8 elements, which are called *octets* here, since a block is CUDA's.
//!
//! An octet is what one lane holds of a row. Each is transformed, and coded with a scale of its own.
//! An outlier spoils 8 elements instead of a group, and less of it since the transform spreads it over them; nothing
//! but the largest value of a group passes between lanes. The scale is symmetric: 2^b cells between -L and L, decoded
//! to their middles. L is a *level* of 0 to 15 times the group's *unit*. A group with values much larger than its others
//! has bands, by which L is less than that, and the cells are on both sides of B instead of 0: `scale.rs`.
//!
//! # The transform
//!
//! ```text
//! e and e + 4: (a / 8 + b / 8, a / 8 - b / 8)
//! e and e + 2: (a + b, a - b) for even e, (a - b, a + b) for odd e
//! e and e + 1: (a + b, a - b)
//! ```
//!
//! It is applied to elements as they are stored, two at a time, so every result is rounded to the storage type, as is
//! `a / 8`, but not `b / 8`, which is part of a fused multiply-add. It is an eighth of a Hadamard matrix, thus nothing
//! overflows, of the elements with the signs of 3 and 7 changed: so what all 8 have in common spreads over four values
//! and does not make one large. Its inverse is the matrix, then the signs. That is exact: a decoded octet is a scale
//! times integers.
//!
//! # The code
//!
//! In fp32, rounding to nearest unless said otherwise; `up7` rounds up to 7 significant bits, and `inv` is below. `max`
//! does not look at constant octets, which come next.
//!
//! ```text
//! unit U  = max(up7(max |v| of the group * ((1 + 2^-11) / 15)), least)
//! level k = ceil(max |v| of the octet * (inv(U) * (1 + 2^-12))), the product unrounded
//! step s  = L / 2^(b-1), where L = U * k and B = 0, but for bands
//! q       = 2^(b-1) + floor((v - B or -B, as v) * inv(s)), the difference exact, the product unrounded
//! v'      = (q - 2^(b-1) + 1/2) * s + B or -B, as q - 2^(b-1) + 1/2; exact
//! x'      = fma(I, s, fma(S, B, +0)), of elements 3 and 7 with -s and -B, in fp32
//! ```
//!
//! where I is the Hadamard matrix times q - 2^(b-1) + 1/2, and S that times the signs of it: integers. The margins see to
//! it that k is 1 to 15 and q within its bits without a clamp, and that U * k is exact in the storage type: `least` is
//! 2^-17 in fp16, 2^-100 in bf16.
//!
//! # Two ranks' octets
//!
//! In one hop, where a and b are those of ranks 0 and 1, and J = I * 2^(2-b), h = L / 2 * scale:
//!
//! ```text
//! x' = fma(J_b, h_b or -h_b, fma(J_a, h_a or -h_a, +0))
//! ```
//!
//! in fp16 with h rounded to it (which it is, but for averages of the very smallest); in bf16 in fp32, rounded at the end.
//! Where one of the two is constant, or its group has bands, x' is (c_a + c_b) * scale in fp32, of both as elements, rounded to the storage type.
//!
//! # Constant octets
//!
//! The level 0 says that all 8 elements are the same one, c, which stands in the octet's quants as it is stored: quant e
//! has its bits e * b to e * b + b - 1, and 0 where there are none. It decodes to (c/2, c/2, c/2, -c/2, 0, 0, 0, 0), or to
//! c 8 times. Two kinds of octets are coded so, and neither makes the unit of its group larger:
//!
//! - Equal elements, whose transform is (v, v, v, -v, 0, 0, 0, 0): c is 2 * v + 0 rounded to the storage type, so they
//!   arrive as they are, and their sum over ranks rounded once. (Zeros arrive as +0. Of elements below 2^-11 in fp16 the
//!   transform has rounded off 2^-22 at most.)
//! - Octets with a value that is a NaN, an infinity, or greater than 120000 in fp16, 2^123 in bf16: c is NaN. A value that
//!   is not finite thus reaches no element beyond its octet (invariant I8), and overflow checks downstream still fire.
//!
//! `inv(x)` is what a GPU computes in 5 instructions, at most 7e-6 below 1/x: the float with the bits 0x7ef311c7 less
//! those of x, then twice `y = fma(y, fma(-x, y, 1), y)`.
//!
//! # Layout
//!
//! Behind the quants stand the levels, 2 bytes per thread with that of row r in byte r % 2, from bit r / 2 * 4 on (so
//! two rows' move at a time), then the units, 2 bytes per group, 8 per thread. That is 0.75 bits per element at a
//! group of 64.

use super::layout::{Place, store, stored};
use super::scale::{MAX_LEVEL, Scale, inverse};
use super::{Codec, LANE_ELEMS, TILE_ELEMS};
use crate::element::Element;

/// Bytes of one group's unit.
pub(super) const GROUP_BYTES: usize = 2;

/// Bytes of a tile's levels: 4 bits per octet.
pub(super) const LEVELS_BYTES: usize = TILE_ELEMS / LANE_ELEMS / 2;

/// Transforms one octet.
pub(super) fn enter<E: Element>(octet: &mut [f32]) {
    // Rounding a sum to fp32 first changes nothing: 24 bits are 2 and twice as many as elements have.
    let round = |x: f32| E::from_f32_nearest(x).to_f32();
    for e in 0..4 {
        let (a, b) = (round(octet[e] * 0.125), octet[e + 4] * 0.125);
        (octet[e], octet[e + 4]) = (round(a + b), round(a - b));
    }
    for e in [0, 1, 4, 5] {
        let (a, b) = (octet[e], octet[e + 2]);
        let (sum, difference) = (round(a + b), round(a - b));
        (octet[e], octet[e + 2]) = if e % 2 == 0 { (sum, difference) } else { (difference, sum) };
    }
    for e in [0, 2, 4, 6] {
        let (a, b) = (octet[e], octet[e + 1]);
        (octet[e], octet[e + 1]) = (round(a + b), round(a - b));
    }
}

impl Codec {
    pub(super) fn encode_blocks<E: Element>(self, group: &[f32], start: usize, payload: &mut [u8]) {
        let octets = || group.chunks_exact(LANE_ELEMS);
        let scale = Scale::of::<E>(octets().filter(|octet| constant::<E>(octet).is_none()));
        store(payload, self.unit_at(start), scale.to_element::<E>());
        for (n, octet) in octets().enumerate() {
            let at = start + n * LANE_ELEMS;
            if let Some(element) = constant::<E>(octet) {
                self.write_constant(at, element, payload); // and the level stays 0
                continue;
            }
            let level = scale.level(octet);
            let (byte, bit) = self.level_at(at);
            payload[byte] |= level << bit;
            let (base, inverse) = (scale.base(level), inverse(self.step(scale, level)));
            for (e, v) in octet.iter().enumerate() {
                self.write_quant(at + e, self.cell(v - base.copysign(*v), inverse), payload);
            }
        }
    }

    pub(super) fn decode_blocks<E: Element>(self, payload: &[u8], start: usize, group: &mut [f32]) {
        let scale = self.read_scale::<E>(start, payload);
        for (n, octet) in group.chunks_mut(LANE_ELEMS).enumerate() {
            let at = start + n * LANE_ELEMS;
            match self.read_level(at, payload) {
                0 => {
                    let half = self.read_constant::<E>(at, payload).to_f32() / 2.0;
                    let values = [half, half, half, -half, 0.0, 0.0, 0.0, 0.0];
                    octet.iter_mut().zip(values).for_each(|(v, value)| *v = value);
                }
                level => {
                    let (base, step) = (scale.base(level), self.step(scale, level));
                    for (e, v) in octet.iter_mut().enumerate() {
                        let middle = self.middle(at + e, payload);
                        *v = middle * step + base.copysign(middle);
                    }
                }
            }
        }
    }

    pub(super) fn decode_blocks_to<E: Element>(self, payload: &[u8], start: usize, group: &mut [E]) {
        let scale = self.read_scale::<E>(start, payload);
        for (n, octet) in group.chunks_mut(LANE_ELEMS).enumerate() {
            self.decode_octet_to(payload, start + n * LANE_ELEMS, scale, octet);
        }
    }

    /// The octet that starts at element `at`.
    fn decode_octet_to<E: Element>(self, payload: &[u8], at: usize, scale: Scale, octet: &mut [E]) {
        let level = self.read_level(at, payload);
        if level == 0 {
            octet.fill(self.read_constant(at, payload));
            return;
        }
        let (step, base) = (self.step(scale, level), scale.base(level));
        let integers = self.integers(at, payload);
        let signs = if base == 0.0 { [0.0; LANE_ELEMS] } else { self.signs(at, payload) };
        for (e, x) in octet.iter_mut().enumerate() {
            let (step, base) = if e % 4 == 3 { (-step, -base) } else { (step, base) };
            *x = E::from_f32_nearest(integers[e].mul_add(step, signs[e].mul_add(base, 0.0)));
        }
    }

    /// I of the octet that starts at element `at`.
    fn integers(self, at: usize, payload: &[u8]) -> [f32; LANE_ELEMS] {
        let mut integers = std::array::from_fn(|e| self.middle(at + e, payload));
        hadamard(&mut integers);
        integers
    }

    /// S of it.
    fn signs(self, at: usize, payload: &[u8]) -> [f32; LANE_ELEMS] {
        let mut signs = std::array::from_fn(|e| self.middle(at + e, payload).signum());
        hadamard(&mut signs);
        signs
    }

    pub(super) fn decode_both_blocks<E: Element>(
        self,
        payloads: [&[u8]; 2],
        start: usize,
        scale: f32,
        group: &mut [E],
    ) {
        let scales = payloads.map(|payload| self.read_scale::<E>(start, payload));
        for (n, octet) in group.chunks_mut(LANE_ELEMS).enumerate() {
            let at = start + n * LANE_ELEMS;
            let levels = payloads.map(|payload| self.read_level(at, payload));
            if levels.contains(&0) || scales.iter().any(|scale| scale.has_bands()) {
                let elements = [0, 1].map(|rank| {
                    let mut elements = [E::from_bits(0); LANE_ELEMS];
                    self.decode_octet_to(payloads[rank], at, scales[rank], &mut elements);
                    elements.map(E::to_f32)
                });
                for (e, x) in octet.iter_mut().enumerate() {
                    *x = E::from_f32_nearest((elements[0][e] + elements[1][e]) * scale);
                }
                continue;
            }
            let integers = payloads.map(|payload| self.integers(at, payload).map(|i| i * 2.0 / self.half_range()));
            let halves = [0, 1].map(|rank| scales[rank].bound(levels[rank]) / 2.0 * scale);
            for (e, x) in octet.iter_mut().enumerate() {
                let sign = if e % 4 == 3 { -1.0 } else { 1.0 };
                *x = E::sum_of_products([integers[0][e], integers[1][e]], halves.map(|half| half * sign));
            }
        }
    }

    /// Writes the element of the constant octet that starts at element `i` of the tile.
    fn write_constant<E: Element>(self, i: usize, element: E, payload: &mut [u8]) {
        let bits = usize::from(self.width.bits());
        for e in 0..16usize.div_ceil(bits) {
            self.write_quant(i + e, (element.to_bits() >> (e * bits)) as u8 & self.width.max_quant(), payload);
        }
    }

    fn read_constant<E: Element>(self, i: usize, payload: &[u8]) -> E {
        let bits = usize::from(self.width.bits());
        E::from_bits(
            (0..16usize.div_ceil(bits)).fold(0, |c, e| c | u16::from(self.read_quant(i + e, payload)) << (e * bits)),
        )
    }

    /// The width of a cell. Exact.
    fn step(self, scale: Scale, level: u8) -> f32 {
        scale.bound(level) / self.half_range()
    }

    /// Cells on one side of 0, 2^(b-1).
    fn half_range(self) -> f32 {
        f32::from(self.width.max_quant() / 2 + 1)
    }

    /// The cell of `v`, which has been brought to 0 by B.
    fn cell(self, v: f32, inverse: f32) -> u8 {
        let q = (f64::from(v) * f64::from(inverse)).floor() + f64::from(self.half_range());
        debug_assert!((0.0..=f64::from(self.width.max_quant())).contains(&q), "{v} {inverse}");
        q as u8
    }

    /// The middle of cell `i`, in cells.
    fn middle(self, i: usize, payload: &[u8]) -> f32 {
        f32::from(self.read_quant(i, payload)) - self.half_range() + 0.5
    }

    fn read_level(self, i: usize, payload: &[u8]) -> u8 {
        let (byte, bit) = self.level_at(i);
        payload[byte] >> bit & MAX_LEVEL
    }

    /// Byte of the payload, and bit in it, where the level stands of the octet that starts at element `i`.
    fn level_at(self, i: usize) -> (usize, usize) {
        let place = Place::of(i);
        (self.quants_bytes() + place.thread() * 2 + place.row % 2, place.row / 2 * 4)
    }

    /// Of the group that starts at element `start`.
    fn read_scale<E: Element>(self, start: usize, payload: &[u8]) -> Scale {
        Scale::from_element(stored::<E>(payload, self.unit_at(start)))
    }

    /// Byte of the payload where the unit stands of the group that starts at element `start`.
    fn unit_at(self, start: usize) -> usize {
        self.quants_bytes() + LEVELS_BYTES + self.group_at(start) * GROUP_BYTES
    }
}

/// Multiplies an octet with the Hadamard matrix. Exact, of the middles of cells.
fn hadamard(octet: &mut [f32]) {
    for distance in [1, 2, 4] {
        for i in (0..LANE_ELEMS).filter(|i| i & distance == 0) {
            let (a, b) = (octet[i], octet[i + distance]);
            (octet[i], octet[i + distance]) = (a + b, a - b);
        }
    }
}

/// The element of an octet that is coded as a constant, from its transform.
fn constant<E: Element>(octet: &[f32]) -> Option<E> {
    let v = octet[0];
    if octet == [v, v, v, -v, 0.0, 0.0, 0.0, 0.0] {
        Some(E::from_f32_nearest(v + v + 0.0))
    } else if octet.iter().all(|v| v.abs() <= E::GREATEST) {
        None
    } else {
        Some(E::CANONICAL_NAN)
    }
}

//! What the octets of a group in the code blocks are scaled by: the group's unit, and whether it has *bands*.
//!
//! Where one value of a group is much larger than the others, as the hot channels of a model's activations are, the
//! transform makes 8 values of it that are nearly equal but for their signs, and a group's unit that is coarse for all
//! else. Such a group has a *shift* w of 2 or 4, and then
//!
//! ```text
//! an octet of level 15:  |v| stands between B and B + L, where L = 15 * U / 2^w and B = 15 * U - L
//! any other:             L = U * k / 2^(w-1)
//! ```
//!
//! The encoder takes the larger shift that all octets of the group allow: one of level 15 where every |v| is greater
//! than B, any other where the k of the smaller unit, worked out as it is of U, is at most 14, and a constant always. A
//! unit that is `least` has none. So hot octets are 4 or 16 times as exact, and what stands beside them 2 or 8 times.
//!
//! The stored unit, which needs 7 significant bits, tells of the shift: its sign is set where there is one, and its last
//! bit where that is 4.

use crate::element::Element;

/// The greatest level.
pub const MAX_LEVEL: u8 = 15;

/// The largest value of a group times this is 1/15 of it and a margin.
const UNIT_SHARE: f32 = (1.0 + 1.0 / 2048.0) / MAX_LEVEL as f32;
/// A margin of half of that: levels are at most 15, and what they bound is strictly within.
const LEVEL_MARGIN: f32 = 1.0 + 1.0 / 4096.0;

/// By how many powers of two.
const SHIFTS: [i32; 2] = [2, 4];

const SIGN: u16 = 0x8000;
/// The last bit of a unit.
const LAST: u16 = 1;

/// A group's unit U, and its shift w; 0: none.
#[derive(Clone, Copy)]
pub(super) struct Scale {
    unit: f32,
    shift: i32,
}

impl Scale {
    /// Of a group with these octets, without the constant ones.
    pub fn of<'a, E: Element>(octets: impl Iterator<Item = &'a [f32]> + Clone) -> Self {
        let unit = unit::<E>(octets.clone().map(largest).fold(0.0, f32::max));
        let plain = Self { unit, shift: 0 };
        let is_allowed = |scale: &Self| octets.clone().all(|octet| scale.allows(octet));
        let shifted = SHIFTS.into_iter().rev().map(|shift| Self { unit, shift }).find(is_allowed);
        shifted.filter(|_| unit > E::LEAST_UNIT).unwrap_or(plain)
    }

    pub fn from_element<E: Element>(stored: E) -> Self {
        let bits = stored.to_bits();
        let shift = if bits & SIGN == 0 { 0 } else { SHIFTS[usize::from(bits & LAST)] };
        let unit = if shift == 0 { stored } else { E::from_bits(bits & !(SIGN | LAST)) };
        Self { unit: unit.to_f32(), shift }
    }

    pub fn to_element<E: Element>(self) -> E {
        let shift = SHIFTS.iter().position(|shift| *shift == self.shift);
        E::from_bits(E::from_f32_nearest(self.unit).to_bits() | shift.map_or(0, |n| SIGN | n as u16))
    }

    /// Whether there are bands.
    pub const fn has_bands(self) -> bool {
        self.shift != 0
    }

    /// The level of an octet that is not constant: the least whose L is greater than every value of it.
    pub fn level(self, octet: &[f32]) -> u8 {
        match level(octet, self.unit) {
            MAX_LEVEL => MAX_LEVEL,
            _ => level(octet, self.others_unit()),
        }
    }

    /// L, what the magnitudes in an octet are less than, above B. Exact.
    pub fn bound(self, level: u8) -> f32 {
        if self.is_band(level) { self.whole() / power(self.shift) } else { self.others_unit() * f32::from(level) }
    }

    /// B, what they are greater than. Exact.
    pub fn base(self, level: u8) -> f32 {
        if self.is_band(level) { self.whole() - self.bound(level) } else { 0.0 }
    }

    fn is_band(self, level: u8) -> bool {
        self.has_bands() && level == MAX_LEVEL
    }

    fn whole(self) -> f32 {
        self.unit * f32::from(MAX_LEVEL)
    }

    /// The unit of octets that are no band.
    fn others_unit(self) -> f32 {
        if self.has_bands() { self.unit / power(self.shift - 1) } else { self.unit }
    }

    fn allows(self, octet: &[f32]) -> bool {
        if level(octet, self.unit) == MAX_LEVEL {
            octet.iter().all(|v| v.abs() > self.base(MAX_LEVEL))
        } else {
            levels(octet, self.others_unit()) < f64::from(MAX_LEVEL)
        }
    }
}

fn power(shift: i32) -> f32 {
    (shift as f32).exp2()
}

/// The least multiple of a unit that is greater than every value.
fn levels(octet: &[f32], unit: f32) -> f64 {
    let per_unit = inverse(unit) * LEVEL_MARGIN;
    (f64::from(largest(octet)) * f64::from(per_unit)).ceil()
}

fn level(octet: &[f32], unit: f32) -> u8 {
    let level = levels(octet, unit);
    debug_assert!((1.0..=f64::from(MAX_LEVEL)).contains(&level), "{octet:?} {unit}");
    level as u8
}

/// The unit of a group whose largest value is that.
fn unit<E: Element>(largest: f32) -> f32 {
    let share = largest * UNIT_SHARE;
    let low_bits = (1 << 17) - 1; // of the mantissa's 23, all but 6
    f32::from_bits((share.to_bits() + low_bits) & !low_bits).max(E::LEAST_UNIT)
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest, v| largest.max(v.abs()))
}

/// About 1 / `x`, of a positive `x`.
pub(super) fn inverse(x: f32) -> f32 {
    let y = f32::from_bits(0x7ef3_11c7 - x.to_bits());
    let y = y.mul_add((-x).mul_add(y, 1.0), y);
    y.mul_add((-x).mul_add(y, 1.0), y)
}

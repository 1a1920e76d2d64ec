//! The two storage types whose sums are compressed, and the directed roundings that the codec needs of them.

use half::{bf16, f16};

/// A 16-bit floating-point storage type: fp16 ([`f16`]) or bf16 ([`struct@bf16`]).
pub trait Element: Copy + PartialEq + std::fmt::Debug + Send + Sync + 'static {
    /// The one NaN that the codec writes (all of CUDA's conversions produce it, too).
    const CANONICAL_NAN: Self;
    /// Bits of the value, as stored.
    fn to_bits(self) -> u16;
    /// The value with these bits.
    fn from_bits(bits: u16) -> Self;
    /// Exact widening.
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even, overflow to infinity, any NaN to [`Element::CANONICAL_NAN`].
    fn from_f32_nearest(x: f32) -> Self;

    /// Rounds toward negative infinity; NaN to [`Element::CANONICAL_NAN`].
    fn from_f32_down(x: f32) -> Self {
        let nearest = Self::from_f32_nearest(x);
        if nearest.to_f32() > x { nearest.next_down() } else { nearest }
    }

    /// Rounds toward positive infinity; NaN to [`Element::CANONICAL_NAN`].
    fn from_f32_up(x: f32) -> Self {
        if x.is_nan() {
            return Self::CANONICAL_NAN;
        }
        Self::from_bits(Self::from_f32_down(-x).to_bits() ^ SIGN)
    }

    /// The next smaller value; only for values above negative infinity.
    fn next_down(self) -> Self {
        match self.to_bits() {
            0 => Self::from_bits(SIGN | 1),
            bits if bits & SIGN == 0 => Self::from_bits(bits - 1),
            bits => Self::from_bits(bits + 1),
        }
    }
}

/// Sign bit of both storage types.
const SIGN: u16 = 0x8000;

impl Element for f16 {
    const CANONICAL_NAN: Self = f16::from_bits(0x7fff);
    fn to_bits(self) -> u16 {
        self.to_bits()
    }
    fn from_bits(bits: u16) -> Self {
        f16::from_bits(bits)
    }
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    fn from_f32_nearest(x: f32) -> Self {
        if x.is_nan() { Self::CANONICAL_NAN } else { f16::from_f32(x) }
    }
}

impl Element for bf16 {
    const CANONICAL_NAN: Self = bf16::from_bits(0x7fff);
    fn to_bits(self) -> u16 {
        self.to_bits()
    }
    fn from_bits(bits: u16) -> Self {
        bf16::from_bits(bits)
    }
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    fn from_f32_nearest(x: f32) -> Self {
        if x.is_nan() { Self::CANONICAL_NAN } else { bf16::from_f32(x) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every finite value of the type, ascending, from its bits.
    fn finite_values<E: Element>() -> Vec<f32> {
        let mut values: Vec<f32> =
            (0..=u16::MAX).map(|bits| E::from_bits(bits).to_f32()).filter(|x| x.is_finite()).collect();
        values.sort_by(f32::total_cmp);
        values
    }

    /// Checks both directed roundings between each two neighbours, against the sorted list of all values.
    fn rounds_to_the_neighbours<E: Element>() {
        for pair in finite_values::<E>().windows(2) {
            let (low, high) = (pair[0], pair[1]);
            if low == high {
                continue; // -0 and +0
            }
            let between = low / 2.0 + high / 2.0;
            if between > low && between < high {
                assert_eq!(E::from_f32_down(between).to_f32(), low, "down {between:e}");
                assert_eq!(E::from_f32_up(between).to_f32(), high, "up {between:e}");
            }
            assert_eq!(E::from_f32_down(low).to_f32(), low);
            assert_eq!(E::from_f32_up(low).to_f32(), low);
        }
    }

    #[test]
    fn directed_roundings_hit_the_neighbours() {
        rounds_to_the_neighbours::<f16>();
        rounds_to_the_neighbours::<bf16>();
    }

    #[test]
    fn directed_roundings_overflow_as_ieee_says() {
        assert_eq!(f16::from_f32_down(1e6), f16::MAX);
        assert_eq!(f16::from_f32_up(1e6), f16::INFINITY);
        assert_eq!(f16::from_f32_down(-1e6), f16::NEG_INFINITY);
        assert_eq!(f16::from_f32_down(-65505.0), f16::NEG_INFINITY);
        assert_eq!(f16::from_f32_up(-1e6).to_f32(), -65504.0);
        assert_eq!(f16::from_f32_down(-1e-30).to_bits(), 0x8001);
        assert_eq!(f16::from_f32_up(1e-30).to_bits(), 0x0001);
        assert_eq!(f16::from_f32_up(0.0).to_bits(), 0);
    }

    #[test]
    fn every_nan_becomes_the_canonical_one() {
        for round in [f16::from_f32_nearest, f16::from_f32_down, f16::from_f32_up] {
            assert_eq!(round(-f32::NAN).to_bits(), 0x7fff);
        }
        for round in [bf16::from_f32_nearest, bf16::from_f32_down, bf16::from_f32_up] {
            assert_eq!(round(-f32::NAN).to_bits(), 0x7fff);
        }
    }
}

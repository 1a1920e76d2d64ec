//! The two storage types whose sums are compressed, and the directed roundings that the codec needs of them.

use half::{bf16, f16};

/// A 16-bit floating-point storage type: fp16 ([`f16`]) or bf16 ([`struct@bf16`]).
pub trait Element: Copy + PartialEq + std::fmt::Debug + Send + Sync + 'static {
    /// The one NaN that the codec writes (all of CUDA's conversions produce it, too).
    const CANONICAL_NAN: Self;
    /// The least unit of the code `blocks`: from here on, half a unit of 7 significant bits times a level is exact.
    const LEAST_UNIT: f32;
    /// The greatest value of the code `blocks`: half of its unit times a level is finite.
    const GREATEST: f32;
    /// Bits of the value, as stored.
    fn to_bits(self) -> u16;
    /// The value with these bits.
    fn from_bits(bits: u16) -> Self;
    /// Exact widening.
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even, overflow to infinity, any NaN to [`Element::CANONICAL_NAN`].
    fn from_f32_nearest(x: f32) -> Self;

    /// `q * scale + zero`, as the output has it. fp16 rounds once, which GPUs do for two elements at a time; bf16 rounds to
    /// fp32 first.
    fn fused(q: f32, scale: f32, zero: f32) -> Self;

    /// `a[0] * b[0] + a[1] * b[1]`, as the output has it: the first product rounded, then the sum. fp16 rounds the `b` to fp16,
    /// then to fp16 each time; bf16 rounds to fp32, and at the end to bf16.
    fn sum_of_products(a: [f32; 2], b: [f32; 2]) -> Self;

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

/// What is summed as it is: fp16, bf16 and fp32.
pub trait Summand: Copy + PartialEq + std::fmt::Debug + Send + Sync + 'static {
    /// Exact widening.
    fn widen(self) -> f32;
    /// Rounds a sum to nearest, ties to even, overflow to infinity, any NaN to the type's one of CUDA's.
    fn round(sum: f32) -> Self;
}

impl<E: Element> Summand for E {
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn round(sum: f32) -> Self {
        E::from_f32_nearest(sum)
    }
}

impl Summand for f32 {
    fn widen(self) -> f32 {
        self
    }
    fn round(sum: f32) -> Self {
        if sum.is_nan() { f32::from_bits(0x7fff_ffff) } else { sum }
    }
}

/// Sign bit of both storage types.
const SIGN: u16 = 0x8000;

impl Element for f16 {
    const CANONICAL_NAN: Self = f16::from_bits(0x7fff);
    const LEAST_UNIT: f32 = 1.0 / 131_072.0;
    const GREATEST: f32 = 120_000.0;
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
    fn fused(q: f32, scale: f32, zero: f32) -> Self {
        // Exact: 19 bits of q * scale from 2^-24 on, and zero below 2^16.
        let exact = f64::from(q) * f64::from(scale) + f64::from(zero);
        Self::from_f32_nearest(to_f32_odd(exact))
    }
    fn sum_of_products(a: [f32; 2], b: [f32; 2]) -> Self {
        let [first, second] = b.map(|b| f16::from_f32(b).to_f32());
        Self::fused(a[1], second, Self::fused(a[0], first, 0.0).to_f32())
    }
}

impl Element for bf16 {
    const CANONICAL_NAN: Self = bf16::from_bits(0x7fff);
    // No need of exactness here, but inverses must be finite and normal.
    const LEAST_UNIT: f32 = f32::from_bits((127 - 100) << 23);
    const GREATEST: f32 = f32::from_bits((127 + 123) << 23);
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
    fn fused(q: f32, scale: f32, zero: f32) -> Self {
        Self::from_f32_nearest(q.mul_add(scale, zero))
    }
    fn sum_of_products(a: [f32; 2], b: [f32; 2]) -> Self {
        Self::from_f32_nearest(a[1].mul_add(b[1], a[0].mul_add(b[0], 0.0)))
    }
}

/// Rounds to the fp32 whose last bit is odd, unless `x` is one exactly. A second rounding, to a narrower type, is then
/// what one rounding of `x` would have been.
fn to_f32_odd(x: f64) -> f32 {
    let nearest = x as f32;
    if f64::from(nearest) == x || nearest.is_nan() {
        return nearest;
    }
    let toward_zero = if f64::from(nearest).abs() > x.abs() { f32::from_bits(nearest.to_bits() - 1) } else { nearest };
    f32::from_bits(toward_zero.to_bits() | 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_fp16_output_is_rounded_once() {
        // 2049 * 1 is halfway between two fp16 values; a little more than that must not count as halfway, though fp32
        // cannot hold the little.
        let little = f16::from_bits(1).to_f32(); // 2^-24
        assert_eq!(<f16 as Element>::fused(1.0, little, 2048.0), f16::from_f32(2048.0));
        let (scale, zero) = (f16::from_f32(2047.0).to_f32(), 2.0 + f16::from_f32(0.001).to_f32());
        let zero = f16::from_f32(zero).to_f32(); // 2.002
        assert_eq!(<f16 as Element>::fused(1.0, scale, zero), f16::from_f32(2050.0));
        // Every sum of a small grid, against exact integers: 255 * s + z in units of 2^-24.
        let step = if cfg!(miri) { 5003 } else { 97 };
        for bits in (1u16..0x7c00).step_by(step) {
            for z_bits in (0u16..0xfc00).step_by(1009) {
                let (s, z) = (f16::from_bits(bits), f16::from_bits(z_bits));
                if !z.is_finite() {
                    continue;
                }
                let units = |x: f16| (x.to_f64() * f64::from(1 << 24)) as i64;
                let exact = 255 * units(s) + units(z);
                let got = <f16 as Element>::fused(255.0, s.to_f32(), z.to_f32());
                if got.is_infinite() {
                    assert!(exact.abs() >= (65520i64 << 24), "{s} {z}");
                    continue;
                }
                let distance = |x: f16| (units(x) - exact).abs();
                let (up, down) = (Element::from_bits(got.to_bits() + 1), Element::from_bits(got.to_bits().max(1) - 1));
                for other in [up, down] {
                    let other: f16 = other;
                    assert!(!other.is_finite() || distance(got) <= distance(other), "{s} {z}: {got}, not {other}");
                }
            }
        }
    }

    /// Every finite value of the type, ascending, from its bits.
    fn finite_values<E: Element>() -> Vec<f32> {
        let mut values: Vec<f32> =
            (0..=u16::MAX).map(|bits| E::from_bits(bits).to_f32()).filter(|x| x.is_finite()).collect();
        values.sort_by(f32::total_cmp);
        values
    }

    /// Checks both directed roundings between each two neighbours, against the sorted list of all values.
    fn rounds_to_the_neighbours<E: Element>() {
        for pair in finite_values::<E>().windows(2).step_by(if cfg!(miri) { 997 } else { 1 }) {
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

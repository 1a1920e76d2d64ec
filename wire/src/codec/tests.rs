//! The codec against a naive oracle that knows groups but no tiles, and its layout against the documented digits.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;

mod bands;
mod blocks_code;
mod isolation;

fn codec(bits: u8, group: u16) -> Codec {
    Codec::plain(Width::new(bits).unwrap(), GroupSize::new(group).unwrap())
}

/// All of them; under Miri, which takes some ten seconds for a tile, one with three planes.
fn all_codecs() -> impl Iterator<Item = Codec> {
    let all = (2..=8).flat_map(|bits| [32, 64, 128].map(|group| codec(bits, group)));
    all.filter(|one| !cfg!(miri) || *one == codec(7, 64))
}

/// The cases of a test; under Miri the first few.
fn few<T>(cases: impl IntoIterator<Item = T>) -> impl Iterator<Item = T> {
    cases.into_iter().take(if cfg!(miri) { 2 } else { usize::MAX })
}

/// The formulas of the module's essay for one whole group, in f64 where that is exact anyway.
fn naive_group<E: Element>(x: &[f32], bits: u8) -> Vec<f32> {
    let q_max = f32::from((1u16 << bits) - 1);
    if x.iter().any(|x| !x.is_finite()) {
        return vec![f32::NAN; x.len()];
    }
    let min = x.iter().copied().fold(f32::INFINITY, f32::min);
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let z = E::from_f32_down(min).to_f32() + 0.0;
    let s = E::from_f32_up((max - z) / q_max).to_f32();
    if !z.is_finite() || !s.is_finite() {
        return vec![f32::NAN; x.len()];
    }
    let code =
        |x: f32| if (1.0 / s).is_finite() { ((x - z) * (1.0 / s)).round_ties_even().clamp(0.0, q_max) } else { 0.0 };
    x.iter().map(|x| (f64::from(code(*x)) * f64::from(s) + f64::from(z)) as f32).collect()
}

fn round_trip<E: Element>(codec: Codec, x: &[f32]) -> Vec<f32> {
    let (mut payload, mut y) = (vec![0; codec.tile_bytes()], vec![0.0; x.len()]);
    codec.encode_tile::<E>(x, &mut payload);
    codec.decode_tile::<E>(&payload, &mut y);
    y
}

fn same(a: f32, b: f32) -> bool {
    a == b || (a.is_nan() && b.is_nan())
}

/// Storage-type values, many of them awkward.
fn element<E: Element>() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => any::<u16>().prop_map(|bits| E::from_bits(bits).to_f32()).prop_filter("finite", |x| x.is_finite()),
        8 => (-8.0f32..8.0).prop_map(|x| E::from_f32_nearest(x).to_f32()),
        1 => Just(0.0),
        1 => Just(-0.0),
        1 => (1u16..64).prop_map(|bits| E::from_bits(bits).to_f32()), // subnormals
    ]
}

proptest! {
    #[test]
    #[cfg_attr(miri, ignore = "takes minutes; the next one does the same to bf16")]
    fn a_tile_is_its_groups_coded_one_by_one(
        x in proptest::collection::vec(element::<f16>(), 1..600),
        bits in 2u8..=8,
        group in prop_oneof![Just(32u16), Just(64), Just(128)],
    ) {
        let codec = codec(bits, group);
        let y = round_trip::<f16>(codec, &x);
        for (x, y) in x.chunks(group.into()).zip(y.chunks(group.into())) {
            for (expected, got) in naive_group::<f16>(x, bits).into_iter().zip(y) {
                prop_assert!(same(expected, *got), "{expected} {got}");
            }
        }
    }

    #[test]
    fn bf16_and_values_between_elements_too(
        x in proptest::collection::vec(element::<bf16>().prop_map(|x| x * 1.000_123), 1..600),
        bits in 2u8..=8,
    ) {
        let y = round_trip::<bf16>(codec(bits, 64), &x);
        for (x, y) in x.chunks(64).zip(y.chunks(64)) {
            for (expected, got) in naive_group::<bf16>(x, bits).into_iter().zip(y) {
                prop_assert!(same(expected, *got), "{expected} {got}");
            }
        }
    }

    #[test]
    fn the_error_is_at_most_half_a_step(x in proptest::collection::vec(-100.0f32..100.0, 128), bits in 2u8..=8) {
        let y = round_trip::<f16>(codec(bits, 128), &x);
        let range = x.iter().copied().fold(f32::MIN, f32::max) - x.iter().copied().fold(f32::MAX, f32::min);
        let step = range / f32::from(codec(bits, 128).width.max_quant());
        for (x, y) in x.iter().zip(&y) {
            prop_assert!((x - y).abs() <= 0.5 * step + 0.002 * range, "{x} {y} {step}");
        }
    }
}

#[test]
fn quants_stand_where_the_layout_says() {
    // All quants 0 but one, at the top: its bits are the only ones set, at the documented places.
    for codec in all_codecs() {
        for i in few([4095, 0, 1, 7, 8, 255, 256, 300, 1023, 1024, 2049]) {
            let mut x = vec![0.0; TILE_ELEMS];
            x[i] = 1.0;
            let mut payload = vec![0; codec.tile_bytes()];
            codec.encode_tile::<f16>(&x, &mut payload);
            let (warp, row, lane, e) = (i / 1024, i / 256 % 4, i / 8 % 32, i % 8);
            let (t, k) = (warp * 32 + lane, row * 8 + e);
            let mut expected = Vec::new();
            let mut at = 0;
            for plane in [8, 4, 2, 1].into_iter().filter(|p| usize::from(codec.width.bits()) & p != 0) {
                let n = k / 4;
                let word = match plane {
                    8 => n / 4 * 512 + t * 4 + n % 4,
                    4 => t * 4 + n / 2,
                    2 => t * 2 + n / 4,
                    _ => t,
                };
                let first = (word * 4 + k % 4) * 8 + n * plane % 8;
                expected.extend((first..first + plane).map(|bit| at * 8 + bit));
                at += TILE_ELEMS * plane / 8;
            }
            let set: Vec<usize> = (0..at * 8).filter(|bit| payload[bit / 8] >> (bit % 8) & 1 == 1).collect();
            assert_eq!(set, expected, "{codec:?} element {i}");
        }
    }
}

#[test]
fn scales_and_zeros_stand_where_the_layout_says() {
    for codec in all_codecs() {
        let g = codec.group.n_elems();
        for start in few((0..TILE_ELEMS).step_by(g).rev()) {
            let mut x = vec![0.0; TILE_ELEMS];
            x[start..start + g].fill(-3.0);
            x[start] = -3.0 + f32::from(codec.width.max_quant());
            let mut payload = vec![0; codec.tile_bytes()];
            codec.encode_tile::<bf16>(&x, &mut payload);
            let (warp, row, lane) = (start / 1024, start / 256 % 4, start / 8 % 32);
            let at =
                TILE_ELEMS * usize::from(codec.width.bits()) / 8 + ((warp * (256 / g) + lane / (g / 8)) * 4 + row) * 4;
            let (one, minus_three) = (bf16::from_f32(1.0).to_le_bytes(), bf16::from_f32(-3.0).to_le_bytes());
            assert_eq!(payload[at..at + 4], [one[0], one[1], minus_three[0], minus_three[1]], "{codec:?} {start}");
        }
    }
}

#[test]
fn tile_sizes_are_multiples_of_128_bytes() {
    for codec in all_codecs() {
        assert_eq!(codec.tile_bytes() % 128, 0);
    }
    assert_eq!(codec(4, 128).tile_bytes(), 2176);
    assert_eq!(codec(8, 128).tile_bytes(), 4224);
    assert_eq!(codec(5, 32).tile_bytes(), 3072);
}

#[test]
fn nan_and_infinity_spread_over_their_group_only() {
    for bad in few([f32::NAN, f32::INFINITY, f32::NEG_INFINITY]) {
        for codec in all_codecs() {
            let mut x: Vec<f32> = (0..300).map(|i| i as f32).collect();
            x[130] = bad;
            let y = round_trip::<f16>(codec, &x);
            let g = codec.group.n_elems();
            for (i, y) in y.iter().enumerate() {
                assert_eq!(y.is_nan(), i / g == 130 / g, "{codec:?} {i}");
            }
        }
    }
}

#[test]
fn a_sum_below_the_storage_type_decodes_to_nan() {
    let mut x = vec![1.0; 128];
    x[3] = -70000.0;
    assert!(round_trip::<f16>(codec(8, 128), &x).iter().all(|y| y.is_nan()));
    assert!(round_trip::<bf16>(codec(8, 128), &x).iter().all(|y| y.is_finite()));
}

#[test]
fn constant_groups_are_exact_and_minus_zero_becomes_zero() {
    for x in few([-0.0, 5.960_464_5e-8, 0.0, 65504.0, -65504.0, 1.5]) {
        let y = round_trip::<f16>(codec(2, 128), &[x; 200]);
        assert!(y.iter().all(|y| y.to_bits() == (x + 0.0).to_bits()), "{x}");
    }
}

#[test]
fn zeros_of_both_signs_encode_alike_in_any_order() {
    let encode = |x: &[f32]| {
        let mut payload = vec![0; codec(4, 128).tile_bytes()];
        codec(4, 128).encode_tile::<f16>(x, &mut payload);
        payload
    };
    let zeros = encode(&[0.0; 128]);
    assert!(zeros.iter().all(|byte| *byte == 0));
    for x in few([[-0.0, 0.0], [0.0, -0.0], [-0.0, -0.0]]) {
        assert_eq!(encode(&x.repeat(64)), zeros, "{x:?}");
    }
}

#[test]
fn a_short_tile_repeats_its_last_element() {
    let x: Vec<f32> = (0..130).map(|i| (i as f32).sin()).collect();
    let mut whole = x.clone();
    whole.resize(TILE_ELEMS, x[129]);
    let encode = |x: &[f32]| {
        let mut payload = vec![0; codec(5, 128).tile_bytes()];
        codec(5, 128).encode_tile::<f16>(x, &mut payload);
        payload
    };
    assert_eq!(encode(&x), encode(&whole));
}

#[test]
fn widths_and_groups_outside_the_format_are_refused() {
    assert_eq!((0..=255).filter(|b| Width::new(*b).is_some()).collect::<Vec<_>>(), [2, 3, 4, 5, 6, 7, 8, 16]);
    assert_eq!((0..=1024).filter(|g| GroupSize::new(*g).is_some()).collect::<Vec<_>>(), [32, 64, 128]);
}

#[test]
fn sixteen_bits_are_the_elements_themselves() {
    let codec = codec(16, 128);
    assert_eq!(codec.tile_bytes(), 2 * TILE_ELEMS);
    let x: Vec<f32> = (0..TILE_ELEMS as u16 - 5).map(|bits| f16::from_bits(bits.wrapping_mul(31)).to_f32()).collect();
    let mut payload = vec![0; codec.tile_bytes()];
    codec.encode_tile::<f16>(&x, &mut payload);
    let stored = |i: usize| u16::from_le_bytes([payload[i * 2], payload[i * 2 + 1]]);
    assert!((0..x.len()).all(|i| stored(i) == <f16 as Element>::from_f32_nearest(x[i]).to_bits()));
    assert_eq!(stored(TILE_ELEMS - 1), stored(x.len() - 1), "the last one repeats");
    assert!(round_trip::<f16>(codec, &x).iter().zip(&x).all(|(a, b)| same(*a, *b)));
    let mut output = vec![f16::ZERO; x.len()];
    codec.decode_tile_to(&payload, &mut output);
    assert!((0..x.len()).all(|i| output[i].to_bits() == stored(i)));
    let legs = |reduce, gather| Legs::new(super::tests::codec(reduce, 32), super::tests::codec(gather, 32));
    assert!(legs(16, 16).is_some() && legs(4, 8).is_some() && legs(4, 16).is_none() && legs(16, 8).is_none());
}

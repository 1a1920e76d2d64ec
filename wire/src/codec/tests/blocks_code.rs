//! The code of blocks against a naive oracle of its formulas, and its layout.

use super::*;

pub(super) fn blocks_of(bits: u8, group: u16) -> Codec {
    Codec { code: Code::Blocks, ..codec(bits, group) }
}

/// At all widths and groups; under Miri once.
fn all_blocks() -> impl Iterator<Item = Codec> {
    let all = (2..=8).flat_map(|bits| [32, 64, 128].map(|group| blocks_of(bits, group)));
    all.filter(|one| !cfg!(miri) || *one == blocks_of(5, 64))
}

// ---- oracles --------------------------------------------------------------------------------------------------------

/// The matrix of the transform, signs included, times 8.
fn octet_matrix(row: usize, column: usize) -> f64 {
    let sign = if column % 4 == 3 { -1.0 } else { 1.0 };
    if (row & column).count_ones().is_multiple_of(2) { sign } else { -sign }
}

/// One whole group, from stored elements to the output, and the values that are summed.
fn naive_blocks<E: Element>(x: &[f32], bits: u8) -> (Vec<f32>, Vec<f32>) {
    let mut v = x.to_vec();
    v.chunks_exact_mut(8).for_each(blocks::enter::<E>);
    let largest = |v: &[f32]| v.iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
    // What all 8 of an octet are, where that is how it is coded.
    let constant = |v: &[f32]| {
        let is_equal = v[0] == v[1] && v[0] == v[2] && v[0] == -v[3] && v[4..].iter().all(|v| *v == 0.0);
        let is_too_large = v.iter().any(|v| v.is_nan() || v.abs() > E::GREATEST);
        (is_equal || is_too_large).then(|| E::from_f32_nearest(if is_equal { 2.0 * v[0] } else { f32::NAN }).to_f32())
    };
    // 7 significant bits, upwards.
    let coded: Vec<f32> = v.chunks_exact(8).filter(|v| constant(v).is_none()).flatten().copied().collect();
    let share = f64::from(largest(&coded) * ((1.0 + 1.0 / 2048.0) / 15.0));
    let digit = (share.log2().floor() - 6.0).exp2();
    let unit = if share == 0.0 { 0.0 } else { (share / digit).ceil() * digit };
    let unit = unit.max(E::LEAST_UNIT.into());
    let inverse = |x: f64| {
        let x = x as f32;
        let mut y = f32::from_bits(0x7ef3_11c7 - x.to_bits());
        for _ in 0..2 {
            y = y.mul_add((-x).mul_add(y, 1.0), y);
        }
        f64::from(y)
    };
    let half = f64::from(1u16 << (bits - 1));
    let level = |octet: &[f32], unit: f64| {
        (f64::from(largest(octet)) * f64::from((inverse(unit) as f32) * (1.0 + 1.0 / 4096.0))).ceil()
    };
    // (B, L) of an octet with the shift w, if it allows that.
    let band = |octet: &[f32], w: i32| {
        if w == 0 {
            return Some((0.0, unit * level(octet, unit)));
        }
        let (top, smaller) = (15.0 * unit, unit / f64::from(1 << (w - 1)));
        let (base, k) = (top - top / f64::from(1 << w), level(octet, smaller));
        match level(octet, unit) {
            15.0 => octet.iter().all(|v| f64::from(v.abs()) > base).then_some((base, top - base)),
            _ => (k <= 14.0).then_some((0.0, smaller * k)),
        }
    };
    let allows =
        |w: &i32| *w == 0 || v.chunks_exact(8).all(|octet| constant(octet).is_some() || band(octet, *w).is_some());
    let w = if unit > E::LEAST_UNIT.into() { [4, 2, 0].into_iter().find(allows).unwrap() } else { 0 };
    let (mut out, mut sum) = (Vec::new(), Vec::new());
    for octet in v.chunks_exact(8) {
        if let Some(x) = constant(octet) {
            out.extend([x; 8]);
            sum.extend([x / 2.0, x / 2.0, x / 2.0, -x / 2.0, 0.0, 0.0, 0.0, 0.0]);
            continue;
        }
        assert!((1.0..=15.0).contains(&level(octet, unit)));
        let (base, bound) = band(octet, w).unwrap();
        let step = bound / half;
        let signed = |v: f32| f64::from(v) - base.copysign(v.into());
        let cells: Vec<f64> = octet.iter().map(|v| (signed(*v) * inverse(step)).floor()).collect();
        assert!(cells.iter().all(|cell| (-half..half).contains(cell)), "within the quants without a clamp");
        let middles: Vec<f64> = cells.iter().map(|cell| cell + 0.5).collect();
        let values: Vec<f64> = middles.iter().map(|middle| middle * step + base.copysign(*middle)).collect();
        assert!(values.iter().all(|value| f64::from(*value as f32) == *value), "exact");
        sum.extend(values.iter().map(|value| *value as f32));
        // Products and their sum are exact in 53 bits, and rounded to fp32 once.
        out.extend((0..8).map(|e| (0..8).map(|j| octet_matrix(j, e) * values[j]).sum::<f64>() as f32 + 0.0));
    }
    (out, sum)
}

pub(super) fn sent<E: Element>(codec: Codec, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let elements: Vec<E> = x.iter().map(|x| E::from_f32_nearest(*x)).collect();
    let (mut payload, mut sum) = (vec![0; codec.tile_bytes()], vec![0.0; x.len()]);
    codec.encode_tile::<E>(&codec.enter(&elements), &mut payload);
    codec.decode_tile::<E>(&payload, &mut sum);
    let mut output = elements;
    codec.decode_tile_to(&payload, &mut output);
    (output.iter().map(|y| y.to_f32()).collect(), sum)
}

fn equals_the_oracle<E: Element>(codec: Codec, x: &[f32]) -> Result<(), TestCaseError> {
    let g = codec.group.n_elems();
    let (output, sum) = sent::<E>(codec, x);
    for start in (0..x.len()).step_by(g) {
        let group: Vec<f32> = (start..start + g).map(|i| x[i.min(x.len() - 1)]).collect();
        let (naive_output, naive_sum) = naive_blocks::<E>(&group, codec.width.bits());
        for i in start..(start + g).min(x.len()) {
            prop_assert!(same(sum[i], naive_sum[i - start]), "{:?} {} {}", codec, sum[i], naive_sum[i - start]);
            let expected = E::from_f32_nearest(naive_output[i - start]).to_f32();
            prop_assert!(same(output[i], expected), "{:?} {} {}", codec, output[i], expected);
        }
    }
    Ok(())
}

fn any_blocks() -> impl Strategy<Value = Codec> {
    let group = prop_oneof![Just(32u16), Just(64), Just(128)];
    (2u8..=8, group).prop_map(|(bits, group)| blocks_of(bits, group))
}

/// Groups of several magnitudes, some with few values.
fn values<E: Element>() -> impl Strategy<Value = Vec<f32>> {
    prop_oneof![
        proptest::collection::vec(element::<E>(), 1..300),
        (proptest::collection::vec(-1.0f32..1.0, 1..300), -12i32..12).prop_map(|(x, exponent)| {
            x.iter().map(|x| E::from_f32_nearest(x * (exponent as f32).exp2()).to_f32()).collect()
        }),
        proptest::collection::vec(prop_oneof![Just(0.0), Just(-3.0), Just(3.0)], 1..300),
        // With an element now and then that is much larger.
        (proptest::collection::vec((-1.0f32..1.0, 0u8..60), 1..300), 0i32..14, -9i32..3).prop_map(
            |(x, larger, exponent)| {
                let size = |hot: u8| (exponent as f32).exp2() * if hot == 0 { (larger as f32).exp2() } else { 1.0 };
                x.iter().map(|(x, hot)| E::from_f32_nearest(x * size(*hot)).to_f32()).collect()
            }
        ),
    ]
}

proptest! {
    #[test]
    #[cfg_attr(miri, ignore = "takes minutes")]
    fn fp16_equals_the_oracle(codec in any_blocks(), x in values::<f16>()) {
        equals_the_oracle::<f16>(codec, &x)?;
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes minutes")]
    fn bf16_equals_the_oracle(codec in any_blocks(), x in values::<bf16>()) {
        equals_the_oracle::<bf16>(codec, &x)?;
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes minutes")]
    fn sums_beyond_elements_stay_within_their_quants(
        codec in any_blocks(),
        x in proptest::collection::vec(-4.0f32..4.0, 128),
        exponent in -30i32..18,
    ) {
        // Debug assertions check it; what the oracle would add is in the tests above.
        let x: Vec<f32> = x.iter().map(|x| x * (exponent as f32).exp2()).collect();
        let y = round_trip::<f16>(codec, &x);
        let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        prop_assume!(largest < 60000.0 && x.chunks_exact(8).all(|octet| octet[1..] != [0.0; 7]));
        let (steps, least) = (f32::from(codec.width.max_quant()), 2.0f32.powi(-16));
        for (x, y) in x.iter().zip(&y) {
            prop_assert!((x - y).abs() <= 1.03 * largest / steps + least, "{:?} {} {}", codec, x, y);
        }
    }
}

// ---- the transform --------------------------------------------------------------------------------------------------

#[test]
fn the_transform_of_an_octet_is_its_matrix() {
    for column in 0..8 {
        let mut octet = [0.0; 8];
        octet[column] = 8.0;
        blocks::enter::<f16>(&mut octet);
        for (row, v) in octet.iter().enumerate() {
            assert_eq!(f64::from(*v), octet_matrix(row, column), "{row} {column}");
        }
    }
}

#[test]
fn what_an_octet_has_in_common_spreads_over_four_values() {
    let mut octet = [2.0; 8];
    blocks::enter::<bf16>(&mut octet);
    assert_eq!(octet, [1.0, 1.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0]);
}

#[test]
fn the_largest_elements_do_not_overflow() {
    // The signs of a row of the matrix gather all in one value.
    let x: Vec<f32> = (0..128).map(|i| octet_matrix(5, i % 8) as f32 * 60000.0).collect();
    let (y, _) = sent::<f16>(blocks_of(8, 128), &x);
    assert!(y.iter().all(|y| y.is_finite()), "{y:?}");
}

#[test]
fn inverses_are_a_little_too_small() {
    for step in (0u32..1 << 23).step_by(if cfg!(miri) { 999_983 } else { 7 }) {
        for exponent in [-100, -24, 0, 7, 120] {
            let x = f32::from_bits(((127 + exponent) as u32) << 23 | step);
            let one = f64::from(x) * f64::from(scale::inverse(x));
            assert!((1.0 - 7e-6..=1.0 + 1e-7).contains(&one), "{x:e} {one}");
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes minutes")]
fn the_transform_rounds_each_result_once() {
    let mut state = 1u32;
    let mut any = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f16::from_bits((state >> 16) as u16).to_f64()
    };
    for _ in 0..1_000_000 {
        let (a, b) = (any(), any());
        if a.is_finite() && b.is_finite() {
            let share = f16::from_f64(a / 8.0).to_f64();
            let mut octet = [a as f32, 0.0, 0.0, 0.0, b as f32, 0.0, 0.0, 0.0];
            blocks::enter::<f16>(&mut octet);
            assert_eq!(octet[0], f16::from_f64(share + b / 8.0).to_f32(), "{a} {b}");
            assert_eq!(octet[4], f16::from_f64(share - b / 8.0).to_f32(), "{a} {b}");
        }
    }
}

// ---- special values -------------------------------------------------------------------------------------------------

#[test]
fn zeros_stay_zeros_and_positive() {
    for codec in all_blocks() {
        for zero in [0.0, -0.0] {
            let (output, _) = sent::<bf16>(codec, &[zero; 200]);
            assert!(output.iter().all(|y| y.to_bits() == 0), "{codec:?}");
        }
    }
}

#[test]
fn an_octet_of_zeros_stays_so_beside_others() {
    let x: Vec<f32> = (0..128).map(|i| if i / 8 == 3 { 0.0 } else { i as f32 }).collect();
    let (y, _) = sent::<f16>(blocks_of(4, 128), &x);
    assert!(y[24..32].iter().all(|y| y.to_bits() == 0));
}

#[test]
fn a_sum_beyond_what_units_reach_makes_nan_of_its_octet() {
    let becomes_nan = |largest: f32| {
        let mut x: Vec<f32> = (0..128).map(|i| i as f32).collect();
        x[3] = -largest;
        let y = round_trip::<f16>(blocks_of(8, 128), &x);
        assert!(y[8..].iter().all(|y| y.is_finite()));
        y[0].is_nan()
    };
    assert!(!becomes_nan(65504.0) && !becomes_nan(120_000.0) && becomes_nan(120_001.0));
}

// ---- layout ---------------------------------------------------------------------------------------------------------

#[test]
fn sizes_are_as_documented() {
    for codec in all_blocks() {
        assert_eq!(codec.tile_bytes() % 64, 0);
        let expected = f64::from(codec.width.bits()) + 16.0 / codec.group.n_elems() as f64 + 0.5;
        assert_eq!(codec.bits_per_element(), expected, "{codec:?}");
    }
    assert_eq!(blocks_of(4, 128).bits_per_element(), 4.625);
}

#[test]
fn levels_and_units_stand_where_the_layout_says() {
    for codec in all_blocks() {
        let g = codec.group.n_elems();
        for start in few((0..TILE_ELEMS).step_by(g).rev()) {
            let mut x = vec![0.0; TILE_ELEMS];
            (x[start], x[start + 8]) = (1.0, 0.5);
            let mut payload = vec![0; codec.tile_bytes()];
            codec.encode_tile::<bf16>(&x, &mut payload);
            let (warp, row, lane) = (start / 1024, start / 256 % 4, start / 8 % 32);
            let levels = TILE_ELEMS * usize::from(codec.width.bits()) / 8;
            let level = |lane: usize| {
                let at = levels + (warp * 32 + lane) * 2;
                u16::from_le_bytes([payload[at], payload[at + 1]]) >> (row % 2 * 8 + row / 2 * 4) & 15
            };
            assert_eq!((level(lane), level(lane + 1), level(lane + 2)), (15, 8, 0), "{codec:?} {start}");
            let at = levels + 256 + ((warp * (256 / g) + lane / (g / 8)) * 4 + row) * 2;
            let unit = bf16::from_le_bytes([payload[at], payload[at + 1]]);
            assert_eq!(unit, bf16::from_f32(69.0 / 1024.0), "1/15 and more, of 7 bits, {codec:?} {start}");
        }
    }
}

#[test]
fn a_short_tile_of_blocks_repeats_its_last_element() {
    let x: Vec<f16> = (0..130).map(|i| f16::from_f32((i as f32).sin())).collect();
    let mut whole = x.clone();
    whole.resize(TILE_ELEMS, x[129]);
    for codec in all_blocks() {
        let encode = |x: &[f16]| {
            let mut payload = vec![0; codec.tile_bytes()];
            codec.encode_tile::<f16>(&codec.enter(x), &mut payload);
            payload
        };
        assert_eq!(encode(&x), encode(&whole), "{codec:?}");
    }
}

#[test]
fn legs_agree_about_the_domain() {
    let legs = |reduce, gather| Legs::new(reduce, gather).is_some();
    assert!(legs(blocks_of(4, 128), blocks_of(8, 32)) && legs(codec(2, 32), codec(8, 128)));
    assert!(!legs(blocks_of(4, 128), codec(4, 128)) && !legs(codec(4, 128), blocks_of(4, 128)));
    assert!(!legs(blocks_of(4, 128), blocks_of(16, 128)) && legs(blocks_of(16, 128), codec(16, 128)));
}

/// A change of a single bit of either code shows here. FNV-1a of the payloads of a fixed tile, at 3, 4 and 8 bits.
#[test]
#[cfg_attr(miri, ignore = "takes minutes")]
fn payloads_are_as_they_were() {
    let mut state = 1u32;
    let x: Vec<f16> = (0..TILE_ELEMS)
        .map(|i| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let uniform = (state >> 8) as f32 / (1 << 24) as f32 - 0.5;
            f16::from_f32(if i % 341 == 0 { 60.0 * uniform } else { uniform })
        })
        .collect();
    let hash = |codec: Codec| {
        let mut payload = vec![0; codec.tile_bytes()];
        codec.encode_tile::<f16>(&codec.enter(&x), &mut payload);
        payload.iter().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
    };
    let hashes = Code::ALL.map(|code| [3, 4, 8].map(|bits| hash(Codec { code, ..codec(bits, 128) })));
    let expected = [
        [0x3ac1_7915, 0xd3a8_75c2, 0x3820_5ccd], // plain
        [0xbaae_9e70, 0xb19a_33c9, 0xf121_17c4], // blocks
    ];
    assert_eq!(hashes, expected, "{hashes:#010x?}");
}

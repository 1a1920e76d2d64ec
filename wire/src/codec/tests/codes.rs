//! The other codes, each against a naive oracle of its formulas, and their layout.

use super::*;

fn coded(code: Code, bits: u8, group: u16) -> Codec {
    Codec { code, ..codec(bits, group) }
}

/// All codes but the plain one, at all widths and groups; under Miri each once.
fn all_others() -> impl Iterator<Item = Codec> {
    let codes = Code::ALL.into_iter().filter(|code| *code != Code::Plain);
    let all = codes.flat_map(|code| {
        (2..=8).flat_map(move |bits| [32, 64, 128].into_iter().map(move |group| coded(code, bits, group)))
    });
    all.filter(|one| !cfg!(miri) || *one == coded(one.code, 5, 64))
}

// ---- oracles --------------------------------------------------------------------------------------------------------

/// One whole group of a code, from stored elements to the output, and the values that are summed.
fn naive<E: Element>(codec: Codec, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let bits = codec.width.bits();
    match codec.code {
        Code::Plain => unreachable!("has an oracle"),
        Code::Spikes => {
            let y = naive_spikes::<E>(x, bits);
            (y.clone(), y)
        }
        Code::Rotated | Code::RotatedSpikes => {
            let share: Vec<f32> = x.iter().map(|x| x / codec.group.n_elems() as f32).collect();
            let rotated = hadamard(&share);
            let sum = match codec.code {
                Code::Rotated => naive_group::<E>(&rotated, bits),
                _ => naive_spikes::<E>(&rotated, bits),
            };
            (hadamard(&sum), sum)
        }
        Code::Blocks => naive_blocks::<E>(x, bits),
    }
}

/// By halves: the last step combines them.
fn hadamard(x: &[f32]) -> Vec<f32> {
    if x.len() == 1 {
        return x.to_vec();
    }
    let (low, high) = x.split_at(x.len() / 2);
    let (low, high) = (hadamard(low), hadamard(high));
    let sums = low.iter().zip(&high).map(|(a, b)| a + b);
    sums.chain(low.iter().zip(&high).map(|(a, b)| a - b)).collect()
}

fn naive_spikes<E: Element>(x: &[f32], bits: u8) -> Vec<f32> {
    let nan = vec![f32::NAN; x.len()];
    if x.iter().any(|x| !x.is_finite()) {
        return nan;
    }
    // 16 bits behind the leading one, then places: those of values below 0 count backwards.
    let cut = |x: f32| f32::from_bits(x.to_bits() & !127);
    let places = |i: &usize, j: &usize| if x[*i].is_sign_negative() { j.cmp(i) } else { i.cmp(j) };
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|i, j| cut(x[*i]).total_cmp(&cut(x[*j])).then(places(i, j)));
    let n = order.len();
    let [least, second, last_but_one, greatest] = [0, 1, n - 2, n - 1].map(|k| cut(x[order[k]]));
    let q_max = f32::from((1u16 << bits) - 1);
    let z = E::from_f32_down(second).to_f32() + 0.0;
    let s = E::from_f32_up((last_but_one - z) / q_max).to_f32();
    if !z.is_finite() || !(s * q_max).is_finite() {
        return nan;
    }
    let r = if (1.0 / (s * q_max)).is_finite() { 1.0 / (s * q_max) } else { 0.0 };
    let code = |x: f32| (f64::from(x.mul_add(r, -(z * r)).clamp(0.0, 1.0)) * f64::from(q_max)).round_ties_even();
    let mut y: Vec<f32> = x.iter().map(|x| (code(*x) * f64::from(s) + f64::from(z)) as f32).collect();
    y[order[0]] = E::from_f32_nearest(least + 0.0).to_f32();
    y[order[n - 1]] = E::from_f32_nearest(greatest + 0.0).to_f32();
    y
}

/// The matrix of the transform, signs included, times 8.
fn block_matrix(row: usize, column: usize) -> f64 {
    let sign = if column % 4 == 3 { -1.0 } else { 1.0 };
    if (row & column).count_ones().is_multiple_of(2) { sign } else { -sign }
}

fn naive_blocks<E: Element>(x: &[f32], bits: u8) -> (Vec<f32>, Vec<f32>) {
    let mut v = x.to_vec();
    v.chunks_exact_mut(8).for_each(blocks::enter::<E>);
    let largest = |v: &[f32]| v.iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
    let nan = vec![f32::NAN; x.len()];
    if v.iter().any(|v| !v.is_finite()) {
        return (nan.clone(), nan);
    }
    // 7 significant bits, upwards.
    let share = f64::from(largest(&v) * ((1.0 + 1.0 / 2048.0) / 15.0));
    let digit = (share.log2().floor() - 6.0).exp2();
    let unit = if share == 0.0 { 0.0 } else { (share / digit).ceil() * digit };
    let unit = unit.max(E::LEAST_UNIT.into());
    if unit > E::GREATEST_UNIT.into() {
        return (nan.clone(), nan);
    }
    let inverse = |x: f64| {
        let x = x as f32;
        let mut y = f32::from_bits(0x7ef3_11c7 - x.to_bits());
        for _ in 0..2 {
            y = y.mul_add((-x).mul_add(y, 1.0), y);
        }
        f64::from(y)
    };
    let half = f64::from(1u16 << (bits - 1));
    let (mut out, mut sum) = (Vec::new(), Vec::new());
    for block in v.chunks_exact(8) {
        let margin = f64::from((inverse(unit) as f32) * (1.0 + 1.0 / 4096.0));
        let level = (f64::from(largest(block)) * margin).ceil();
        assert!(level <= 15.0);
        let step = unit * level / half;
        let per_step = inverse(unit * level.max(1.0) / half);
        let cells: Vec<f64> = block.iter().map(|v| (f64::from(*v) * per_step).floor()).collect();
        assert!(cells.iter().all(|cell| (-half..half).contains(cell)), "within the codes without a clamp");
        let middles: Vec<f64> = cells.iter().map(|cell| cell + 0.5).collect();
        sum.extend(middles.iter().map(|middle| (middle * step) as f32));
        out.extend((0..8).map(|e| {
            let integer: f64 = (0..8).map(|j| block_matrix(j, e) * middles[j]).sum();
            (integer * step) as f32 + 0.0
        }));
    }
    (out, sum)
}

fn sent<E: Element>(codec: Codec, x: &[f32]) -> (Vec<f32>, Vec<f32>) {
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
        let (naive_output, naive_sum) = naive::<E>(codec, &group);
        for i in start..(start + g).min(x.len()) {
            prop_assert!(same(sum[i], naive_sum[i - start]), "{:?} {} {}", codec, sum[i], naive_sum[i - start]);
            if codec.code == Code::Spikes {
                continue; // rounded as in the plain code
            }
            let expected = E::from_f32_nearest(naive_output[i - start]).to_f32();
            prop_assert!(same(output[i], expected), "{:?} {} {}", codec, output[i], expected);
        }
    }
    Ok(())
}

fn any_other() -> impl Strategy<Value = Codec> {
    let code = prop_oneof![Just(Code::Spikes), Just(Code::Rotated), Just(Code::RotatedSpikes), Just(Code::Blocks)];
    let group = prop_oneof![Just(32u16), Just(64), Just(128)];
    (code, 2u8..=8, group).prop_map(|(code, bits, group)| coded(code, bits, group))
}

/// Groups of several magnitudes, some with few values.
fn values<E: Element>() -> impl Strategy<Value = Vec<f32>> {
    prop_oneof![
        proptest::collection::vec(element::<E>(), 1..300),
        (proptest::collection::vec(-1.0f32..1.0, 1..300), -12i32..12).prop_map(|(x, exponent)| {
            x.iter().map(|x| E::from_f32_nearest(x * (exponent as f32).exp2()).to_f32()).collect()
        }),
        proptest::collection::vec(prop_oneof![Just(0.0), Just(-3.0), Just(3.0)], 1..300),
    ]
}

proptest! {
    #[test]
    #[cfg_attr(miri, ignore = "takes minutes")]
    fn fp16_equals_the_oracle(codec in any_other(), x in values::<f16>()) {
        equals_the_oracle::<f16>(codec, &x)?;
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes minutes")]
    fn bf16_equals_the_oracle(codec in any_other(), x in values::<bf16>()) {
        equals_the_oracle::<bf16>(codec, &x)?;
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes minutes")]
    fn sums_beyond_elements_stay_within_their_codes(
        codec in any_other(),
        x in proptest::collection::vec(-4.0f32..4.0, 128),
        exponent in -30i32..18,
    ) {
        // Debug assertions check it; what the oracle would add is in the tests above.
        let x: Vec<f32> = x.iter().map(|x| x * (exponent as f32).exp2()).collect();
        let y = round_trip::<f16>(codec, &x);
        let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        prop_assume!(largest < 60000.0);
        let (steps, least) = (f32::from(codec.width.max_code()), 2.0f32.powi(-16));
        for (x, y) in x.iter().zip(&y) {
            prop_assert!((x - y).abs() <= 1.03 * largest / steps + least, "{:?} {} {}", codec, x, y);
        }
    }
}

// ---- the transforms -------------------------------------------------------------------------------------------------

#[test]
fn the_transform_of_a_block_is_its_matrix() {
    for column in 0..8 {
        let mut block = [0.0; 8];
        block[column] = 8.0;
        blocks::enter::<f16>(&mut block);
        for (row, v) in block.iter().enumerate() {
            assert_eq!(f64::from(*v), block_matrix(row, column), "{row} {column}");
        }
    }
}

#[test]
fn what_a_block_has_in_common_spreads_over_four_values() {
    let mut block = [2.0; 8];
    blocks::enter::<bf16>(&mut block);
    assert_eq!(block, [1.0, 1.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0]);
}

#[test]
fn the_largest_elements_do_not_overflow() {
    for code in [Code::Rotated, Code::RotatedSpikes, Code::Blocks] {
        // The signs of a row of the matrix gather all in one value.
        let x: Vec<f32> = (0..128).map(|i| block_matrix(5, i % 8) as f32 * 60000.0).collect();
        let (y, _) = sent::<f16>(coded(code, 8, 128), &x);
        assert!(y.iter().all(|y| y.is_finite()), "{code:?} {y:?}");
    }
}

#[test]
fn inverses_are_a_little_too_small() {
    for step in (0u32..1 << 23).step_by(if cfg!(miri) { 999_983 } else { 7 }) {
        for exponent in [-100, -24, 0, 7, 120] {
            let x = f32::from_bits(((127 + exponent) as u32) << 23 | step);
            let one = f64::from(x) * f64::from(blocks::inverse(x));
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
            let mut block = [a as f32, 0.0, 0.0, 0.0, b as f32, 0.0, 0.0, 0.0];
            blocks::enter::<f16>(&mut block);
            assert_eq!(block[0], f16::from_f64(share + b / 8.0).to_f32(), "{a} {b}");
            assert_eq!(block[4], f16::from_f64(share - b / 8.0).to_f32(), "{a} {b}");
        }
    }
}

// ---- special values -------------------------------------------------------------------------------------------------

#[test]
fn nan_and_infinity_spread_over_their_group_in_every_code() {
    for bad in few([f32::NAN, f32::INFINITY, f32::NEG_INFINITY]) {
        for codec in all_others() {
            let mut x: Vec<f32> = (0..300).map(|i| (i % 7) as f32).collect();
            x[130] = bad;
            let g = codec.group.n_elems();
            let (output, sum) = sent::<f16>(codec, &x);
            for (i, (y, v)) in output.iter().zip(&sum).enumerate() {
                assert_eq!((y.is_nan(), v.is_nan()), (i / g == 130 / g, i / g == 130 / g), "{codec:?} {i}");
            }
        }
    }
}

#[test]
fn zeros_stay_zeros_and_positive() {
    for codec in all_others() {
        for zero in [0.0, -0.0] {
            let (output, _) = sent::<bf16>(codec, &[zero; 200]);
            assert!(output.iter().all(|y| y.to_bits() == 0), "{codec:?}");
        }
    }
}

#[test]
fn a_block_of_zeros_stays_so_beside_others() {
    let x: Vec<f32> = (0..128).map(|i| if i / 8 == 3 { 0.0 } else { i as f32 }).collect();
    let (y, _) = sent::<f16>(coded(Code::Blocks, 4, 128), &x);
    assert!(y[24..32].iter().all(|y| y.to_bits() == 0));
}

#[test]
fn spikes_are_exact_whatever_the_width() {
    let mut x: Vec<f32> = (0..128).map(|i| (i as f32).sin()).collect();
    (x[17], x[101]) = (-400.25, 1000.5);
    let (y, sum) = sent::<f16>(coded(Code::Spikes, 2, 128), &x);
    assert_eq!((y[17], y[101], sum[17], sum[101]), (-400.25, 1000.5, -400.25, 1000.5));
    assert!((0..128).all(|i| (x[i] - y[i]).abs() < 0.35), "the rest has its own scale");
}

#[test]
fn a_spike_beyond_the_storage_type_is_an_infinity_there_only() {
    let mut x = vec![1.0; 128];
    (x[3], x[9]) = (-70000.0, 70000.0);
    let y = round_trip::<f16>(coded(Code::Spikes, 8, 128), &x);
    assert_eq!((y[3], y[9]), (f32::NEG_INFINITY, f32::INFINITY));
    assert!(y.iter().enumerate().all(|(i, y)| i == 3 || i == 9 || *y == 1.0));
}

#[test]
fn a_sum_beyond_what_units_reach_decodes_to_nan() {
    let reached = |largest: f32| {
        let mut x = vec![1.0; 128];
        x[3] = -largest;
        !round_trip::<f16>(coded(Code::Blocks, 8, 128), &x)[0].is_nan()
    };
    assert!(reached(65504.0) && reached(120_000.0) && !reached(122_000.0));
}

// ---- layout ---------------------------------------------------------------------------------------------------------

#[test]
fn sizes_are_as_documented() {
    for codec in all_others() {
        assert_eq!(codec.tile_bytes() % 64, 0);
        let per_group = match codec.code {
            Code::Plain => unreachable!(),
            Code::Spikes | Code::RotatedSpikes => 80.0,
            Code::Rotated => 32.0,
            Code::Blocks => 16.0,
        };
        let levels = if codec.code == Code::Blocks { 0.5 } else { 0.0 };
        let expected = f64::from(codec.width.bits()) + per_group / codec.group.n_elems() as f64 + levels;
        assert_eq!(codec.bits_per_element(), expected, "{codec:?}");
    }
    assert_eq!(coded(Code::Spikes, 4, 128).bits_per_element(), 4.625);
    assert_eq!(coded(Code::Blocks, 4, 128).bits_per_element(), 4.625);
}

#[test]
fn spikes_stand_where_the_layout_says() {
    for codec in all_others().filter(|codec| codec.code == Code::Spikes) {
        let g = codec.group.n_elems();
        for start in few((0..TILE_ELEMS).step_by(g).rev()) {
            let mut x = vec![0.0; TILE_ELEMS];
            (x[start + 3], x[start + 5], x[start + 31], x[start + 30]) = (1.0, 1.0, -3.0, -3.0);
            let mut payload = vec![0; codec.tile_bytes()];
            codec.encode_tile::<bf16>(&x, &mut payload);
            let (warp, row, lane) = (start / 1024, start / 256 % 4, start / 8 % 32);
            let n = (warp * (256 / g) + lane / (g / 8)) * 4 + row;
            let params = TILE_ELEMS * usize::from(codec.width.bits()) / 8;
            let (spikes, places) = (params + TILE_ELEMS / g * 4, params + TILE_ELEMS / g * 8);
            let (one, minus_three) = (bf16::from_f32(1.0).to_le_bytes(), bf16::from_f32(-3.0).to_le_bytes());
            let at = spikes + n * 4;
            assert_eq!(payload[at..at + 4], [minus_three[0], minus_three[1], one[0], one[1]], "{codec:?} {start}");
            let at = places + n * 2;
            assert_eq!(payload[at..at + 2], [31, 5], "the last of equal ones, {codec:?} {start}");
        }
    }
}

#[test]
fn levels_and_units_stand_where_the_layout_says() {
    for codec in all_others().filter(|codec| codec.code == Code::Blocks) {
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
fn a_short_tile_repeats_its_last_element_in_every_code() {
    let x: Vec<f16> = (0..130).map(|i| f16::from_f32((i as f32).sin())).collect();
    let mut whole = x.clone();
    whole.resize(TILE_ELEMS, x[129]);
    for codec in all_others() {
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
    let blocks = |bits, group| coded(Code::Blocks, bits, group);
    assert!(legs(blocks(4, 128), blocks(8, 32)) && legs(coded(Code::Spikes, 2, 32), codec(8, 128)));
    assert!(legs(coded(Code::Rotated, 4, 64), coded(Code::RotatedSpikes, 3, 64)));
    assert!(!legs(coded(Code::Rotated, 4, 64), coded(Code::Rotated, 4, 128)));
    assert!(!legs(blocks(4, 128), codec(4, 128)) && !legs(codec(4, 128), coded(Code::Rotated, 4, 128)));
    assert!(!legs(blocks(4, 128), blocks(16, 128)) && legs(blocks(16, 128), codec(16, 128)));
}

/// A change of a single bit of any code shows here. FNV-1a of the payloads of a fixed tile, at 3, 4 and 8 bits.
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
    let hashes = Code::ALL.map(|code| [3, 4, 8].map(|bits| hash(coded(code, bits, 128))));
    let expected = [
        [0x3ac1_7915, 0xd3a8_75c2, 0x3820_5ccd], // plain
        [0x4660_1c2f, 0x5fd0_b3dd, 0x8878_5649], // spikes
        [0xbb53_6ae2, 0x1aae_780c, 0x3e0a_2a96], // rotated
        [0x7da7_8f72, 0xd19f_11f0, 0xb4c1_76de], // rotated spikes
        [0x7591_0af5, 0xbf96_0eab, 0x9be8_a46f], // blocks
    ];
    assert_eq!(hashes, expected, "{hashes:#010x?}");
}

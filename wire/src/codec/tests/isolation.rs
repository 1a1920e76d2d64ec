//! What is not finite reaches no element beyond its octet (invariant I8), and what is equal arrives exactly: the code of
//! blocks in one leg and in the whole all-reduce.

use super::*;
use crate::reference::{Op, all_reduce};

fn legs(code: Code, reduce: u8, gather: u8, group: u16) -> Legs {
    let width = |bits| Width::new(bits).unwrap();
    Legs::choose(Some(code), (width(reduce), width(gather)), GroupSize::new(group).unwrap()).unwrap()
}

/// Every pair of legs that blocks have.
fn any_legs() -> impl Strategy<Value = Legs> {
    let group = prop_oneof![Just(32u16), Just(64), Just(128)];
    let widths = prop_oneof![(2u8..=8).prop_map(|bits| (bits, bits)), Just((4, 8))];
    (widths, group).prop_map(|((reduce, gather), group)| legs(Code::Blocks, reduce, gather, group))
}

/// What must not spread: not finite, or in bf16 beyond what units reach.
fn bad<E: Element>() -> impl Strategy<Value = E> {
    let bad = prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY), Just(3e38), Just(-1e38)];
    bad.prop_map(E::from_f32_nearest)
}

/// A bad element at `at` makes NaN of its octet. Every other element is as it is where that octet is zeros on every rank,
/// if the other ranks' is; and finite, whatever they have there.
fn is_isolated<E: Element>(x: &[Vec<E>], rank: usize, at: usize, bad: E, legs: Legs) -> Result<(), TestCaseError> {
    let octet = at / 8 * 8..at / 8 * 8 + 8;
    let sum = |inputs: &[Vec<E>]| all_reduce(&inputs.iter().map(Vec::as_slice).collect::<Vec<_>>(), Op::Sum, legs);
    let mut inputs = x.to_vec();
    inputs.iter_mut().for_each(|input| input[octet.clone()].fill(E::from_bits(0)));
    let without = sum(&inputs);
    inputs[rank] = x[rank].clone();
    inputs[rank][at] = bad;
    let with = sum(&inputs);
    let mut inputs = x.to_vec();
    inputs[rank][at] = bad;
    let beside_others = sum(&inputs);
    for i in 0..with.len() {
        if octet.contains(&i) {
            prop_assert_eq!(with[i].to_bits(), E::CANONICAL_NAN.to_bits(), "{:?} {}", legs, i);
            prop_assert_eq!(beside_others[i].to_bits(), E::CANONICAL_NAN.to_bits(), "{:?} {}", legs, i);
        } else {
            prop_assert_eq!(with[i].to_bits(), without[i].to_bits(), "{:?} {}", legs, i);
            prop_assert!(beside_others[i].to_f32().is_finite(), "{:?} {}", legs, i);
        }
    }
    Ok(())
}

/// As many ranks' inputs: some groups with few values, so that octets are constant of themselves.
fn inputs<E: Element>() -> impl Strategy<Value = Vec<Vec<E>>> {
    let element = prop_oneof![4 => -8.0f32..8.0, 1 => Just(0.0), 1 => Just(-1.5)];
    (2usize..=8, 9usize..300).prop_flat_map(move |(world, count)| {
        let input = proptest::collection::vec(element.clone().prop_map(E::from_f32_nearest), count);
        proptest::collection::vec(input, world)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    #[cfg_attr(miri, ignore = "takes minutes")]
    fn a_bad_element_of_any_rank_makes_nan_of_its_octet_and_changes_no_other_bit_in_fp16(
        x in inputs::<f16>(), rank in 0usize..8, at in 0usize..300, bad in bad::<f16>(), legs in any_legs(),
    ) {
        is_isolated(&x, rank % x.len(), at % (x[0].len() / 8 * 8), bad, legs)?;
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes minutes")]
    fn and_in_bf16(
        x in inputs::<bf16>(), rank in 0usize..8, at in 0usize..300, bad in bad::<bf16>(), legs in any_legs(),
    ) {
        is_isolated(&x, rank % x.len(), at % (x[0].len() / 8 * 8), bad, legs)?;
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes minutes")]
    fn octets_of_equal_elements_sum_exactly(
        values in proptest::collection::vec((-2000i32..2000, -2000i32..2000), 40),
        world in 2usize..=8,
        legs in any_legs(),
    ) {
        // Halves of integers: every sum is one, of 11 bits at most in fp16 after its rounding.
        let inputs: Vec<Vec<f16>> = (0..world)
            .map(|rank| {
                let of = |(a, b): &(i32, i32)| f16::from_f32((a + b * rank as i32) as f32 / 16.0);
                values.iter().flat_map(|pair| [of(pair); 8]).collect()
            })
            .collect();
        let sum = all_reduce(&inputs.iter().map(Vec::as_slice).collect::<Vec<_>>(), Op::Sum, legs);
        for (i, got) in sum.iter().enumerate() {
            let exact: f64 = inputs.iter().map(|input| input[i].to_f64()).sum();
            prop_assert_eq!(*got, f16::from_f64(exact), "{:?} {}", legs, i);
        }
    }
}

/// Whole groups of each value of a type; every 16-bit pattern stands in the quants of every width.
fn every_element_arrives<E: Element>() {
    for bits in 2..=8 {
        let codec = Codec { code: Code::Blocks, ..codec(bits, 64) };
        for first in few((0..=u16::MAX).step_by(TILE_ELEMS / 8)) {
            let x: Vec<E> = (0..TILE_ELEMS).map(|i| E::from_bits(first.wrapping_add((i / 8) as u16))).collect();
            let mut payload = vec![0; codec.tile_bytes()];
            codec.encode_tile::<E>(&codec.enter(&x), &mut payload);
            let mut y = x.clone();
            codec.decode_tile_to(&payload, &mut y);
            for (x, y) in x.iter().zip(&y) {
                // Below, the transform has rounded.
                let is_small = E::LEAST_UNIT == <f16 as Element>::LEAST_UNIT && x.to_f32().abs() < 1.0 / 2048.0;
                if !x.to_f32().is_finite() {
                    assert_eq!(y.to_bits(), 0x7fff, "{x:?}");
                } else if is_small || x.to_f32().abs() < 1e-37 {
                    assert!((x.to_f32() - y.to_f32()).abs() <= 4.0 / 16_777_216.0, "{x:?} {y:?}");
                } else {
                    assert_eq!(x, y, "{bits} bits");
                }
            }
        }
    }
}

#[test]
fn octets_of_every_element_arrive_as_they_are() {
    every_element_arrives::<f16>();
    every_element_arrives::<bf16>();
}

#[test]
fn ones_sum_to_the_number_of_ranks_at_every_width_and_code() {
    let count = if cfg!(miri) { 100 } else { TILE_ELEMS + 77 };
    for world in few(2..=8) {
        let ones = vec![bf16::from_f32(1.0); count];
        let pairs = (2..=8).flat_map(|reduce| (2..=8).map(move |gather| (reduce, gather)));
        for (reduce, gather) in few(pairs.filter(|(a, b)| a == b || *b == 8)) {
            for code in [None, Some(Code::Plain)] {
                let width = |bits| Width::new(bits).unwrap();
                let legs = Legs::choose(code, (width(reduce), width(gather)), GroupSize::new(64).unwrap()).unwrap();
                let sum = all_reduce(&vec![ones.as_slice(); world], Op::Sum, legs);
                assert!(sum.iter().all(|sum| sum.to_f32() == world as f32), "{legs:?} {sum:?}");
                let average = all_reduce(&vec![ones.as_slice(); world], Op::Average, legs);
                assert!(average.iter().all(|x| x.to_f32() == 1.0), "{legs:?} {average:?}");
            }
        }
    }
}

#[test]
fn a_constant_sum_beyond_fp16_is_an_infinity_as_with_nccl() {
    let input = vec![f16::from_f32(-65504.0); 64];
    for world in [2, 3, 8] {
        let sum = all_reduce(&vec![input.as_slice(); world], Op::Sum, legs(Code::Blocks, 4, 4, 64));
        assert!(sum.iter().all(|x| *x == f16::NEG_INFINITY), "{world} {sum:?}");
    }
}

#[test]
fn constant_octets_do_not_widen_the_group_of_others() {
    // Beside 60000 eight times, small elements are coded as they are alone.
    let small: Vec<f16> = (0..64).map(|i| f16::from_f32((i as f32).sin())).collect();
    let mut beside = small.clone();
    beside[24..32].fill(f16::from_f32(60000.0));
    let sent = |x: &[f16]| all_reduce(&[x], Op::Sum, legs(Code::Blocks, 4, 4, 64));
    let mut without = small;
    without[24..32].fill(f16::ZERO);
    let (y, z) = (sent(&beside), sent(&without));
    assert!((0..64).all(|i| if i / 8 == 3 { y[i] == beside[i] } else { y[i] == z[i] }), "{y:?} {z:?}");
}

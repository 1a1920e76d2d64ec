//! Bands of the code of blocks: when a group has them, and what they are good for. (The oracle in blocks_code.rs has them, too.)

use super::blocks_code::{blocks_of, sent};
use super::*;

/// The unit as it is stored of the first group.
fn stored_unit<E: Element>(codec: Codec, values: &[f32]) -> u16 {
    let mut payload = vec![0; codec.tile_bytes()];
    codec.encode_tile::<E>(values, &mut payload);
    let at = TILE_ELEMS * usize::from(codec.width.bits()) / 8 + 256;
    u16::from_le_bytes([payload[at], payload[at + 1]])
}

#[test]
fn one_hot_element_costs_its_neighbours_little() {
    // The largest error of an octet's other elements, and of other octets, in units of the others' size.
    let errors = |hot: f32, bits: u8| {
        let mut x: Vec<f32> = (0..64).map(|i| ((i * 37 + 11) as f32).sin()).collect();
        x[20] = hot;
        let (y, _) = sent::<f16>(blocks_of(bits, 64), &x);
        let error = |i: usize| (x[i] - y[i]).abs();
        let largest =
            |within: bool| (0..64).filter(|i| *i != 20 && (*i / 8 == 2) == within).map(error).fold(0.0, f32::max);
        (largest(true), largest(false), error(20) / hot.abs())
    };
    // Without bands a step beside 40 is 40 / 8 / 8 at 4 bits, and up to eight halves of it add up.
    for (hot, bits, beside, elsewhere) in
        [(40.0, 4, 0.7, 0.4), (-40.0, 4, 0.7, 0.4), (40.0, 6, 0.17, 0.1), (300.0, 4, 1.3, 0.7), (-300.0, 6, 0.33, 0.17)]
    {
        let (in_octet, in_others, of_hot) = errors(hot, bits);
        assert!(in_octet < beside && in_others < elsewhere && of_hot < 0.02, "{hot} {bits}: {:?}", errors(hot, bits));
    }
}

#[test]
fn a_band_begins_above_its_base() {
    // A unit of 1 and 15 for the top: up7(14.9 * ...) / 15. Of v equal to B the sign would be lost, so there is no band.
    let codec = blocks_of(4, 64);
    let group = |lowest: f32| {
        let mut v = vec![0.25; 64];
        v[..8].fill(-14.9);
        v[5] = -lowest;
        v
    };
    assert_eq!(stored_unit::<f16>(codec, &group(11.25)), f16::ONE.to_bits(), "3/4 of 15");
    let banded = f16::ONE.to_bits() | 0x8000;
    assert_eq!(stored_unit::<f16>(codec, &group(11.250_001)), banded);
    assert_eq!(stored_unit::<f16>(codec, &group(14.062_5)), banded, "15/16 of 15");
    assert_eq!(stored_unit::<f16>(codec, &group(14.062_501)), banded | 1);
    let y = round_trip::<f16>(codec, &group(11.250_001));
    assert!((-11.5..-11.25).contains(&y[5]) && (-15.0..-14.5).contains(&y[0]), "{y:?}");
}

#[test]
fn other_octets_have_a_say_in_bands() {
    // Of a shift of 2 the others' L is 15/2 of the unit at most, so none may have a level of more than 14 halves.
    let codec = blocks_of(5, 64);
    let stored = |other: f32| {
        let mut v = vec![0.25; 64];
        v[..8].fill(14.9);
        v[8..16].copy_from_slice(&[other, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        stored_unit::<bf16>(codec, &v)
    };
    let one = bf16::ONE.to_bits();
    assert_eq!([stored(1.0), stored(6.9), stored(7.1)], [one | 0x8001, one | 0x8000, one]);
    assert_eq!(stored(f32::NAN), one | 0x8001, "a constant has none");
}

#[test]
fn the_smallest_groups_have_no_bands() {
    let v = |size: f32| [vec![size; 8], vec![size / 100.0; 56]].concat();
    let codec = blocks_of(4, 64);
    assert_eq!(stored_unit::<f16>(codec, &v(3e-6)), 0x0080, "the unit is the least");
    assert_eq!(stored_unit::<f16>(codec, &v(1e-3)) & 0x8001, 0x8001);
}

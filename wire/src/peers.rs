//! What others send, to compare our codes with: the spike code of *FlashCommunication V2* (arXiv
//! 2508.03760), symmetric integers, FP8 and MXFP4.
//!
//! The library has no kernels for these, so nothing here has a payload. A peer is a function that
//! replaces the values of a quantization group by what they decode to; its scales are rounded to
//! the type that it would send them in. The caller names the bits on the wire
//! ([`spikes_bits_per_element`]), and [`two_hop_sum`] does with such a function what
//! [`crate::reference`] does with ours. `wire/examples/codes.rs` prints the comparison.

use half::f16;

use crate::element::Element;

/// The two-hop sum of all ranks' inputs, each group of `group` elements coded by `code`. The owner
/// of an element adds its own input unquantized. The number of ranks and `group` divide the inputs'
/// length.
pub fn two_hop_sum<E: Element>(inputs: &[&[E]], group: usize, code: impl Fn(&mut [f32])) -> Vec<E> {
    let count = inputs[0].len();
    let chunk = count / inputs.len();
    let mut output = Vec::with_capacity(count);
    for start in (0..count).step_by(group) {
        let mut sum = vec![0.0; group];
        for (rank, input) in inputs.iter().enumerate() {
            let mut term: Vec<f32> = input[start..start + group].iter().map(|x| x.to_f32()).collect();
            if rank != start / chunk {
                code(&mut term);
            }
            sum.iter_mut().zip(&term).for_each(|(s, t)| *s += t);
        }
        code(&mut sum);
        output.extend(sum.iter().map(|x| E::from_f32_nearest(*x)));
    }
    output
}

/// Spike reserving: the minimum and the maximum of a group travel in the storage type, with their
/// places. Scale and zero point come from the rest, as in the plain code. A group that holds a NaN
/// or an infinity becomes NaN throughout.
pub fn spikes<E: Element>(group: &mut [f32], bits: u8) {
    let ends = |group: &[f32]| {
        let low = (0..group.len()).min_by(|i, j| group[*i].total_cmp(&group[*j])).expect("a group has elements");
        let high = (0..group.len()).max_by(|i, j| group[*i].total_cmp(&group[*j])).expect("a group has elements");
        (low, high)
    };
    if !group.iter().all(|x| x.is_finite()) {
        return group.fill(f32::NAN);
    }
    // Of equal elements the first is the minimum and the last the maximum, so the two places
    // differ.
    let (low, high) = ends(group);
    let reserved = [low, high].map(|place| (place, E::from_f32_nearest(group[place]).to_f32()));
    let rest: Vec<f32> = (0..group.len()).filter(|i| *i != low && *i != high).map(|i| group[i]).collect();
    let (least, greatest) = ends(&rest);
    let max_integer = f32::from(u8::MAX >> (8 - bits));
    let zero = E::from_f32_down(rest[least]).to_f32();
    let scale = E::from_f32_up((rest[greatest] - zero) / max_integer).to_f32();
    let inverse = if (1.0 / scale).is_finite() { 1.0 / scale } else { 0.0 };
    for x in group.iter_mut() {
        *x = ((*x - zero) * inverse).round_ties_even().clamp(0.0, max_integer).mul_add(scale, zero);
    }
    reserved.into_iter().for_each(|(place, value)| group[place] = value);
}

/// Bits that an element takes with [`spikes`]: the integer; for each group scale, zero point and
/// two elements of 16 bits, and two places of 8.
pub fn spikes_bits_per_element(bits: u8, group: usize) -> f64 {
    f64::from(bits) + 80.0 / group as f64
}

/// Symmetric integers: the value farthest from 0 becomes -2^(b-1) times the scale, of fp16.
pub fn symmetric(group: &mut [f32], bits: u8) {
    let half_range = f32::from(1u8 << (bits - 1));
    let farthest = group.iter().fold(0.0, |far: f32, x| if x.abs() > far.abs() { *x } else { far });
    let scale = f16::from_f32(farthest / -half_range).to_f32();
    if scale != 0.0 {
        group.iter_mut().for_each(|x| *x = (*x / scale).round_ties_even().clamp(-half_range, half_range - 1.0) * scale);
    }
}

/// FP8 e4m3 with a scale of fp16.
pub fn fp8(group: &mut [f32]) {
    let scale = f16::from_f32(largest(group) / 448.0).to_f32();
    if scale != 0.0 {
        group.iter_mut().for_each(|x| *x = minifloat(*x / scale, 3, -6, 448.0) * scale);
    }
}

/// MXFP4: e2m1 with a power of two as scale.
pub fn mxfp4(group: &mut [f32]) {
    let largest = largest(group);
    if largest > 0.0 {
        let scale = (largest.log2().floor() - 2.0).exp2();
        group.iter_mut().for_each(|x| *x = minifloat(*x / scale, 1, 0, 6.0) * scale);
    }
}

fn largest(group: &[f32]) -> f32 {
    group.iter().fold(0.0, |largest: f32, x| largest.max(x.abs()))
}

/// `x` rounded to a float of so many mantissa bits, saturating.
fn minifloat(x: f32, mantissa_bits: i32, min_exponent: i32, max: f32) -> f32 {
    if x == 0.0 {
        return x;
    }
    let exponent = (x.abs().log2().floor() as i32).max(min_exponent);
    let unit = ((exponent - mantissa_bits) as f32).exp2();
    ((x / unit).round_ties_even() * unit).clamp(-max, max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spikes_are_exact_whatever_the_width() {
        let mut x: Vec<f32> = (0..128).map(|i| (i as f32).sin()).collect();
        (x[17], x[101]) = (-400.25, 1000.5);
        let mut y = x.clone();
        spikes::<f16>(&mut y, 2);
        assert_eq!((y[17], y[101]), (-400.25, 1000.5));
        assert!((0..128).all(|i| (x[i] - y[i]).abs() < 0.35), "the rest has its own scale");
        assert_eq!(spikes_bits_per_element(4, 128), 4.625);
    }

    #[test]
    fn a_spike_beyond_the_storage_type_is_an_infinity_there_only() {
        let mut x = vec![1.0; 128];
        (x[3], x[9]) = (-70000.0, 70000.0);
        spikes::<f16>(&mut x, 8);
        assert_eq!((x[3], x[9]), (f32::NEG_INFINITY, f32::INFINITY));
        assert!(x.iter().enumerate().all(|(i, y)| i == 3 || i == 9 || *y == 1.0));
    }

    #[test]
    fn the_rest_of_a_group_of_spikes_is_off_by_half_a_step_at_most() {
        let x: Vec<f32> = (0..128).map(|i| (i as f32 * 0.7).sin() * if i % 60 == 0 { 0.1 } else { 3.0 }).collect();
        for bits in 2..=8 {
            let mut y = x.clone();
            spikes::<f16>(&mut y, bits);
            let half_step = 0.5 * 6.0 / f32::from(u8::MAX >> (8 - bits)) + 0.004;
            assert!(x.iter().zip(&y).all(|(x, y)| (x - y).abs() <= half_step), "{bits} bits");
        }
    }

    #[test]
    fn a_nan_or_an_infinity_spreads_over_its_group_of_spikes() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1.0; 32];
            x[7] = bad;
            spikes::<f16>(&mut x, 4);
            assert!(x.iter().all(|y| y.is_nan()));
        }
    }

    #[test]
    fn the_owner_adds_its_own_input_unquantized() {
        // A code that forgets everything leaves of hop 1 the owner's input, of hop 2 nothing.
        let inputs = [[1.0f32; 8], [2.0; 8]].map(|input| input.map(f16::from_f32));
        let ranks: Vec<&[f16]> = inputs.iter().map(|input| &input[..]).collect();
        assert!(two_hop_sum(&ranks, 4, |group| group.fill(0.0)).iter().all(|y| y.to_f32() == 0.0));
        let kept = std::cell::RefCell::new(Vec::new());
        two_hop_sum(&ranks, 4, |group| kept.borrow_mut().push(group[0]));
        assert_eq!(*kept.borrow(), [2.0, 3.0, 1.0, 3.0], "each chunk: the other's term, then the sum");
    }

    #[test]
    fn minifloats_round_to_their_grid() {
        let mut x = [6.0, 5.1, 2.6, 0.2, -0.3, 0.0];
        mxfp4(&mut x);
        assert_eq!(x, [6.0, 6.0, 3.0, 0.0, -0.5, 0.0]);
        let mut x = [448.0, 17.1, -0.001];
        fp8(&mut x);
        assert_eq!(x, [448.0, 18.0, -0.001_953_125]);
    }
}

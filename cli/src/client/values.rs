//! What ranks sum, what must come out, and how far something is from it.

use std::hash::{DefaultHasher, Hasher};

use anyhow::{Context, Result};
use flashcomm_wire::{Code, Element, GroupSize, Legs, Op, Summand, Width, reference};
use half::{bf16, f16};
use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use rand_distr::{Distribution, StandardNormal};
use serde::{Deserialize, Serialize};

use super::rank::Dtype;

/// Elements that share a scale and a zero point in every job here.
pub const GROUP: u16 = 64;

/// A value of `--bits`, `BITS` or `BITS-CODE`, as values of `FLASHCOMM_BITS` and `FLASHCOMM_CODE`.
pub fn bits_and_code(bits: &str) -> (&str, &str) {
    bits.split_once('-').unwrap_or((bits, "auto"))
}

/// The same, and [`GROUP`], typed.
pub fn legs(text: &str) -> Result<Legs> {
    let (bits, code) = bits_and_code(text);
    let typed = || {
        let width = |text: &str| text.parse().ok().and_then(Width::new);
        let (reduce, gather) = bits.split_once(':').unwrap_or((bits, bits));
        let code = if code == "auto" { None } else { Some(Code::by_name(code)?) };
        Legs::choose(code, (width(reduce)?, width(gather)?), GroupSize::new(GROUP).expect("a group size"))
    };
    typed().with_context(|| {
        format!(
            "{text:?} is no width; it takes 2 to 8, or reduce:gather as in 4:8, the second no less, or 16; with a code as in 4-plain: any of \
             FLASHCOMM_CODE, all but plain with legs of one width, or 4:8"
        )
    })
}

/// A rank's input: normally distributed, the same whenever it is asked for. A shorter one is the beginning of a longer one.
pub fn input(n_bytes: usize, dtype: Dtype, seed: u64, rank: usize) -> Vec<u8> {
    let random = Xoshiro256PlusPlus::seed_from_u64(seed.wrapping_mul(1 << 16).wrapping_add(rank as u64));
    let values = StandardNormal.sample_iter(random).take(n_bytes / dtype.n_bytes());
    match dtype {
        Dtype::Fp16 => values.flat_map(|x: f32| f16::from_f32(x).to_le_bytes()).collect(),
        Dtype::Bf16 => values.flat_map(|x: f32| bf16::from_f32(x).to_le_bytes()).collect(),
        Dtype::Fp32 => values.flat_map(|x: f32| x.to_le_bytes()).collect(),
    }
}

/// Every rank's input.
pub fn inputs(n_bytes: usize, dtype: Dtype, seed: u64, world: usize) -> Vec<Vec<u8>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..world).map(|rank| scope.spawn(move || input(n_bytes, dtype, seed, rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("makes numbers")).collect()
    })
}

/// What every rank must hold after a compressed all-reduce, as the specification has it.
pub fn reference(inputs: &[Vec<u8>], dtype: Dtype, legs: Legs) -> Vec<u8> {
    fn typed<E: Element>(inputs: &[Vec<u8>], legs: Legs) -> Vec<u8> {
        let inputs: Vec<Vec<E>> = inputs.iter().map(|input| elements(input).collect()).collect();
        let inputs: Vec<&[E]> = inputs.iter().map(Vec::as_slice).collect();
        let output = reference::all_reduce(&inputs, Op::Sum, legs);
        output.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect()
    }
    match dtype {
        Dtype::Fp16 => typed::<f16>(inputs, legs),
        Dtype::Bf16 => typed::<bf16>(inputs, legs),
        Dtype::Fp32 => unreachable!("fp32 is never compressed"),
    }
}

/// What every rank must hold after an exact one.
pub fn exact(inputs: &[Vec<u8>], dtype: Dtype) -> Vec<u8> {
    fn typed<S: Summand>(inputs: &[Vec<S>], bytes: impl Fn(S) -> Vec<u8>) -> Vec<u8> {
        let inputs: Vec<&[S]> = inputs.iter().map(Vec::as_slice).collect();
        reference::exact(&inputs, Op::Sum).into_iter().flat_map(bytes).collect()
    }
    fn coded<E: Element>(inputs: &[Vec<u8>]) -> Vec<u8> {
        let inputs: Vec<Vec<E>> = inputs.iter().map(|input| elements(input).collect()).collect();
        typed(&inputs, |x| x.to_bits().to_le_bytes().to_vec())
    }
    match dtype {
        Dtype::Fp16 => coded::<f16>(inputs),
        Dtype::Bf16 => coded::<bf16>(inputs),
        Dtype::Fp32 => {
            let inputs: Vec<Vec<f32>> =
                inputs.iter().map(|input| numbers(input, dtype).map(|x| x as f32).collect()).collect();
            typed(&inputs, |x| x.to_le_bytes().to_vec())
        }
    }
}

fn elements<E: Element>(bytes: &[u8]) -> impl Iterator<Item = E> {
    bytes.chunks_exact(2).map(|pair| E::from_bits(u16::from_le_bytes([pair[0], pair[1]])))
}

fn numbers(bytes: &[u8], dtype: Dtype) -> Box<dyn Iterator<Item = f64> + '_> {
    match dtype {
        Dtype::Fp16 => Box::new(elements::<f16>(bytes).map(|x| x.to_f64())),
        Dtype::Bf16 => Box::new(elements::<bf16>(bytes).map(|x| x.to_f64())),
        Dtype::Fp32 => {
            Box::new(bytes.chunks_exact(4).map(|four| f64::from(f32::from_le_bytes(four.try_into().expect("four")))))
        }
    }
}

/// The same for the same bytes, in every process of this executable.
pub fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// How far a result is from the exact sum.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Distance {
    /// The error's Euclidean norm over that of the exact sum.
    pub relative_l2: f64,
    /// Signal to quantization noise, dB: `-20 log10(relative_l2)`.
    pub sqnr_db: f64,
    /// The largest error of an element.
    pub max_abs: f64,
}

/// The distance of `output` from the sum of `inputs`, taken in fp64.
pub fn distance(inputs: &[Vec<u8>], output: &[u8], dtype: Dtype) -> Distance {
    let mut exact: Vec<f64> = numbers(&inputs[0], dtype).collect();
    for input in &inputs[1..] {
        exact.iter_mut().zip(numbers(input, dtype)).for_each(|(sum, x)| *sum += x);
    }
    let (mut signal, mut noise, mut max_abs) = (0.0, 0.0, 0.0f64);
    for (exact, got) in exact.iter().zip(numbers(output, dtype)) {
        let error = (got - exact).abs();
        signal += exact * exact;
        noise += error * error;
        if error > max_abs || error.is_nan() {
            max_abs = error; // and a NaN stays
        }
    }
    let relative_l2 = (noise / signal).sqrt();
    Distance { relative_l2, sqnr_db: -20.0 * relative_l2.log10(), max_abs }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect()
    }

    #[test]
    fn the_distance_is_that_of_the_definitions() {
        let inputs = [bytes(&[1.0, 2.0, 0.0]), bytes(&[2.0, 2.0, 0.0])];
        let got = distance(&inputs, &bytes(&[3.0, 4.5, 0.0]), Dtype::Fp16);
        assert!((got.relative_l2 - 0.1).abs() < 1e-12 && (got.sqnr_db - 20.0).abs() < 1e-9 && got.max_abs == 0.5);
        assert!(distance(&inputs, &bytes(&[f32::NAN, 4.0, 0.0]), Dtype::Fp16).relative_l2.is_nan());
    }

    #[test]
    fn a_shorter_input_is_the_beginning_of_a_longer_one_and_ranks_differ() {
        let long = input(4096, Dtype::Fp16, 7, 1);
        assert_eq!(input(1024, Dtype::Fp16, 7, 1), long[..1024]);
        assert_ne!(input(4096, Dtype::Fp16, 7, 2), long);
        assert_ne!(input(4096, Dtype::Fp16, 8, 1), long);
    }

    #[test]
    fn widths_are_parsed_as_the_shim_does() {
        assert_eq!(legs("4:8").unwrap().to_string(), "4:8");
        assert_eq!(legs("5").unwrap().to_string(), "5");
        assert_eq!(legs("5").unwrap().code(), Code::Blocks);
        assert_eq!(legs("5-plain").unwrap().code(), Code::Plain);
        assert!(legs("4-morse").is_err() && legs("4-spikes").is_err() && legs("3:5-blocks").is_err());
        assert!(legs("9").is_err() && legs("4:").is_err() && legs("16:4").is_err());
    }
}

//! Inputs of ranks and what must come out: the scalar reference of `wire/`, or the exact sum.

use std::ffi::c_int;
use std::sync::Arc;

use flashcomm_wire::{Code, Element, GroupSize, Legs, Op, Width, reference};

use crate::api::dtype;

/// A small fast generator.
#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 ^ (self.0 >> 29)) >> 16
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.number() % n as u64) as usize
    }
}

/// A rank's input: bell-like values with an outlier now and then.
pub fn input<E: Element>(count: usize, seed: u64, rank: usize) -> Vec<E> {
    let mut random = Random(seed.wrapping_mul(1_000_003).wrapping_add(rank as u64 * 7919 + 1));
    let value = |_| {
        let bits = random.number();
        let unit = (0..4).map(|i| (bits >> (i * 8) & 0xff) as f32 / 128.0 - 1.0).sum::<f32>();
        E::from_f32_nearest(if bits >> 40 & 0xff == 0 { unit * 50.0 } else { unit })
    };
    (0..count).map(value).collect()
}

/// Everyone's input.
pub fn inputs<E: Element>(count: usize, seed: u64, world: usize) -> Vec<Vec<E>> {
    (0..world).map(|rank| input(count, seed, rank)).collect()
}

/// The codecs of `FLASHCOMM_BITS`, the default group and code.
pub fn legs(reduce: u8, gather: u8) -> Legs {
    legs_of(None, reduce, gather, 64)
}

/// Those of `FLASHCOMM_CODE` and `FLASHCOMM_GROUP`, too.
pub fn legs_of(code: Option<Code>, reduce: u8, gather: u8, group: u16) -> Legs {
    let width = |bits| Width::new(bits).unwrap();
    Legs::choose(code, (width(reduce), width(gather)), GroupSize::new(group).unwrap()).unwrap()
}

/// What every rank must hold after a compressed all-reduce.
pub fn reference<E: Element>(inputs: &[Vec<E>], legs: Legs) -> Vec<E> {
    reference_of(Op::Sum, inputs, legs)
}

/// The same, of a sum or an average.
pub fn reference_of<E: Element>(op: Op, inputs: &[Vec<E>], legs: Legs) -> Vec<E> {
    let inputs: Vec<&[E]> = inputs.iter().map(Vec::as_slice).collect();
    reference::all_reduce(&inputs, op, legs)
}

/// One all-reduce's inputs and what must come out, shared by the ranks.
pub struct Case<E> {
    pub count: usize,
    pub inputs: Vec<Vec<E>>,
    pub expected: Vec<E>,
}

impl<E: Element> Case<E> {
    pub fn new(count: usize, seed: u64, world: usize, legs: Legs) -> Arc<Self> {
        let inputs = inputs(count, seed, world);
        let expected = reference(&inputs, legs);
        Arc::new(Case { count, inputs, expected })
    }
}

/// Wants two vectors to hold the same bits.
pub fn same_bits<E: Element>(got: &[E], expected: &[E], about: &str) {
    let differs = got.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    assert!(got.len() == expected.len() && differs.is_none(), "{about}: differs at element {differs:?}");
}

/// Small whole numbers, whose sums of up to 16 ranks are exact in every type.
pub fn whole_numbers(count: usize, seed: u64, rank: usize) -> Vec<half::f16> {
    let mut random = Random(seed.wrapping_mul(31).wrapping_add(rank as u64));
    (0..count).map(|_| half::f16::from_f32(random.below(17) as f32 - 8.0)).collect()
}

/// Their exact sum: what plain NCCL gives.
pub fn exact_sum(inputs: &[Vec<half::f16>]) -> Vec<half::f16> {
    let sum = |i: usize| half::f16::from_f32(inputs.iter().map(|input| input[i].to_f32()).sum());
    (0..inputs[0].len()).map(sum).collect()
}

pub fn type_of<E: Element>() -> c_int {
    // 1.0 tells the two apart.
    if E::from_f32_nearest(1.0).to_bits() == 0x3c00 { dtype::FP16 } else { dtype::BF16 }
}

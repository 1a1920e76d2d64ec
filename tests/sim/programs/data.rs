//! What the operations of a program read and what they must make of it.

use flashcomm_test_support::{Random, dtype, legs, reference};
use flashcomm_wire::Element;
use half::{bf16, f16};

use super::program::{Kind, Op, Program};

/// How all-reduces come out.
#[derive(Clone, Copy)]
pub struct Compression {
    /// From so many bytes.
    pub min_bytes: usize,
    /// Also on communicators that do not block.
    pub non_blocking: bool,
}

/// Where an operation's data lie in a rank's memory.
#[derive(Clone, Copy)]
pub struct Place {
    pub input: usize,
    pub output: usize,
}

/// A rank's memory: before the program, where everything lies in it, and after it.
pub struct Memory {
    pub before: Vec<u8>,
    pub after: Vec<u8>,
    /// By the number of the operation.
    pub places: Vec<Option<Place>>,
}

/// Each rank's memory. Without compression as plain NCCL has it.
pub fn memories(program: &Program, compression: Option<Compression>) -> Vec<Memory> {
    let new = |_| Memory { before: Vec::new(), after: Vec::new(), places: Vec::new() };
    let mut memories: Vec<Memory> = (0..program.world).map(new).collect();
    for (i, op) in program.ops.iter().enumerate() {
        let comm = &program.comms[op.comm];
        let world = comm.members.len();
        let inputs: Vec<_> = (0..world).map(|rank| input(op, program.seed, i, rank)).collect();
        let is_compressed = compression.is_some_and(|how| {
            let n_bytes = op.count * n_bytes(op.kind);
            let is_half = matches!(op.kind, Kind::Sum(dtype::FP16 | dtype::BF16));
            is_half && world > 1 && n_bytes >= how.min_bytes && (how.non_blocking || !comm.non_blocking)
        });
        let outputs = outputs(op, &inputs, is_compressed);
        for (rank, memory) in memories.iter_mut().enumerate() {
            let place = comm.rank_of(rank).map(|rank| memory.add(op, rank, &inputs[rank], &outputs[rank]));
            memory.places.push(place);
        }
    }
    memories
}

impl Memory {
    fn add(&mut self, op: &Op, rank: usize, input: &[u8], output: &[u8]) -> Place {
        const UNTOUCHED: u8 = 0xa5;
        let start = self.before.len().next_multiple_of(16);
        self.before.resize(start, UNTOUCHED);
        self.after.resize(start, UNTOUCHED);
        // An all-gather in place has its input where it comes out.
        let offset = if op.in_place && op.kind == Kind::Gather { rank * input.len() } else { 0 };
        let output_at = if op.in_place { start } else { start + input.len().next_multiple_of(16) };
        let end = output_at + output.len();
        self.before.resize(end, UNTOUCHED);
        self.after.resize(end, UNTOUCHED);
        self.before[start + offset..][..input.len()].copy_from_slice(input);
        self.after[start + offset..][..input.len()].copy_from_slice(input);
        self.after[output_at..end].copy_from_slice(output);
        Place { input: start + offset, output: output_at }
    }
}

/// Bytes of an element.
fn n_bytes(kind: Kind) -> usize {
    match kind {
        Kind::Sum(dtype::FP16 | dtype::BF16) => 2,
        Kind::Shift => 1,
        _ => 4,
    }
}

/// Small whole numbers, whose sums are exact in every type.
fn input(op: &Op, seed: u64, number: usize, rank: usize) -> Vec<u8> {
    let mut random = Random(seed.wrapping_mul(1_000_003).wrapping_add((number * 64 + rank) as u64 * 7919));
    let mut bytes = Vec::with_capacity(op.count * n_bytes(op.kind));
    for _ in 0..op.count {
        let value = random.below(17) as f32 - 8.0;
        match op.kind {
            Kind::Sum(dtype::FP16) => bytes.extend(f16::from_f32(value).to_le_bytes()),
            Kind::Sum(dtype::BF16) => bytes.extend(bf16::from_f32(value).to_le_bytes()),
            Kind::Sum(dtype::FP32) => bytes.extend(value.to_le_bytes()),
            Kind::Shift => bytes.push(value as i8 as u8),
            _ => bytes.extend((value as i32).to_le_bytes()),
        }
    }
    bytes
}

/// What each rank gets.
fn outputs(op: &Op, inputs: &[Vec<u8>], is_compressed: bool) -> Vec<Vec<u8>> {
    let world = inputs.len();
    let all = |output: Vec<u8>| vec![output; world];
    match op.kind {
        Kind::Sum(dtype::FP16) => all(half_sum::<f16>(inputs, is_compressed)),
        Kind::Sum(dtype::BF16) => all(half_sum::<bf16>(inputs, is_compressed)),
        Kind::Sum(dtype::FP32) => all(sum(inputs, |words| words.map(f32::from_le_bytes).sum::<f32>().to_le_bytes())),
        Kind::Sum(_) => all(sum(inputs, |words| words.map(i32::from_le_bytes).sum::<i32>().to_le_bytes())),
        Kind::Broadcast(root) => all(inputs[root].clone()),
        Kind::Gather => all(inputs.concat()),
        Kind::Shift => (0..world).map(|rank| inputs[(rank + world - 1) % world].clone()).collect(),
    }
}

fn half_sum<E: Element>(inputs: &[Vec<u8>], is_compressed: bool) -> Vec<u8> {
    let values = |bytes: &Vec<u8>| -> Vec<E> {
        bytes.chunks_exact(2).map(|pair| E::from_bits(u16::from_le_bytes([pair[0], pair[1]]))).collect()
    };
    let inputs: Vec<Vec<E>> = inputs.iter().map(values).collect();
    let exact = |i: usize| E::from_f32_nearest(inputs.iter().map(|input| input[i].to_f32()).sum());
    let sum = match is_compressed {
        true => reference(&inputs, legs(4, 4)),
        false => (0..inputs[0].len()).map(exact).collect(),
    };
    sum.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect()
}

fn sum(inputs: &[Vec<u8>], of: impl Fn(&mut dyn Iterator<Item = [u8; 4]>) -> [u8; 4]) -> Vec<u8> {
    let word = |input: &Vec<u8>, i: usize| input[i * 4..][..4].try_into().unwrap();
    (0..inputs[0].len() / 4).flat_map(|i| of(&mut inputs.iter().map(|input| word(input, i)))).collect()
}

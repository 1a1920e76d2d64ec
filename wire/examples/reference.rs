//! The reference all-reduce on raw files: what a job on real GPUs is compared with.
//!
//! usage: reference sum|avg fp16|bf16 BITS CODE GROUP OUTPUT INPUT...
//!
//! INPUTs hold the ranks' elements, little-endian, in rank order; OUTPUT gets the sum's, or the average's. BITS, CODE and GROUP are as in
//! FLASHCOMM_BITS, FLASHCOMM_CODE and FLASHCOMM_GROUP.

use std::fs;
use std::process::exit;

use flashcomm_wire::{Code, Element, GroupSize, Legs, Op, Width, reference};
use half::{bf16, f16};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [op, dtype, bits, code, group, output, inputs @ ..] = args.as_slice() else {
        eprintln!("usage: reference sum|avg fp16|bf16 BITS CODE GROUP OUTPUT INPUT...");
        exit(2);
    };
    let group = GroupSize::new(group.parse().expect("GROUP is a number")).expect("GROUP is 32, 64 or 128");
    let (reduce, gather) = bits.split_once(':').unwrap_or((bits, bits));
    let width = |bits: &str| Width::new(bits.parse().expect("BITS are numbers")).expect("BITS are 2 to 8");
    let code = (code != "auto").then(|| Code::by_name(code).expect("CODE is as in FLASHCOMM_CODE"));
    let legs = Legs::choose(code, (width(reduce), width(gather)), group).expect("the code takes these widths");
    let op = match op.as_str() {
        "sum" => Op::Sum,
        "avg" => Op::Average,
        _ => panic!("the operation is sum or avg"),
    };
    match dtype.as_str() {
        "fp16" => run::<f16>(inputs, output, op, legs),
        "bf16" => run::<bf16>(inputs, output, op, legs),
        _ => panic!("the type is fp16 or bf16"),
    }
}

fn run<E: Element>(inputs: &[String], output: &str, op: Op, legs: Legs) {
    let inputs: Vec<Vec<E>> = inputs
        .iter()
        .map(|path| {
            let bytes = fs::read(path).unwrap_or_else(|error| panic!("{path}: {error}"));
            bytes.chunks_exact(2).map(|bits| E::from_bits(u16::from_le_bytes([bits[0], bits[1]]))).collect()
        })
        .collect();
    let inputs: Vec<&[E]> = inputs.iter().map(Vec::as_slice).collect();
    let sum = reference::all_reduce(&inputs, op, legs);
    let bytes: Vec<u8> = sum.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect();
    fs::write(output, bytes).unwrap_or_else(|error| panic!("{output}: {error}"));
}

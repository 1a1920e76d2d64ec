//! What each code loses: the error of a whole two-hop sum, by width, code, world size and kind of input.
//!
//! usage: codes [fp16|bf16]
//!
//! Prints SQNR in dB against the exact sum of the inputs (more is better), with the bits that an element takes on the
//! wire. In brackets, for comparison, stands what others send, computed here the same way: the spike code, symmetric
//! integers and FP8 with a scale per group in fp16, and MXFP4. The inputs are the same in every run.

use flashcomm_wire::{Code, Codec, Element, GroupSize, Legs, Op, TILE_ELEMS, Width, peers, reference};
use half::{bf16, f16};

/// Channels of the inputs with hot ones, a row of a matrix.
const CHANNELS: usize = 4096;
const HOT_CHANNELS: usize = 12;
/// Elements of each input: 8 tiles, so that each of 8 ranks owns one.
const COUNT: usize = 8 * TILE_ELEMS;
const WORLDS: [usize; 3] = [2, 4, 8];
const INPUTS: [&str; 5] = ["Gaussian", "Laplace", "Student t3", "hot channels", "uniform 0..1"];

fn main() {
    match std::env::args().nth(1).as_deref() {
        None | Some("fp16") => run::<f16>("fp16"),
        Some("bf16") => run::<bf16>("bf16"),
        _ => panic!("usage: codes [fp16|bf16]"),
    }
}

fn run<E: Element>(dtype: &str) {
    println!("SQNR in dB of a {dtype} sum over 2 / 4 / 8 ranks, {COUNT} elements\n");
    print!("{:5}{:22}{:>9}", "bits", "code", "bits/el");
    INPUTS.iter().for_each(|name| print!("{name:>22}"));
    println!();
    let inputs: Vec<Vec<Vec<E>>> = (0..INPUTS.len()).map(inputs).collect();
    for bits in 2..=8 {
        for (code, groups) in [(Code::Plain, &[128u16, 64, 32][..]), (Code::Blocks, &[128, 64, 32])] {
            for group in groups {
                let codec = Codec { width: Width::new(bits).unwrap(), group: GroupSize::new(*group).unwrap(), code };
                let legs = Legs::new(codec, codec).unwrap();
                let name = format!("{} {group}", code.name());
                row(bits, &name, codec.bits_per_element(), &inputs, |ranks| {
                    reference::all_reduce(ranks, Op::Sum, legs)
                });
            }
        }
        let peer = |name: &str, size: f64, group: usize, code: &dyn Fn(&mut [f32])| {
            row(bits, name, size, &inputs, |ranks| peers::two_hop_sum(ranks, group, code));
        };
        let size = peers::spikes_bits_per_element(bits, 128);
        peer("(spikes 128)", size, 128, &|group| peers::spikes::<E>(group, bits));
        peer("(symmetric 32)", f64::from(bits) + 0.5, 32, &|group| peers::symmetric(group, bits));
        if bits == 4 {
            peer("(MXFP4)", 4.25, 32, &|group| peers::mxfp4(group));
        }
        if bits == 8 {
            peer("(FP8 e4m3 128)", 8.125, 128, &|group| peers::fp8(group));
        }
    }
}

fn row<E: Element>(bits: u8, name: &str, size: f64, inputs: &[Vec<Vec<E>>], sum: impl Fn(&[&[E]]) -> Vec<E>) {
    print!("{bits:<5}{name:22}{size:9.3}");
    for ranks in inputs {
        let ranks: Vec<&[E]> = ranks.iter().map(Vec::as_slice).collect();
        let figures = WORLDS.map(|world| format!("{:.1}", sqnr_db(&ranks[..world], &sum(&ranks[..world]))));
        print!("{:>22}", figures.join(" / "));
    }
    println!();
}

fn sqnr_db<E: Element>(ranks: &[&[E]], sum: &[E]) -> f64 {
    let (mut signal, mut noise) = (0.0, 0.0);
    for (i, got) in sum.iter().enumerate() {
        let exact: f64 = ranks.iter().map(|rank| f64::from(rank[i].to_f32())).sum();
        signal += exact * exact;
        noise += (exact - f64::from(got.to_f32())).powi(2);
    }
    10.0 * (signal / noise).log10()
}

// ---- inputs ---------------------------------------------------------------------------------------------------------

/// One input per rank, of one kind.
fn inputs<E: Element>(kind: usize) -> Vec<Vec<E>> {
    let mut random = Random(kind as u64 + 1);
    let mut gain = vec![1.0; CHANNELS];
    for _ in 0..HOT_CHANNELS {
        let channel = (random.uniform() * CHANNELS as f64) as usize;
        gain[channel] = 10.0 + 50.0 * random.uniform();
    }
    let mut element = |i: usize| match kind {
        0 => random.gaussian(),
        1 => random.laplace(),
        2 => random.student_t3(),
        3 => random.gaussian() * gain[i % CHANNELS],
        _ => random.uniform(),
    };
    let most = WORLDS[WORLDS.len() - 1];
    (0..most).map(|_| (0..COUNT).map(|i| E::from_f32_nearest(element(i) as f32)).collect()).collect()
}

/// SplitMix64.
struct Random(u64);

impl Random {
    /// In (0, 1).
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ z >> 31) >> 12) as f64 + 0.5) / (1u64 << 52) as f64
    }
    fn gaussian(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }
    fn laplace(&mut self) -> f64 {
        let u = self.uniform() - 0.5;
        -u.signum() * (1.0 - 2.0 * u.abs()).ln()
    }
    fn student_t3(&mut self) -> f64 {
        let squares: f64 = (0..3).map(|_| self.gaussian().powi(2)).sum();
        self.gaussian() / (squares / 3.0).sqrt()
    }
}

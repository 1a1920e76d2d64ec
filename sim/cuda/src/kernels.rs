//! Kernels: Rust functions of one block, found by name in the library's own list. The one place where a new verb is added
//! is [`find`].
//!
//! A kernel takes one struct by value, the same as those of `kernels/*.cu`, and gets its bytes. It computes with the scalar
//! codec of `flashcomm-wire`. All of it runs on the stream's thread. Blocks that wait for nothing run one after the
//! other; what waits for other ranks, the channels of the fused kernel and the blocks of the exact one, takes turns
//! ([`crate::turns`]).

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use flashcomm_wire::{Codec, Element, GroupSize, TILE_ELEMS};
use half::{bf16, f16};
use once_cell::sync::Lazy;

use crate::access::{args, enter, load, store, store_both, store_decoded};
use crate::cu_result::{CuResult, Result};
use crate::element::ElementType;
use crate::instances::{Instance, Verb};
use crate::shared::{
    AllReduceArgs, CombineArgs, DequantizeArgs, EXACT_THREADS, ExactArgs, HOST_CHANNELS, QuantizeArgs, ReduceArgs,
    SignalArgs, Slice, TILE_THREADS, WaitArgs,
};
use crate::{copies, exact, fused, one_hop};

/// The extent of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Blocks that the multiprocessors of the stream hold at once; each of the others waits for one to end.
    pub resident: u32,
    /// Whether the last block begins. CUDA promises no order.
    pub from_back: bool,
}

/// How a kernel runs.
#[derive(Clone, Copy)]
enum Run {
    /// Block by block; each gets its coordinates.
    Blocks(fn(&Kernel, &[u8], [u32; 3]) -> Result<()>),
    /// As a whole.
    Grid(fn(&Kernel, &[u8], Shape) -> Result<()>),
}

/// A kernel.
#[derive(Clone)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// Bytes of its argument.
    pub arg_bytes: usize,
    /// Threads of its blocks at most.
    pub max_threads: u32,
    instance: &'static Instance,
    run: Run,
}

/// Threads of a warp.
const WARP: u32 = 32;

/// The kernel of this name, if the library has it.
pub fn find(name: &str) -> Option<Kernel> {
    static ALL: Lazy<Vec<Instance>> = Lazy::new(Instance::all);
    let instance = ALL.iter().find(|instance| instance.name() == name)?;
    let by_type = |fp16: Run, bf16: Run| match instance.element() {
        ElementType::Fp16 => fp16,
        ElementType::Bf16 => bf16,
        ElementType::Fp32 => unreachable!("it has no codes"),
    };
    const ROW: u32 = TILE_THREADS as u32;
    let (run, arg_bytes, max_threads) = match instance.verb() {
        Verb::Quantize => {
            (by_type(Run::Blocks(quantize::<f16>), Run::Blocks(quantize::<bf16>)), size_of::<QuantizeArgs>(), ROW)
        }
        Verb::Reduce => {
            (by_type(Run::Blocks(reduce::<f16>), Run::Blocks(reduce::<bf16>)), size_of::<ReduceArgs>(), ROW)
        }
        Verb::Dequantize => {
            (by_type(Run::Blocks(dequantize::<f16>), Run::Blocks(dequantize::<bf16>)), size_of::<DequantizeArgs>(), ROW)
        }
        Verb::Combine => {
            (by_type(Run::Blocks(combine::<f16>), Run::Blocks(combine::<bf16>)), size_of::<CombineArgs>(), ROW)
        }
        verb @ (Verb::OneHop | Verb::HostOneHop) => {
            let run = by_type(Run::Grid(one_hop::run::<f16>), Run::Grid(one_hop::run::<bf16>));
            (run, size_of::<AllReduceArgs>(), max_channels(verb) * ROW)
        }
        verb @ (Verb::AllReduce | Verb::HostAllReduce) => {
            let run = by_type(Run::Grid(fused::run::<f16>), Run::Grid(fused::run::<bf16>));
            (run, size_of::<AllReduceArgs>(), max_channels(verb) * ROW)
        }
        Verb::Exact => {
            let run = match instance.element() {
                ElementType::Fp16 => exact::run::<f16>,
                ElementType::Bf16 => exact::run::<bf16>,
                ElementType::Fp32 => exact::run::<f32>,
            };
            (Run::Grid(run), size_of::<ExactArgs>(), EXACT_THREADS as u32)
        }
        Verb::Signal => (Run::Blocks(copies::signal), size_of::<SignalArgs>(), WARP),
        Verb::Wait => (Run::Grid(copies::wait), size_of::<WaitArgs>(), WARP),
    };
    Some(Kernel { name: name.into(), arg_bytes, max_threads, instance, run })
}

/// Channels of a block of a fused kernel at most.
const fn max_channels(verb: Verb) -> u32 {
    match verb {
        Verb::HostAllReduce | Verb::HostOneHop => HOST_CHANNELS as u32,
        _ => 7,
    }
}

impl Kernel {
    /// What it does.
    pub fn verb(&self) -> Verb {
        self.instance.verb()
    }

    /// Bytes of its elements.
    pub fn element_bytes(&self) -> u64 {
        self.instance.element().n_bytes() as u64
    }

    /// Whether its blocks may have this shape.
    pub fn takes(&self, [threads, rows]: [u32; 2]) -> bool {
        let is_shape = match self.instance.verb() {
            Verb::Exact | Verb::Signal | Verb::Wait => rows == 1 && threads > 0 && threads.is_multiple_of(WARP),
            _ => rows > 0 && threads == TILE_THREADS as u32,
        };
        is_shape && threads * rows <= self.max_threads
    }

    /// Runs every block of a grid.
    pub fn run(&self, args: &[u8], shape: Shape) -> Result<()> {
        let [x, y, z] = shape.grid;
        match self.run {
            Run::Blocks(run) => {
                let mut blocks = (0..z).flat_map(|z| (0..y).flat_map(move |y| (0..x).map(move |x| [x, y, z])));
                blocks.try_for_each(|at| run(self, args, at))
            }
            Run::Grid(run) => {
                let begun = Instant::now();
                run(self, args, shape)?;
                self.leave_time(args, begun.elapsed())
            }
        }
    }

    /// What it took, where that is asked for: of every kernel, and not of one in 16.
    fn leave_time(&self, bytes: &[u8], elapsed: Duration) -> Result<()> {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let took = match self.verb() {
            Verb::Exact => args::<ExactArgs>(bytes).took,
            Verb::AllReduce | Verb::OneHop | Verb::HostAllReduce | Verb::HostOneHop => {
                args::<AllReduceArgs>(bytes).took
            }
            _ => std::ptr::null_mut(),
        };
        if took.is_null() {
            return Ok(());
        }
        let ns = elapsed.as_nanos().min(u32::MAX.into()) as u64;
        store(took as usize, &((LAST.fetch_add(1, Ordering::Relaxed) + 1) << 32 | ns).to_le_bytes())
    }

    /// The codec of hop `i` of those that it handles; `group_shift` is log2 of a group's elements / 8.
    pub fn codec(&self, i: usize, group_shift: u32) -> Result<Codec> {
        let group = 8u16.checked_shl(group_shift).and_then(GroupSize::new);
        let (code, width) = *self.instance.codings().get(i).ok_or(CuResult::INVALID_VALUE)?;
        Ok(Codec { width, group: group.ok_or(CuResult::LAUNCH_FAILED)?, code })
    }
}

impl Slice {
    /// First element and length of tile `i` of the slice in the chunk of rank `owner`, if it has one.
    fn tile(&self, owner: u32, i: u32) -> Option<(usize, usize)> {
        let in_chunk = self.first_tile + u64::from(i);
        let start = (u64::from(owner) * self.chunk_tiles + in_chunk) * TILE_ELEMS as u64;
        let is_there = i < self.n_tiles && in_chunk < self.chunk_tiles && start < self.count;
        is_there.then(|| (start as usize, (self.count - start).min(TILE_ELEMS as u64) as usize))
    }
}

fn quantize<E: Element>(kernel: &Kernel, bytes: &[u8], at: [u32; 3]) -> Result<()> {
    let args: QuantizeArgs = args(bytes);
    let codec = kernel.codec(0, args.slice.group_shift)?;
    let [tile, slot, _] = at;
    let owner = slot + u32::from(slot >= args.rank);
    let Some(elements) = args.slice.tile(owner, tile) else { return Ok(()) };
    let mut payload = vec![0; codec.tile_bytes()];
    codec.encode_tile::<E>(&enter::<E>(codec, args.input as usize, elements)?, &mut payload);
    store(args.outgoing as usize + slot as usize * args.slot_bytes as usize + tile as usize * payload.len(), &payload)
}

fn reduce<E: Element>(kernel: &Kernel, bytes: &[u8], at: [u32; 3]) -> Result<()> {
    let args: ReduceArgs = args(bytes);
    let (from, to) = (kernel.codec(0, args.slice.group_shift)?, kernel.codec(1, args.slice.group_shift)?);
    let tile = at[0];
    let Some(elements) = args.slice.tile(args.rank, tile) else { return Ok(()) };
    let slot = |rank: u32| args.incoming as usize + rank as usize * args.slot_bytes as usize;
    let payload_at = |rank: u32| slot(rank) + tile as usize * from.tile_bytes();
    let is_batch_invariant = args.batch_invariant != 0;
    if is_batch_invariant {
        let mut payload = vec![0; from.tile_bytes()];
        from.encode_tile::<E>(&enter::<E>(from, args.input as usize, elements)?, &mut payload);
        store(payload_at(args.rank), &payload)?;
    }
    let mut sum: Option<Vec<f32>> = None;
    for rank in 0..args.world {
        let term = if rank == args.rank && !is_batch_invariant {
            enter::<E>(from, args.input as usize, elements)?
        } else {
            let mut term = vec![0.0; from.n_values(elements.1)];
            from.decode_tile::<E>(&load(payload_at(rank), from.tile_bytes())?, &mut term);
            term
        };
        match &mut sum {
            None => sum = Some(term),
            Some(sum) => sum.iter_mut().zip(term).for_each(|(sum, term)| *sum += term),
        }
    }
    let mut sum = sum.ok_or(CuResult::LAUNCH_FAILED)?;
    sum.iter_mut().for_each(|sum| *sum *= args.scale);
    let mut payload = vec![0; to.tile_bytes()];
    to.encode_tile::<E>(&sum, &mut payload);
    store(args.outgoing as usize + tile as usize * payload.len(), &payload)
}

fn dequantize<E: Element>(kernel: &Kernel, bytes: &[u8], at: [u32; 3]) -> Result<()> {
    let args: DequantizeArgs = args(bytes);
    let codec = kernel.codec(0, args.slice.group_shift)?;
    let [tile, owner, _] = at;
    let Some((start, n_elems)) = args.slice.tile(owner, tile) else { return Ok(()) };
    let at = args.payload as usize + owner as usize * args.slot_bytes as usize + tile as usize * codec.tile_bytes();
    store_decoded::<E>(codec, &load(at, codec.tile_bytes())?, args.output as usize, (start, n_elems))
}

fn combine<E: Element>(kernel: &Kernel, bytes: &[u8], at: [u32; 3]) -> Result<()> {
    let args: CombineArgs = args(bytes);
    let codec = kernel.codec(0, args.slice.group_shift)?;
    let Some(tile) = args.slice.tile(0, at[0]) else { return Ok(()) };
    let payload = |rank: usize| {
        load(
            args.payload as usize + rank * args.slot_bytes as usize + at[0] as usize * codec.tile_bytes(),
            codec.tile_bytes(),
        )
    };
    store_both::<E>(codec, [&payload(0)?, &payload(1)?], args.scale, args.output as usize, tile)
}

//! Kernels: Rust functions of one block, found by name. The one place where a new kernel is added is [`find`].
//!
//! A kernel takes one struct by value, as those of `kernels/*.cu` do, and gets its bytes. It computes with the scalar
//! codec of `flashcomm-wire`. A kernel whose blocks wait for other blocks or ranks is marked [`Blocks::Wait`]: each of
//! its blocks is then a thread. The blocks of the others run one after the other on the stream's thread.

use flashcomm_wire::{Codec, Element, GroupSize, TILE_ELEMS, Width};
use half::{bf16, f16};

use crate::code::{Code, Result};
use crate::memory;

/// How the blocks of a kernel run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Blocks {
    /// One after the other: they wait for nothing.
    InTurn,
    /// Each on a thread of its own.
    Wait,
}

/// Which block of which grid.
#[derive(Clone, Copy, Debug)]
pub struct Block {
    /// Its coordinates.
    pub at: [u32; 3],
    /// The grid's extent.
    pub grid: [u32; 3],
}

/// A kernel.
#[derive(Clone)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// Bytes of its argument.
    pub arg_bytes: usize,
    /// How its blocks run.
    pub blocks: Blocks,
    widths: [Option<Width>; 2],
    run: fn(&Kernel, &[u8], Block) -> Result<()>,
}

/// Threads of every block of ours.
pub const THREADS: u32 = 128;

/// The kernel of this name: `flashcomm_<verb>_<dtype>_int<bits>[_int<bits>]`.
pub fn find(name: &str) -> Option<Kernel> {
    let rest = name.strip_prefix("flashcomm_")?;
    let mut parts = rest.split('_');
    let (verb, element) = (parts.next()?, parts.next()?);
    let mut widths = [None; 2];
    for (place, part) in widths.iter_mut().zip(&mut parts) {
        *place = Some(Width::new(part.strip_prefix("int")?.parse().ok()?)?);
    }
    if parts.next().is_some() || widths[0].is_none() {
        return None;
    }
    type Run = fn(&Kernel, &[u8], Block) -> Result<()>;
    let by_type = |fp16: Run, bf16: Run| match element {
        "fp16" => Some(fp16),
        "bf16" => Some(bf16),
        _ => None,
    };
    let (run, arg_bytes, n_widths): (Run, usize, usize) = match verb {
        "quantize" => (by_type(quantize::<f16>, quantize::<bf16>)?, size_of::<QuantizeArgs>(), 1),
        "reduce" => (by_type(reduce::<f16>, reduce::<bf16>)?, size_of::<ReduceArgs>(), 2),
        "dequantize" => (by_type(dequantize::<f16>, dequantize::<bf16>)?, size_of::<DequantizeArgs>(), 1),
        _ => return None,
    };
    if widths.iter().flatten().count() != n_widths {
        return None;
    }
    Some(Kernel { name: name.into(), arg_bytes, blocks: Blocks::InTurn, widths, run })
}

impl Kernel {
    /// Runs every block of a grid.
    pub fn run(&self, args: &[u8], grid: [u32; 3]) -> Result<()> {
        let blocks = (0..grid[2])
            .flat_map(|z| (0..grid[1]).flat_map(move |y| (0..grid[0]).map(move |x| Block { at: [x, y, z], grid })));
        match self.blocks {
            Blocks::InTurn => blocks.into_iter().try_for_each(|block| (self.run)(self, args, block)),
            Blocks::Wait => std::thread::scope(|scope| {
                let threads: Vec<_> = blocks.map(|block| scope.spawn(move || (self.run)(self, args, block))).collect();
                let mut joined = threads.into_iter().map(|thread| thread.join().unwrap_or(Err(Code::LAUNCH_FAILED)));
                joined.try_for_each(|result| result)
            }),
        }
    }

    /// The codec of leg `i` for groups of so many lanes of 8 elements.
    fn codec(&self, i: usize, group_lanes: u32) -> Result<Codec> {
        let group = u16::try_from(group_lanes * 8).ok().and_then(GroupSize::new);
        let (width, group) = (self.widths[i].ok_or(Code::INVALID_VALUE)?, group.ok_or(Code::LAUNCH_FAILED)?);
        Ok(Codec { width, group })
    }
}

/// `Slice` of `kernels/layout.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Slice {
    count: u64,
    first_tile: u64,
    chunk_tiles: u64,
    n_tiles: u32,
    group_lanes: u32,
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

#[repr(C)]
#[derive(Clone, Copy)]
struct QuantizeArgs {
    input: usize,
    outgoing: usize,
    slot_bytes: u64,
    rank: u32,
    slice: Slice,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ReduceArgs {
    input: usize,
    incoming: usize,
    outgoing: usize,
    slot_bytes: u64,
    rank: u32,
    world: u32,
    slice: Slice,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct DequantizeArgs {
    payload: usize,
    output: usize,
    slot_bytes: u64,
    slice: Slice,
}

/// The argument struct from its bytes.
fn args<A: Copy>(bytes: &[u8]) -> A {
    assert_eq!(bytes.len(), size_of::<A>(), "a kernel gets as many bytes as it says");
    // SAFETY: as many bytes as the struct has; every pattern of them is one of its values (integers only).
    unsafe { bytes.as_ptr().cast::<A>().read_unaligned() }
}

/// The bytes of a device range, copied.
fn load(address: usize, n_bytes: usize) -> Result<Vec<u8>> {
    let source = memory::resolve(address, n_bytes)?;
    let mut bytes = vec![0; n_bytes];
    // SAFETY: a live range of that many bytes.
    unsafe { std::ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), n_bytes) };
    Ok(bytes)
}

fn store(address: usize, bytes: &[u8]) -> Result<()> {
    let target = memory::resolve(address, bytes.len())?;
    // SAFETY: a live range of that many bytes.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
    Ok(())
}

fn load_elements<E: Element>(address: usize, (start, n_elems): (usize, usize)) -> Result<Vec<f32>> {
    let bytes = load(address + start * 2, n_elems * 2)?;
    Ok(bytes.chunks_exact(2).map(|pair| E::from_bits(u16::from_le_bytes([pair[0], pair[1]])).to_f32()).collect())
}

fn quantize<E: Element>(kernel: &Kernel, bytes: &[u8], block: Block) -> Result<()> {
    let args: QuantizeArgs = args(bytes);
    let codec = kernel.codec(0, args.slice.group_lanes)?;
    let [tile, slot, _] = block.at;
    let owner = slot + u32::from(slot >= args.rank);
    let Some(elements) = args.slice.tile(owner, tile) else { return Ok(()) };
    let mut payload = vec![0; codec.tile_bytes()];
    codec.encode_tile::<E>(&load_elements::<E>(args.input, elements)?, &mut payload);
    store(args.outgoing + slot as usize * args.slot_bytes as usize + tile as usize * payload.len(), &payload)
}

fn reduce<E: Element>(kernel: &Kernel, bytes: &[u8], block: Block) -> Result<()> {
    let args: ReduceArgs = args(bytes);
    let (from, to) = (kernel.codec(0, args.slice.group_lanes)?, kernel.codec(1, args.slice.group_lanes)?);
    let tile = block.at[0];
    let Some(elements) = args.slice.tile(args.rank, tile) else { return Ok(()) };
    let mut sum: Option<Vec<f32>> = None;
    for rank in 0..args.world {
        let term = if rank == args.rank {
            load_elements::<E>(args.input, elements)?
        } else {
            let at = args.incoming + rank as usize * args.slot_bytes as usize + tile as usize * from.tile_bytes();
            let mut term = vec![0.0; elements.1];
            from.decode_tile::<E>(&load(at, from.tile_bytes())?, &mut term);
            term
        };
        match &mut sum {
            None => sum = Some(term),
            Some(sum) => sum.iter_mut().zip(term).for_each(|(sum, term)| *sum += term),
        }
    }
    let mut payload = vec![0; to.tile_bytes()];
    to.encode_tile::<E>(&sum.ok_or(Code::LAUNCH_FAILED)?, &mut payload);
    store(args.outgoing + tile as usize * payload.len(), &payload)
}

fn dequantize<E: Element>(kernel: &Kernel, bytes: &[u8], block: Block) -> Result<()> {
    let args: DequantizeArgs = args(bytes);
    let codec = kernel.codec(0, args.slice.group_lanes)?;
    let [tile, owner, _] = block.at;
    let Some((start, n_elems)) = args.slice.tile(owner, tile) else { return Ok(()) };
    let at = args.payload + owner as usize * args.slot_bytes as usize + tile as usize * codec.tile_bytes();
    let mut values = vec![0.0; n_elems];
    codec.decode_tile::<E>(&load(at, codec.tile_bytes())?, &mut values);
    let bytes: Vec<u8> = values.iter().flat_map(|x| E::from_f32_nearest(*x).to_bits().to_le_bytes()).collect();
    store(args.output + start * 2, &bytes)
}

//! How long kernels and copies take on a fabric, from what they are told. In nanoseconds.

use flashcomm_sim_fabric::{Carrier, Fabric, Flow, Hops, Memory, Mover, Place, Sum, Way};
use flashcomm_wire::TILE_ELEMS;

use crate::access::args;
use crate::clock;
use crate::cu_result::Result;
use crate::instances::Verb;
use crate::kernels::{Kernel, Shape};
use crate::memory::{self, Kind};
use crate::shared::{AllReduceArgs, CombineArgs, DequantizeArgs, ExactArgs, QuantizeArgs, ReduceArgs, Slice};

/// Bytes of an element that is coded.
const ELEMENT_BYTES: u64 = 2;

/// Kernels that code an all-reduce over NCCL in two hops: each does a part of the work.
const CODING_KERNELS: f64 = 3.0;

/// How long a kernel takes with this argument.
///
/// # Errors
/// Where it would not run.
pub fn of_kernel(fabric: &Fabric, kernel: &Kernel, bytes: &[u8], shape: Shape) -> Result<u64> {
    let coding = |slice: Slice, n_tiles: u32| fabric.gpu.launch_ns as u64 + coding_ns(fabric, slice, n_tiles);
    let [tiles, slots, _] = shape.grid;
    Ok(match kernel.verb() {
        Verb::Quantize => coding(args::<QuantizeArgs>(bytes).slice, tiles * slots),
        Verb::Reduce => {
            let args: ReduceArgs = args(bytes);
            coding(args.slice, tiles * args.world)
        }
        Verb::Dequantize => coding(args::<DequantizeArgs>(bytes).slice, tiles * slots),
        Verb::Combine => coding(args::<CombineArgs>(bytes).slice, tiles),
        Verb::AllReduce | Verb::HostAllReduce => fused(fabric, kernel, bytes, Hops::Two)?,
        Verb::OneHop | Verb::HostOneHop => fused(fabric, kernel, bytes, Hops::One)?,
        Verb::Signal | Verb::Wait => fabric.gpu.launch_ns as u64,
        Verb::Exact => {
            let args: ExactArgs = args(bytes);
            let memory = memory_of(args.mailboxes[peer_of(args.rank, args.world)] as usize);
            let way = if args.two_hops != 0 { Way::ExactTwoHops(memory) } else { Way::ExactOneHop(memory) };
            let n_bytes = args.count * kernel.element_bytes();
            fabric.nanoseconds(&Sum { world: args.world as usize, n_bytes, way })
        }
    })
}

/// How long a copy takes; `None`: memory that no device knows.
pub fn of_copy(fabric: &Fabric, target: Option<usize>, source: Option<usize>, n_bytes: usize) -> u64 {
    let (from, to, n_bytes) = (place_of(fabric, source), place_of(fabric, target), n_bytes as f64);
    match from == to {
        true => within(fabric, n_bytes),
        false => fabric.traffic(&[Flow { from, to, n_bytes, mover: Mover::CopyEngine }]).total_ns().round() as u64,
    }
}

/// How long it takes to fill memory of the device.
pub fn of_fill(fabric: &Fabric, n_bytes: usize) -> u64 {
    within(fabric, n_bytes as f64)
}

fn within(fabric: &Fabric, n_bytes: f64) -> u64 {
    (fabric.gpu.launch_ns + n_bytes / fabric.gpu.memory_gb_s).round() as u64
}

fn fused(fabric: &Fabric, kernel: &Kernel, bytes: &[u8], hops: Hops) -> Result<u64> {
    let args: AllReduceArgs = args(bytes);
    let bits = |leg: usize| kernel.codec(leg, args.group_shift).map(|codec| codec.bits_per_element());
    let bits = match hops {
        Hops::One => bits(0)?,
        Hops::Two => (bits(0)? + bits(1)?) / 2.0,
    };
    let carrier = match memory_of(args.areas[peer_of(args.rank, args.world)] as usize) {
        Memory::Peer if args.pulls != 0 => Carrier::PeerPull,
        Memory::Peer => Carrier::PeerPush,
        Memory::Host => Carrier::HostKernels,
    };
    let way = Way::Compressed { hops, bits, carrier };
    Ok(fabric.nanoseconds(&Sum { world: args.world as usize, n_bytes: args.count * ELEMENT_BYTES, way }))
}

fn coding_ns(fabric: &Fabric, slice: Slice, n_tiles: u32) -> u64 {
    let n_elems = (u64::from(n_tiles) * TILE_ELEMS as u64).min(slice.count);
    (fabric.codec_ns((n_elems * ELEMENT_BYTES) as f64) / CODING_KERNELS).round() as u64
}

/// Another rank, whose memory is of the same kind as that of all.
fn peer_of(rank: u32, world: u32) -> usize {
    ((rank + 1) % world.max(1)) as usize
}

/// What memory ranks exchange through, by the address of a rank's part of it.
fn memory_of(address: usize) -> Memory {
    match memory::allocation_of(address).map(|found| found.kind) {
        Some(Kind::Pinned | Kind::Registered) => Memory::Host,
        _ => Memory::Peer,
    }
}

/// Where an address is, as the device of this thread's stream sees it. Of a peer's memory that was
/// opened it is not known whose it is: the next device's.
fn place_of(fabric: &Fabric, address: Option<usize>) -> Place {
    let here = clock::device() as usize;
    match address.and_then(memory::allocation_of) {
        Some(found) if found.kind == Kind::Device => Place::Gpu(fabric.gpu_of(found.device as usize)),
        Some(found) if found.kind == Kind::Imported => Place::Gpu(fabric.gpu_of(here + 1)),
        _ => Place::HostOf(fabric.gpu_of(here)),
    }
}

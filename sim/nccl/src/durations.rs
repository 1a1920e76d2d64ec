//! How long collectives take on a fabric, in nanoseconds: what NCCL's rings do, in steps.
//!
//! A rank sees its own calls only. It takes it that the others do the same, so that all ranks come
//! to the same time where they do.

use std::collections::BTreeMap;

use flashcomm_sim_fabric::{Fabric, Sum, Way};

use crate::types::{Collective, Kind, Op};

/// How long a collective takes among `world` ranks.
pub fn of_collective(fabric: &Fabric, call: &Collective, world: usize) -> u64 {
    let block = (call.count * call.datatype.n_bytes()) as u64;
    let others = world.saturating_sub(1);
    match call.kind {
        Kind::AllReduce => fabric.nanoseconds(&Sum { world, n_bytes: block, way: Way::Nccl }),
        Kind::AllGather | Kind::ReduceScatter => fabric.nccl_ring(world, others, block),
        // Pieces follow each other around the ring.
        Kind::Broadcast | Kind::Reduce => fabric.nccl_ring(world, others.min(1), block),
        Kind::AlltoAll => {
            let to_each: Vec<_> = (1..world).map(|ahead| (ahead, block)).collect();
            fabric.nccl_sends(world, &to_each)
        }
    }
}

/// How long the sends and receives of a launch take for `rank` of `world`; `None` where there are
/// none.
pub fn of_sends(fabric: &Fabric, ops: &[Op], rank: usize, world: usize) -> Option<u64> {
    // By how far the receiver is ahead of the sender: bytes sent, bytes received.
    let mut by_distance: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
    for op in ops {
        match *op {
            Op::Send { n_bytes, peer, .. } => {
                by_distance.entry((peer + world - rank) % world).or_default().0 += n_bytes as u64;
            }
            Op::Recv { n_bytes, peer, .. } => {
                by_distance.entry((rank + world - peer) % world).or_default().1 += n_bytes as u64;
            }
            Op::Collective(_) => {}
        }
    }
    let sends: Vec<_> = by_distance.into_iter().map(|(ahead, (sent, received))| (ahead, sent.max(received))).collect();
    (!sends.is_empty()).then(|| fabric.nccl_sends(world, &sends))
}

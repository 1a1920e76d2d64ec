//! What a launch does when its stream comes to it: the collectives of the group in order, then its sends and receives,
//! all of them together.
//!
//! A collective: everyone puts what it contributes into its outbox and posts, waits until all have posted, takes
//! what it needs, and says that it is done; an outbox is used again when all are done. A send is put into the outbox
//! and is over when the receiver has taken it: nothing is buffered beyond that, so a receive that never comes is a hang.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use flashcomm_sim_fabric::{Fabric, chosen};
use flashcomm_sim_schedule as schedule;

use crate::comm::{Comm, Ready, Stop};
use crate::driver::driver;
use crate::durations;
use crate::reduce::reduce;
use crate::segment::OUTBOX_BYTES;
use crate::types::{Collective, Kind, Op, RedOp, Scalar};

type Outcome<T> = Result<T, Stop>;

/// The driver's `CUDA_ERROR_ILLEGAL_ADDRESS` and `CUDA_ERROR_LAUNCH_FAILED`.
const ILLEGAL_ADDRESS: i32 = 700;
const LAUNCH_FAILED: i32 = 719;

/// Runs a launch; 0, or the driver's code of an error.
pub fn run(comm: &Comm, ops: &[Op]) -> i32 {
    schedule::point();
    let mut turn = comm.turn.lock();
    let mut go = || -> Outcome<()> {
        let ready = comm.ready().map_err(|_| Stop::Aborted)?;
        for op in ops {
            if let Op::Collective(collective) = op {
                *turn += 1;
                run_collective(comm, ready, collective, *turn)?;
                takes(|fabric| Some(durations::of_collective(fabric, collective, ready.world)));
            }
        }
        send_and_receive(comm, ready, ops)?;
        takes(|fabric| durations::of_sends(fabric, ops, ready.rank, ready.world));
        Ok(())
    };
    match go() {
        Ok(()) | Err(Stop::Aborted) => 0,
        Err(Stop::Wrong(code)) => code,
    }
}

/// Moves the clock of the stream by what something takes on the fabric, if there is one.
fn takes(ns: impl FnOnce(&Fabric) -> Option<u64>) {
    if let (Some(ns), Ok(driver)) = (chosen().and_then(ns), driver()) {
        driver.advance(ns);
    }
}

/// The bytes of a device range.
fn device<'a>(address: usize, n_bytes: usize) -> Outcome<&'a mut [u8]> {
    if n_bytes == 0 {
        return Ok(&mut []);
    }
    let bytes =
        driver().ok().and_then(|driver| driver.resolve(address, n_bytes)).ok_or(Stop::Wrong(ILLEGAL_ADDRESS))?;
    // SAFETY: a live range of that many bytes; that nobody else uses it now is the application's duty.
    Ok(unsafe { std::slice::from_raw_parts_mut(bytes, n_bytes) })
}

/// A part of an outbox.
#[allow(clippy::mut_from_ref, reason = "shared memory; the protocol says who writes when")]
fn outbox(ready: &Ready, rank: usize, offset: usize, n_bytes: usize) -> Outcome<&mut [u8]> {
    if offset + n_bytes > OUTBOX_BYTES {
        eprintln!("simulated NCCL: more than {} MiB at once are not simulated", OUTBOX_BYTES >> 21);
        return Err(Stop::Wrong(LAUNCH_FAILED));
    }
    // SAFETY: within the outbox, which lives as long as the segment. The protocol lets its owner write or others read.
    Ok(unsafe { std::slice::from_raw_parts_mut(ready.segment.outbox(rank).add(offset), n_bytes) })
}

fn run_collective(comm: &Comm, ready: &Ready, call: &Collective, n: u64) -> Outcome<()> {
    let Ready { segment, rank, world } = ready;
    let (rank, world, ranks) = (*rank, *world, &segment.shared().ranks[..*world]);
    let block = call.count * call.datatype.n_bytes();
    let contributed = match call.kind {
        Kind::AllReduce | Kind::AllGather | Kind::Reduce => block,
        Kind::ReduceScatter | Kind::AlltoAll => block * world,
        Kind::Broadcast => {
            if rank == call.root {
                block
            } else {
                0
            }
        }
    };
    if contributed > OUTBOX_BYTES / 2 {
        outbox(ready, rank, OUTBOX_BYTES, contributed)?;
    }

    comm.wait(|| ranks.iter().all(|part| part.done.load(Ordering::Acquire) >= n - 1))?;
    let mine = outbox(ready, rank, 0, contributed)?;
    let input = device(call.send, contributed)?;
    match call.op {
        RedOp::PreMulSum(scalar) => {
            let n_bytes = call.datatype.n_bytes();
            let mut bytes = [0; 8];
            match scalar {
                Scalar::Here(here) => bytes = here,
                Scalar::Device(address) => bytes[..n_bytes].copy_from_slice(device(address, n_bytes)?),
            }
            reduce(call.datatype, call.op, &[input], Some(&[bytes]), mine);
        }
        _ => mine.copy_from_slice(input),
    }
    // Which operation, in numbers that are the same on all ranks.
    let op = match call.op {
        RedOp::Sum => 0,
        RedOp::Prod => 1,
        RedOp::Max => 2,
        RedOp::Min => 3,
        RedOp::Avg => 4,
        RedOp::PreMulSum(_) => 5,
    };
    let what = [call.kind as u64, call.count as u64, call.datatype.number() as u64, op, call.root as u64];
    ranks[rank].call.iter().zip(what).for_each(|(place, word)| place.store(word, Ordering::Relaxed));
    ranks[rank].posted.store(n, Ordering::Release);
    segment.ring();
    schedule::point();

    comm.wait(|| ranks.iter().all(|part| part.posted.load(Ordering::Acquire) >= n))?;
    for (other, part) in ranks.iter().enumerate() {
        let theirs: [u64; 5] = std::array::from_fn(|i| part.call[i].load(Ordering::Relaxed));
        if part.posted.load(Ordering::Acquire) == n && theirs != what {
            eprintln!("simulated NCCL: rank {rank} calls {call:?}, rank {other} (kind, count, ...) {theirs:?}");
            return comm.wait(|| false); // as NCCL, at best: until an abort
        }
    }
    take(ready, call, block)?;
    ranks[rank].done.store(n, Ordering::Release);
    segment.ring();
    Ok(())
}

/// Takes what a rank needs out of all outboxes.
fn take(ready: &Ready, call: &Collective, block: usize) -> Outcome<()> {
    let (rank, world) = (ready.rank, ready.world);
    let from_all = |offset: usize| -> Outcome<Vec<&[u8]>> {
        (0..world).map(|from| outbox(ready, from, offset, block).map(|bytes| &*bytes)).collect()
    };
    let op = if matches!(call.op, RedOp::PreMulSum(_)) { RedOp::Sum } else { call.op };
    let gather = |offset: usize| -> Outcome<()> {
        let output = device(call.recv, block * world)?;
        for from in 0..world {
            output[from * block..(from + 1) * block].copy_from_slice(outbox(ready, from, offset, block)?);
        }
        Ok(())
    };
    match call.kind {
        Kind::Reduce if rank != call.root => {}
        Kind::AllReduce | Kind::Reduce => reduce(call.datatype, op, &from_all(0)?, None, device(call.recv, block)?),
        Kind::ReduceScatter => {
            reduce(call.datatype, op, &from_all(rank * block)?, None, device(call.recv, block)?);
        }
        Kind::AllGather => gather(0)?,
        Kind::AlltoAll => gather(rank * block)?,
        Kind::Broadcast => device(call.recv, block)?.copy_from_slice(outbox(ready, call.root, 0, block)?),
    }
    Ok(())
}

/// Sends and receives of a launch, each pair of ranks in order, all pairs at once.
fn send_and_receive(comm: &Comm, ready: &Ready, ops: &[Op]) -> Outcome<()> {
    let Ready { segment, rank, world } = ready;
    let (rank, channels) = (*rank, &segment.shared().channels);
    let mut sends: Vec<VecDeque<(usize, usize)>> = vec![VecDeque::new(); *world];
    let mut receives: Vec<VecDeque<(usize, usize)>> = vec![VecDeque::new(); *world];
    let mut offset = OUTBOX_BYTES / 2;
    for op in ops {
        match *op {
            Op::Send { from, n_bytes, peer } => {
                outbox(ready, rank, offset, n_bytes)?.copy_from_slice(device(from, n_bytes)?);
                sends[peer].push_back((offset, n_bytes));
                offset += n_bytes;
            }
            Op::Recv { to, n_bytes, peer } => receives[peer].push_back((to, n_bytes)),
            Op::Collective(_) => {}
        }
    }
    let mut wrong = None;
    let mut step = || -> Outcome<bool> {
        let mut moved = false;
        for peer in 0..*world {
            let channel = &channels[rank][peer];
            let sent = channel.sent.load(Ordering::Acquire);
            if let Some((offset, n_bytes)) = sends[peer].front()
                && channel.taken.load(Ordering::Acquire) == sent
            {
                channel.offset.store(*offset as u64, Ordering::Relaxed);
                channel.n_bytes.store(*n_bytes as u64, Ordering::Relaxed);
                channel.sent.store(sent + 1, Ordering::Release);
                sends[peer].pop_front();
                moved = true;
            }
            let channel = &channels[peer][rank];
            let taken = channel.taken.load(Ordering::Acquire);
            if let Some((to, n_bytes)) = receives[peer].front()
                && channel.sent.load(Ordering::Acquire) > taken
            {
                let offset = channel.offset.load(Ordering::Relaxed) as usize;
                if channel.n_bytes.load(Ordering::Relaxed) != *n_bytes as u64 {
                    eprintln!("simulated NCCL: rank {rank} receives {n_bytes} bytes of {peer}, which sends others");
                    return Err(Stop::Wrong(LAUNCH_FAILED));
                }
                device(*to, *n_bytes)?.copy_from_slice(outbox(ready, peer, offset, *n_bytes)?);
                channel.taken.store(taken + 1, Ordering::Release);
                receives[peer].pop_front();
                moved = true;
            }
        }
        if moved {
            segment.ring();
        }
        let all_taken = (0..*world).all(|peer| {
            let channel = &channels[rank][peer];
            channel.taken.load(Ordering::Acquire) == channel.sent.load(Ordering::Acquire)
        });
        Ok(all_taken && sends.iter().all(VecDeque::is_empty) && receives.iter().all(VecDeque::is_empty))
    };
    comm.wait(|| match step() {
        Ok(is_done) => is_done,
        Err(stop) => {
            wrong = Some(stop);
            true
        }
    })?;
    wrong.map_or(Ok(()), Err)
}

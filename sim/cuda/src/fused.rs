//! The fused all-reduce: the protocol of `kernels/all_reduce.cu` over the scalar codec.
//!
//! The channels of a launch that are resident take turns: each goes on until it would have to wait for another rank. Resident
//! are those of as many blocks as the multiprocessors of the stream hold; another block begins when one of them has ended. In
//! which order is not promised, so devices of odd number begin with the last: ranks that both lack room wait for each other
//! for ever.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::{Duration, Instant};

use flashcomm_sim_schedule as schedule;
use flashcomm_wire::{Codec, Element, Legs, Rings, TILE_ELEMS, rings};

use crate::access::{args, enter, load, store, store_decoded};
use crate::cu_result::{CuResult, Result};
use crate::device::{self, Stores};
use crate::kernels::{Kernel, Shape};
use crate::memory::{self, Kind};
use crate::shared::{ABORTED, AllReduceArgs, DEADLINE_PASSED, GaveUp};

/// Channels of a block at most.
pub const MAX_BLOCK_CHANNELS: u32 = 7;

/// Where an operation waits, or that it has ended.
enum Progress {
    Done,
    Advanced,
    /// For the signal of this rank.
    Waits(usize),
}

/// The parts of an iteration: up to where it may have to wait, and on.
#[derive(Clone, Copy)]
enum Part {
    Push,
    Reduce,
    Decode,
}

/// What the channels of a launch share.
struct Launch {
    args: AllReduceArgs,
    rings: Rings,
    n_channels: usize,
}

struct Channel {
    number: usize,
    n_rounds: usize,
    /// Signals ever given.
    n_signals: u32,
    iteration: usize,
    /// What comes next in it.
    part: Part,
    waits_since: Option<Instant>,
}

/// A word of memory that ranks share.
fn word(address: usize) -> Result<&'static AtomicU32> {
    let word = memory::resolve(address, 4)?;
    // SAFETY: four live bytes, aligned as the areas are; it is used before the allocation can be freed.
    Ok(unsafe { AtomicU32::from_ptr(word.cast()) })
}

/// Runs the operation to its end, or until it gives up.
pub fn run<E: Element>(kernel: &Kernel, bytes: &[u8], shape: Shape) -> Result<()> {
    let args: AllReduceArgs = args(bytes);
    let (reduce, gather) = (kernel.codec(0, args.group_shift)?, kernel.codec(1, args.group_shift)?);
    let legs = Legs { reduce, gather, batch_invariant: args.batch_invariant != 0 };
    let rings = Rings { world: args.world as usize, legs, channels: args.max_channels as usize };
    let n_channels = (shape.grid[0] * shape.block[1]) as usize;
    let n_tiles = args.chunk_tiles as usize;
    if n_channels > rings.channels && n_tiles > rings.channels {
        return Err(CuResult::ILLEGAL_ADDRESS); // would write past the areas
    }
    let launch = Launch { args, rings, n_channels };
    let new = |number: usize| {
        let n_signals = word(args.signals as usize + number * 4)?.load(Ordering::Relaxed);
        let n_rounds = (n_tiles - number).div_ceil(n_channels);
        Ok(Channel { number, n_rounds, n_signals, iteration: 0, part: Part::Push, waits_since: None })
    };
    let mut blocks: Vec<usize> = (0..shape.grid[0] as usize).collect();
    if !shape.from_back {
        blocks.reverse(); // they are taken from the end
    }
    let rows = shape.block[1] as usize;
    // Those of a block are neighbours.
    let n_resident = |channels: &[Channel]| channels.chunk_by(|a, b| a.number / rows == b.number / rows).count();
    let mut channels: Vec<Channel> = Vec::new();
    let mut idle_turns = 0;
    loop {
        while n_resident(&channels) < shape.resident as usize
            && let Some(block) = blocks.pop()
        {
            for number in (block * rows..(block + 1) * rows).filter(|number| *number < n_tiles) {
                channels.push(new(number)?);
            }
        }
        if channels.is_empty() {
            break;
        }
        let mut left = Vec::with_capacity(channels.len());
        let mut has_advanced = false;
        for mut channel in channels {
            schedule::point();
            match channel.step::<E>(&launch)? {
                Progress::Done => {
                    has_advanced = true;
                    word(args.signals as usize + channel.number * 4)?.store(channel.n_signals, Ordering::Relaxed);
                }
                Progress::Advanced => {
                    has_advanced = true;
                    left.push(channel);
                }
                Progress::Waits(peer) if launch.gives_up(&mut channel, peer)? => {}
                Progress::Waits(_) => left.push(channel),
            }
        }
        channels = left;
        idle_turns = if has_advanced { 0 } else { idle_turns + 1 };
        match idle_turns {
            0 => {}
            1..50 => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(50)),
        }
    }
    Ok(())
}

impl Launch {
    /// The elements of the tile of `owner`'s chunk that `channel` serves in `round`, if there are any.
    fn tile(&self, channel: &Channel, owner: usize, round: usize) -> Option<(usize, usize)> {
        let in_chunk = round * self.n_channels + channel.number;
        let start = (owner * self.args.chunk_tiles as usize + in_chunk) * TILE_ELEMS;
        let count = self.args.count as usize;
        (round < channel.n_rounds && start < count).then(|| (start, (count - start).min(TILE_ELEMS)))
    }

    fn slot(&self, at_rank: usize, channel: &Channel, hop: usize, from: usize, round: usize) -> usize {
        self.args.areas[at_rank] as usize + self.rings.slot(channel.number, hop, from, round)
    }

    /// What becomes of what is written to the area of `rank`: host memory is not behind the link that may be bad.
    fn stores_to(&self, rank: usize) -> Stores {
        let kind = memory::allocation_of(self.args.areas[rank] as usize).map(|found| found.kind);
        let is_remote = rank != self.args.rank as usize && matches!(kind, Some(Kind::Device | Kind::Imported));
        if is_remote { device::stores() } else { Stores::Arrive }
    }

    /// Writes a payload to a slot in the area of `rank`.
    fn send(&self, rank: usize, slot: usize, payload: &[u8]) -> Result<()> {
        match self.stores_to(rank) {
            Stores::Arrive => store(slot, payload),
            Stores::Lost => Ok(()),
            Stores::Garbled => store(slot, &payload.iter().map(|byte| byte ^ 0x11).collect::<Vec<u8>>()),
        }
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, world) = (self.args.rank as usize, self.args.world as usize);
        (1..world).map(move |step| (rank + step) % world)
    }

    fn gives_up(&self, channel: &mut Channel, peer: usize) -> Result<bool> {
        let since = *channel.waits_since.get_or_insert_with(Instant::now);
        let at = |offset: usize| word(self.args.gave_up as usize + offset);
        let gave_up = at(offset_of!(GaveUp, why))?;
        let why = match () {
            () if word(self.args.abort as usize)?.load(Ordering::Relaxed) != 0 => ABORTED,
            () if self.args.timeout_ns != 0 && since.elapsed().as_nanos() > u128::from(self.args.timeout_ns) => {
                DEADLINE_PASSED
            }
            () => gave_up.load(Ordering::Relaxed),
        };
        if why == 0 {
            return Ok(false);
        }
        if at(offset_of!(GaveUp, claimed))?.swap(1, Ordering::AcqRel) == 0 {
            at(offset_of!(GaveUp, peer))?.store(peer as u32, Ordering::Relaxed);
            at(offset_of!(GaveUp, channel))?.store(channel.number as u32, Ordering::Relaxed);
            at(offset_of!(GaveUp, iteration))?.store(channel.iteration as u32, Ordering::Relaxed);
            gave_up.store(why, Ordering::Release);
        }
        Ok(true)
    }
}

impl Channel {
    /// One part of an iteration, if it need not wait.
    fn step<E: Element>(&mut self, launch: &Launch) -> Result<Progress> {
        let (i, lag) = (self.iteration, rings::lag(launch.rings.world));
        if i == self.n_rounds + 2 * lag {
            return Ok(Progress::Done);
        }
        self.part = match self.part {
            Part::Push => {
                for owner in launch.others() {
                    self.push::<E>(launch, owner)?;
                }
                if launch.rings.legs.batch_invariant {
                    self.push::<E>(launch, launch.args.rank as usize)?;
                }
                if lag == 0 {
                    self.tell(launch)?;
                }
                Part::Reduce
            }
            Part::Reduce => {
                if i >= lag
                    && let Some(peer) = self.not_heard(launch)?
                {
                    return Ok(Progress::Waits(peer));
                }
                if i < self.n_rounds + lag {
                    if let Some(round) = i.checked_sub(lag) {
                        self.reduce::<E>(launch, round)?;
                    }
                    self.tell(launch)?;
                }
                Part::Decode
            }
            Part::Decode => {
                if lag == 0
                    && let Some(peer) = self.not_heard(launch)?
                {
                    return Ok(Progress::Waits(peer));
                }
                if let Some(round) = i.checked_sub(2 * lag) {
                    for owner in launch.others() {
                        self.decode::<E>(launch, owner, round)?;
                    }
                }
                self.iteration += 1;
                Part::Push
            }
        };
        self.waits_since = None;
        Ok(Progress::Advanced)
    }

    /// A peer that has not given as many signals as this rank.
    fn not_heard(&self, launch: &Launch) -> Result<Option<usize>> {
        let mine = launch.args.areas[launch.args.rank as usize] as usize;
        for peer in launch.others() {
            let told = word(mine + launch.rings.signal(self.number, peer))?.load(Ordering::Acquire);
            if (told.wrapping_sub(self.n_signals) as i32) < 0 {
                return Ok(Some(peer));
            }
        }
        Ok(None)
    }

    /// Signals each peer.
    fn tell(&mut self, launch: &Launch) -> Result<()> {
        self.n_signals = self.n_signals.wrapping_add(1);
        fence(Ordering::SeqCst);
        for peer in launch.others() {
            let signal =
                word(launch.args.areas[peer] as usize + launch.rings.signal(self.number, launch.args.rank as usize))?;
            if launch.stores_to(peer) != Stores::Lost {
                signal.store(self.n_signals, Ordering::Release);
            }
        }
        Ok(())
    }

    fn push<E: Element>(&self, launch: &Launch, owner: usize) -> Result<()> {
        let Some(tile) = launch.tile(self, owner, self.iteration) else { return Ok(()) };
        let reduce = launch.rings.legs.reduce;
        let payload = encode::<E>(reduce, &enter::<E>(reduce, launch.args.input as usize, tile)?);
        launch.send(owner, launch.slot(owner, self, 0, launch.args.rank as usize, self.iteration), &payload)
    }

    fn decode<E: Element>(&self, launch: &Launch, owner: usize, round: usize) -> Result<()> {
        let Some(tile) = launch.tile(self, owner, round) else { return Ok(()) };
        let gather = launch.rings.legs.gather;
        let payload = load(launch.slot(launch.args.rank as usize, self, 1, owner, round), gather.tile_bytes())?;
        store_decoded::<E>(gather, &payload, launch.args.output as usize, tile)
    }

    fn reduce<E: Element>(&self, launch: &Launch, round: usize) -> Result<()> {
        let (rank, Legs { reduce, gather, batch_invariant }) = (launch.args.rank as usize, launch.rings.legs);
        let Some(tile) = launch.tile(self, rank, round) else { return Ok(()) };
        let n_values = reduce.n_values(tile.1);
        let mut sum = vec![-0.0f32; n_values];
        for from in 0..launch.rings.world {
            let term = if from == rank && !batch_invariant {
                enter::<E>(reduce, launch.args.input as usize, tile)?
            } else {
                let mut term = vec![0.0; n_values];
                reduce
                    .decode_tile::<E>(&load(launch.slot(rank, self, 0, from, round), reduce.tile_bytes())?, &mut term);
                term
            };
            sum.iter_mut().zip(term).for_each(|(sum, term)| *sum += term);
        }
        sum.iter_mut().for_each(|sum| *sum *= launch.args.scale);
        let payload = encode::<E>(gather, &sum);
        for peer in launch.others() {
            launch.send(peer, launch.slot(peer, self, 1, rank, round), &payload)?;
        }
        store_decoded::<E>(gather, &payload, launch.args.output as usize, tile)
    }
}

fn encode<E: Element>(codec: Codec, values: &[f32]) -> Vec<u8> {
    let mut payload = vec![0; codec.tile_bytes()];
    codec.encode_tile::<E>(values, &mut payload);
    payload
}

//! The fused all-reduce in two hops: the protocol of `kernels/all_reduce.cu` over the scalar codec.

use std::marker::PhantomData;
use std::sync::atomic::{Ordering, fence};

use flashcomm_wire::{Element, Legs, Rings, TILE_ELEMS, rings};

use crate::access::{args, decode, encode, enter, receive, send, store_decoded};
use crate::cu_result::{CuResult, Result};
use crate::device::Stores;
use crate::kernels::{Kernel, Shape};
use crate::shared::AllReduceArgs;
use crate::turns::{self, Part, Patience, Progress, stores_to, word};

/// The parts of an iteration: up to where it may have to wait, and on.
#[derive(Clone, Copy)]
enum Phase {
    Push,
    Reduce,
    Decode,
}

/// What the channels of a launch share.
struct Launch {
    args: AllReduceArgs,
    rings: Rings,
    n_channels: usize,
    /// Channels of a block.
    rows: usize,
}

struct Channel<E> {
    number: usize,
    n_rounds: usize,
    /// Signals ever given.
    n_signals: u32,
    iteration: usize,
    /// What comes next in it.
    phase: Phase,
    element: PhantomData<E>,
}

/// Runs the operation to its end, or until it gives up.
pub fn run<E: Element>(kernel: &Kernel, bytes: &[u8], shape: Shape) -> Result<()> {
    let args: AllReduceArgs = args(bytes);
    let (reduce, gather) = (kernel.codec(0, args.group_shift)?, kernel.codec(1, args.group_shift)?);
    let legs = Legs { reduce, gather, batch_invariant: args.batch_invariant != 0 };
    let rings = Rings { world: args.world as usize, legs, channels: args.max_channels as usize };
    let n_channels = (shape.grid[0] * shape.block[1]) as usize;
    let (n_tiles, rows) = (args.chunk_tiles as usize, shape.block[1] as usize);
    if n_channels > rings.channels && n_tiles > rings.channels {
        return Err(CuResult::ILLEGAL_ADDRESS); // would write past the areas
    }
    let launch = Launch { args, rings, n_channels, rows };
    let new = |number: usize| {
        let n_signals = word(args.signals as usize + number * 4)?.load(Ordering::Relaxed);
        let n_rounds = (n_tiles - number).div_ceil(n_channels);
        let (phase, element) = (Phase::Push, PhantomData::<E>);
        Ok(Channel { number, n_rounds, n_signals, iteration: 0, phase, element })
    };
    turns::take(&launch, shape, |block| {
        (block * rows..(block + 1) * rows).filter(|number| *number < n_tiles).map(new).collect()
    })
}

impl Launch {
    /// The elements of the tile of `owner`'s chunk that `channel` serves in `round`, if there are any.
    fn tile(&self, channel: &Channel<impl Element>, owner: usize, round: usize) -> Option<(usize, usize)> {
        let in_chunk = round * self.n_channels + channel.number;
        let start = (owner * self.args.chunk_tiles as usize + in_chunk) * TILE_ELEMS;
        let count = self.args.count as usize;
        (round < channel.n_rounds && start < count).then(|| (start, (count - start).min(TILE_ELEMS)))
    }

    /// In the area of the reader, or, where payloads are pulled, of the writer.
    fn slot(&self, reader: usize, channel: &Channel<impl Element>, hop: usize, writer: usize, round: usize) -> usize {
        let (at, peer) = if self.args.pulls != 0 { (writer, reader) } else { (reader, writer) };
        self.args.areas[at] as usize + self.rings.slot(channel.number, hop, peer, round)
    }

    /// What becomes of what is written to the area of `rank`.
    fn stores_to(&self, rank: usize) -> Stores {
        if rank == self.args.rank as usize { Stores::Arrive } else { stores_to(self.args.areas[rank] as usize) }
    }

    /// Writes a payload to a slot, for `reader`.
    fn send(&self, reader: usize, slot: usize, payload: &[u8]) -> Result<()> {
        let at = if self.args.pulls != 0 { self.args.rank as usize } else { reader };
        send(self.stores_to(at), slot, payload)
    }

    /// Reads a payload from a slot, of `writer`.
    fn receive(&self, writer: usize, slot: usize, n_bytes: usize) -> Result<Vec<u8>> {
        let at = if self.args.pulls != 0 { writer } else { self.args.rank as usize };
        receive(self.stores_to(at), slot, n_bytes)
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let (rank, world) = (self.args.rank as usize, self.args.world as usize);
        (1..world).map(move |step| (rank + step) % world)
    }
}

impl<E: Element> Part for Channel<E> {
    type Launch = Launch;

    fn block(&self, launch: &Launch) -> usize {
        self.number / launch.rows
    }

    fn step(&mut self, launch: &Launch) -> Result<Progress> {
        let (i, lag) = (self.iteration, rings::lag(launch.rings.world));
        if i == self.n_rounds + 2 * lag {
            word(launch.args.signals as usize + self.number * 4)?.store(self.n_signals, Ordering::Relaxed);
            return Ok(Progress::Done);
        }
        self.phase = match self.phase {
            Phase::Push => {
                for owner in launch.others() {
                    self.push(launch, owner)?;
                }
                if launch.rings.legs.batch_invariant {
                    self.push(launch, launch.args.rank as usize)?;
                }
                if lag == 0 {
                    self.tell(launch)?;
                }
                Phase::Reduce
            }
            Phase::Reduce => {
                if i >= lag
                    && let Some(peer) = self.not_heard(launch)?
                {
                    return Ok(Progress::Waits(peer));
                }
                if i < self.n_rounds + lag {
                    if let Some(round) = i.checked_sub(lag) {
                        self.reduce(launch, round)?;
                    }
                    self.tell(launch)?;
                }
                Phase::Decode
            }
            Phase::Decode => {
                if lag == 0
                    && let Some(peer) = self.not_heard(launch)?
                {
                    return Ok(Progress::Waits(peer));
                }
                if let Some(round) = i.checked_sub(2 * lag) {
                    for owner in launch.others() {
                        self.decode(launch, owner, round)?;
                    }
                }
                self.iteration += 1;
                Phase::Push
            }
        };
        Ok(Progress::Advanced)
    }

    fn place(&self) -> (usize, usize) {
        (self.number, self.iteration)
    }

    fn patience(launch: &Launch) -> Patience {
        let AllReduceArgs { abort, gave_up, timeout_ns, .. } = launch.args;
        Patience { abort, gave_up, timeout_ns }
    }
}

impl<E: Element> Channel<E> {
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

    fn push(&self, launch: &Launch, owner: usize) -> Result<()> {
        let Some(tile) = launch.tile(self, owner, self.iteration) else { return Ok(()) };
        let reduce = launch.rings.legs.reduce;
        let payload = encode::<E>(reduce, &enter::<E>(reduce, launch.args.input as usize, tile)?);
        launch.send(owner, launch.slot(owner, self, 0, launch.args.rank as usize, self.iteration), &payload)
    }

    fn decode(&self, launch: &Launch, owner: usize, round: usize) -> Result<()> {
        let Some(tile) = launch.tile(self, owner, round) else { return Ok(()) };
        let gather = launch.rings.legs.gather;
        let slot = launch.slot(launch.args.rank as usize, self, 1, owner, round);
        let payload = launch.receive(owner, slot, gather.tile_bytes())?;
        store_decoded::<E>(gather, &payload, launch.args.output as usize, tile)
    }

    fn reduce(&self, launch: &Launch, round: usize) -> Result<()> {
        let (rank, Legs { reduce, gather, batch_invariant }) = (launch.args.rank as usize, launch.rings.legs);
        let Some(tile) = launch.tile(self, rank, round) else { return Ok(()) };
        let n_values = reduce.n_values(tile.1);
        let mut sum = vec![-0.0f32; n_values];
        for from in 0..launch.rings.world {
            let term = if from == rank && !batch_invariant {
                enter::<E>(reduce, launch.args.input as usize, tile)?
            } else {
                let payload = launch.receive(from, launch.slot(rank, self, 0, from, round), reduce.tile_bytes())?;
                decode::<E>(reduce, &payload, n_values)
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

//! The fused all-reduce of two ranks in one hop: the protocol of `kernels/one_hop.cu` over the
//! scalar codec.

use std::marker::PhantomData;
use std::sync::atomic::{Ordering, fence};

use flashcomm_wire::{Codec, Element, Legs, Rings, TILE_ELEMS};

use crate::access::{args, encode, enter, receive, send, store_both};
use crate::cu_result::{CuResult, Result};
use crate::device::Stores;
use crate::kernels::{Kernel, Shape};
use crate::shared::AllReduceArgs;
use crate::turns::{self, Part, Patience, Progress, stores_to, word};

/// The parts of an iteration: up to where it may have to wait, and on.
#[derive(Clone, Copy)]
enum Phase {
    Push,
    Decode,
}

/// What the channels of a launch share.
struct Launch {
    args: AllReduceArgs,
    codec: Codec,
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
    /// Payloads that this rank has pushed, of this iteration and the one before.
    own: [Vec<Vec<u8>>; 2],
    element: PhantomData<E>,
}

/// Runs the operation to its end, or until it gives up.
pub fn run<E: Element>(kernel: &Kernel, bytes: &[u8], shape: Shape) -> Result<()> {
    let args: AllReduceArgs = args(bytes);
    let codec = kernel.codec(0, args.group_shift)?;
    let legs = Legs { reduce: codec, gather: codec, batch_invariant: args.batch_invariant != 0 };
    let rings = Rings { world: args.world as usize, legs, channels: args.max_channels as usize };
    if rings.one_hop().is_none() {
        return Err(CuResult::INVALID_VALUE);
    }
    let (n_channels, rows) = ((shape.grid[0] * shape.block[1]) as usize, shape.block[1] as usize);
    let n_rounds_of_all = (args.count as usize).div_ceil(TILE_ELEMS).div_ceil(args.round_tiles as usize);
    if n_channels.min(n_rounds_of_all) > rings.channels {
        return Err(CuResult::ILLEGAL_ADDRESS); // would write past the areas
    }
    let launch = Launch { args, codec, rings, n_channels, rows };
    let new = |number: usize| {
        let n_signals = word(args.signals as usize + number * 4)?.load(Ordering::Relaxed);
        let n_rounds = (n_rounds_of_all - number).div_ceil(n_channels);
        let (own, element) = (Default::default(), PhantomData::<E>);
        Ok(Channel { number, n_rounds, n_signals, iteration: 0, phase: Phase::Push, own, element })
    };
    turns::take(&launch, shape, |block| {
        (block * rows..(block + 1) * rows).filter(|number| *number < n_rounds_of_all).map(new).collect()
    })
}

impl Launch {
    fn rank(&self) -> usize {
        self.args.rank as usize
    }

    fn peer(&self) -> usize {
        1 - self.rank()
    }

    /// The elements of each tile that `channel` serves in `round`.
    fn tiles(&self, channel: usize, round: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (n_tiles, count) = (self.args.round_tiles as usize, self.args.count as usize);
        let first = (round * self.n_channels + channel) * n_tiles;
        let starts = (first..first + n_tiles).map(|number| number * TILE_ELEMS).filter(move |start| *start < count);
        starts.map(move |start| (start, (count - start).min(TILE_ELEMS)))
    }

    /// In the area of the reader, or, where payloads are pulled, of the writer; with what the link there does.
    fn slot(
        &self,
        (reader, writer): (usize, usize),
        channel: &Channel<impl Element>,
        n_signals: u32,
        part: usize,
    ) -> (Stores, usize) {
        let at = if self.args.pulls != 0 { writer } else { reader };
        let area = self.args.areas[at] as usize;
        let stores = if at == self.rank() { Stores::Arrive } else { stores_to(area) };
        (stores, area + self.rings.one_hop_slot(channel.number, n_signals, part))
    }
}

impl<E: Element> Part for Channel<E> {
    type Launch = Launch;

    fn block(&self, launch: &Launch) -> usize {
        self.number / launch.rows
    }

    fn step(&mut self, launch: &Launch) -> Result<Progress> {
        let (i, pushes) = (self.iteration, self.iteration < self.n_rounds);
        self.phase = match self.phase {
            Phase::Push => {
                if pushes {
                    self.push(launch)?;
                }
                Phase::Decode
            }
            Phase::Decode => {
                if i > 0 && !self.is_heard(launch)? {
                    return Ok(Progress::Waits(launch.peer()));
                }
                if pushes {
                    self.tell(launch)?;
                }
                if i > 0 {
                    self.decode(launch)?;
                }
                self.n_signals = self.n_signals.wrapping_add(pushes.into());
                self.iteration += 1;
                if !pushes {
                    word(launch.args.signals as usize + self.number * 4)?.store(self.n_signals, Ordering::Relaxed);
                    return Ok(Progress::Done);
                }
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
    fn push(&mut self, launch: &Launch) -> Result<()> {
        let mut own = Vec::new();
        for (part, tile) in launch.tiles(self.number, self.iteration).enumerate() {
            let payload = encode::<E>(launch.codec, &enter::<E>(launch.codec, launch.args.input as usize, tile)?);
            let (stores, slot) = launch.slot((launch.peer(), launch.rank()), self, self.n_signals, part);
            send(stores, slot, &payload)?;
            own.push(payload);
        }
        self.own[self.iteration % 2] = own;
        Ok(())
    }

    /// Whether the peer has given as many signals as this rank.
    fn is_heard(&self, launch: &Launch) -> Result<bool> {
        let signal = launch.args.areas[launch.rank()] as usize + launch.rings.signal(self.number, launch.peer());
        let told = word(signal)?.load(Ordering::Acquire);
        Ok((told.wrapping_sub(self.n_signals) as i32) >= 0)
    }

    fn tell(&self, launch: &Launch) -> Result<()> {
        fence(Ordering::SeqCst);
        let area = launch.args.areas[launch.peer()] as usize;
        let signal = word(area + launch.rings.signal(self.number, launch.rank()))?;
        if stores_to(area) != Stores::Lost {
            signal.store(self.n_signals.wrapping_add(1), Ordering::Release);
        }
        Ok(())
    }

    /// What was pushed in the iteration before.
    fn decode(&self, launch: &Launch) -> Result<()> {
        let round = self.iteration - 1;
        for (part, tile) in launch.tiles(self.number, round).enumerate() {
            let n_signals = self.n_signals.wrapping_sub(1);
            let (stores, slot) = launch.slot((launch.rank(), launch.peer()), self, n_signals, part);
            let (own, theirs) = (&self.own[round % 2][part], receive(stores, slot, launch.codec.tile_bytes())?);
            let both = if launch.rank() == 0 { [own, &theirs] } else { [&theirs, own] };
            let (scale, output) = (launch.args.scale, launch.args.output as usize);
            store_both::<E>(launch.codec, both.map(Vec::as_slice), scale, output, tile)?;
        }
        Ok(())
    }
}

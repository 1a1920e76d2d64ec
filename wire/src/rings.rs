//! Where the fused kernel's receive areas have what.
//!
//! Every rank has an *area* that all ranks can write: for each channel a row of signals, [`SIGNAL_BYTES`] with a 32-bit
//! word for each sender; behind them, for each channel, hop and sender, a *ring* of [`slots`] slots of one tile's payload.
//! The rings are as many and as long whatever the size of an operation, so an area is small enough for a GPU's L2 cache.
//! `kernels/all_reduce.cu` computes the same offsets.
//!
//! Where two ranks need one hop ([`Legs::one_hop`]), a channel has one ring, for what the peer sends: [`TURNS`] rounds of
//! [`ROUND_TILES`] slots. A round takes the next turn whatever operation it belongs to, so the count of signals says which.
//! `kernels/one_hop.cu` computes those offsets.

use crate::codec::{Codec, Legs};

/// Ranks that a fused all-reduce takes at most.
pub const MAX_WORLD: usize = 16;

/// Ranks up to which there is a lag.
pub const LAGGING_WORLD: usize = 4;

/// Iterations of a channel from the push of a tile to the use of what peers pushed.
///
/// `world`: number of ranks. Among few an iteration is short, and other work must hide the way of a signal; among many
/// it is long, and what is under way should stay in the L2 cache.
pub const fn lag(world: usize) -> usize {
    if world <= LAGGING_WORLD { 1 } else { 0 }
}

/// Tiles that a ring holds among `world` ranks.
pub const fn slots(world: usize) -> usize {
    1 + 2 * lag(world)
}

/// Rounds that a ring holds in one hop.
pub const TURNS: usize = 4;

/// Tiles of a round in one hop at most.
pub const ROUND_TILES: usize = 2;

/// Bytes of a cache line, at which rows of signals and slots begin.
pub const LINE_BYTES: usize = 128;

/// Bytes of a channel's row of signals: a line of its own.
pub const SIGNAL_BYTES: usize = LINE_BYTES;

/// The receive area of one rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rings {
    /// Ranks that send, this one included (its own rings are not used).
    pub world: usize,
    /// The codecs of the two legs.
    pub legs: Legs,
    /// Channels that there is room for.
    pub channels: usize,
}

impl Rings {
    /// The area of as many channels as fit in `buffer_bytes`, but at most `channels`; `None` where not even one does.
    pub fn within(world: usize, legs: Legs, channels: usize, buffer_bytes: usize) -> Option<Self> {
        let per_channel = Rings { world, legs, channels: 1 }.area_bytes();
        // The kernel computes offsets in 32 bits.
        let fit = buffer_bytes.min(u32::MAX as usize) / per_channel;
        Some(Rings { world, legs, channels: channels.min(fit) }).filter(|rings| rings.channels > 0)
    }

    /// The codec of the one hop, where that is enough.
    pub fn one_hop(&self) -> Option<Codec> {
        self.legs.one_hop(self.world)
    }

    /// Bytes of the area, a multiple of 128.
    pub fn area_bytes(&self) -> usize {
        self.channels * (SIGNAL_BYTES + self.channel_slots() * self.slot_bytes())
    }

    /// Slots of a channel.
    fn channel_slots(&self) -> usize {
        if self.one_hop().is_some() { TURNS * ROUND_TILES } else { 2 * self.world * slots(self.world) }
    }

    /// Bytes of a slot: a tile's payload in the wider leg, and the rest of its last cache line.
    pub fn slot_bytes(&self) -> usize {
        self.legs.reduce.tile_bytes().max(self.legs.gather.tile_bytes()).next_multiple_of(LINE_BYTES)
    }

    /// Offset of the signal of `sender` to `channel`.
    pub fn signal(&self, channel: usize, sender: usize) -> usize {
        channel * SIGNAL_BYTES + sender * 4
    }

    /// Offset of the slot of `round` for what `sender` sends in `hop`, 0 or 1, over `channel`.
    pub fn slot(&self, channel: usize, hop: usize, sender: usize, round: usize) -> usize {
        let ring = (channel * 2 + hop) * self.world + sender;
        self.channels * SIGNAL_BYTES + (ring * slots(self.world) + round % slots(self.world)) * self.slot_bytes()
    }

    /// The same in one hop, of tile `part` of a round before which the sender has signalled `n_signals` times.
    pub fn one_hop_slot(&self, channel: usize, n_signals: u32, part: usize) -> usize {
        let slot = (channel * TURNS + n_signals as usize % TURNS) * ROUND_TILES + part;
        self.channels * SIGNAL_BYTES + slot * self.slot_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Codec, GroupSize, Width};

    fn legs(reduce: u8, gather: u8) -> Legs {
        let codec = |bits| Codec::plain(Width::new(bits).unwrap(), GroupSize::new(128).unwrap());
        Legs { reduce: codec(reduce), gather: codec(gather), batch_invariant: false }
    }

    #[test]
    fn signals_and_slots_do_not_overlap_and_fill_the_area() {
        for world in [3, 5] {
            let (rings, slots) = (Rings { world, legs: legs(4, 8), channels: 5 }, slots(world));
            let mut ranges = Vec::new();
            for channel in 0..5 {
                for sender in 0..world {
                    ranges.push((rings.signal(channel, sender), 4));
                    for hop in 0..2 {
                        for round in 0..slots {
                            ranges.push((rings.slot(channel, hop, sender, round), rings.slot_bytes()));
                            assert_eq!(rings.slot(channel, hop, sender, round) % 128, 0);
                        }
                        assert_eq!(rings.slot(channel, hop, sender, 1), rings.slot(channel, hop, sender, 1 + slots));
                    }
                }
            }
            ranges.sort_unstable();
            assert!(ranges.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
            let (at, n_bytes) = ranges[ranges.len() - 1];
            assert_eq!(at + n_bytes, rings.area_bytes());
        }
    }

    #[test]
    fn in_one_hop_slots_fill_the_area_too() {
        let rings = Rings { world: 2, legs: legs(4, 4), channels: 3 };
        let mut at: Vec<usize> = (0..3)
            .flat_map(|channel| (7..7 + TURNS as u32).map(move |n_signals| (channel, n_signals)))
            .flat_map(|(channel, n_signals)| [0, 1].map(|part| rings.one_hop_slot(channel, n_signals, part)))
            .collect();
        at.sort_unstable();
        let first = rings.signal(3, 0);
        assert!(at.iter().enumerate().all(|(i, at)| *at == first + i * rings.slot_bytes()));
        assert_eq!(first + at.len() * rings.slot_bytes(), rings.area_bytes());
    }

    #[test]
    fn a_buffer_bounds_the_channels() {
        let one = Rings { world: 2, legs: legs(4, 4), channels: 1 }.area_bytes();
        assert_eq!(Rings::within(2, legs(4, 4), 100, 10 * one + 5).unwrap().channels, 10);
        assert_eq!(Rings::within(2, legs(4, 4), 7, 10 * one).unwrap().channels, 7);
        assert_eq!(Rings::within(2, legs(4, 4), 7, one - 1), None);
        assert!(Rings::within(16, legs(8, 8), 100_000, usize::MAX).unwrap().area_bytes() <= u32::MAX as usize);
    }
}

/// The protocol of the fused kernel, every interleaving of it: no slot is written before it has been read.
///
/// A rank is one channel, its steps those of `kernels/all_reduce.cu` in order. Memory is sequentially consistent here; in
/// the kernel a signal releases what was stored before it.
#[cfg(test)]
mod protocol {
    use std::collections::{BTreeSet, HashSet};

    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    enum Step {
        /// Writes what is told of a round to a ring of each peer.
        Write {
            hop: usize,
            round: usize,
            tag: u8,
        },
        /// Reads it in the rings of this rank.
        Read {
            hop: usize,
            round: usize,
            tag: u8,
        },
        Tell(u8),
        Hear(u8),
    }
    use Step::{Hear, Read, Tell, Write};

    /// What one rank does in operations of so many rounds.
    fn program(operations: &[usize], lag: usize) -> Vec<Step> {
        let (mut steps, mut n_signals) = (Vec::new(), 0u8);
        let mut tell = |steps: &mut Vec<Step>| {
            n_signals += 1;
            steps.push(Tell(n_signals));
            n_signals
        };
        let mut told = 0;
        for (operation, &n_rounds) in operations.iter().enumerate() {
            let tag = |round: usize| (operation * 32 + round + 1) as u8;
            for i in 0..n_rounds + 2 * lag {
                steps.extend((i < n_rounds).then(|| Write { hop: 0, round: i, tag: tag(i) }));
                if lag == 0 {
                    told = tell(&mut steps);
                }
                steps.extend((i >= lag).then_some(Hear(told)));
                if i < n_rounds + lag {
                    if let Some(round) = i.checked_sub(lag) {
                        steps.push(Read { hop: 0, round, tag: tag(round) });
                        steps.push(Write { hop: 1, round, tag: tag(round) });
                    }
                    told = tell(&mut steps);
                }
                steps.extend((lag == 0).then_some(Hear(told)));
                steps.extend(i.checked_sub(2 * lag).map(|round| Read { hop: 1, round, tag: tag(round) }));
            }
        }
        steps
    }

    /// The same in one hop. Its rounds are numbered through all operations, and what is written is told of in hop 0.
    fn one_hop_program(operations: &[usize]) -> Vec<Step> {
        let (mut steps, mut turn) = (Vec::new(), 0);
        for &n_rounds in operations {
            for i in 0..=n_rounds {
                let tag = |round: usize| (round + 1) as u8;
                steps.extend((i < n_rounds).then(|| Write { hop: 0, round: turn, tag: tag(turn) }));
                steps.extend((i > 0).then_some(Hear(turn as u8)));
                if i < n_rounds {
                    turn += 1;
                    steps.push(Tell(turn as u8));
                }
                let told = turn - usize::from(i < n_rounds); // what peers wrote in the round before
                steps.extend((i > 0).then(|| Read { hop: 0, round: told - 1, tag: tag(told - 1) }));
            }
        }
        steps
    }

    /// Of any lag.
    const MAX_SLOTS: usize = 4;

    /// Where each rank is, and its memory: signals by sender, and by sender, hop and slot what was written last.
    #[derive(Clone, PartialEq, Eq, Hash)]
    struct State {
        at: Vec<usize>,
        signals: Vec<Vec<u8>>,
        rings: Vec<Vec<[[u8; MAX_SLOTS]; 2]>>,
    }

    impl State {
        /// After the next step of `rank`, if it need not wait; an error where it reads what it should not.
        fn after(&self, rank: usize, program: &[Step], slots: usize) -> Result<Option<Self>, String> {
            let Some(step) = program.get(self.at[rank]) else { return Ok(None) };
            let peers = (0..self.at.len()).filter(|peer| *peer != rank);
            let mut next = self.clone();
            next.at[rank] += 1;
            for peer in peers {
                match *step {
                    Write { hop, round, tag } => next.rings[peer][rank][hop][round % slots] = tag,
                    Read { hop, round, tag } if self.rings[rank][peer][hop][round % slots] != tag => {
                        return Err(format!("rank {rank} finds something else at {step:?}, step {}", self.at[rank]));
                    }
                    Read { .. } => {}
                    Tell(count) => next.signals[peer][rank] = count,
                    Hear(count) if self.signals[rank][peer] < count => return Ok(None),
                    Hear(_) => {}
                }
            }
            Ok(Some(next))
        }
    }

    /// Goes through every interleaving. An error where one ends in a wrong read or in ranks that all wait.
    fn explore(world: usize, program: &[Step], slots: usize) -> Result<(), String> {
        let start = State {
            at: vec![0; world],
            signals: vec![vec![0; world]; world],
            rings: vec![vec![[[0; MAX_SLOTS]; 2]; world]; world],
        };
        let (mut open, mut seen) = (vec![start.clone()], HashSet::from([start]));
        while let Some(state) = open.pop() {
            let mut moves = 0;
            for rank in 0..world {
                if let Some(next) = state.after(rank, program, slots)? {
                    moves += 1;
                    if seen.insert(next.clone()) {
                        open.push(next);
                    }
                }
            }
            if moves == 0 && state.at.iter().any(|at| *at < program.len()) {
                return Err(format!("all wait at {:?}", state.at));
            }
        }
        Ok(())
    }

    #[test]
    #[cfg_attr(miri, ignore = "thousands of states")]
    fn no_slot_is_written_before_it_has_been_read() {
        // Operations that follow one another.
        let operations: BTreeSet<Vec<usize>> = [1, 2, 3, 7]
            .iter()
            .flat_map(|a| [1, 2, 3, 6].map(|b| vec![*a, b]))
            .chain([vec![9], vec![1, 4, 2]])
            .collect();
        for operations in operations {
            for lag in [0, 1] {
                let result = explore(2, &program(&operations, lag), 1 + 2 * lag);
                assert_eq!(result, Ok(()), "{operations:?}, lag {lag}");
            }
        }
        for lag in [0, 1] {
            for operations in [vec![1, 3], vec![7, 2], vec![4, 5]] {
                let result = explore(3, &program(&operations, lag), 1 + 2 * lag);
                assert_eq!(result, Ok(()), "{operations:?} of 3 ranks, lag {lag}");
            }
            assert_eq!(explore(4, &program(&[2, 3], lag), 1 + 2 * lag), Ok(()), "of 4 ranks, lag {lag}");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "thousands of states")]
    fn no_slot_of_the_one_hop_is_written_before_it_has_been_read() {
        for operations in [vec![1], vec![9], vec![1, 1, 1, 1, 1, 1, 1], vec![1, 4, 2], vec![7, 6], vec![2, 1, 5, 3]] {
            assert_eq!(explore(2, &one_hop_program(&operations), super::TURNS), Ok(()), "{operations:?}");
        }
        assert!(explore(2, &one_hop_program(&[9]), super::TURNS - 1).is_err());
        let deaf: Vec<Step> = one_hop_program(&[9]).into_iter().filter(|step| *step != Hear(4)).collect();
        assert!(explore(2, &deaf, super::TURNS).is_err());
    }

    #[test]
    #[cfg_attr(miri, ignore = "thousands of states")]
    fn fewer_slots_or_a_wait_less_would_not_do() {
        assert!(explore(2, &program(&[6], 1), 2).is_err());
        for lag in [0, 1] {
            let deaf: Vec<Step> = program(&[6], lag).into_iter().filter(|step| *step != Hear(3)).collect();
            assert!(explore(2, &deaf, 1 + 2 * lag).is_err(), "lag {lag}");
        }
    }
}

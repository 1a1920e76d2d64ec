//! The exact all-reduce in one hop: where its mailboxes have what, and why no old word is taken for a new one.
//!
//! Behind its rings ([`crate::rings`]) every rank's area has *mailboxes*: for each of two turns, each peer and each block of a
//! kernel, room for as many *stripes* as a block ever sends. A stripe is what the lanes of a warp take at once:
//! [`LANE_VECS`] vectors of [`VEC_BYTES`] bytes each. A rank writes its whole input to each peer's mailboxes and sums what
//! arrives in its own.
//!
//! A lane's vectors travel as [`LANE_PACKETS`] *packets* of 16 bytes: the first three words of each vector, then all of their
//! last words, with a *flag* of 4 bytes behind. Whoever finds the flag has the data, for a packet is written and read by one
//! access of 128 bits, which arrives whole. So there are no signals, and no fences. (NCCL's protocol LL does the same with 8
//! bytes, half of which is flags.)
//!
//! The flag is the block's *epoch*: how many operations that block has taken part in, this one included. It counts on each
//! rank by itself, and all ranks launch the same blocks, so all have the same count. Epochs take turns between two
//! mailboxes: a block that writes those of epoch e has heard from all peers in epoch e - 1, so they have ended epoch e - 2,
//! whose data was there. Nobody acknowledges anything.
//!
//! *In two hops* a stripe goes to its [`owner`] only, which sums it and sends everyone the sum: fewer bytes, where there are more
//! than two ranks, and the same bits. The packets are where they are in one hop: from a peer to the owner its input, from the
//! owner to a peer the sum. Who has heard from an owner has heard from all: it has waited for their inputs.
//!
//! Epochs wrap around after 2^32 operations, and a place that only a large operation uses may hold a flag of long ago. So in
//! the last two epochs of each [`RENEWAL`] a block writes all of its places, in one hop: no flag is ever older than that.
//! `kernels/exact.cu` computes the same.

use crate::rings::LINE_BYTES;

/// Bytes of data that a lane takes at once.
pub const VEC_BYTES: usize = 16;

/// Lanes of a warp.
pub const LANES: usize = 32;

/// Vectors of a lane in a stripe. Vector `i` of a lane is the stripe's vector `i * LANES + lane`.
pub const LANE_VECS: usize = 3;

/// Vectors of a stripe.
pub const STRIPE_VECS: usize = LANES * LANE_VECS;

/// Bytes of a packet: 12 of data, and the flag.
pub const PACKET_BYTES: usize = 16;

/// Packets of a lane in a stripe.
pub const LANE_PACKETS: usize = 4;

/// Mailboxes of each peer.
pub const TURNS: usize = 2;

/// Epochs after which every place has been written anew; a power of two.
pub const RENEWAL: u32 = 1 << 30;

/// Whether all places are written in this epoch, whatever the operation needs.
pub const fn renews(epoch: u32) -> bool {
    epoch % RENEWAL >= RENEWAL - TURNS as u32
}

/// The rank that sums a stripe in two hops; the stripe counts from the operation's first one.
pub const fn owner(stripe: usize, world: usize) -> usize {
    stripe % world
}

/// The mailboxes of one rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mailboxes {
    /// Ranks, this one included.
    pub world: usize,
    /// Blocks that a kernel has at most.
    pub blocks: usize,
    /// Stripes that a block sends at most.
    pub block_stripes: usize,
}

impl Mailboxes {
    /// Those for operations of as many as `max_bytes`, more than 0, by `blocks` blocks at most.
    pub fn for_bytes(world: usize, blocks: usize, max_bytes: usize) -> Self {
        let stripes = max_bytes.div_ceil(STRIPE_VECS * VEC_BYTES);
        let blocks = blocks.min(stripes);
        Self { world, blocks, block_stripes: stripes.div_ceil(blocks) }
    }

    /// Bytes of an operation that there is room for.
    pub fn max_bytes(&self) -> usize {
        self.blocks * self.block_stripes * STRIPE_VECS * VEC_BYTES
    }

    /// Bytes of all of them, a multiple of 128.
    pub fn area_bytes(&self) -> usize {
        TURNS * (self.world - 1) * self.blocks * self.block_stripes * LANES * LANE_PACKETS * PACKET_BYTES
    }

    /// Offset in the mailboxes of rank `at` of a packet from rank `from`: the `packet`-th of a lane in a stripe of a block.
    pub fn packet(&self, epoch: u32, (at, from): (usize, usize), block: usize, stripe: usize, packet: usize) -> usize {
        let (turn, peer) = (epoch as usize % TURNS, from - usize::from(from > at));
        let mailbox = (turn * (self.world - 1) + peer) * self.blocks + block;
        ((mailbox * self.block_stripes + stripe) * LANE_PACKETS + packet) * LANES * PACKET_BYTES
    }
}

const _: () = assert!((LANES * PACKET_BYTES).is_multiple_of(LINE_BYTES) && RENEWAL.is_power_of_two());
const _: () = assert!(LANE_PACKETS * (PACKET_BYTES - 4) == LANE_VECS * VEC_BYTES);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_do_not_overlap_and_fill_the_mailboxes() {
        let mailboxes = Mailboxes::for_bytes(3, 4, 14_000);
        assert_eq!(mailboxes, Mailboxes { world: 3, blocks: 4, block_stripes: 3 });
        assert!(mailboxes.max_bytes() >= 14_000);
        assert_eq!(Mailboxes::for_bytes(2, 33, 1).max_bytes(), 1536, "little room is not shared out");
        for at in 0..3 {
            let mut starts = Vec::new();
            for (epoch, from, block) in
                [7, 8].into_iter().flat_map(|e| (0..3).flat_map(move |s| (0..4).map(move |b| (e, s, b))))
            {
                if from != at {
                    let packets = (0..3).flat_map(|stripe| (0..4).map(move |packet| (stripe, packet)));
                    starts.extend(packets.map(|(stripe, i)| mailboxes.packet(epoch, (at, from), block, stripe, i)));
                }
            }
            starts.sort_unstable();
            assert!(starts.iter().enumerate().all(|(i, start)| *start == i * 512), "{starts:?}");
            assert_eq!(starts.len() * 512, mailboxes.area_bytes());
        }
        assert_eq!(mailboxes.packet(7, (0, 1), 2, 2, 0), mailboxes.packet(9, (0, 1), 2, 2, 0));
    }

    #[test]
    fn both_turns_are_renewed_in_each_period() {
        let renewed: Vec<u32> =
            (0..4u64).map(|i| (i << 30) as u32).flat_map(|e| [e.wrapping_sub(2), e.wrapping_sub(1)]).collect();
        assert!(renewed.iter().all(|epoch| renews(*epoch)));
        assert!([0, 1, 2, RENEWAL - 3, RENEWAL, u32::MAX - 2].iter().all(|epoch| !renews(*epoch)));
    }
}

/// The protocol, every interleaving of it: who finds the flag of its epoch finds the data of its operation.
///
/// A rank is one block. Memory is sequentially consistent here, and a packet, here called word, arrives whole; the order of
/// words is left to chance, and so is that of the reads.
#[cfg(test)]
mod protocol {
    use std::collections::HashSet;

    /// The mailboxes, small enough to go through all of their states.
    #[derive(Clone, Copy)]
    struct Model {
        /// Epochs before they wrap around.
        epochs: u8,
        /// After so many all places are written anew; 0: never.
        renewal: u8,
        turns: u8,
        /// Words that a block sends at most.
        n_words: u8,
    }

    const SOUND: Model = Model { epochs: 8, renewal: 4, turns: 2, n_words: 2 };

    impl Model {
        fn renews(self, epoch: u8) -> bool {
            self.renewal != 0 && epoch % self.renewal >= self.renewal - self.turns
        }
    }

    /// An operation: its words, and whether they go over their owners.
    #[derive(Clone, Copy, Debug)]
    enum Operation {
        OneHop(u8),
        TwoHops(u8),
    }
    use Operation::{OneHop, TwoHops};

    /// Where each rank is: its operation, its words still to be written to peers, its words still to be read, the next one
    /// last; and every rank's mailboxes, by turn, sender and word: flag and number of the operation.
    #[derive(Clone, PartialEq, Eq, Hash)]
    struct State {
        ranks: Vec<Rank>,
        mail: Vec<Vec<(u8, u8)>>,
    }

    #[derive(Clone, PartialEq, Eq, Hash)]
    struct Rank {
        operation: usize,
        /// Peer and word.
        writes: Vec<(usize, u8)>,
        reads: Vec<(usize, u8)>,
    }

    /// Goes through every interleaving of these operations. An error where one ends in a wrong sum, or in ranks that all wait.
    fn explore(model: Model, world: usize, operations: &[Operation]) -> Result<(), String> {
        let place = |turn: u8, sender: usize, word: u8| {
            (usize::from(turn) * world + sender) * usize::from(model.n_words) + usize::from(word)
        };
        let epoch = |operation: usize| ((operation + 1) % usize::from(model.epochs)) as u8;
        let owner = |word: u8| super::owner(usize::from(word), world);
        let peers = |rank: usize| (0..world).filter(move |peer| *peer != rank);
        let two_hops =
            |operation: usize| matches!(operations.get(operation), Some(TwoHops(_))) && !model.renews(epoch(operation));
        let begin = |rank: usize, operation: usize| {
            let n_words = operations.get(operation).map_or(0, |(OneHop(n) | TwoHops(n))| *n);
            let n_written = if n_words > 0 && model.renews(epoch(operation)) { model.n_words } else { n_words };
            let of = |word: u8| peers(rank).map(move |peer| (peer, word));
            let (writes, reads) = match two_hops(operation) {
                false => ((0..n_written).flat_map(of).collect(), (0..n_words).flat_map(of).collect()),
                true => {
                    let (mine, others): (Vec<u8>, Vec<u8>) = (0..n_words).partition(|word| owner(*word) == rank);
                    let theirs = || others.iter().map(|word| (owner(*word), *word));
                    (theirs().collect(), theirs().chain(mine.into_iter().flat_map(of)).collect())
                }
            };
            Rank { operation, writes, reads }
        };
        let n_places = usize::from(model.turns) * world * usize::from(model.n_words);
        let start = State {
            ranks: (0..world).map(|rank| begin(rank, 0)).collect(),
            mail: vec![vec![(0, u8::MAX); n_places]; world],
        };
        let (mut open, mut seen) = (vec![start.clone()], HashSet::from([start]));
        while let Some(state) = open.pop() {
            let mut has_moved = false;
            let mut go = |next: State| {
                has_moved = true;
                if seen.insert(next.clone()) {
                    open.push(next);
                }
            };
            for rank in 0..world {
                let me = &state.ranks[rank];
                let (operation, epoch) = (me.operation, epoch(me.operation));
                let turn = epoch % model.turns;
                // Any word may be the next to arrive.
                for (i, (peer, word)) in me.writes.iter().enumerate() {
                    let mut next = state.clone();
                    next.ranks[rank].writes.remove(i);
                    next.mail[*peer][place(turn, rank, *word)] = (epoch, operation as u8);
                    go(next);
                }
                // One by one: a read changes nothing but what this rank has seen.
                if let Some((peer, word)) = me.reads.last() {
                    let (flag, from) = state.mail[rank][place(turn, *peer, *word)];
                    if flag == epoch {
                        if usize::from(from) != operation {
                            return Err(format!("rank {rank} takes a word of operation {from} for one of {operation}"));
                        }
                        let mut next = state.clone();
                        let Rank { writes, reads, .. } = &mut next.ranks[rank];
                        reads.pop();
                        let was_last = reads.iter().all(|(_, other)| other != word);
                        if two_hops(operation) && owner(*word) == rank && was_last {
                            writes.extend(peers(rank).map(|peer| (peer, *word))); // the sum
                        }
                        go(next);
                    }
                }
                if me.writes.is_empty() && me.reads.is_empty() && operation < operations.len() {
                    let mut next = state.clone();
                    next.ranks[rank] = begin(rank, operation + 1);
                    go(next);
                }
            }
            if !has_moved && state.ranks.iter().any(|rank| rank.operation < operations.len()) {
                return Err("all wait".into());
            }
        }
        Ok(())
    }

    /// A large operation, small ones until the epochs have wrapped around, and a large one again.
    fn around(epochs: u8) -> Vec<Operation> {
        let mut operations = vec![OneHop(1); usize::from(epochs) + 1];
        operations[0] = OneHop(2);
        operations[usize::from(epochs)] = OneHop(2);
        operations
    }

    #[test]
    #[cfg_attr(miri, ignore = "thousands of states")]
    fn who_finds_its_flag_finds_its_data() {
        let one_hop = |words: &[u8]| words.iter().map(|n| OneHop(*n)).collect::<Vec<_>>();
        for words in [&[1, 1, 1][..], &[2, 1, 2, 2], &[1, 2, 1, 2, 1]] {
            assert_eq!(explore(SOUND, 2, &one_hop(words)), Ok(()), "{words:?}");
        }
        assert_eq!(explore(SOUND, 2, &around(SOUND.epochs)), Ok(()));
        for words in [&[1, 1, 1][..], &[2, 1, 2]] {
            assert_eq!(explore(SOUND, 3, &one_hop(words)), Ok(()), "{words:?} of 3 ranks");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "thousands of states")]
    fn one_hop_and_two_may_follow_each_other() {
        for operations in [
            [OneHop(1), TwoHops(1), OneHop(1)],
            [TwoHops(1), TwoHops(1), TwoHops(1)],
            [TwoHops(2), OneHop(1), TwoHops(2)],
            [TwoHops(1), TwoHops(2), TwoHops(1)],
        ] {
            assert_eq!(explore(SOUND, 3, &operations), Ok(()), "{operations:?}");
        }
        // In epochs that renew the places what would take two hops takes one.
        let mut operations = around(SOUND.epochs);
        operations.iter_mut().skip(1).step_by(2).for_each(|operation| *operation = TwoHops(1));
        assert_eq!(explore(SOUND, 2, &operations), Ok(()));
    }

    #[test]
    #[cfg_attr(miri, ignore = "thousands of states")]
    fn one_turn_less_or_no_renewal_would_not_do() {
        assert!(explore(Model { turns: 1, renewal: 0, ..SOUND }, 2, &[OneHop(1); 3]).is_err());
        assert!(explore(Model { turns: 1, renewal: 0, ..SOUND }, 3, &[TwoHops(1), OneHop(1), OneHop(1)]).is_err());
        assert!(explore(Model { renewal: 0, ..SOUND }, 2, &around(SOUND.epochs)).is_err());
    }
}

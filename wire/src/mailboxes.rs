//! The exact all-reduce in one hop: where its mailboxes have what, and why no old word is taken for a new one.
//!
//! Behind its rings ([`crate::rings`]) every rank's area has *mailboxes*: for each of two turns, each sender and each block
//! of a kernel, room for as many vectors of [`VEC_BYTES`] bytes as a block ever sends. A rank writes its whole input to each
//! peer's mailboxes and sums what arrives in its own.
//!
//! A vector travels as two *packets*: 8 bytes of it, behind each 4 of them a *flag* of 4. Whoever finds the flag has the data,
//! for a word of 8 bytes arrives whole. So there are no signals, and no fences. (NCCL calls this protocol LL.)
//!
//! The flag is the block's *epoch*: how many operations that block has taken part in, this one included. It counts on each
//! rank by itself, and all ranks launch the same blocks, so all have the same count. Epochs take turns between two
//! mailboxes: a block that writes those of epoch e has heard from all peers in epoch e - 1, so they have ended epoch e - 2,
//! whose data was there. Nobody acknowledges anything.
//!
//! Epochs wrap around after 2^32 operations, and a place that only a large operation uses may hold a flag of long ago. So in
//! the last two epochs of each [`RENEWAL`] a block writes all of its places: no flag is ever older than that.
//! `kernels/exact.cu` computes the same.

use crate::rings::LINE_BYTES;

/// Bytes of data that a thread takes at once.
pub const VEC_BYTES: usize = 16;

/// Bytes of a packet: 8 of data, and 2 flags.
pub const PACKET_BYTES: usize = 16;

/// Packets of a vector.
pub const VEC_PACKETS: usize = 2 * VEC_BYTES / PACKET_BYTES;

/// Vectors of a warp, whose packets stand together: first all first ones, then all second ones, so that what the warp writes at
/// once is in one piece.
pub const WARP_VECS: usize = 32;

/// Mailboxes of each sender.
pub const TURNS: usize = 2;

/// Epochs after which every place has been written anew; a power of two.
pub const RENEWAL: u32 = 1 << 30;

/// Whether all places are written in this epoch, whatever the operation needs.
pub const fn renews(epoch: u32) -> bool {
    epoch % RENEWAL >= RENEWAL - TURNS as u32
}

/// The mailboxes of one rank.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mailboxes {
    /// Ranks that send, this one included (its own are not used).
    pub world: usize,
    /// Blocks that a kernel has at most.
    pub blocks: usize,
    /// Vectors that a block sends at most, a multiple of [`WARP_VECS`].
    pub block_vecs: usize,
}

impl Mailboxes {
    /// Those for operations of as many as `max_bytes`, more than 0, by `blocks` blocks at most.
    pub fn for_bytes(world: usize, blocks: usize, max_bytes: usize) -> Self {
        let warps = max_bytes.div_ceil(WARP_VECS * VEC_BYTES);
        let blocks = blocks.min(warps);
        Self { world, blocks, block_vecs: warps.div_ceil(blocks) * WARP_VECS }
    }

    /// Bytes of an operation that there is room for.
    pub fn max_bytes(&self) -> usize {
        self.blocks * self.block_vecs * VEC_BYTES
    }

    /// Bytes of all of them, a multiple of 128.
    pub fn area_bytes(&self) -> usize {
        TURNS * self.world * self.blocks * self.block_vecs * VEC_PACKETS * PACKET_BYTES
    }

    /// Offset of a packet, the `half`-th of vector `vec` of what `sender` sends in `block` in an epoch.
    pub fn packet(&self, epoch: u32, sender: usize, block: usize, vec: usize, half: usize) -> usize {
        let turn = epoch as usize % TURNS;
        let mailbox = ((turn * self.world + sender) * self.blocks + block) * self.block_vecs * VEC_PACKETS;
        let in_mailbox = vec / WARP_VECS * WARP_VECS * VEC_PACKETS + half * WARP_VECS + vec % WARP_VECS;
        (mailbox + in_mailbox) * PACKET_BYTES
    }
}

const _: () = assert!((WARP_VECS * VEC_PACKETS * PACKET_BYTES).is_multiple_of(LINE_BYTES) && RENEWAL.is_power_of_two());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_do_not_overlap_and_fill_the_mailboxes() {
        let mailboxes = Mailboxes::for_bytes(3, 4, 5000);
        assert_eq!(mailboxes, Mailboxes { world: 3, blocks: 4, block_vecs: 96 });
        assert!(mailboxes.max_bytes() >= 5000);
        assert_eq!(Mailboxes::for_bytes(2, 33, 1).max_bytes(), 512, "little room is not shared out");
        let mut starts = Vec::new();
        for (epoch, sender, block) in
            [7, 8].into_iter().flat_map(|e| (0..3).flat_map(move |s| (0..4).map(move |b| (e, s, b))))
        {
            for vec in 0..96 {
                starts.extend([0, 1].map(|half| mailboxes.packet(epoch, sender, block, vec, half)));
            }
        }
        starts.sort_unstable();
        assert!(starts.iter().enumerate().all(|(i, start)| *start == i * PACKET_BYTES));
        assert_eq!(starts.len() * PACKET_BYTES, mailboxes.area_bytes());
        assert_eq!(mailboxes.packet(7, 1, 2, 3, 0), mailboxes.packet(9, 1, 2, 3, 0));
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
/// A rank is one block. Memory is sequentially consistent here, and a word of data and flag arrives whole; the order of
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

    /// Where each rank is: its operation, its words still to be written to peers, its words still to be read; and
    /// every rank's mailboxes, by turn, sender and word: flag and number of the operation.
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

    /// Goes through every interleaving of operations of so many words each. An error where one ends in a wrong sum, or in
    /// ranks that all wait.
    fn explore(model: Model, world: usize, operations: &[u8]) -> Result<(), String> {
        let place = |turn: u8, sender: usize, word: u8| {
            (usize::from(turn) * world + sender) * usize::from(model.n_words) + usize::from(word)
        };
        let epoch = |operation: usize| ((operation + 1) % usize::from(model.epochs)) as u8;
        let begin = |rank: usize, operation: usize| {
            let n_words = operations.get(operation).copied().unwrap_or(0);
            let n_written = if n_words > 0 && model.renews(epoch(operation)) { model.n_words } else { n_words };
            let peers = || (0..world).filter(move |peer| *peer != rank);
            let of = |n: u8| peers().flat_map(move |peer| (0..n).map(move |word| (peer, word))).collect();
            Rank { operation, writes: of(n_written), reads: of(n_words) }
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
                        next.ranks[rank].reads.pop();
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
    fn around(epochs: u8) -> Vec<u8> {
        let mut operations = vec![1; usize::from(epochs) + 1];
        operations[0] = 2;
        operations[usize::from(epochs)] = 2;
        operations
    }

    #[test]
    #[cfg_attr(miri, ignore = "thousands of states")]
    fn who_finds_its_flag_finds_its_data() {
        for operations in [&[1, 1, 1][..], &[2, 1, 2, 2], &[1, 2, 1, 2, 1], &around(SOUND.epochs)] {
            assert_eq!(explore(SOUND, 2, operations), Ok(()), "{operations:?}");
        }
        for operations in [&[1, 1, 1][..], &[2, 1, 2]] {
            assert_eq!(explore(SOUND, 3, operations), Ok(()), "{operations:?} of 3 ranks");
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "thousands of states")]
    fn one_turn_less_or_no_renewal_would_not_do() {
        assert!(explore(Model { turns: 1, renewal: 0, ..SOUND }, 2, &[1, 1, 1]).is_err());
        assert!(explore(Model { renewal: 0, ..SOUND }, 2, &around(SOUND.epochs)).is_err());
    }
}

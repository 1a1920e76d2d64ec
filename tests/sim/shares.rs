//! The large share of a device: the first communicator of a family that is used has it, on all ranks from the same sum on, and no
//! rank waits for another to agree on that.
//!
//! A simulated device has 16 multiprocessors, of which NCCL gets half: a kernel has 5 blocks in the large share and 2 in the usual one.

use std::sync::{Arc, Barrier};
use std::time::Duration;

use flashcomm_test_support::*;
use flashcomm_wire::TILE_ELEMS;
use half::f16;

const USUAL: i32 = 2;
const LARGE: i32 = 5;

/// Tiles for every channel of every block.
fn case(world: usize) -> Arc<Case<f16>> {
    Case::new(world * 40 * TILE_ELEMS, 1, world, legs(4, 4))
}

/// A rank of a communicator, with a stream of its own.
struct Rank<'a> {
    comm: usize,
    rank: usize,
    stream: Stream,
    memory: Memory,
    case: &'a Case<f16>,
}

impl<'a> Rank<'a> {
    fn new(comm: usize, rank: usize, case: &'a Case<f16>) -> Self {
        Rank { comm, rank, stream: Stream::new(), memory: Memory::new(2 * case.count), case }
    }

    /// Issues a sum; the blocks of its kernel.
    fn issue(&self) -> i32 {
        self.memory.write(&self.case.inputs[self.rank], &self.stream);
        ok!(ncclAllReduce(self.memory.at, self.memory.at, self.case.count, dtype::FP16, SUM, self.comm, self.stream.0));
        call!(flashcomm_sim_last_blocks(self.rank as i32))
    }

    fn sum(&self, about: &str) -> i32 {
        let blocks = self.issue();
        same_bits(&self.memory.read(self.case.count, &self.stream), &self.case.expected, about);
        blocks
    }

    fn end(self) {
        ok!(ncclCommDestroy(self.comm));
    }
}

/// Runs a test over both exchanges that have a kernel that waits, each in a process.
fn over_each(test: impl Fn()) {
    if is_real() {
        return; // whose grids cannot be asked for
    }
    for exchange in ["peer", "host"] {
        let settings = [("FLASHCOMM_EXCHANGE", exchange), ("FLASHCOMM_BITS", "4"), ("FLASHCOMM_BUFFER_MIB", "64")];
        in_process(&settings, &test);
        if std::env::var_os("WORLD_INNER").is_some() {
            return;
        }
    }
}

#[test]
fn the_first_that_is_used_has_the_large_share_until_it_ends() {
    over_each(|| {
        let (world, ids, gate) = (3, [(); 4].map(|()| unique_id()), Barrier::new(3));
        let case = case(world);
        threads(world, |rank| {
            // The ranks of a communicator of the same ranks may be numbered otherwise.
            let of = |i: usize| Rank::new(init(world, ids[i], (rank + i) % world), (rank + i) % world, &case);
            let blocks = |of: &Rank<'_>, about: &str| {
                of.memory.write(&case.inputs[of.rank], &of.stream);
                gate.wait();
                ok!(ncclAllReduce(of.memory.at, of.memory.at, case.count, dtype::FP16, SUM, of.comm, of.stream.0));
                let blocks = call!(flashcomm_sim_last_blocks(rank as i32));
                same_bits(&of.memory.read(case.count, &of.stream), &case.expected, about);
                blocks
            };
            let [made_first, used_first, third] = [0, 1, 2].map(of);
            blocks(&used_first, "the first sum"); // before rank 0's first one it is not settled
            assert_eq!(blocks(&used_first, "used first"), LARGE);
            for _ in 0..3 {
                assert_eq!(blocks(&made_first, "used later"), USUAL);
            }
            assert_eq!(blocks(&used_first, "used first, again"), LARGE);
            gate.wait();
            used_first.end();
            gate.wait();
            blocks(&third, "the first sum of the third");
            assert_eq!(blocks(&third, "its turn has come"), LARGE);
            assert_eq!(blocks(&made_first, "once and for all"), USUAL);
            let fourth = of(3);
            blocks(&fourth, "the first sum of the fourth");
            assert_eq!(blocks(&fourth, "made while another has it"), USUAL);
            gate.wait();
            [made_first, third, fourth].into_iter().for_each(Rank::end);
        });
    });
}

#[test]
fn a_communicator_of_other_ranks_has_the_usual_share() {
    over_each(|| {
        let (ids, gate) = ([unique_id(), unique_id()], Barrier::new(3));
        let cases = [case(3), case(2)];
        threads(3, |rank| {
            let all = Rank::new(init(3, ids[0], rank), rank, &cases[0]);
            if rank < 2 {
                let two = Rank::new(init(2, ids[1], rank), rank, &cases[1]);
                assert_eq!([two.sum("of two"), two.sum("again")], [USUAL; 2], "though used first");
                two.end();
            }
            gate.wait();
            all.sum("of all");
            assert_eq!(all.sum("of all"), LARGE);
            gate.wait();
            all.end();
        });
    });
}

#[test]
fn ranks_that_are_ahead_change_to_it_with_the_same_sum() {
    over_each(|| {
        const AHEAD: usize = 4;
        let (world, ids, gate) = (3, [(); 3].map(|()| unique_id()), Barrier::new(3));
        let case = case(world);
        let grids = threads(world, |thread| {
            // Whichever rank leads, in one of the turns it is the last.
            (0..world)
                .map(|turn| {
                    let rank = Rank::new(init(world, ids[turn], thread), thread, &case);
                    let mut grids = Vec::new();
                    gate.wait();
                    if thread == turn {
                        gate.wait();
                    }
                    (0..AHEAD).for_each(|_| grids.push(rank.issue()));
                    if thread != turn {
                        gate.wait();
                    }
                    gate.wait();
                    (0..AHEAD).for_each(|_| grids.push(rank.issue()));
                    same_bits(&rank.memory.read(case.count, &rank.stream), &case.expected, "the last one");
                    gate.wait();
                    rank.end();
                    gate.wait();
                    grids
                })
                .collect::<Vec<_>>()
        });
        let [first, second, third] = &grids[..] else { panic!("three ranks") };
        assert!(first == second && second == third, "{grids:?}");
        for turn in first {
            assert!(turn.is_sorted() && turn.last() == Some(&LARGE), "{turn:?}");
        }
        let n_usual = first.iter().map(|turn| turn.iter().filter(|blocks| **blocks == USUAL).count());
        assert!(n_usual.max().unwrap() >= AHEAD, "no rank was ahead of the one that leads");
    });
}

#[test]
fn processes_change_to_it_with_the_same_sum() {
    if is_real() {
        return; // as above
    }
    let settings = |_| vec![("FLASHCOMM_BITS", "4".to_string()), ("FLASHCOMM_BUFFER_MIB", "64".into())];
    let ends = processes(3, settings, |process| {
        use_device(process.rank);
        let case = case(3);
        for turn in 0..3 {
            let rank = Rank::new(init(3, process.unique_id(turn), process.rank), process.rank, &case);
            if process.rank == turn {
                std::thread::sleep(Duration::from_millis(200));
            }
            let grids: Vec<u8> = (0..8).map(|_| rank.issue() as u8).collect();
            same_bits(&rank.memory.read(case.count, &rank.stream), &case.expected, "the last one");
            process.tell(&format!("grids{turn}.{}", process.rank), &grids);
            (0..3).for_each(|other| assert_eq!(process.hear(&format!("grids{turn}.{other}")), grids, "rank {other}"));
            rank.sum("once more");
            assert_eq!(rank.sum("and more"), LARGE);
            rank.end();
        }
    });
    all_succeed(ends);
}

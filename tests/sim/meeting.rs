//! When ranks meet: at a communicator's creation, which waits for all of them anyway. Afterwards no call blocks the host
//! where NCCL's would not, whoever is late and in whatever order communicators are used first.

use std::sync::{Arc, Barrier, mpsc};
use std::time::{Duration, Instant};

use flashcomm_test_support::*;
use half::f16;

const EXCHANGES: [&str; 3] = ["peer", "host", "nccl"];
/// Seconds for which ranks wait for each other in attach: long enough for a machine that does other things, too.
const TIMEOUT_S: u64 = 20;
/// The same where a rank is late by more.
const SHORT_TIMEOUT_S: u64 = 2;
const LATE: Duration = Duration::from_secs(4);

/// One rank's all-reduce of a case on a stream of its own.
struct Sum<'a> {
    comm: usize,
    stream: Stream,
    memory: Memory,
    case: &'a Case<f16>,
}

impl<'a> Sum<'a> {
    fn new(comm: usize, rank: usize, case: &'a Case<f16>) -> Self {
        let stream = Stream::new();
        let memory = Memory::of(&case.inputs[rank], &stream);
        stream.wait();
        Sum { comm, stream, memory, case }
    }

    fn issue(&self) {
        ok!(ncclAllReduce(self.memory.at, self.memory.at, self.case.count, dtype::FP16, SUM, self.comm, self.stream.0));
    }

    fn check(&self, about: &str) {
        same_bits(&self.memory.read(self.case.count, &self.stream), &self.case.expected, about);
    }
}

/// Runs a job once for each exchange, with 4 bits and an attach timeout of [`TIMEOUT_S`].
fn over_each_exchange(job: impl Fn()) {
    within(TIMEOUT_S, job);
}

/// The same with another timeout.
fn within(timeout_s: u64, job: impl Fn()) {
    let timeout_s = timeout_s.to_string();
    for exchange in EXCHANGES {
        let timeout = ("FLASHCOMM_ATTACH_TIMEOUT_S", timeout_s.as_str());
        in_process(&[("FLASHCOMM_BITS", "4"), ("FLASHCOMM_EXCHANGE", exchange), timeout], &job);
        if std::env::var_os("WORLD_INNER").is_some() {
            return;
        }
    }
}

fn case(seed: u64, world: usize) -> Arc<Case<f16>> {
    Case::<f16>::new(9000, seed, world, legs(4, 4))
}

#[test]
fn a_rank_may_be_late_at_creation_and_at_the_first_sum() {
    within(SHORT_TIMEOUT_S, || {
        let (world, id) = (3, unique_id());
        let case = case(1, world);
        threads(world, |rank| {
            if rank == 1 {
                std::thread::sleep(LATE); // it loads
            }
            let sum = Sum::new(init(world, id, rank), rank, &case);
            if rank == 1 {
                std::thread::sleep(LATE); // it compiles
            }
            let start = Instant::now();
            sum.issue();
            assert!(start.elapsed() < LATE / 2, "the call waited for {:?}", start.elapsed());
            sum.check("the first sum");
            ok!(ncclCommDestroy(sum.comm));
        });
        assert_eq!(n_compressed(), 3);
    });
}

#[test]
fn communicators_may_be_used_first_in_another_order_on_every_rank() {
    over_each_exchange(|| {
        let (world, ids) = (2, [unique_id(), unique_id(), unique_id()]);
        let cases = [1, 2, 3].map(|seed| case(seed, world));
        threads(world, |rank| {
            let comms = ids.map(|id| init(world, id, rank));
            let sums: Vec<_> = comms.iter().zip(&cases).map(|(comm, case)| Sum::new(*comm, rank, case)).collect();
            let order = [[0, 1, 2], [2, 0, 1]][rank];
            order.iter().for_each(|i| sums[*i].issue());
            sums.iter().for_each(|sum| sum.check("a first sum"));
            comms.iter().for_each(|comm| ok!(ncclCommDestroy(*comm)));
        });
        assert_eq!(n_compressed(), 6);
    });
}

#[test]
fn a_rank_may_send_what_another_awaits_behind_its_first_sum() {
    over_each_exchange(|| {
        for with_warm_up in [false, true] {
            let (world, id) = (2, unique_id());
            let case = case(1, world);
            let (tell, heard) = mpsc::channel();
            let heard = std::sync::Mutex::new(heard);
            threads(world, |rank| {
                let comm = init(world, id, rank);
                let sum = Sum::new(comm, rank, &case);
                if with_warm_up {
                    let (stream, memory) = (Stream::new(), Memory::new(400));
                    ok!(ncclAllReduce(memory.at, memory.at, 100, dtype::FP32, SUM, comm, stream.0));
                    stream.wait();
                }
                if rank == 1 {
                    heard.lock().unwrap().recv_timeout(Duration::from_secs(20)).expect("rank 0's call does not return");
                }
                sum.issue();
                if rank == 0 {
                    tell.send(()).unwrap();
                }
                sum.check("the first sum");
                ok!(ncclCommDestroy(comm));
            });
        }
        assert_eq!(n_compressed(), 4);
    });
}

#[test]
fn communicators_of_every_origin_compress_their_first_sum() {
    over_each_exchange(|| {
        let (world, id) = (2, unique_id());
        let case = case(4, world);
        threads(world, |rank| {
            let parent = init(world, id, rank);
            let (mut split, mut shrunk) = (0, 0);
            ok!(ncclGroupStart());
            ok!(ncclCommSplit(parent, 0, rank as i32, &mut split, std::ptr::null()));
            ok!(ncclGroupEnd());
            let sum = Sum::new(split, rank, &case);
            sum.issue();
            sum.check("of a split");
            if rank == 0 {
                ok!(ncclCommShrink(parent, [1].as_mut_ptr(), 1, &mut shrunk, std::ptr::null(), 0));
                ok!(ncclCommDestroy(shrunk));
            }
            [split, parent].iter().for_each(|comm| ok!(ncclCommDestroy(*comm)));
        });
        assert_eq!(n_compressed(), 2);
    });
}

#[test]
fn a_group_creates_communicators_in_another_order_on_every_rank() {
    over_each_exchange(|| {
        let (world, ids) = (2, [unique_id(), unique_id()]);
        let cases = [1, 2].map(|seed| case(seed, world));
        threads(world, |rank| {
            let mut comms = [0; 2];
            ok!(ncclGroupStart());
            for i in [[0, 1], [1, 0]][rank] {
                ok!(ncclCommInitRank(&mut comms[i], world as i32, ids[i], rank as i32));
            }
            ok!(ncclGroupEnd());
            let sums: Vec<_> = comms.iter().zip(&cases).map(|(comm, case)| Sum::new(*comm, rank, case)).collect();
            sums.iter().for_each(Sum::issue);
            sums.iter().for_each(|sum| sum.check("of a group"));
            comms.iter().for_each(|comm| ok!(ncclCommDestroy(*comm)));
        });
        assert_eq!(n_compressed(), 4);
    });
}

#[test]
fn a_communicator_that_is_still_in_the_making_may_be_aborted() {
    in_process(&[("FLASHCOMM_BITS", "4"), ("FLASHCOMM_EXCHANGE", "peer")], || {
        let (world, ids) = (2, [unique_id(), unique_id()]);
        let case = case(1, world);
        threads(world, |rank| {
            if rank == 0 {
                let (mut comm, config) = (0, Config::non_blocking());
                let first = call!(ncclCommInitRankConfig(&mut comm, world as i32, ids[0], 0, &config));
                assert_eq!(first, 7, "ncclInProgress: the other rank never comes");
                std::thread::sleep(Duration::from_millis(50));
                ok!(ncclCommAbort(comm));
            }
            let sum = Sum::new(init(world, ids[1], rank), rank, &case);
            sum.issue();
            sum.check("of another communicator");
            ok!(ncclCommDestroy(sum.comm));
        });
    });
}

#[test]
fn a_link_that_loses_or_garbles_stores_is_not_used() {
    if is_real() {
        return; // a machine whose links are good
    }
    for stores in ["lost", "garbled"] {
        let settings = |_| {
            let words = [("FLASHCOMM_BITS", "4"), ("FLASHCOMM_LOG", "info"), ("FLASHCOMM_SIM_STORES", stores)];
            words.map(|(name, value)| (name, value.to_string())).to_vec()
        };
        let ends = processes(3, settings, |process| {
            use_device(process.rank);
            let numbers: Vec<_> = (0..3).map(|rank| whole_numbers(5000, 1, rank)).collect();
            let (comm, stream) = (init(3, process.unique_id(0), process.rank), Stream::new());
            let memory = Memory::of(&numbers[process.rank], &stream);
            ok!(ncclAllReduce(memory.at, memory.at, 5000, dtype::FP16, SUM, comm, stream.0));
            let sum = memory.read(5000, &stream);
            same_bits(&sum, &reference(&numbers, legs(4, 4)), "over another exchange");
            assert_ne!(Info::of(comm).exchange(), "peer");
            ok!(ncclCommDestroy(comm));
        });
        let Some(ends) = ends else { return };
        let word = if stores == "lost" { "loses stores" } else { "garbles stores" };
        assert!(ends.iter().any(|(_, log)| log.contains(word)), "{}", ends[0].1);
        all_succeed(Some(ends));
    }
}

#[test]
fn ranks_of_one_host_meet_without_a_call_of_the_real_nccl() {
    if is_real() {
        return; // whose calls cannot be made to fail
    }
    for exchange in ["peer", "host"] {
        let settings = [("FLASHCOMM_BITS", "4"), ("FLASHCOMM_EXCHANGE", exchange), ("FLASHCOMM_SIM_FAIL", "nccl:1")];
        in_process(&settings, || {
            let (world, id) = (3, unique_id());
            let case = case(6, world);
            threads(world, |rank| {
                let mut split = 0;
                let comm = init(world, id, rank);
                ok!(ncclCommSplit(comm, 0, rank as i32, &mut split, std::ptr::null()));
                for comm in [comm, split] {
                    let sum = Sum::new(comm, rank, &case);
                    sum.issue();
                    sum.check("the first sum");
                    ok!(ncclCommDestroy(comm));
                }
            });
            assert_eq!(n_compressed(), 6);
        });
        if std::env::var_os("WORLD_INNER").is_some() {
            return;
        }
    }
}

#[test]
fn where_one_rank_may_not_share_memory_all_meet_over_the_real_nccl() {
    let settings = |rank: usize| {
        let shm = ("NCCL_SHM_DISABLE", usize::from(rank == 1).to_string());
        vec![("FLASHCOMM_BITS", "4".into()), ("FLASHCOMM_LOG", "info".into()), shm]
    };
    let ends = processes(3, settings, |process| {
        use_device(process.rank);
        let case = case(7, 3);
        let start = Instant::now();
        let (first, mut second) = (init(3, process.unique_id(0), process.rank), 0);
        ok!(ncclCommSplit(first, 0, process.rank as i32, &mut second, std::ptr::null()));
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        for comm in [first, second] {
            let sum = Sum::new(comm, process.rank, &case);
            sum.issue();
            sum.check("the first sum");
            assert_eq!(Info::of(comm).exchange(), "peer");
            ok!(ncclCommDestroy(comm));
        }
    });
    all_succeed(ends);
}

fn settled(comm: usize) {
    let (mut state, end) = (7, Instant::now() + Duration::from_secs(20)); // ncclInProgress
    while state == 7 {
        assert!(Instant::now() < end, "the communicator stays in progress");
        std::thread::sleep(Duration::from_millis(1));
        ok!(ncclCommGetAsyncError(comm, &mut state));
    }
    assert_eq!(state, 0);
}

/// Begins to create a communicator of two ranks that does not block.
fn begin(comm: &mut usize, id: UniqueId, rank: usize) {
    let answer = call!(ncclCommInitRankConfig(comm, 2, id, rank as i32, &Config::non_blocking()));
    assert!(answer == 0 || answer == 7, "{answer}");
}

#[test]
fn a_communicator_that_does_not_block_is_ready_before_another_of_its_group() {
    if is_real() {
        return; // NCCL 2.32 keeps all of the group's in progress until the last of them is ready
    }
    over_each_exchange(|| {
        let (world, ids) = (2, [unique_id(), unique_id()]);
        let first_is_ready = Barrier::new(world);
        threads(world, |rank| {
            let mut comms = [0; 2];
            if rank == 0 {
                ok!(ncclGroupStart());
                (0..2).for_each(|i| begin(&mut comms[i], ids[i], rank));
                let answer = call!(ncclGroupEnd());
                assert!(answer == 0 || answer == 7, "{answer}");
            } else {
                begin(&mut comms[0], ids[0], rank);
            }
            settled(comms[0]);
            first_is_ready.wait();
            if rank == 1 {
                begin(&mut comms[1], ids[1], rank);
            }
            settled(comms[1]);
            comms.iter().for_each(|comm| ok!(ncclCommDestroy(*comm)));
        });
    });
}

#[test]
fn a_communicator_that_does_not_block_is_made_while_a_sum_of_another_waits() {
    over_each_exchange(|| {
        let (world, ids) = (2, [unique_id(), unique_id()]);
        let case = case(5, world);
        threads(world, |rank| {
            let sum = Sum::new(init(world, ids[0], rank), rank, &case);
            let mut comm = 0;
            if rank == 0 {
                sum.issue();
            }
            begin(&mut comm, ids[1], rank);
            settled(comm);
            if rank == 1 {
                sum.issue();
            }
            sum.check("the sum");
            [sum.comm, comm].iter().for_each(|comm| ok!(ncclCommDestroy(*comm)));
        });
    });
}

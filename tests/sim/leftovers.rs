//! What outlives communicators, and that nothing does after the last one: a process that has destroyed them all may be
//! checkpointed, or leave its GPU to somebody else.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use flashcomm_test_support::*;
use half::f16;

/// What a process holds of a GPU's memory, of other processes' and of shared memory.
#[derive(PartialEq, Eq, Debug)]
struct Left {
    device_bytes: usize,
    /// Processes of which it has imported memory.
    n_imported: usize,
    n_shared: usize,
}

impl Left {
    fn now() -> Self {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let lines = |name: &'static str| maps.lines().filter(move |line| line.contains(name));
        let inodes: BTreeSet<_> =
            lines("memfd:flashcomm-sim-memory").map(|line| line.split_whitespace().nth(4).unwrap()).collect();
        let n_shared = lines("/dev/shm/flashcomm-").count();
        // Its own simulated memory is such a file, too, from the first allocation on.
        Left { device_bytes: Held::now().device_bytes, n_imported: inodes.len().saturating_sub(1), n_shared }
    }
}

/// What is held when `before` is again, or after a second. Others may have to let go first.
fn in_the_end(before: &Left) -> Left {
    let end = Instant::now() + Duration::from_secs(1);
    loop {
        let now = Left::now();
        if now == *before || Instant::now() > end {
            return now;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn reduce(comm: usize, rank: usize, case: &Case<f16>) {
    let stream = Stream::new();
    let memory = Memory::of(&case.inputs[rank], &stream);
    ok!(ncclAllReduce(memory.at, memory.at, case.count, dtype::FP16, SUM, comm, stream.0));
    same_bits(&memory.read(case.count, &stream), &case.expected, "the sum");
    drop(memory);
    stream.wait();
}

fn settings(exchange: &str) -> Vec<(&'static str, String)> {
    vec![("FLASHCOMM_BITS", "4".into()), ("FLASHCOMM_EXCHANGE", exchange.into())]
}

#[test]
fn processes_hold_nothing_after_their_last_communicator() {
    if is_real() {
        return; // where others have memory on the GPU, too; the GPU suite has a job for this
    }
    for exchange in ["peer", "host", "nccl"] {
        let ends = processes(
            3,
            |_| settings(exchange),
            |process| {
                let rank = process.rank;
                use_device(rank);
                let case = Case::<f16>::new(30_000, 1, 3, legs(4, 4));
                let before = Left::now();
                for round in 0..3 {
                    let (first, mut second) = (init(3, process.unique_id(round), rank), 0);
                    ok!(ncclCommSplit(first, 0, rank as i32, &mut second, std::ptr::null()));
                    [first, second].iter().for_each(|comm| reduce(*comm, rank, &case));
                    let during = Left::now();
                    assert!(during.device_bytes > before.device_bytes && during != before, "{during:?}");
                    ok!(ncclCommDestroy(second));
                    if rank == round {
                        std::thread::sleep(Duration::from_millis(300));
                    }
                    ok!(ncclCommDestroy(first));
                    assert_eq!(in_the_end(&before), before, "round {round}");
                }
            },
        );
        let Some(ends) = ends else { return };
        all_succeed(Some(ends));
    }
}

#[test]
fn ranks_of_one_process_hold_nothing_after_their_last_communicator() {
    if is_real() {
        return; // as above
    }
    for exchange in ["peer", "host", "nccl"] {
        in_process(&[("FLASHCOMM_BITS", "4"), ("FLASHCOMM_EXCHANGE", exchange)], || {
            let case = Case::<f16>::new(30_000, 1, 3, legs(4, 4));
            use_device(0);
            let before = Left::now();
            for _ in 0..3 {
                let id = unique_id();
                let comms = threads(3, |rank| {
                    let comm = init(3, id, rank);
                    reduce(comm, rank, &case);
                    comm
                });
                use_device(0);
                assert_ne!(Left::now(), before);
                comms.iter().for_each(|comm| ok!(ncclCommDestroy(*comm)));
                assert_eq!(Left::now(), before);
            }
        });
        if std::env::var_os("WORLD_INNER").is_some() {
            return;
        }
    }
}

/// Ranks 0 and 1 have a communicator, 1 and 2 another one. That of rank 0 ends, and 1 goes on.
#[test]
fn memory_that_another_process_still_has_is_kept() {
    let ends = processes(
        3,
        |_| settings("peer"),
        |process| {
            let rank = process.rank;
            use_device(rank);
            let case = Case::<f16>::new(30_000, 1, 2, legs(4, 4));
            let before = Left::now();
            let first = (rank < 2).then(|| init(2, process.unique_id(0), rank));
            let second = (rank > 0).then(|| init(2, process.unique_id_by(1, 1), rank - 1));
            if let Some(comm) = first {
                reduce(comm, rank, &case);
                ok!(ncclCommDestroy(comm));
                std::thread::sleep(Duration::from_millis(300));
                assert!(is_real() || Left::now().device_bytes > before.device_bytes, "rank 1 may have it mapped");
                process.tell(&format!("ended{rank}"), b"");
            }
            if let Some(comm) = second {
                [0, 1].iter().for_each(|rank| drop(process.hear(&format!("ended{rank}"))));
                reduce(comm, rank - 1, &case);
                ok!(ncclCommDestroy(comm));
            }
            if !is_real() {
                assert_eq!(in_the_end(&before), before);
            }
        },
    );
    all_succeed(ends);
}

/// A thread aborts a communicator, the last one of its process, while another launches sums on it: what their kernels still
/// read and write stays until they have ended.
#[test]
fn an_abort_while_sums_are_launched_takes_nothing_from_under_them() {
    const CALLS: usize = 30;
    let ends = processes(
        2,
        |_| settings("peer"),
        |process| {
            let rank = process.rank;
            use_device(rank);
            let mut random = Random(rank as u64);
            let stream = Stream::new();
            let memory = Memory::of(&whole_numbers(30_000, 1, rank), &stream);
            stream.wait();
            for round in 0..40 {
                let comm = init(2, process.unique_id(round), rank);
                let after = Duration::from_micros(random.below(1000) as u64);
                // In a group, so that no call begins when the communicator is gone.
                ok!(ncclGroupStart());
                for _ in 0..CALLS {
                    ok!(ncclAllReduce(memory.at, memory.at, 30_000, dtype::FP16, SUM, comm, stream.0));
                }
                std::thread::scope(|scope| {
                    scope.spawn(|| {
                        use_device(rank);
                        std::thread::sleep(after);
                        ok!(ncclCommAbort(comm));
                    });
                    call!(ncclGroupEnd()); // whose kernels may have given up already
                });
                assert!(
                    stream.becomes_idle(Duration::from_secs(10)),
                    "round {round}: the context is lost, or it hangs"
                );
            }
        },
    );
    all_succeed(ends);
}

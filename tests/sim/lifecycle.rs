//! Communicators from their first use to their end, and what may go wrong in between.

use std::collections::HashSet;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use flashcomm_test_support::*;
use half::f16;

const BITS: Settings<'static> = &[("FLASHCOMM_BITS", "4")];

/// One all-reduce of a case, checked.
fn reduce(comm: usize, stream: &Stream, rank: usize, case: &Case<f16>, about: &str) {
    let memory = Memory::of(&case.inputs[rank], stream);
    ok!(ncclAllReduce(memory.at, memory.at, case.count, dtype::FP16, SUM, comm, stream.0));
    same_bits(&memory.read(case.count, stream), &case.expected, about);
}

#[test]
fn settings_that_differ_leave_all_ranks_with_plain_nccl_and_are_named() {
    for (name, first, second) in [
        ("FLASHCOMM_BITS", "4", "8"),
        ("FLASHCOMM_GROUP", "128", "32"),
        ("FLASHCOMM_BATCH_INVARIANT", "0", "1"),
        ("FLASHCOMM_MIN_BYTES", "0", "1K"),
        ("FLASHCOMM_DTYPES", "fp16", "fp16,bf16"),
        ("FLASHCOMM_EXCHANGE", "auto", "nccl"),
        ("FLASHCOMM_BUFFER_MIB", "1", "2"),
    ] {
        let world = 3;
        let settings = |rank: usize| vec![(name, String::from(if rank == 2 { second } else { first }))];
        let ends = processes(world, settings, |process| {
            let (rank, count) = (process.rank, 5000);
            use_device(rank);
            let numbers: Vec<_> = (0..world).map(|rank| whole_numbers(count, 1, rank)).collect();
            let (comm, stream) = (init(world, process.unique_id(0), rank), Stream::new());
            let memory = Memory::of(&numbers[rank], &stream);
            ok!(ncclAllReduce(memory.at, memory.at, count, dtype::FP16, SUM, comm, stream.0));
            same_bits(&memory.read(count, &stream), &exact_sum(&numbers), "exact");
            assert_eq!(n_compressed(), 0);
            ok!(ncclCommDestroy(comm));
        });
        let Some(ends) = ends else { return };
        assert!(ends[0].1.contains("rank 2") && ends[0].1.contains(name), "{}", ends[0].1);
        all_succeed(Some(ends));
    }
}

#[test]
fn a_rank_without_the_shim_is_told_within_the_attach_timeout() {
    let world = 3;
    let settings = |rank: usize| match rank {
        1 => vec![("WORLD_WITHOUT_SHIM", "1".into())],
        _ => vec![("FLASHCOMM_ATTACH_TIMEOUT_S", "2".into())],
    };
    let ends = processes(world, settings, |process| {
        let rank = process.rank;
        use_device(rank);
        let start = Instant::now();
        let ((comm, result), stream, memory) =
            (try_init(world, process.unique_id(0), rank), Stream::new(), Memory::new(2000));
        if rank == 1 {
            assert_eq!(result, 0);
            std::thread::sleep(Duration::from_secs(5));
        } else {
            assert_eq!(result, 6, "ncclRemoteError");
            // And not after the default, 300 s. On a busy machine processes take their time, too.
            assert!((2..20).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
            // Other ranks may be in something else on it: every call is refused, and the state says so, until the abort.
            let mut state = 0;
            ok!(ncclCommGetAsyncError(comm, &mut state));
            let at = memory.at;
            let calls = [
                state,
                call!(ncclAllReduce(at, at, 1000, dtype::FP16, SUM, comm, stream.0)),
                call!(ncclAllReduce(at, at, 500, dtype::FP32, SUM, comm, stream.0)),
                call!(ncclSend(at, 1000, dtype::UINT8, 0, comm, stream.0)),
            ];
            assert_eq!(calls, [6; 4]);
            assert!(last_error(comm).contains("could not meet"), "{}", last_error(comm));
        }
        ok!(ncclCommAbort(comm));
    });
    let Some(ends) = ends else { return };
    for rank in [0, 2] {
        assert!(ends[rank].1.contains("runs without the shim"), "{}", ends[rank].1);
    }
    all_succeed(Some(ends));
}

#[test]
fn an_address_used_again_has_no_stale_state() {
    in_process(BITS, || {
        let world = 2;
        let cases = [2, 3].map(|world| Case::<f16>::new(5000, 9, world, legs(4, 4)));
        let mut seen = [HashSet::new(), HashSet::new()];
        let mut n_repeated = 0;
        // How soon one comes again is the allocator's; that of ThreadSanitizer takes its time.
        for round in 0..400 {
            // Rank and world change, so what is known of the old one would be wrong.
            let case = &cases[round % 2];
            let (world, id) = (case.inputs.len().max(world), unique_id());
            let handles = threads(world, |thread| {
                let rank = (thread + round) % world;
                use_device(rank);
                let (comm, stream) = (init(world, id, rank), Stream::new());
                reduce(comm, &stream, rank, case, &format!("round {round}"));
                ok!(ncclCommDestroy(comm));
                comm
            });
            let others = &mut seen[(round + 1) % 2];
            n_repeated += handles.iter().filter(|handle| others.contains(*handle)).count();
            seen[round % 2].extend(handles);
            if round >= 39 && (is_real() || n_repeated > 0) {
                break;
            }
        }
        assert!(is_real() || n_repeated > 0, "no address came again");
    });
}

#[test]
fn children_of_an_attached_communicator_compress_by_themselves() {
    in_process(BITS, || {
        let (world, id) = (4, unique_id());
        let whole = Case::<f16>::new(20_000, 1, world, legs(4, 4));
        let pair = Case::<f16>::new(9000, 2, 2, legs(4, 4));
        let three = Case::<f16>::new(9000, 3, 3, legs(4, 4));
        let parts = Barrier::new(world);
        threads(world, |rank| {
            let (comm, stream) = (init(world, id, rank), Stream::new());
            reduce(comm, &stream, rank, &whole, "the parent");
            let (mut half, mut shrunk, mut rank_there) = (0, 0, 0);
            // The keys turn the order around.
            ok!(ncclCommSplit(comm, rank as i32 % 2, -(rank as i32), &mut half, std::ptr::null()));
            ok!(ncclCommUserRank(half, &mut rank_there));
            assert_eq!(rank_there as usize, 1 - rank / 2);
            reduce(half, &stream, rank_there as usize, &pair, "a half");
            if is_real() {
                parts.wait(); // on a device that ranks share, what the other half allocates may wait for this one's kernels
            }
            reduce(comm, &stream, rank, &whole, "the parent after the split");
            parts.wait();
            if rank != 1 {
                ok!(ncclCommShrink(comm, [1].as_ptr(), 1, &mut shrunk, std::ptr::null(), 0));
                reduce(shrunk, &stream, if rank == 0 { 0 } else { rank - 1 }, &three, "the shrunk one");
                ok!(ncclCommDestroy(shrunk));
            }
            parts.wait();
            ok!(ncclCommDestroy(half));
            if is_real() {
                parts.wait(); // as above, for what the other half frees
            }
            reduce(comm, &stream, rank, &whole, "the parent after its children");
            ok!(ncclCommDestroy(comm));
        });
        assert_eq!(n_compressed(), 3 * 4 + 4 + 3);
    });
}

#[test]
fn auto_takes_host_memory_only_where_gpus_do_not_reach_each_other() {
    let cases: [(&[(&'static str, &str)], &str, &str); 3] = [
        (&[], "exchange peer", ""),
        // Refused, as in some containers, where the real NCCL has other ways.
        (&[("FLASHCOMM_SIM_FAIL", "ipc:1")], "exchange nccl", "the GPUs reach each other's memory"),
        (&[("FLASHCOMM_SIM_PEER_ACCESS", "0")], "exchange host", "driver error 217"),
    ];
    for (more, expected, because) in cases {
        let settings = |_| {
            let log_all = [("FLASHCOMM_BITS", "4".to_string()), ("FLASHCOMM_LOG", "info".into())];
            log_all.into_iter().chain(more.iter().map(|(name, value)| (*name, value.to_string()))).collect()
        };
        let ends = processes(2, settings, |process| {
            use_device(process.rank);
            let case = Case::<f16>::new(5000, 1, 2, legs(4, 4));
            let comm = init(2, process.unique_id(0), process.rank);
            reduce(comm, &Stream::new(), process.rank, &case, "the sum");
            ok!(ncclCommDestroy(comm));
        });
        let Some(ends) = ends else { return };
        for (_, log) in &ends {
            assert!(log.contains(expected) && log.contains(because), "{expected}: {log}");
        }
        all_succeed(Some(ends));
    }
}

/// Two of three ranks call, the third does not; another thread aborts. `used`: whether there was a sum before.
fn an_abort_frees_the_peers(used: bool) {
    let (world, id, after) = (3, unique_id(), unique_id());
    let case = Case::<f16>::new(20_000, 1, world, legs(4, 4));
    let again = Case::<f16>::new(20_000, 2, world, legs(4, 4));
    threads(world, |rank| {
        let (comm, stream) = (init(world, id, rank), Stream::new());
        if used {
            reduce(comm, &stream, rank, &case, "before");
        }
        if rank < 2 {
            let memory = Memory::of(&case.inputs[rank], &stream);
            stream.wait();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(300));
                    use_device(rank);
                    ok!(ncclCommAbort(comm));
                });
                ok!(ncclAllReduce(memory.at, memory.at, case.count, dtype::FP16, SUM, comm, stream.0));
            });
            assert!(stream.becomes_idle(Duration::from_secs(5)), "the stream hangs after the abort");
        } else {
            std::thread::sleep(Duration::from_millis(300));
            ok!(ncclCommAbort(comm));
        }
        let comm = init(world, after, rank);
        reduce(comm, &stream, rank, &again, "a new communicator");
        ok!(ncclCommDestroy(comm));
    });
}

#[test]
fn an_abort_by_another_thread_frees_peers_that_wait_in_their_first_all_reduce() {
    in_process(BITS, || an_abort_frees_the_peers(false));
}

#[test]
fn an_abort_by_another_thread_frees_peers_that_wait_in_a_later_all_reduce() {
    in_process(BITS, || an_abort_frees_the_peers(true));
}

#[test]
fn a_deadline_ends_a_wait_and_says_for_whom() {
    in_process(&[("FLASHCOMM_BITS", "4"), ("FLASHCOMM_EXCHANGE", "peer"), ("FLASHCOMM_TIMEOUT_S", "1")], || {
        let (world, ids) = (3, [unique_id(), unique_id()]);
        let case = Case::<f16>::new(5000, 1, world, legs(4, 4));
        threads(world, |rank| {
            let (comm, stream) = (init(world, ids[0], rank), Stream::new());
            reduce(comm, &stream, rank, &case, "before");
            assert_eq!(last_error(comm), "");
            if rank != 2 {
                let memory = Memory::new(10_000);
                let start = Instant::now();
                ok!(ncclAllReduce(memory.at, memory.at, 5000, dtype::FP16, SUM, comm, stream.0));
                stream.wait();
                assert!((1..10).contains(&start.elapsed().as_secs()));
                let mut state = 0;
                ok!(ncclCommGetAsyncError(comm, &mut state));
                assert_eq!(state, 6, "ncclRemoteError");
                for text in [last_error(comm), last_error(0), nccl_last_error(comm)] {
                    assert!(text.contains("waiting for rank 2") && text.contains("FLASHCOMM_TIMEOUT_S"), "{text}");
                }
                let again = call!(ncclAllReduce(memory.at, memory.at, 5000, dtype::FP16, SUM, comm, stream.0));
                assert_eq!(again, 6, "nothing more is issued");
            }
            ok!(ncclCommAbort(comm));
            let comm = init(world, ids[1], rank);
            reduce(comm, &stream, rank, &case, "a new communicator");
            ok!(ncclCommDestroy(comm));
        });
    });
}

#[test]
fn the_last_error_is_ours_or_the_real_nccls_whichever_came_last() {
    in_process(BITS, || {
        use_device(0);
        let comm = init(1, unique_id(), 0);
        assert_eq!(nccl_last_error(comm), "");
        let ours_fails = || assert_eq!(call!(flashcommSetCommBits(comm, 4, 4)), 5);
        // A bare jump, of which the shim hears nothing, and a call that it counts and forwards.
        let mut other = 0;
        let theirs_fails: [(&str, &dyn Fn(&mut usize) -> i32); 2] = [
            ("ncclCommInitRank", &|other| call!(ncclCommInitRank(other, 0, unique_id(), 0))),
            ("ncclBroadcast", &|_| call!(ncclBroadcast(0, 0, 10, dtype::UINT8, 9, comm, 0))),
        ];
        for (function, theirs) in theirs_fails {
            ours_fails();
            assert_eq!([nccl_last_error(comm), pnccl_last_error(comm)], [last_error(0), last_error(0)]);
            assert_ne!(theirs(&mut other), 0);
            let text = nccl_last_error(comm);
            assert!(text.starts_with(function), "{text}");
            assert!(!last_error(0).contains(function), "flashcomm's own call tells of its own");
        }
        ours_fails();
        assert_eq!(nccl_last_error(comm), last_error(0), "and again");
        ok!(ncclCommDestroy(comm));
    });
}

#[test]
fn a_revoked_communicator_is_plain_nccls_to_answer_for() {
    in_process(BITS, || {
        let (world, id) = (2, unique_id());
        let case = Case::<f16>::new(5000, 1, world, legs(4, 4));
        threads(world, |rank| {
            let (comm, stream) = (init(world, id, rank), Stream::new());
            reduce(comm, &stream, rank, &case, "before");
            ok!(ncclCommRevoke(comm, 0));
            let memory = Memory::new(10_000);
            assert_ne!(call!(ncclAllReduce(memory.at, memory.at, 5000, dtype::FP16, SUM, comm, stream.0)), 0);
            ok!(ncclCommDestroy(comm));
        });
    });
}

#[test]
fn a_communicator_ends_while_another_thread_captures() {
    in_process(BITS, || {
        let (world, count, gate) = (2, 5000, Barrier::new(2));
        let ids = [unique_id(), unique_id()];
        let case = Case::<f16>::new(count, 1, world, legs(4, 4));
        threads(world, |rank| {
            let (stream, other) = (Stream::new(), Stream::new());
            let comms = ids.map(|id| init(world, id, rank));
            comms.iter().for_each(|comm| reduce(*comm, &stream, rank, &case, "before"));
            let memory = Memory::of(&case.inputs[rank], &stream);
            stream.wait();
            gate.wait();
            // In the global mode, which forbids other threads to free memory or to ask an event. The real NCCL does such
            // things itself when it destroys a communicator (seen with 2.32.3, without the shim).
            let mode = if is_real() { 1 } else { 0 };
            ok!(cuStreamBeginCapture_v2(other.0, mode));
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    use_device(rank);
                    ok!(ncclCommDestroy(comms[1]));
                });
            });
            ok!(ncclAllReduce(memory.at, memory.at, count, dtype::FP16, SUM, comms[0], other.0));
            let mut graph = 0;
            ok!(cuStreamEndCapture(other.0, &mut graph));
            gate.wait();
            ok!(cuGraphDestroy(graph));
            ok!(ncclCommDestroy(comms[0]));
        });
    });
}

/// `FLASHCOMM_TEST_COMMUNICATORS` (10000): how many.
#[test]
fn thousands_of_communicators_leave_nothing_behind() {
    in_process(BITS, || {
        let asked = std::env::var("FLASHCOMM_TEST_COMMUNICATORS").ok();
        let asked = asked.map_or(10_000, |text| text.parse().expect("FLASHCOMM_TEST_COMMUNICATORS is a number"));
        let (world, n_rounds) = (2, if is_real() { 200 } else { asked });
        let case = Case::<f16>::new(500, 1, world, legs(4, 4));
        let gate = Barrier::new(world);
        let ids: Vec<_> = (0..n_rounds).map(|_| once_cell::sync::OnceCell::new()).collect();
        let measured = threads(world, |rank| {
            let stream = Stream::new();
            let mut measured = Vec::new();
            for (i, id) in ids.iter().enumerate() {
                let comm = init(world, *id.get_or_init(unique_id), rank);
                reduce(comm, &stream, rank, &case, "every round");
                gate.wait();
                ok!(ncclCommDestroy(comm));
                gate.wait();
                if rank == 0 && (i == n_rounds / 10 || i == n_rounds - 1) {
                    std::thread::sleep(Duration::from_millis(100)); // threads of the last round end
                    measured.push(Held::now());
                }
            }
            measured
        });
        assert_eq!(n_compressed() as usize, world * n_rounds);
        let [first, last] = measured[0][..] else { panic!("measured twice") };
        // The longer part of the rounds may not cost as much as 200 bytes each.
        assert!(last.memory_kib <= first.memory_kib + n_rounds * 200 / 1024 + 1024, "{first:?} {last:?}");
        assert!(last.files <= first.files + 2 && last.threads <= first.threads + 2, "{first:?} {last:?}");
        assert!(last.device_bytes <= first.device_bytes || is_real(), "{first:?} {last:?}");
    });
}

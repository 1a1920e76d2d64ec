//! Groups, captures, streams: whatever way all-reduces are issued, they come out as the reference has them.

use std::time::Duration;

use flashcomm_test_support::*;
use half::f16;

const BITS: Settings<'static> = &[("FLASHCOMM_BITS", "4")];

/// Communicators of all ranks on this one thread, each with its stream.
fn init_all(world: usize) -> (Vec<usize>, Vec<Stream>) {
    let mut n_devices = 0;
    ok!(cuDeviceGetCount(&mut n_devices));
    let devices: Vec<i32> = (0..world as i32).map(|rank| rank % n_devices).collect();
    let mut comms = vec![0; world];
    ok!(ncclCommInitAll(comms.as_mut_ptr(), world as i32, devices.as_ptr()));
    let stream = |rank| {
        use_device(rank);
        Stream::new()
    };
    (comms, (0..world).map(stream).collect())
}

#[test]
fn init_all_and_a_group_of_all_reduces_from_one_thread() {
    in_process(BITS, || {
        let world = 4;
        let (comms, streams) = init_all(world);
        // The larger one has several slices.
        for (round, count) in [3000, 1_500_000, 40_000].into_iter().enumerate() {
            let case = Case::<f16>::new(count, round as u64, world, legs(4, 4));
            let memory: Vec<_> = (0..world)
                .map(|rank| {
                    use_device(rank);
                    Memory::of(&case.inputs[rank], &streams[rank])
                })
                .collect();
            ok!(ncclGroupStart());
            for rank in 0..world {
                let at = memory[rank].at;
                ok!(ncclAllReduce(at, at, count, dtype::FP16, SUM, comms[rank], streams[rank].0));
            }
            ok!(ncclGroupEnd());
            for rank in 0..world {
                use_device(rank);
                same_bits(&memory[rank].read(count, &streams[rank]), &case.expected, &format!("rank {rank}"));
            }
        }
        assert_eq!(n_compressed(), 12);
        comms.iter().for_each(|comm| ok!(ncclCommDestroy(*comm)));
    });
}

#[test]
fn a_first_use_may_be_several_in_one_group() {
    for exchange in ["peer", "nccl"] {
        in_process(&[("FLASHCOMM_BITS", "4"), ("FLASHCOMM_EXCHANGE", exchange)], || {
            let (world, count) = (3, 5000);
            let cases: Vec<_> = (0..4).map(|seed| Case::<f16>::new(count, seed, world, legs(4, 4))).collect();
            for _ in 0..10 {
                let id = unique_id();
                threads(world, |rank| {
                    let (comm, stream) = (init(world, id, rank), Stream::new());
                    let memory: Vec<_> = cases.iter().map(|case| Memory::of(&case.inputs[rank], &stream)).collect();
                    ok!(ncclGroupStart());
                    for Memory { at, .. } in &memory {
                        ok!(ncclAllReduce(*at, *at, count, dtype::FP16, SUM, comm, stream.0));
                    }
                    ok!(ncclGroupEnd());
                    for (memory, case) in memory.iter().zip(&cases) {
                        same_bits(&memory.read(count, &stream), &case.expected, exchange);
                    }
                    ok!(ncclCommDestroy(comm));
                });
            }
            assert_eq!(n_compressed(), 10 * 3 * 4);
        });
        if std::env::var_os("WORLD_INNER").is_some() {
            return;
        }
    }
}

#[test]
fn nested_groups_mix_communicators_forwarded_calls_and_send_receive() {
    in_process(BITS, || {
        let (world, count) = (3, 9000);
        let legs = legs(4, 4);
        let first = Case::<f16>::new(count, 1, world, legs);
        let second = Case::<f16>::new(count / 2, 2, world, legs);
        let ids = [unique_id(), unique_id()];
        threads(world, |rank| {
            let comms = ids.map(|id| init(world, id, rank));
            let (stream, other) = (Stream::new(), Stream::new());
            let numbers: Vec<u8> = (0..4 * count).map(|i| (i * (rank + 1)) as u8 & 1).collect();
            for _ in 0..3 {
                let (a, b) = (Memory::of(&first.inputs[rank], &stream), Memory::of(&second.inputs[rank], &stream));
                let (from, to) = (Memory::new(count), Memory::new(count));
                let exact = Memory::new(4 * count);
                exact.write_bytes(&numbers, &stream);
                from.write_bytes(&vec![rank as u8 + 1; count], &stream);
                to.write_bytes(&vec![0; count], &stream);
                stream.wait();
                ok!(ncclGroupStart());
                ok!(ncclAllReduce(a.at, a.at, count, dtype::FP16, SUM, comms[0], stream.0));
                ok!(ncclGroupStart());
                ok!(ncclSend(from.at, count, dtype::UINT8, (rank as i32 + 1) % 3, comms[0], stream.0));
                ok!(ncclRecv(to.at, count, dtype::UINT8, (rank as i32 + 2) % 3, comms[0], stream.0));
                ok!(ncclAllReduce(b.at, b.at, count / 2, dtype::FP16, SUM, comms[1], other.0));
                ok!(ncclGroupEnd());
                ok!(ncclAllReduce(exact.at, exact.at, count, dtype::INT32, SUM, comms[0], stream.0));
                ok!(ncclGroupEnd());
                same_bits(&a.read(count, &stream), &first.expected, "the first");
                same_bits(&b.read(count / 2, &other), &second.expected, "of the other communicator");
                assert_eq!(to.read_bytes(count, &stream), vec![(rank as u8 + 2) % 3 + 1; count]);
                let sum = exact.read_bytes(4 * count, &stream);
                let expected = |i: usize| (1..=3).map(|factor| ((i * factor) as u8) & 1).sum::<u8>();
                assert!(sum.iter().enumerate().all(|(i, byte)| *byte == expected(i)), "the forwarded one is exact");
            }
            comms.iter().for_each(|comm| ok!(ncclCommDestroy(*comm)));
        });
        assert_eq!(n_compressed(), 18);
    });
}

/// Runs `spoil` between two good all-reduces of every rank; what it issues on the marked memory must not happen.
fn nothing_happens(spoil: impl Fn(usize, usize, &Memory, &Stream) + Sync) {
    let (world, count) = (2, 5000);
    let case = Case::<f16>::new(count, 3, world, legs(4, 4));
    let id = unique_id();
    threads(world, |rank| {
        let (comm, stream) = (init(world, id, rank), Stream::new());
        for _ in 0..3 {
            let memory = Memory::of(&case.inputs[rank], &stream);
            ok!(ncclAllReduce(memory.at, memory.at, count, dtype::FP16, SUM, comm, stream.0));
            same_bits(&memory.read(count, &stream), &case.expected, "before and after");
            spoil(comm, rank, &memory, &stream);
            same_bits(&memory.read(count, &stream), &case.expected, "nothing happened");
        }
        ok!(ncclCommDestroy(comm));
    });
    assert_eq!(n_compressed(), 6);
}

#[test]
fn a_simulated_end_discards_the_group() {
    in_process(BITS, || {
        nothing_happens(|comm, _, memory, stream| {
            let mut info = [24, 0, 0x7468_5283, 22807, 0xbf80_0000, 0];
            ok!(ncclGroupStart());
            ok!(ncclAllReduce(memory.at, memory.at, 5000, dtype::FP16, SUM, comm, stream.0));
            ok!(ncclGroupSimulateEnd(&mut info));
        });
    });
}

#[test]
fn an_error_inside_discards_the_group() {
    in_process(BITS, || {
        nothing_happens(|comm, _, memory, stream| {
            ok!(ncclGroupStart());
            ok!(ncclAllReduce(memory.at, memory.at, 5000, dtype::FP16, SUM, comm, stream.0));
            let bad_root = 7;
            assert_eq!(call!(ncclBroadcast(memory.at, memory.at, 1, dtype::UINT8, bad_root, comm, stream.0)), 4);
            assert_eq!(call!(ncclGroupEnd()), 4);
        });
    });
}

#[test]
fn a_first_use_inside_a_capture_compresses() {
    in_process(BITS, || {
        let (world, count, id) = (3, 6000, unique_id());
        let case = Case::<f16>::new(count, 4, world, legs(4, 4));
        threads(world, |rank| {
            let (comm, stream) = (init(world, id, rank), Stream::new());
            let (input, output) = (Memory::of(&case.inputs[rank], &stream), Memory::new(count * 2));
            let reduce = || ok!(ncclAllReduce(input.at, output.at, count, dtype::FP16, SUM, comm, stream.0));
            let graph = stream.capture(reduce);
            for _ in 0..3 {
                graph.launch(&stream);
                same_bits(&output.read(count, &stream), &case.expected, "the graph");
            }
            reduce();
            same_bits(&output.read(count, &stream), &case.expected, "an eager call");
            drop(graph);
            ok!(ncclCommDestroy(comm));
        });
        assert_eq!(n_compressed(), 6);
    });
}

#[test]
fn a_capture_that_forks_to_another_stream_is_replayed_right() {
    in_process(BITS, || {
        let (world, count) = (2, 5000);
        let cases: Vec<_> = (0..2).map(|seed| Case::<f16>::new(count, seed, world, legs(4, 4))).collect();
        let id = unique_id();
        threads(world, |rank| {
            let (comm, stream, fork) = (init(world, id, rank), Stream::new(), Stream::new());
            let input: Vec<_> = cases.iter().map(|case| Memory::of(&case.inputs[rank], &stream)).collect();
            let output: Vec<_> = cases.iter().map(|_| Memory::new(count * 2)).collect();
            let reduce = |i: usize, on: &Stream| {
                ok!(ncclAllReduce(input[i].at, output[i].at, count, dtype::FP16, SUM, comm, on.0));
            };
            reduce(0, &stream);
            stream.wait();
            let graph = stream.capture(|| {
                order(&stream, &fork);
                reduce(0, &stream);
                reduce(1, &fork);
                order(&fork, &stream);
            });
            for round in 0..20 {
                output.iter().for_each(|output| ok!(cuMemsetD8Async(output.at, 7, count * 2, stream.0)));
                graph.launch(&stream);
                for i in 0..2 {
                    same_bits(&output[i].read(count, &stream), &cases[i].expected, &format!("round {round} of {i}"));
                }
            }
            drop(graph);
            ok!(ncclCommDestroy(comm));
        });
    });
}

#[test]
fn operations_of_a_communicator_are_ordered_across_streams() {
    in_process(&[("FLASHCOMM_BITS", "4"), ("FLASHCOMM_SIM_SEED", "1")], || {
        let (world, count) = (3, 30_000);
        let cases: Vec<_> = (0..3).map(|seed| Case::<f16>::new(count, seed, world, legs(4, 4))).collect();
        let id = unique_id();
        threads(world, |rank| {
            let comm = init(world, id, rank);
            let streams: Vec<_> = cases.iter().map(|_| Stream::new()).collect();
            let at = |i: usize| Memory::of(&cases[i].inputs[rank], &streams[i]);
            let (input, output): (Vec<_>, Vec<_>) = (0..3).map(|i| (at(i), Memory::new(count * 2))).unzip();
            streams.iter().for_each(Stream::wait);
            for round in 0..30 {
                // No word about order between the streams.
                for (i, stream) in streams.iter().enumerate() {
                    ok!(ncclAllReduce(input[i].at, output[i].at, count, dtype::FP16, SUM, comm, stream.0));
                }
                for (i, stream) in streams.iter().enumerate() {
                    same_bits(&output[i].read(count, stream), &cases[i].expected, &format!("round {round} stream {i}"));
                }
            }
            ok!(ncclCommDestroy(comm));
        });
    });
}

/// Where ranks share a device, to free memory waits for what other ranks have begun: when a refusal ends an attach, all must
/// have freed what it needed before one goes on.
#[test]
fn a_refused_attach_frees_nothing_while_others_go_on() {
    for seed in 1..=20 {
        let (seed, part) = (seed.to_string(), format!("seed {seed}"));
        if std::env::var("WORLD_PART").is_ok_and(|mine| mine != part) {
            continue;
        }
        let settings = [
            ("FLASHCOMM_BITS", "4"),
            ("FLASHCOMM_EXCHANGE", "nccl"),
            ("FLASHCOMM_SIM_DEVICES", "1"),
            ("FLASHCOMM_SIM_SEED", &seed),
            ("WORLD_PART", &part),
        ];
        do_not_block_with(&settings, 0, exact_sum);
    }
}

/// A job of communicators that do not block; `expected` of the inputs by rank.
fn do_not_block(exchange: &str, n_expected: u64, expected: fn(&[Vec<f16>]) -> Vec<f16>) {
    do_not_block_with(&[("FLASHCOMM_BITS", "4"), ("FLASHCOMM_EXCHANGE", exchange)], n_expected, expected);
}

fn do_not_block_with(settings: &[(&str, &str)], n_expected: u64, expected: fn(&[Vec<f16>]) -> Vec<f16>) {
    in_process(settings, || {
        let (world, count) = (3, 4000);
        let numbers: Vec<_> = (0..world).map(|rank| whole_numbers(count, 6, rank)).collect();
        let (expected, id) = (expected(&numbers), unique_id());
        threads(world, |rank| {
            let (mut comm, stream, config) = (0, Stream::new(), Config::non_blocking());
            let settled = |comm: usize, first: i32| {
                let mut state = first;
                while state == 7 {
                    ok!(ncclCommGetAsyncError(comm, &mut state));
                    std::thread::sleep(Duration::from_micros(50));
                }
                assert_eq!(state, 0);
            };
            let first = call!(ncclCommInitRankConfig(&mut comm, world as i32, id, rank as i32, &config));
            settled(comm, first);
            // Kept: to free it may wait for what another rank has begun already.
            let memory = Memory::new(count * 2);
            for _ in 0..5 {
                memory.write(&numbers[rank], &stream);
                let first = call!(ncclAllReduce(memory.at, memory.at, count, dtype::FP16, SUM, comm, stream.0));
                settled(comm, first);
                same_bits(&memory.read(count, &stream), &expected, "the sum");
            }
            let first = call!(ncclCommFinalize(comm));
            settled(comm, first);
            ok!(ncclCommDestroy(comm));
        });
        assert_eq!(n_compressed(), n_expected);
    });
}

#[test]
fn non_blocking_communicators_are_plain_nccls_where_nccl_carries_the_payloads() {
    do_not_block("nccl", 0, exact_sum);
}

#[test]
fn non_blocking_communicators_compress_where_nccl_is_not_needed() {
    do_not_block("peer", 15, |inputs| reference(inputs, legs(4, 4)));
}

#[test]
fn what_nccl_calls_of_itself_is_not_taken_twice() {
    let preload = built("libflashcomm.so");
    in_process(&[("FLASHCOMM_BITS", "4"), ("LD_PRELOAD", preload.to_str().unwrap())], || {
        let (world, id) = (2, unique_id());
        threads(world, |rank| {
            let (comm, stream) = (init(world, id, rank), Stream::new());
            let memory = Memory::new(100);
            memory.write_bytes(&[rank as u8 + 1; 100], &stream);
            ok!(ncclBcast(memory.at, 100, dtype::UINT8, 1, comm, stream.0));
            assert_eq!(memory.read_bytes(100, &stream), [2; 100]);
            ok!(ncclCommDestroy(comm));
        });
        let mut stats = [48, 0, 0, 0, 0, 0];
        ok!(flashcommGetStats(&mut stats));
        assert_eq!(stats[3], 2, "two calls of the application's, whatever NCCL made of them");
    });
}

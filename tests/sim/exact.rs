//! Exact sums in one hop or two: rounded once and the same on all ranks, in every type, size and way of calling.

use std::ffi::c_int;
use std::time::Duration;

use flashcomm_test_support::*;
use flashcomm_wire::{Element, Op, Summand, reference};
use half::{bf16, f16};

/// A type that is summed exactly, as bytes.
trait Summed: Summand {
    const NUMBER: c_int;
    fn of(x: f32) -> Self;
    fn bytes(self) -> Vec<u8>;
}

macro_rules! summed {
    ($($type:ty, $number:expr, $of:expr;)*) => { $(impl Summed for $type {
        const NUMBER: c_int = $number;
        fn of(x: f32) -> Self {
            $of(x)
        }
        fn bytes(self) -> Vec<u8> {
            self.to_le_bytes().into()
        }
    })* };
}
summed! {
    f16, dtype::FP16, f16::from_f32;
    bf16, dtype::BF16, bf16::from_f32;
    f32, dtype::FP32, std::convert::identity;
}

fn bytes<S: Summed>(elements: &[S]) -> Vec<u8> {
    elements.iter().flat_map(|x| x.bytes()).collect()
}

/// Everyone's input: values of all sizes, so that the order of a sum shows, and what is special.
fn inputs_of<S: Summed>(count: usize, world: usize) -> Vec<Vec<S>> {
    let element = |rank: usize, i: usize, x: f16| match i % 61 {
        7 => S::of(-0.0),
        11 if rank == 1 => S::of(f32::NAN),
        13 if rank == 0 => S::of(f32::INFINITY),
        17 => S::of(60000.0),
        _ => S::of(x.to_f32() * 1.1f32.powi((i % 50) as i32 - 25)),
    };
    let row = |rank: usize| {
        input::<f16>(count, count as u64, rank).into_iter().enumerate().map(|(i, x)| element(rank, i, x)).collect()
    };
    (0..world).map(row).collect()
}

/// Settings of jobs in which everything that fits is exact.
fn settings<'a>(exchange: &'a str, exact_max: &'a str) -> Vec<(&'a str, &'a str)> {
    vec![
        ("FLASHCOMM_EXCHANGE", exchange),
        ("FLASHCOMM_MIN_BYTES", "1G"),
        ("FLASHCOMM_EXACT_MAX_BYTES", exact_max),
        ("FLASHCOMM_BUFFER_MIB", "16"),
    ]
}

/// Out of place, in place, and from and to addresses that are aligned as an element is.
fn equals_the_reference<S: Summed>(comm: usize, stream: &Stream, rank: usize, inputs: &[Vec<S>], op: Op) {
    let (count, width) = (inputs[0].len(), size_of::<S>());
    let number = if op == Op::Sum { SUM } else { AVG };
    let ranks: Vec<&[S]> = inputs.iter().map(Vec::as_slice).collect();
    let expected = bytes(&reference::exact(&ranks, op));
    for (from, to, is_in_place) in [(0, 0, false), (0, 0, true), (width, 3 * width, false), (width, width, true)] {
        let (input, output) = (Memory::new((count + 3) * width), Memory::new((count + 4) * width));
        input.write_bytes(&[vec![0xaa; from], bytes(&inputs[rank])].concat(), stream);
        output.write_bytes(&vec![0x55; (count + 4) * width], stream);
        let target = if is_in_place { &input } else { &output };
        ok!(ncclAllReduce(input.at + from, target.at + to, count, S::NUMBER, number, comm, stream.0));
        let got = target.read_bytes(to + count * width, stream);
        let about = format!("{} x {count}, {op:?}, rank {rank}, at {from} and {to}", std::any::type_name::<S>());
        assert!(got[to..] == expected, "{about}: not the reference's bits");
        if !is_in_place {
            let all = output.read_bytes((count + 4) * width, stream);
            assert!(all[..to].iter().chain(&all[to + count * width..]).all(|byte| *byte == 0x55), "{about}: too much");
            assert_eq!(
                input.read_bytes(from + count * width, stream)[from..],
                bytes(&inputs[rank]),
                "{about}: the input"
            );
        }
    }
}

/// One vector, and what is before and behind it; a stripe; a block, and more than one; what more than two ranks take two hops
/// for.
const COUNTS: [usize; 11] = [1, 4, 7, 8, 9, 255, 256, 769, 4099, 8192, 32_749];

/// Of 16 ranks, which have room for less.
const FEW_COUNTS: [usize; 3] = [7, 256, 1025];

fn all_types_equal_the_reference(exchange: &str, worlds: &[usize], counts: &[usize]) {
    in_process(&settings(exchange, "128K"), || {
        for &world in worlds {
            let id = unique_id();
            threads(world, |rank| {
                let (comm, stream) = (init(world, id, rank), Stream::new());
                for &count in counts {
                    for op in [Op::Sum, Op::Average] {
                        equals_the_reference(comm, &stream, rank, &inputs_of::<f16>(count, world), op);
                        equals_the_reference(comm, &stream, rank, &inputs_of::<bf16>(count, world), op);
                        equals_the_reference(comm, &stream, rank, &inputs_of::<f32>(count, world), op);
                    }
                }
                let stats = Stats::of(comm);
                assert_eq!((stats.exact, stats.compressed, stats.forwarded), (counts.len() as u64 * 2 * 3 * 4, 0, 0));
                ok!(ncclCommDestroy(comm));
            });
        }
    });
}

#[test]
fn two_and_five_ranks_equal_the_reference_over_peer_memory() {
    all_types_equal_the_reference("peer", &[2, 5], &COUNTS);
}

#[test]
fn two_and_three_ranks_equal_the_reference_over_host_memory() {
    all_types_equal_the_reference("host", &[2, 3], &COUNTS);
}

#[test]
fn sixteen_ranks_equal_the_reference_over_peer_memory() {
    all_types_equal_the_reference("peer", &[16], &FEW_COUNTS);
}

#[test]
fn the_ranges_are_what_is_set_and_told() {
    let ranges =
        [("FLASHCOMM_MIN_BYTES", "100000"), ("FLASHCOMM_EXACT_MAX_BYTES", "20000"), ("FLASHCOMM_EXCHANGE", "peer")];
    in_process(&ranges, || {
        let id = unique_id();
        threads(2, |rank| {
            let (comm, stream) = (init(2, id, rank), Stream::new());
            let memory = Memory::new(120_000);
            let call = |count: usize, number: c_int, op| {
                memory.write_bytes(&[0; 120_000], &stream);
                ok!(ncclAllReduce(memory.at, memory.at, count, number, op, comm, stream.0));
                stream.wait();
            };
            call(10_000, dtype::FP16, SUM); // exact
            call(5_000, dtype::FP32, SUM); // exact
            call(10_001, dtype::FP16, SUM); // small
            call(5_001, dtype::FP32, SUM); // its type
            call(50_000, dtype::BF16, AVG); // compressed
            call(100, dtype::FP16, SUM + 1); // its operation
            call(100, dtype::INT32, SUM); // its type
            let (stats, info) = (Stats::of(comm), Info::of(comm));
            assert_eq!((stats.exact, stats.bytes_exact), (2, 40_000));
            assert_eq!((stats.compressed, stats.because("small"), stats.because("datatype")), (1, 1, 2));
            assert_eq!((stats.because("operation"), stats.exact_by_size[5]), (1, 2));
            assert_eq!((info.min_bytes, info.exact_max_bytes), (100_000, 20_000));
            ok!(ncclCommDestroy(comm));
        });
    });
}

#[test]
fn over_the_real_nccl_and_where_it_is_turned_off_none_is() {
    for (exchange, exact_max) in [("nccl", "64K"), ("peer", "0")] {
        let part = exchange;
        if std::env::var("WORLD_PART").is_ok_and(|mine| mine != part) {
            continue;
        }
        in_process(&[settings(exchange, exact_max), vec![("WORLD_PART", part)]].concat(), || {
            let id = unique_id();
            threads(2, |rank| {
                let (comm, stream) = (init(2, id, rank), Stream::new());
                let memory = Memory::of(&whole_numbers(100, 1, rank), &stream);
                ok!(ncclAllReduce(memory.at, memory.at, 100, dtype::FP16, SUM, comm, stream.0));
                let expected = exact_sum(&[whole_numbers(100, 1, 0), whole_numbers(100, 1, 1)]);
                same_bits(&memory.read::<f16>(100, &stream), &expected, exchange);
                let stats = Stats::of(comm);
                assert_eq!((stats.exact, stats.forwarded, stats.because("small")), (0, 1, 1));
                ok!(ncclCommDestroy(comm));
            });
        });
    }
}

/// Small, large and exact ones of all sizes in turns, eager and replayed, in two streams: what one leaves in the mailboxes the
/// next does not take for its own.
#[test]
fn sums_of_all_sizes_in_turns() {
    for exchange in ["peer", "host"] {
        if std::env::var("WORLD_PART").is_ok_and(|mine| mine != exchange) {
            continue;
        }
        let mine = [("FLASHCOMM_MIN_BYTES", "16000"), ("FLASHCOMM_BITS", "4"), ("WORLD_PART", exchange)];
        in_process(&[settings(exchange, "16K"), mine.to_vec()].concat(), || {
            let (world, id) = (3, unique_id());
            threads(world, |rank| {
                let (comm, streams) = (init(world, id, rank), [Stream::new(), Stream::new()]);
                let mut random = Random(5); // the same on all ranks
                let sizes = [1, 100, 3000, 7999, 8000, 20_000];
                let memories = sizes.map(|count| Memory::new(count * 2));
                let reduce = |size: usize, stream: &Stream| {
                    let at = memories[size].at;
                    ok!(ncclAllReduce(at, at, sizes[size], dtype::FP16, SUM, comm, stream.0));
                };
                // Two of one graph, the second on the first's result.
                let graphs: Vec<Graph> = (0..sizes.len())
                    .map(|size| {
                        streams[0].capture(|| {
                            reduce(size, &streams[0]);
                            reduce(size, &streams[0]);
                        })
                    })
                    .collect();
                for round in 0..150 {
                    let (size, is_replay, stream) = (random.below(sizes.len()), random.below(3) == 0, random.below(2));
                    let inputs = inputs::<f16>(sizes[size], round, world);
                    let sum = |inputs: &[Vec<f16>]| match sizes[size] >= 8000 {
                        true => reference(inputs, legs(4, 4)),
                        false => reference::exact(&inputs.iter().map(Vec::as_slice).collect::<Vec<_>>(), Op::Sum),
                    };
                    let once = sum(&inputs);
                    memories[size].write(&inputs[rank], &streams[stream]);
                    if is_replay {
                        graphs[size].launch(&streams[stream]);
                    } else {
                        reduce(size, &streams[stream]);
                    }
                    let expected = if is_replay { sum(&vec![once; world]) } else { once };
                    let got = memories[size].read::<f16>(sizes[size], &streams[stream]);
                    same_bits(&got, &expected, &format!("round {round}, {} elements, rank {rank}", sizes[size]));
                }
                drop(graphs);
                ok!(ncclCommDestroy(comm));
            });
        });
    }
}

/// A rank that never comes: an abort, or the timeout, ends the wait, and the error names it.
#[test]
fn a_wait_ends_by_an_abort_and_by_the_timeout() {
    for (exchange, timeout_s) in [("peer", "0"), ("host", "1")] {
        if std::env::var("WORLD_PART").is_ok_and(|mine| mine != exchange) {
            continue;
        }
        let mine = [("FLASHCOMM_TIMEOUT_S", timeout_s), ("WORLD_PART", exchange)];
        in_process(&[settings(exchange, "64K"), mine.to_vec()].concat(), || {
            let id = unique_id();
            threads(2, |rank| {
                let (comm, stream) = (init(2, id, rank), Stream::new());
                let memory = Memory::of(&vec![f16::ONE; 1000], &stream);
                if rank == 1 {
                    std::thread::sleep(Duration::from_millis(2500));
                    ok!(ncclCommAbort(comm));
                    return;
                }
                ok!(ncclAllReduce(memory.at, memory.at, 1000, dtype::FP16, SUM, comm, stream.0));
                if timeout_s == "0" {
                    assert!(!stream.becomes_idle(Duration::from_millis(300)), "it waits");
                    ok!(ncclCommAbort(comm));
                    assert!(stream.becomes_idle(Duration::from_secs(5)), "the abort frees it");
                    return;
                }
                assert!(stream.becomes_idle(Duration::from_secs(10)), "it gives up");
                let mut told = 0;
                ok!(ncclCommGetAsyncError(comm, &mut told));
                assert!(told == 6 && last_error(comm).contains("rank 1"), "{told}: {}", last_error(comm));
                assert_ne!(call!(ncclAllReduce(memory.at, memory.at, 1000, dtype::FP16, SUM, comm, stream.0)), 0);
                ok!(ncclCommAbort(comm));
            });
        });
    }
}

#[test]
fn an_exact_sum_is_no_worse_than_one_rounded_at_each_step() {
    // Against the sum in fp64, over inputs as ranks have them: mean square, as the tables of the docs have it.
    for world in [2, 4, 8] {
        let inputs = inputs::<bf16>(20_000, 3, world);
        let ranks: Vec<&[bf16]> = inputs.iter().map(Vec::as_slice).collect();
        let exact = reference::exact(&ranks, Op::Sum);
        let error = |sum: &dyn Fn(usize) -> f64| -> f64 {
            let true_sum = |i: usize| inputs.iter().map(|input| f64::from(input[i].to_f32())).sum::<f64>();
            (0..20_000).map(|i| (sum(i) - true_sum(i)).powi(2)).sum()
        };
        let stepwise = |i: usize| {
            let add = |sum: bf16, input: &Vec<bf16>| Element::from_f32_nearest(sum.to_f32() + input[i].to_f32());
            f64::from(inputs[1..].iter().fold(inputs[0][i], add).to_f32())
        };
        let (ours, rings) = (error(&|i| f64::from(exact[i].to_f32())), error(&stepwise));
        assert!(ours <= rings && (world == 2 || ours < 0.8 * rings), "{world} ranks: {ours:e}, {rings:e}");
    }
}

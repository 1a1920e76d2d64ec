//! Invariant I1 over whole jobs: every rank holds the reference's bits, for every world, size and way of calling.

use flashcomm_test_support::*;
use flashcomm_wire::{Code, Element, Legs, Op, Plan, TILE_ELEMS};
use half::{bf16, f16};

/// `FLASHCOMM_WAY_COMPRESSED`, `FLASHCOMM_WAY_PULLED` and `FLASHCOMM_WAY_COPIED`.
const WAY_COMPRESSED: i32 = 3;
const WAY_PULLED: i32 = 4;
const WAY_COPIED: i32 = 5;

/// Sizes on both sides of every border: group, tile, chunk, slice.
fn sizes(world: usize, legs: Legs) -> Vec<usize> {
    let slice_tiles = (1 << 20) / Plan::staging_bytes_per_tile(world, legs);
    let borders = [1, 128, TILE_ELEMS, world * TILE_ELEMS, world * slice_tiles * TILE_ELEMS];
    let mut sizes: Vec<usize> = borders.iter().flat_map(|border| [border - 1, *border, border + 1]).collect();
    sizes.extend([3 * TILE_ELEMS * world / 2 + 77, 2 * world * slice_tiles * TILE_ELEMS + 5]);
    sizes.retain(|size| *size > 0);
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}

/// One rank's all-reduce of a case, out of place and in place.
fn reduce_both_ways<E: Element>(comm: usize, stream: &Stream, rank: usize, case: &Case<E>) {
    let about = |how: &str| format!("{how}, {} elements, rank {rank} of {}", case.count, case.inputs.len());
    let input = Memory::of(&case.inputs[rank], stream);
    let output = Memory::new(case.count * 2);
    ok!(ncclAllReduce(input.at, output.at, case.count, type_of::<E>(), SUM, comm, stream.0));
    same_bits(&output.read(case.count, stream), &case.expected, &about("out of place"));
    same_bits(&input.read(case.count, stream), &case.inputs[rank], &about("the input afterwards"));
    ok!(ncclAllReduce(input.at, input.at, case.count, type_of::<E>(), SUM, comm, stream.0));
    same_bits(&input.read(case.count, stream), &case.expected, &about("in place"));
}

fn equals_the_reference<E: Element>(exchange: &str, worlds: &[usize], reduce: u8, gather: u8) {
    let bits = format!("{reduce}:{gather}");
    in_process(&[("FLASHCOMM_BITS", &bits), ("FLASHCOMM_EXCHANGE", exchange)], || {
        for &world in worlds {
            let legs = legs(reduce, gather);
            let cases: Vec<_> =
                sizes(world, legs).into_iter().map(|count| Case::<E>::new(count, count as u64, world, legs)).collect();
            let id = unique_id();
            threads(world, |rank| {
                let (comm, stream) = (init(world, id, rank), Stream::new());
                cases.iter().for_each(|case| reduce_both_ways(comm, &stream, rank, case));
                ok!(ncclCommDestroy(comm));
            });
        }
        let expected: usize = worlds.iter().map(|world| 2 * world * sizes(*world, legs(reduce, gather)).len()).sum();
        assert_eq!(n_compressed() as usize, expected, "none was forwarded");
    });
}

#[test]
fn two_to_five_ranks_equal_the_reference_over_nccl_fp16_int4_int8() {
    equals_the_reference::<f16>("nccl", &[2, 3, 4, 5], 4, 8);
}

#[test]
fn two_to_five_ranks_equal_the_reference_over_peer_memory_bf16_int7() {
    equals_the_reference::<bf16>("peer", &[2, 3, 4, 5], 7, 7);
}

#[test]
fn two_to_five_ranks_equal_the_reference_over_host_memory_fp16_int4_int6() {
    equals_the_reference::<f16>("host", &[2, 3, 4, 5], 4, 6);
}

/// With one block a rank its channels go through their rings again and again, in either lag.
#[test]
fn rings_go_round_in_gpu_memory() {
    rings_go_round(&[2, 5], &[("FLASHCOMM_EXCHANGE", "peer")], WAY_COMPRESSED);
}

#[test]
fn rings_go_round_in_gpu_memory_where_payloads_are_read() {
    rings_go_round(&[2, 3, 5], &[("FLASHCOMM_EXCHANGE", "peer"), ("FLASHCOMM_P2P_READ", "1")], WAY_PULLED);
}

#[test]
fn rings_go_round_in_host_memory() {
    rings_go_round(&[2, 5], &[("FLASHCOMM_EXCHANGE", "host"), ("FLASHCOMM_P2P_READ", "1")], WAY_COMPRESSED);
}

#[test]
fn copy_engines_carry_slice_by_slice() {
    rings_go_round(&[2, 3, 5], &[("FLASHCOMM_EXCHANGE", "host"), ("FLASHCOMM_HOST_COPY", "1")], WAY_COPIED);
}

/// Among few ranks and among five: with and without a lag.
fn rings_go_round(worlds: &[usize], settings: &[(&str, &str)], way: i32) {
    in_process(&[&[("FLASHCOMM_BITS", "4"), ("FLASHCOMM_MAX_CTAS", "1")], settings].concat(), || {
        for &world in worlds {
            let case = Case::<f16>::new(world * 40 * TILE_ELEMS - 77, 3, world, legs(4, 4));
            let id = unique_id();
            threads(world, |rank| {
                let (comm, stream) = (init(world, id, rank), Stream::new());
                assert_eq!(Way::of(comm, dtype::FP16, 1 << 20).way, way);
                reduce_both_ways(comm, &stream, rank, &case);
                ok!(ncclCommDestroy(comm));
            });
        }
        assert_eq!(n_compressed(), 2 * worlds.iter().sum::<usize>() as u64);
    });
}

/// Runs a test in both codes, with groups of all sizes.
fn in_every_code(exchange: &str, test: impl Fn(Code, Legs)) {
    let plain = [(4, 4, 32), (3, 3, 64), (8, 8, 128)].map(|case| (Code::Plain, case));
    let blocks = [(4, 8, 128), (5, 5, 64)].map(|case| (Code::Blocks, case));
    for (code, (reduce, gather, group)) in plain.into_iter().chain(blocks) {
        let (bits, group_text) = (format!("{reduce}:{gather}"), group.to_string());
        let part = format!("{} {bits}", code.name());
        let settings = [
            ("FLASHCOMM_BITS", bits.as_str()),
            ("FLASHCOMM_CODE", code.name()),
            ("FLASHCOMM_GROUP", &group_text),
            ("FLASHCOMM_EXCHANGE", exchange),
            ("WORLD_PART", &part),
        ];
        if std::env::var("WORLD_PART").is_ok_and(|mine| mine != part) {
            continue;
        }
        in_process(&settings, || test(code, legs_of(Some(code), reduce, gather, group)));
    }
}

/// All-reduces of these inputs in place, sums and averages: what every rank must hold, and what `also` wants of it.
fn sums_and_averages<E: Element>(world: usize, legs: Legs, cases: &[Vec<Vec<E>>], also: impl Fn(Op, &[E]) + Sync) {
    let expected = |op: Op| -> Vec<Vec<E>> { cases.iter().map(|inputs| reference_of(op, inputs, legs)).collect() };
    let (id, sums, averages) = (unique_id(), &expected(Op::Sum), &expected(Op::Average));
    threads(world, |rank| {
        let (comm, stream) = (init(world, id, rank), Stream::new());
        for (i, inputs) in cases.iter().enumerate() {
            for (op, number, expected) in [(Op::Sum, SUM, &sums[i]), (Op::Average, AVG, &averages[i])] {
                let memory = Memory::of(&inputs[rank], &stream);
                let (at, count) = (memory.at, inputs[rank].len());
                ok!(ncclAllReduce(at, at, count, type_of::<E>(), number, comm, stream.0));
                let got = memory.read::<E>(count, &stream);
                same_bits(&got, expected, &format!("{legs} of {count}, {op:?}, rank {rank}"));
                also(op, &got);
            }
        }
        ok!(ncclCommDestroy(comm));
    });
}

/// One run of two and one of three ranks.
fn codes_equal_the_reference<E: Element>(exchange: &str) {
    in_every_code(exchange, |_, legs| {
        for world in [2, 3] {
            let counts = [1, 77, 4096, 12_345, 40_000];
            let cases = counts.map(|count| inputs::<E>(count, count as u64, world));
            sums_and_averages(world, legs, &cases, |_, _| {});
        }
        assert_eq!(n_compressed(), 5 * 2 * (2 + 3), "none was forwarded");
    });
}

/// A NaN or an infinity of one rank, and sums beyond the type, are seen on all ranks, and their neighbors' groups (of blocks: octets) are as ever.
fn what_is_not_finite_is_seen<E: Element>(exchange: &str, greatest: f32, well_within: f32) {
    const NAN: usize = 5_000;
    const INFINITE: usize = 15_000;
    const TOO_LARGE: std::ops::Range<usize> = 25_000..26_000;
    const LARGE: std::ops::Range<usize> = 35_000..36_000;
    in_every_code(exchange, |code, legs| {
        for world in [2, 3] {
            let mut inputs: Vec<Vec<E>> =
                vec![(0..40_000).map(|i| E::from_f32_nearest((i % 7) as f32)).collect(); world];
            inputs[1][NAN] = E::from_f32_nearest(f32::NAN);
            inputs[0][INFINITE] = E::from_f32_nearest(f32::NEG_INFINITY);
            for input in &mut inputs {
                input[TOO_LARGE].fill(E::from_f32_nearest(0.9 * greatest));
                input[LARGE].fill(E::from_f32_nearest(well_within));
            }
            sums_and_averages(world, legs, &[inputs], |op, got| {
                let is_finite = |i: usize| got[i].to_f32().is_finite();
                assert!(!is_finite(NAN) && !is_finite(INFINITE), "{code:?}");
                if op == Op::Sum {
                    assert!(TOO_LARGE.clone().all(|i| !is_finite(i)), "{code:?}: a sum beyond the type");
                }
                let reach = if code == Code::Blocks { 8 } else { legs.reduce.group.n_elems() };
                let places = [NAN..NAN + 1, INFINITE..INFINITE + 1, TOO_LARGE];
                let is_near = |i| places.iter().any(|place| i + reach > place.start && i < place.end + reach);
                let lost = (0..got.len()).find(|i| !is_near(*i) && !is_finite(*i));
                assert_eq!(lost, None, "{code:?}: not finite, far from what is not");
            });
        }
        assert_eq!(n_compressed(), 2 * (2 + 3), "none was forwarded");
    });
}

#[test]
fn every_code_shows_what_is_not_finite_over_nccl_bf16() {
    // Blocks take sums of bf16 up to 2^123.
    what_is_not_finite_is_seen::<bf16>("nccl", bf16::MAX.to_f32(), 2f32.powi(115));
}

#[test]
fn every_code_shows_what_is_not_finite_over_peer_memory_fp16() {
    what_is_not_finite_is_seen::<f16>("peer", f16::MAX.to_f32(), 0.25 * f16::MAX.to_f32());
}

#[test]
fn every_code_equals_the_reference_over_nccl_fp16() {
    codes_equal_the_reference::<f16>("nccl");
}

#[test]
fn every_code_equals_the_reference_over_peer_memory_bf16() {
    codes_equal_the_reference::<bf16>("peer");
}

#[test]
fn every_code_equals_the_reference_over_host_memory_fp16() {
    codes_equal_the_reference::<f16>("host");
}

/// The kernels for host memory, those of the other widths: a GPU has others there than for peer memory.
#[test]
fn every_width_of_plain_and_blocks_equals_the_reference_over_host_memory() {
    let widths = (2..=8).map(|bits| (bits, bits)).chain([(4, 8)]);
    for (code, (reduce, gather)) in widths.flat_map(|pair| [(Code::Plain, pair), (Code::Blocks, pair)]) {
        let group = if reduce % 2 == 0 { 32 } else { 128 };
        let (bits, group_text) = (format!("{reduce}:{gather}"), group.to_string());
        let part = format!("{} {bits}", code.name());
        if std::env::var("WORLD_PART").is_ok_and(|mine| mine != part) {
            continue;
        }
        let settings = [
            ("FLASHCOMM_BITS", bits.as_str()),
            ("FLASHCOMM_CODE", code.name()),
            ("FLASHCOMM_GROUP", &group_text),
            ("FLASHCOMM_EXCHANGE", "host"),
            ("WORLD_PART", &part),
        ];
        in_process(&settings, || {
            let legs = legs_of(Some(code), reduce, gather, group);
            sums_and_averages(2, legs, &[4097, 40_000].map(|count| inputs::<f16>(count, 1, 2)), |_, _| {});
            sums_and_averages(2, legs, &[4097, 40_000].map(|count| inputs::<bf16>(count, 2, 2)), |_, _| {});
            assert_eq!(n_compressed(), 2 * 2 * 2 * 2, "none was forwarded");
        });
    }
}

#[test]
fn six_to_nine_ranks_equal_the_reference_over_host_memory_bf16_int5() {
    equals_the_reference::<bf16>("host", &[6, 7, 8, 9], 5, 5);
}

#[test]
fn ten_to_thirteen_ranks_equal_the_reference_over_peer_memory_fp16_int2_int3() {
    equals_the_reference::<f16>("peer", &[10, 11, 12, 13], 2, 3);
}

#[test]
fn fourteen_to_sixteen_ranks_equal_the_reference_over_nccl_bf16_int6_int8() {
    equals_the_reference::<bf16>("nccl", &[14, 15, 16], 6, 8);
}

#[test]
fn sixteen_ranks_equal_the_reference_over_peer_memory_fp16_int4() {
    equals_the_reference::<f16>("peer", &[16], 4, 4);
}

#[test]
fn processes_equal_the_reference() {
    for (world, exchange) in [(2, "peer"), (5, "peer"), (2, "host"), (3, "host"), (2, "nccl"), (3, "nccl")] {
        let ends = processes(
            world,
            |_| {
                let bits = ("FLASHCOMM_BITS", "4".into());
                vec![bits, ("FLASHCOMM_EXCHANGE", exchange.into()), ("WORLD_SIZE", world.to_string())]
            },
            |process| {
                let world = std::env::var("WORLD_SIZE").unwrap().parse().unwrap();
                let rank = process.rank;
                use_device(rank);
                let (comm, stream) = (init(world, process.unique_id(0), rank), Stream::new());
                for count in sizes(world, legs(4, 4)) {
                    reduce_both_ways(
                        comm,
                        &stream,
                        rank,
                        &*Case::<f16>::new(count, 1 + count as u64, world, legs(4, 4)),
                    );
                }
                ok!(ncclCommDestroy(comm));
            },
        );
        if ends.is_none() {
            return; // a rank
        }
        all_succeed(ends);
    }
}

#[test]
fn replays_equal_the_reference_and_mix_with_eager_calls() {
    in_process(&[("FLASHCOMM_BITS", "6")], || {
        let (world, legs) = (3, legs(6, 6));
        // The larger one has several slices.
        for count in [5000, 900_000] {
            let rounds: Vec<_> = (0..6).map(|round| Case::<bf16>::new(count, round, world, legs)).collect();
            let id = unique_id();
            threads(world, |rank| {
                let (comm, stream, other) = (init(world, id, rank), Stream::new(), Stream::new());
                let (input, output) = (Memory::new(count * 2), Memory::new(count * 2));
                let reduce = |stream: &Stream| {
                    ok!(ncclAllReduce(input.at, output.at, count, dtype::BF16, SUM, comm, stream.0));
                };
                input.write(&rounds[0].inputs[rank], &stream);
                reduce(&stream); // attaches
                same_bits(&output.read(count, &stream), &rounds[0].expected, "eager first");
                // Two in one graph, the second on the first's result.
                let again = Memory::new(count * 2);
                let graph = stream.capture(|| {
                    reduce(&stream);
                    ok!(ncclAllReduce(output.at, again.at, count, dtype::BF16, SUM, comm, stream.0));
                });
                for (i, case) in rounds.iter().enumerate() {
                    input.write(&case.inputs[rank], &stream);
                    if i % 2 == 0 {
                        graph.launch(&stream);
                        let of_result = reference(&vec![case.expected.clone(); world], legs);
                        same_bits(&again.read(count, &stream), &of_result, "the graph's second");
                    } else {
                        order(&stream, &other);
                        reduce(&other);
                        order(&other, &stream);
                    }
                    same_bits(&output.read(count, &stream), &case.expected, &format!("round {i} rank {rank}"));
                }
                drop(graph);
                ok!(ncclCommDestroy(comm));
            });
        }
    });
}

//! Groups of calls that are compressed and of such that are forwarded, or of several communicators: what is compressed runs
//! beside the application's streams.

use std::sync::Arc;

use flashcomm_test_support::*;
use half::f16;

const COUNT: usize = 5000;

/// A rank's part in two communicators: what their compressed sums read and make, and a broadcast from rank 0.
struct Part {
    comms: [usize; 2],
    input: Vec<Memory>,
    output: Vec<Memory>,
    forwarded: Memory,
}

impl Part {
    fn new(ids: [UniqueId; 2], cases: &[Arc<Case<f16>>], rank: usize, stream: &Stream) -> Self {
        let comms = ids.map(|id| init(cases[0].inputs.len(), id, rank));
        let input = cases.iter().map(|case| Memory::of(&case.inputs[rank], stream)).collect();
        let output = cases.iter().map(|_| Memory::new(COUNT * 2)).collect();
        let forwarded = Memory::new(COUNT);
        forwarded.write_bytes(&vec![rank as u8 + 1; COUNT], stream);
        stream.wait();
        Part { comms, input, output, forwarded }
    }

    fn sum(&self, comm: usize, case: usize, on: &Stream) {
        let (from, to) = (self.input[case].at, self.output[case].at);
        ok!(ncclAllReduce(from, to, COUNT, dtype::FP16, SUM, self.comms[comm], on.0));
    }

    fn broadcast(&self, comm: usize, on: &Stream) {
        let at = self.forwarded.at;
        ok!(ncclBroadcast(at, at, COUNT, dtype::UINT8, 0, self.comms[comm], on.0));
    }

    /// What has come of all of it, as `stream` sees it; clears that.
    fn check(&self, cases: &[Arc<Case<f16>>], stream: &Stream, what: &str) {
        for (output, case) in self.output.iter().zip(cases) {
            same_bits(&output.read(COUNT, stream), &case.expected, what);
            ok!(cuMemsetD8Async(output.at, 7, COUNT * 2, stream.0));
        }
        assert_eq!(self.forwarded.read_bytes(COUNT, stream), vec![1; COUNT], "{what}");
        stream.wait();
    }

    fn end(self) {
        self.comms.iter().for_each(|comm| ok!(ncclCommDestroy(*comm)));
    }
}

fn group(calls: impl FnOnce()) {
    ok!(ncclGroupStart());
    calls();
    ok!(ncclGroupEnd());
}

/// A job of two ranks, over each exchange, with delays.
fn job(name: &'static str, n_expected: u64, body: impl Fn(usize, &Part, &[Arc<Case<f16>>], &Stream) + Sync) {
    for exchange in ["peer", "nccl"] {
        let part = format!("{name}, {exchange}");
        if std::env::var("WORLD_PART").is_ok_and(|mine| mine != part) {
            continue;
        }
        let settings = [
            ("FLASHCOMM_BITS", "4"),
            ("FLASHCOMM_EXCHANGE", exchange),
            ("FLASHCOMM_SIM_SEED", "5"),
            ("WORLD_PART", &part),
        ];
        in_process(&settings, || {
            let cases: Vec<_> = (0..2).map(|seed| Case::<f16>::new(COUNT, seed, 2, legs(4, 4))).collect();
            let ids = [unique_id(), unique_id()];
            threads(2, |rank| {
                let stream = Stream::new();
                let part = Part::new(ids, &cases, rank, &stream);
                body(rank, &part, &cases, &stream);
                part.end();
            });
            assert_eq!(n_compressed(), n_expected);
        });
    }
}

#[test]
fn one_rank_may_have_in_a_group_what_another_has_in_several() {
    job("apart", 2 * 20 * 2, |rank, part, cases, stream| {
        part.broadcast(1, stream);
        for round in 0..20 {
            let first = || part.sum(0, 0, stream);
            let second = || {
                part.broadcast(1, stream);
                part.sum(1, 1, stream);
            };
            if (rank + round) % 2 == 0 {
                group(|| {
                    first();
                    second();
                });
            } else {
                group(first);
                group(second);
            }
            part.check(cases, stream, "a group or two");
        }
    });
}

#[test]
fn one_rank_may_have_two_compressed_sums_in_a_group_and_another_a_group_for_each() {
    job("two sums", 2 * 20 * 2, |rank, part, cases, stream| {
        part.broadcast(0, stream);
        for round in 0..20 {
            let sum = |comm: usize| part.sum(comm, comm, stream);
            match (rank + round) % 2 {
                0 => group(|| (0..2).for_each(sum)),
                _ => (0..2).for_each(|comm| group(|| sum(comm))),
            }
            part.check(cases, stream, "a group or two");
        }
    });
}

#[test]
fn what_follows_on_a_stream_of_a_group_follows_all_of_its_communicator() {
    job("streams", 2 * 20 * 2, |_, part, cases, stream| {
        let other = Stream::new();
        part.broadcast(0, stream);
        for _ in 0..20 {
            group(|| {
                part.sum(0, 0, stream);
                part.sum(0, 1, &other);
            });
            part.check(cases, stream, "on one of the streams");
        }
    });
}

#[test]
fn groups_of_both_kinds_are_captured_and_replayed_between_eager_ones() {
    job("captured", 2 * 2 * 5, |_, part, cases, stream| {
        let mixed = || {
            group(|| {
                part.sum(0, 0, stream);
                part.broadcast(0, stream);
                part.sum(1, 1, stream);
            });
        };
        for round in 0..2 {
            mixed();
            part.check(cases, stream, "before");
            let graph = stream.capture(mixed);
            for _ in 0..3 {
                graph.launch(stream);
                part.check(cases, stream, "the graph");
            }
            if round == 1 {
                mixed();
                part.check(cases, stream, "after");
            }
        }
    });
}

/// A stream that takes part in a capture does so until that ends.
#[test]
fn while_a_capture_with_such_a_group_goes_on_another_stream_has_one() {
    job("open", 2 * 4, |_, part, cases, stream| {
        let other = Stream::new();
        part.broadcast(0, stream); // the real NCCL connects, which it must not while something is captured
        let mixed = |on: &Stream| {
            group(|| {
                part.sum(0, 0, on);
                part.broadcast(0, on);
                part.sum(1, 1, on);
            });
        };
        let graph = stream.capture(|| {
            mixed(stream);
            mixed(&other);
        });
        part.check(cases, &other, "eager");
        graph.launch(stream);
        part.check(cases, stream, "the graph");
    });
}

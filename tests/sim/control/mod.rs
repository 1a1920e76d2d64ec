//! Control from an engine: widths and on/off change on all ranks or on none, and what was captured before stays as it was.

mod refusals;

use std::time::Duration;

use flashcomm_test_support::*;
use half::f16;

const COUNT: usize = 30_000;

/// The inputs of all ranks and what comes out of them.
struct Sums {
    inputs: Vec<Vec<f16>>,
    exact: Vec<f16>,
}

impl Sums {
    fn of(world: usize) -> Self {
        let inputs: Vec<_> = (0..world).map(|rank| whole_numbers(COUNT, 3, rank)).collect();
        let exact = exact_sum(&inputs);
        Sums { inputs, exact }
    }

    fn at(&self, reduce: u8, gather: u8) -> Vec<f16> {
        let sum = reference(&self.inputs, legs(reduce, gather));
        assert!(sum != self.exact, "{reduce}:{gather} is exact on these inputs, and nothing is seen");
        sum
    }
}

/// One rank of a job.
struct Rank<'a> {
    comm: usize,
    stream: Stream,
    input: Memory,
    output: Memory,
    sums: &'a Sums,
}

impl<'a> Rank<'a> {
    fn new(sums: &'a Sums, id: UniqueId, rank: usize) -> Self {
        let comm = init(sums.inputs.len(), id, rank);
        let stream = Stream::new();
        let input = Memory::of(&sums.inputs[rank], &stream);
        stream.wait();
        Rank { comm, stream, input, output: Memory::new(2 * COUNT), sums }
    }

    fn issue(&self) {
        ok!(ncclAllReduce(self.input.at, self.output.at, COUNT, dtype::FP16, SUM, self.comm, self.stream.0));
    }

    fn check(&self, expected: &[f16], about: &str) {
        same_bits(&self.output.read(COUNT, &self.stream), expected, about);
    }

    fn gives(&self, expected: &[f16], about: &str) {
        ok!(cuMemsetD8Async(self.output.at, 7, 2 * COUNT, self.stream.0));
        self.issue();
        self.check(expected, about);
    }

    fn set(&self, reduce: i32, gather: i32) {
        assert_eq!(call!(flashcommSetCommBits(self.comm, reduce, gather)), 0, "{}", last_error(self.comm));
        let info = Info::of(self.comm);
        let code = if reduce == gather || (reduce, gather) == (4, 8) { "blocks" } else { "plain" };
        assert_eq!((info.state, info.reduce_bits, info.gather_bits, info.code()), (1, reduce, gather, code));
    }

    fn switch(&self, on: bool) {
        assert_eq!(call!(flashcommSetCommEnabled(self.comm, on.into())), 0, "{}", last_error(self.comm));
        assert_eq!((Info::of(self.comm).state, Info::of(self.comm).enabled), (1, on.into()));
    }
}

/// Width after width, on and off; results and statistics say what each all-reduce did.
fn changes(exchange: &str, rank: &Rank<'_>, world: usize) {
    let info = Info::of(rank.comm);
    assert_eq!((info.state, info.enabled, info.reduce_bits, info.n_ranks, info.min_bytes), (1, 1, 8, world as i32, 0));
    assert_eq!((info.exchange(), info.code()), (exchange, "blocks"));
    rank.gives(&rank.sums.at(8, 8), "as FLASHCOMM_BITS has it");
    for round in 0..2 {
        for (reduce, gather) in [(4, 4), (2, 8), (8, 8), (4, 4)] {
            rank.set(reduce, gather);
            for _ in 0..3 {
                rank.gives(&rank.sums.at(reduce as u8, gather as u8), &format!("{reduce}:{gather}, round {round}"));
            }
        }
        rank.switch(false);
        rank.gives(&rank.sums.exact, "switched off");
        rank.set(3, 3);
        rank.gives(&rank.sums.exact, "still off");
        rank.switch(true);
        rank.gives(&rank.sums.at(3, 3), "on again, with the width that was set meanwhile");
    }
    let stats = Stats::of(rank.comm);
    assert_eq!((stats.compressed, stats.because("switched_off"), stats.forwarded), (1 + 2 * 13, 4, 4));
    ok!(ncclCommDestroy(rank.comm));
}

fn threads_change(exchange: &str) {
    in_process(&[("FLASHCOMM_EXCHANGE", exchange)], || {
        let (world, id) = (3, unique_id());
        let sums = Sums::of(world);
        threads(world, |rank| changes(exchange, &Rank::new(&sums, id, rank), world));
    });
}

#[test]
fn threads_change_widths_over_peer_memory() {
    threads_change("peer");
}

#[test]
fn threads_change_widths_over_host_memory() {
    threads_change("host");
}

#[test]
fn threads_change_widths_over_nccl() {
    threads_change("nccl");
}

#[test]
fn processes_change_widths() {
    for exchange in ["peer", "host", "nccl"] {
        let settings = |_| vec![("FLASHCOMM_EXCHANGE", exchange.into()), ("CONTROL_EXCHANGE", exchange.into())];
        let ends = processes(2, settings, |process| {
            use_device(process.rank);
            let (sums, exchange) = (Sums::of(2), std::env::var("CONTROL_EXCHANGE").unwrap());
            changes(&exchange, &Rank::new(&sums, process.unique_id(0), process.rank), 2);
        });
        if ends.is_none() {
            return; // a rank
        }
        all_succeed(ends);
    }
}

#[test]
fn a_change_may_come_before_the_first_all_reduce_and_captures_may_follow_it_at_once() {
    for first in ["bits", "off"] {
        in_process(&[("FLASHCOMM_EXCHANGE", "peer"), ("CONTROL_FIRST", first)], || {
            let (world, id) = (2, unique_id());
            let sums = Sums::of(world);
            threads(world, |rank| {
                let rank = Rank::new(&sums, id, rank);
                let expected = match std::env::var("CONTROL_FIRST").unwrap().as_str() {
                    "bits" => {
                        rank.set(5, 5);
                        sums.at(5, 5)
                    }
                    _ => {
                        rank.switch(false);
                        sums.exact.clone()
                    }
                };
                let graph = rank.stream.capture(|| rank.issue());
                graph.launch(&rank.stream);
                rank.check(&expected, "the graph");
                rank.gives(&expected, "an eager one");
                drop(graph);
                ok!(ncclCommDestroy(rank.comm));
            });
        });
        if std::env::var_os("WORLD_INNER").is_some() {
            return;
        }
    }
}

#[test]
fn graphs_keep_the_width_that_they_were_captured_with() {
    for exchange in ["peer", "nccl"] {
        in_process(&[("FLASHCOMM_EXCHANGE", exchange), ("FLASHCOMM_SIM_SEED", "3")], || {
            let (world, id) = (3, unique_id());
            let sums = Sums::of(world);
            threads(world, |rank| {
                let rank = Rank::new(&sums, id, rank);
                let mut graphs = Vec::new();
                for bits in [8, 4, 2] {
                    rank.set(bits, bits);
                    graphs.push((rank.stream.capture(|| rank.issue()), sums.at(bits as u8, bits as u8)));
                }
                rank.switch(false);
                graphs.push((rank.stream.capture(|| rank.issue()), sums.exact.clone()));
                rank.switch(true);
                rank.set(6, 6);
                // Without a pause between them: operations of different widths follow on one another's heels.
                for round in 0..20 {
                    let (graph, expected) = &graphs[round % graphs.len()];
                    rank.issue();
                    graph.launch(&rank.stream);
                    if round % 3 == 0 {
                        rank.check(expected, &format!("the graph, round {round}"));
                        rank.gives(&sums.at(6, 6), "an eager one");
                    }
                }
                drop(graphs);
                ok!(ncclCommDestroy(rank.comm));
            });
        });
        if std::env::var_os("WORLD_INNER").is_some() {
            return;
        }
    }
}

#[test]
fn one_thread_changes_all_its_ranks_in_a_group() {
    in_process(&[("FLASHCOMM_EXCHANGE", "peer")], || {
        let world = 3;
        let sums = Sums::of(world);
        let mut comms = vec![0; world];
        let mut n_devices = 0;
        ok!(cuDeviceGetCount(&mut n_devices));
        let devices: Vec<i32> = (0..world as i32).map(|rank| rank % n_devices).collect();
        ok!(ncclCommInitAll(comms.as_mut_ptr(), world as i32, devices.as_ptr()));
        let new = |rank: usize| {
            use_device(rank);
            let stream = Stream::new();
            let input = Memory::of(&sums.inputs[rank], &stream);
            stream.wait();
            Rank { comm: comms[rank], stream, input, output: Memory::new(2 * COUNT), sums: &sums }
        };
        let ranks: Vec<_> = (0..world).map(new).collect();
        let all = |what: &dyn Fn(&Rank<'_>), simulate: bool| {
            ok!(ncclGroupStart());
            ranks.iter().for_each(what);
            if simulate {
                ok!(ncclGroupSimulateEnd(&mut [24, 0, 0x7468_5283, 22807, 0xbf80_0000, 0]));
            } else {
                ok!(ncclGroupEnd());
            }
        };
        let set = |bits: i32| move |rank: &Rank<'_>| ok!(flashcommSetCommBits(rank.comm, bits, bits));
        let gives = |expected: &[f16], about: &str| {
            all(&|rank| rank.issue(), false);
            ranks.iter().for_each(|rank| rank.check(expected, about));
        };
        all(&set(4), false);
        gives(&sums.at(4, 4), "4 bits");
        all(&set(8), true);
        gives(&sums.at(4, 4), "a simulated end changes nothing");
        let both = |rank: &Rank<'_>| {
            ok!(flashcommSetCommBits(rank.comm, 2, 2));
            ok!(flashcommSetCommEnabled(rank.comm, 0));
            ok!(flashcommSetCommBits(rank.comm, 6, 6));
        };
        all(&both, false);
        gives(&sums.exact, "off");
        all(&|rank| ok!(flashcommSetCommEnabled(rank.comm, 1)), false);
        gives(&sums.at(6, 6), "the last of the widths counts");
        comms.iter().for_each(|comm| ok!(ncclCommDestroy(*comm)));
    });
}

#[test]
fn an_abort_frees_a_graph_of_an_earlier_width() {
    in_process(&[("FLASHCOMM_EXCHANGE", "peer")], || {
        let (world, id) = (2, unique_id());
        let sums = Sums::of(world);
        threads(world, |rank_number| {
            let rank = Rank::new(&sums, id, rank_number);
            rank.set(4, 4);
            let graph = rank.stream.capture(|| rank.issue());
            rank.set(8, 8);
            if rank_number == 0 {
                graph.launch(&rank.stream); // the other rank does not
                std::thread::sleep(Duration::from_millis(50));
            }
            ok!(ncclCommAbort(rank.comm));
            assert!(rank.stream.becomes_idle(Duration::from_secs(5)), "the graph hangs after the abort");
            drop(graph);
        });
    });
}

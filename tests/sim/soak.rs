//! A soak: random operations, sizes, streams, groups and captures against a model, everything from a seed.
//!
//! `FLASHCOMM_TEST_SOAK_OPS` (100000) and `FLASHCOMM_TEST_SOAK_SEED`: how many operations, and from which seed on. The
//! seed is printed first, and is in the message of a difference.

use std::cell::RefCell;
use std::sync::Barrier;

use flashcomm_test_support::*;
use half::f16;

/// Operations of a program: one that all ranks run, then check.
const ROUND: usize = 200;
const BUFFERS: usize = 6;
const MAX_COUNT: usize = 20_000;

/// What is done to the buffers; the same on all ranks.
#[derive(Clone, Copy, Debug)]
enum Op {
    /// A compressed all-reduce from one buffer to another, or in place.
    Reduce { comm: usize, from: usize, to: usize, count: usize, stream: usize },
    /// Plain NCCL's: rank `root`'s buffer to everyone.
    Broadcast { comm: usize, buffer: usize, count: usize, root: usize, stream: usize },
    /// To the next rank, from the one before.
    Shift { from: usize, to: usize, count: usize, stream: usize },
}

impl Op {
    fn random(random: &mut Random, world: usize) -> Self {
        let (from, to, stream) = (random.below(BUFFERS), random.below(BUFFERS), random.below(2));
        let count = match random.below(8) {
            0 => 1 + random.below(MAX_COUNT),
            1 => 4096 * (1 + random.below(4)) + random.below(3) - 1,
            _ => 1 + random.below(600),
        };
        let comm = random.below(2);
        match random.below(10) {
            0 => Op::Broadcast { comm, buffer: from, count, root: random.below(world), stream },
            1 => Op::Shift { from, to: (from + 1) % BUFFERS, count, stream },
            _ => Op::Reduce { comm, from, to, count, stream },
        }
    }

    fn stream(self) -> usize {
        match self {
            Op::Reduce { stream, .. } | Op::Broadcast { stream, .. } | Op::Shift { stream, .. } => stream,
        }
    }

    fn buffers(self) -> [usize; 2] {
        match self {
            Op::Reduce { from, to, .. } | Op::Shift { from, to, .. } => [from, to],
            Op::Broadcast { buffer, .. } => [buffer; 2],
        }
    }
}

/// How a few operations are issued together.
#[derive(Clone, Debug)]
enum Step {
    Eager(Op),
    /// In one group, on disjoint buffers.
    Group(Vec<Op>),
    /// Captured once, replayed so often.
    Graph(Vec<Op>, usize),
}

fn program(random: &mut Random, world: usize) -> (Vec<Step>, usize) {
    let (mut steps, mut n_ops) = (Vec::new(), 0);
    while n_ops < ROUND {
        let mut some = |n: usize, one_stream: bool, disjoint: bool| -> Vec<Op> {
            let mut ops: Vec<Op> = Vec::new();
            for _ in 0..n {
                let op = Op::random(random, world);
                let used = |buffer: &usize| ops.iter().any(|other| other.buffers().contains(buffer));
                if disjoint && op.buffers().iter().any(used) || one_stream && op.stream() != 0 {
                    continue;
                }
                ops.push(op);
            }
            ops
        };
        let step = match steps.len() % 6 {
            4 => Step::Group(some(4, false, true)),
            5 => Step::Graph(some(6, true, false), 1 + steps.len() % 3),
            _ => match some(1, false, false).first() {
                Some(op) => Step::Eager(*op),
                None => continue,
            },
        };
        n_ops += match &step {
            Step::Eager(_) => 1,
            Step::Group(ops) => ops.len(),
            Step::Graph(ops, times) => ops.len() * times,
        };
        steps.push(step);
    }
    (steps, n_ops)
}

/// The first operations of a job: the communicators attach, so that what is captured later is compressed, and NCCL connects
/// every rank with all that it will send to.
fn first_ops(world: usize) -> Vec<Op> {
    let (buffer, count, stream) = (0, 1, 0);
    let reduce = |comm| Op::Reduce { comm, from: buffer, to: buffer, count, stream };
    let broadcasts = move |comm| (0..world).map(move |root| Op::Broadcast { comm, buffer, count, root, stream });
    let shift = Op::Shift { from: 0, to: 1, count, stream };
    (0..2).map(reduce).chain((0..2).flat_map(broadcasts)).chain([shift]).collect()
}

type Buffers = Vec<Vec<f16>>;

/// What an operation makes of all ranks' buffers. The second communicator has the ranks in reverse.
fn model(op: Op, ranks: &mut [Buffers], legs: flashcomm_wire::Legs) {
    let world = ranks.len();
    let place = |comm: usize, rank: usize| if comm == 0 { rank } else { world - 1 - rank };
    match op {
        Op::Reduce { comm, from, to, count, .. } => {
            let inputs: Vec<_> = (0..world).map(|rank| ranks[place(comm, rank)][from][..count].to_vec()).collect();
            let sum = reference(&inputs, legs);
            ranks.iter_mut().for_each(|buffers| buffers[to][..count].copy_from_slice(&sum));
        }
        Op::Broadcast { comm, buffer, count, root, .. } => {
            let sent = ranks[place(comm, root)][buffer][..count].to_vec();
            ranks.iter_mut().for_each(|buffers| buffers[buffer][..count].copy_from_slice(&sent));
        }
        Op::Shift { from, to, count, .. } => {
            let sent: Vec<_> = ranks.iter().map(|buffers| buffers[from][..count].to_vec()).collect();
            for (rank, buffers) in ranks.iter_mut().enumerate() {
                buffers[to][..count].copy_from_slice(&sent[(rank + world - 1) % world]);
            }
        }
    }
}

/// One rank's part of a job.
struct Rank<'a> {
    rank: usize,
    world: usize,
    comms: [usize; 2],
    streams: &'a [Stream],
    memory: &'a [Memory],
    gate: &'a Barrier,
    graphs: RefCell<Vec<Graph>>,
}

impl Rank<'_> {
    /// On a device that ranks share, what a rank allocates may wait for another's kernels, which may wait for this rank: all of
    /// them meet idle before what allocates, and after it.
    fn meet_where_ranks_share_a_device(&self) {
        if is_real() {
            self.streams.iter().for_each(Stream::wait);
            self.gate.wait();
        }
    }

    fn issue(&self, op: Op) {
        let stream = self.streams[op.stream()].0;
        let at = |buffer: usize| self.memory[buffer].at;
        match op {
            Op::Reduce { comm, from, to, count, .. } => {
                ok!(ncclAllReduce(at(from), at(to), count, dtype::FP16, SUM, self.comms[comm], stream));
            }
            Op::Broadcast { comm, buffer, count, root, .. } => {
                let at = at(buffer);
                ok!(ncclBroadcast(at, at, count, dtype::FP16, root as i32, self.comms[comm], stream));
            }
            Op::Shift { from, to, count, .. } => {
                let (next, before) = ((self.rank + 1) % self.world, (self.rank + self.world - 1) % self.world);
                ok!(ncclGroupStart());
                ok!(ncclSend(at(from), count, dtype::FP16, next as i32, self.comms[0], stream));
                ok!(ncclRecv(at(to), count, dtype::FP16, before as i32, self.comms[0], stream));
                ok!(ncclGroupEnd());
            }
        }
    }

    fn run(&self, step: &Step) {
        let all_before = |stream: usize| order(&self.streams[1 - stream], &self.streams[stream]);
        match step {
            Step::Eager(op) => {
                all_before(op.stream());
                self.issue(*op);
            }
            Step::Group(ops) => {
                all_before(0);
                all_before(1);
                ok!(ncclGroupStart());
                ops.iter().for_each(|op| self.issue(*op));
                ok!(ncclGroupEnd());
            }
            Step::Graph(ops, times) => {
                all_before(0);
                self.meet_where_ranks_share_a_device();
                let graph = self.streams[0].capture(|| ops.iter().for_each(|op| self.issue(*op)));
                self.meet_where_ranks_share_a_device();
                (0..*times).for_each(|_| graph.launch(&self.streams[0]));
                self.streams[0].wait();
                if is_real() {
                    // NCCL frees what a graph had at a call that comes later, when other ranks' kernels may wait for this one's.
                    self.graphs.borrow_mut().push(graph);
                }
            }
        }
    }
}

/// A third of the operations over one exchange, in three processes: without delays, and with those of two schedules.
fn soak(exchange: &str, host_copy: &str, reduce: u8, gather: u8) {
    for (part, schedule) in ["", "1", "2"].into_iter().enumerate() {
        let part = part.to_string();
        if std::env::var("WORLD_PART").is_ok_and(|mine| mine != part) {
            continue;
        }
        let bits = format!("{reduce}:{gather}");
        let settings = [
            ("FLASHCOMM_BITS", bits.as_str()),
            ("FLASHCOMM_EXCHANGE", exchange),
            ("FLASHCOMM_HOST_COPY", host_copy),
            ("FLASHCOMM_SIM_SEED", schedule),
            ("WORLD_PART", &part),
        ];
        in_process(&settings, || soak_part(exchange, &part, reduce, gather));
    }
}

fn soak_part(exchange: &str, part: &str, reduce: u8, gather: u8) {
    let number = |name: &str, default: usize| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    // Other programs in every part.
    let first_seed = number("FLASHCOMM_TEST_SOAK_SEED", 1) as u64 + part.parse::<u64>().unwrap() * 1_000_000;
    let wanted = number("FLASHCOMM_TEST_SOAK_OPS", 100_000).div_ceil(9);
    let (mut n_ops, mut seed) = (0, first_seed);
    eprintln!("soak: {wanted} operations from seed {seed} over {exchange}, {reduce}:{gather} bits, schedule {part}");
    while n_ops < wanted {
        let mut random = Random(seed * 7919);
        let world = 2 + (seed as usize % 3);
        let start: Vec<Buffers> =
            (0..world).map(|rank| (0..BUFFERS).map(|b| input(MAX_COUNT, seed + b as u64, rank)).collect()).collect();
        let programs: Vec<_> = (0..10).map(|_| program(&mut random, world)).collect();
        let ids = [unique_id(), unique_id()];
        let gate = Barrier::new(world);
        let (start_ref, programs_ref, gate_ref) = (&start, &programs, &gate);
        let results = threads(world, |rank| {
            let streams = [Stream::new(), Stream::new()];
            let comms = [init(world, ids[0], rank), init(world, ids[1], world - 1 - rank)];
            let memory: Vec<_> = start_ref[rank].iter().map(|buffer| Memory::of(buffer, &streams[0])).collect();
            streams[0].wait();
            let me = Rank {
                rank,
                world,
                comms,
                streams: &streams,
                memory: &memory,
                gate: gate_ref,
                graphs: RefCell::default(),
            };
            let mut results = Vec::new();
            for op in first_ops(world) {
                me.issue(op);
                me.meet_where_ranks_share_a_device();
            }
            for (steps, _) in programs_ref {
                steps.iter().for_each(|step| me.run(step));
                order(&streams[1], &streams[0]);
                let read = |buffer: &Memory| buffer.read::<f16>(MAX_COUNT, &streams[0]);
                results.push(memory.iter().map(read).collect::<Buffers>());
            }
            me.meet_where_ranks_share_a_device();
            me.graphs.take();
            comms.iter().for_each(|comm| ok!(ncclCommDestroy(*comm)));
            results
        });
        let mut ranks = start;
        first_ops(world).into_iter().for_each(|op| model(op, &mut ranks, legs(reduce, gather)));
        for (i, (steps, n)) in programs.iter().enumerate() {
            for step in steps {
                let (ops, times) = match step {
                    Step::Eager(op) => (std::slice::from_ref(op), 1),
                    Step::Group(ops) => (ops.as_slice(), 1),
                    Step::Graph(ops, times) => (ops.as_slice(), *times),
                };
                for op in (0..times).flat_map(|_| ops) {
                    model(*op, &mut ranks, legs(reduce, gather));
                }
            }
            for (rank, expected) in ranks.iter().enumerate() {
                for (b, buffer) in expected.iter().enumerate() {
                    same_bits(
                        &results[rank][i][b],
                        buffer,
                        &format!("seed {seed}, program {i}, rank {rank}, buffer {b}"),
                    );
                }
            }
            n_ops += n;
        }
        seed += 1;
    }
    eprintln!("soak: {n_ops} operations, seeds {first_seed} to {}, no difference", seed - 1);
}

#[test]
fn random_jobs_over_nccl_equal_the_model() {
    soak("nccl", "auto", 4, 4);
}

#[test]
fn random_jobs_over_peer_memory_equal_the_model() {
    soak("peer", "auto", 3, 8);
}

#[test]
fn random_jobs_over_host_memory_equal_the_model() {
    soak("host", "auto", 4, 8);
}

#[test]
fn random_jobs_over_host_memory_by_copy_engines_equal_the_model() {
    soak("host", "1", 5, 5);
}

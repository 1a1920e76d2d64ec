//! Programs from seeds. First a schedule of the whole job, in which every call comes when all
//! before it are done with; each rank's program is its part of that. Then each rank's steps change
//! places, as long as those of a stream and of a communicator stay in order and the program ends by
//! the application's own rules ([`machine`]).

use flashcomm_test_support::{Random, dtype};

use super::GAPS;
use super::machine;
use super::program::{Comm, Kind, Making, Op, Program, STREAMS, Step, Way};

/// Elements of an operation at most.
const MAX_COUNT: usize = 3000;
const MAX_COMMS: usize = 5;

struct Generator {
    random: Random,
    program: Program,
    /// Communicators that have not been destroyed, and whether a graph has operations of them.
    live: Vec<usize>,
    in_graph: Vec<usize>,
    n_messages: usize,
    /// Ranks are threads of one process.
    threads: bool,
}

/// The program of a seed, of ranks that are threads or, where that says so, of so many processes.
pub fn program(seed: u64, processes: Option<usize>) -> Program {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let _ = random.number();
    let world = processes.unwrap_or(2 + random.below(3));
    let program = Program { seed, world, comms: vec![], ops: vec![], events: vec![], ranks: vec![Vec::new(); world] };
    let (live, in_graph) = (Vec::new(), Vec::new());
    let mut generator = Generator { random, program, live, in_graph, n_messages: 0, threads: processes.is_none() };
    generator.create();
    for _ in 0..6 + generator.random.below(10) {
        generator.item();
    }
    assert!(machine::ends(&generator.program), "seed {seed}: the schedule itself does not end");
    generator.change_places();
    generator.end();
    generator.program
}

impl Generator {
    fn one_in(&mut self, n: usize) -> bool {
        self.random.below(n) == 0
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        (1..items.len()).for_each(|i| items.swap(i, self.random.below(i + 1)));
    }

    fn push(&mut self, rank: usize, step: Step) {
        self.program.ranks[rank].push(step);
    }

    fn item(&mut self) {
        let rank = self.random.below(self.program.world);
        match self.random.below(20) {
            0..3 if self.program.comms.len() < MAX_COMMS => self.create(),
            3..5 => {
                let us = 100 + self.random.below(1500) as u64;
                self.push(rank, Step::Sleep(us));
            }
            5 => {
                let stream = self.random.below(STREAMS);
                self.push(rank, Step::Wait(stream));
            }
            6 => {
                let first = self.random.below(STREAMS);
                self.push(rank, Step::Order(first, (first + 1) % STREAMS));
            }
            7 if self.live.len() > 1 => self.destroy(),
            8..11 => self.message(rank),
            _ => self.issue(),
        }
    }

    fn message(&mut self, from: usize) {
        let to = (from + 1 + self.random.below(self.program.world - 1)) % self.program.world;
        self.push(from, Step::Tell(self.n_messages));
        self.push(to, Step::Hear(self.n_messages));
        self.n_messages += 1;
    }

    /// Some of the ranks, in any order; two at least.
    fn members(&mut self) -> Vec<usize> {
        let mut members: Vec<_> = (0..self.program.world).collect();
        self.shuffle(&mut members);
        if !self.one_in(2) {
            members.truncate(2 + self.random.below(self.program.world - 1));
        }
        members
    }

    fn event(&mut self, ranks: Vec<usize>) -> usize {
        self.program.events.push(ranks);
        self.program.events.len() - 1
    }

    fn comm(&mut self, members: Vec<usize>, non_blocking: bool, event: usize, parent: Option<usize>) -> usize {
        self.program.comms.push(Comm { members, non_blocking, event, parent });
        self.live.push(self.program.comms.len() - 1);
        self.program.comms.len() - 1
    }

    fn create(&mut self) {
        let n_live = self.live.len();
        let parent = if n_live > 0 { Some(self.live[self.random.below(n_live)]) } else { None };
        match (self.random.below(8), parent) {
            (0, _) if self.threads => self.create_all(),
            (1 | 2, Some(parent)) => self.split(parent),
            (3, Some(parent)) => self.shrink(parent),
            _ => self.create_some(),
        }
    }

    fn create_all(&mut self) {
        let mut members: Vec<_> = (0..self.program.world).collect();
        self.shuffle(&mut members);
        let by = self.random.below(self.program.world);
        let event = self.event(vec![by]);
        let comm = self.comm(members, false, event, None);
        for rank in 0..self.program.world {
            let make = Step::Create { makings: vec![(event, Making::InitAll { comm })], grouped: false };
            self.push(rank, if rank == by { make } else { Step::Take(comm) });
        }
    }

    /// One communicator or two, in groups on all ranks or on none; in a group in any order.
    fn create_some(&mut self) {
        let (non_blocking, grouped) = (self.one_in(4), self.one_in(2));
        let mut new = Vec::new();
        for _ in 0..1 + self.random.below(2) {
            let members = self.members();
            let event = self.event(members.clone());
            new.push((event, self.comm(members, non_blocking, event, None)));
        }
        for rank in 0..self.program.world {
            let is_in = |(event, _): &&(usize, usize)| self.program.events[*event].contains(&rank);
            let mut mine: Vec<_> = new.iter().filter(is_in).copied().collect();
            if grouped {
                self.shuffle(&mut mine);
            }
            let makings: Vec<_> = mine.iter().map(|(event, comm)| (*event, Making::Init { comm: *comm })).collect();
            if grouped && !makings.is_empty() {
                self.push(rank, Step::Create { makings, grouped });
            } else {
                makings.into_iter().for_each(|making| self.push(rank, Step::Create { makings: vec![making], grouped }));
            }
            if non_blocking {
                mine.iter().for_each(|(_, comm)| self.push(rank, Step::Settle(*comm)));
            }
        }
    }

    fn split(&mut self, parent: usize) {
        let Comm { members, non_blocking, .. } = self.program.comms[parent].clone();
        let event = self.event(members.clone());
        let lowest = if non_blocking { 0 } else { -1 }; // -1: in no child
        let mut words: Vec<_> = members
            .iter()
            .map(|member| (self.random.below(3).min(1) as i32, self.random.below(5) as i32 - 2, *member))
            .collect();
        if lowest < 0 && members.len() > 2 && self.one_in(3) {
            words[0].0 = -1;
        }
        let mut children = vec![None; self.program.world];
        for color in 0..2 {
            let mut same: Vec<_> = words.iter().filter(|(its, ..)| *its == color).collect();
            same.sort_by_key(|(_, key, _)| *key); // then by rank in the parent
            let same: Vec<_> = same.into_iter().map(|(.., member)| *member).collect();
            if !same.is_empty() {
                let child = self.comm(same.clone(), non_blocking, event, Some(parent));
                same.iter().for_each(|member| children[*member] = Some(child));
            }
        }
        let grouped = self.one_in(2);
        for (color, key, rank) in words {
            let child = children[rank];
            let makings = vec![(event, Making::Split { parent, color, key, child })];
            self.push(rank, Step::Create { makings, grouped });
            if let (true, Some(child)) = (non_blocking, child) {
                self.push(rank, Step::Settle(child));
            }
        }
    }

    fn shrink(&mut self, parent: usize) {
        let Comm { mut members, non_blocking, .. } = self.program.comms[parent].clone();
        if members.len() < 2 {
            return;
        }
        let without = self.random.below(members.len());
        members.remove(without);
        let event = self.event(members.clone());
        let child = self.comm(members.clone(), non_blocking, event, Some(parent));
        let grouped = self.one_in(2);
        for rank in members {
            let makings = vec![(event, Making::Shrink { parent, without: without as i32, child })];
            self.push(rank, Step::Create { makings, grouped });
            if non_blocking {
                self.push(rank, Step::Settle(child));
            }
        }
    }

    fn destroy(&mut self) {
        let comm = self.live.swap_remove(self.random.below(self.live.len()));
        for rank in self.program.comms[comm].members.clone() {
            let idle = self.one_in(2) || self.in_graph.contains(&comm);
            self.push(rank, Step::Destroy { comm, idle });
        }
    }

    /// An operation on a communicator; only one that may be compressed, or only one that is
    /// forwarded, where it says so.
    fn op(&mut self, comm: usize, in_graph: bool, large_half: Option<bool>) -> usize {
        let world = self.program.comms[comm].members.len();
        let (from, to) = match large_half {
            None => (0, 12),
            Some(false) => (0, 5),
            Some(true) => (5, 12),
        };
        let kind = match from + self.random.below(to - from) {
            0 => Kind::Sum(dtype::FP32),
            1 => Kind::Sum(dtype::INT32),
            2 => Kind::Broadcast(self.random.below(world)),
            4 if world > 1 && !in_graph => Kind::Shift,
            3 | 4 => Kind::Gather,
            5..8 => Kind::Sum(dtype::BF16),
            _ => Kind::Sum(dtype::FP16),
        };
        let max_count = if self.one_in(3) && large_half.is_none() { 300 } else { MAX_COUNT };
        let count = if large_half == Some(true) { 300 } else { 1 } + self.random.below(max_count);
        let in_place = !in_graph && self.one_in(2);
        self.program.ops.push(Op { comm, kind, count, in_place });
        self.program.ops.len() - 1
    }

    /// One operation or several, on one communicator or several.
    fn issue(&mut self) {
        let way = match self.random.below(8) {
            0 | 1 => Way::Group,
            2 => Way::Nested,
            3 => Way::Graph(1 + self.random.below(3)),
            _ => Way::Alone,
        };
        let n_ops = if way == Way::Alone { 1 } else { 1 + self.random.below(4) };
        let first = self.live[self.random.below(self.live.len())];
        let non_blocking = self.program.comms[first].non_blocking;
        // One that does not block takes one call at a time; NCCL wants no group of both kinds.
        let way = if non_blocking && matches!(way, Way::Graph(_)) { Way::Alone } else { way };
        let alike = |comm: &usize| self.program.comms[*comm].non_blocking == non_blocking;
        let mut alike: Vec<_> = self.live.iter().copied().filter(alike).collect();
        let mut large_half = None;
        // Both kinds of calls on one communicator, or one kind on several.
        if non_blocking && !GAPS {
            match self.one_in(2) {
                true => alike = vec![first],
                false => large_half = Some(self.one_in(2)),
            }
        }
        let mut ops = Vec::new();
        for i in 0..n_ops {
            let comm = if i == 0 { first } else { alike[self.random.below(alike.len())] };
            ops.push(self.op(comm, matches!(way, Way::Graph(_)), large_half));
            if matches!(way, Way::Graph(_)) && !self.in_graph.contains(&comm) {
                self.in_graph.push(comm);
            }
        }
        // Some ranks have a group for each communicator.
        let apart = matches!(way, Way::Group | Way::Nested) && self.one_in(2);
        if apart && !GAPS {
            let comm_of = |op: &usize| self.program.ops[*op].comm;
            let comms: Vec<_> = ops.iter().map(comm_of).collect();
            ops.sort_by_key(|op| comms.iter().position(|comm| *comm == comm_of(op)));
        }
        let same = self.random.below(STREAMS);
        for rank in 0..self.program.world {
            let everywhere = matches!(way, Way::Graph(_)) || self.one_in(2);
            let is_mine = |op: &&usize| self.program.comms[self.program.ops[**op].comm].members.contains(&rank);
            let mine: Vec<usize> = ops.iter().filter(is_mine).copied().collect();
            let ops: Vec<_> =
                mine.into_iter().map(|op| (op, if everywhere { same } else { self.random.below(STREAMS) })).collect();
            if apart && self.one_in(2) {
                self.push_by_comm(rank, ops, way);
            } else if !ops.is_empty() {
                self.push(rank, Step::Issue { ops, way });
            }
        }
    }

    /// A group for each communicator.
    fn push_by_comm(&mut self, rank: usize, mut ops: Vec<(usize, usize)>, way: Way) {
        while let Some((first, _)) = ops.first() {
            let comm = self.program.ops[*first].comm;
            let (same, others) = ops.into_iter().partition(|(op, _)| self.program.ops[*op].comm == comm);
            self.push(rank, Step::Issue { ops: same, way });
            ops = others;
        }
    }

    /// Two steps next to each other change places, some at a time, where the program still ends.
    fn change_places(&mut self) {
        for _ in 0..20 {
            let before = self.program.ranks.clone();
            for _ in 0..1 + self.random.below(4) {
                let rank = self.random.below(self.program.world);
                let n_steps = self.program.ranks[rank].len();
                if n_steps > 1 {
                    let i = self.random.below(n_steps - 1);
                    if self.may_change_places(rank, i) {
                        self.program.ranks[rank].swap(i, i + 1);
                    }
                }
            }
            if !machine::ends(&self.program) {
                self.program.ranks = before;
            }
        }
    }

    fn may_change_places(&self, rank: usize, i: usize) -> bool {
        let steps = &self.program.ranks[rank];
        let ((streams, comms), (others, other_comms)) =
            (self.program.touches(&steps[i]), self.program.touches(&steps[i + 1]));
        !streams.iter().any(|stream| others.contains(stream)) && !comms.iter().any(|comm| other_comms.contains(comm))
    }

    /// What is left is destroyed, in another order on every rank.
    fn end(&mut self) {
        for rank in 0..self.program.world {
            self.push(rank, Step::WaitAll);
            let mut live = self.live.clone();
            self.shuffle(&mut live);
            for comm in live {
                if self.program.comms[comm].members.contains(&rank) {
                    self.push(rank, Step::Destroy { comm, idle: true });
                }
            }
        }
        assert!(machine::ends(&self.program), "seed {}: the end does not end", self.program.seed);
    }
}

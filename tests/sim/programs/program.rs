//! What a program is: communicators, operations on them, and what each rank does, step by step.

use std::fmt;

use flashcomm_test_support::dtype;

/// A communicator: who is in it, by the ranks there.
#[derive(Clone, Debug)]
pub struct Comm {
    pub members: Vec<usize>,
    pub non_blocking: bool,
    /// What makes it.
    pub event: usize,
    /// What it is made of, which is busy with that.
    pub parent: Option<usize>,
}

impl Comm {
    pub fn rank_of(&self, rank: usize) -> Option<usize> {
        self.members.iter().position(|member| *member == rank)
    }
}

/// What an operation does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// An all-reduce of this type.
    Sum(i32),
    /// Of whole numbers, from this rank of the communicator.
    Broadcast(usize),
    /// An all-gather of whole numbers.
    Gather,
    /// Each rank sends bytes to the next one and receives them from the one before.
    Shift,
}

/// An operation, the same on all ranks of its communicator. Each has memory of its own.
#[derive(Clone, Debug)]
pub struct Op {
    pub comm: usize,
    pub kind: Kind,
    pub count: usize,
    pub in_place: bool,
}

/// How a rank issues some operations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// One after the other.
    Alone,
    Group,
    /// In a group within a group, but for the first.
    Nested,
    /// Captured, and replayed so often.
    Graph(usize),
}

/// One call that makes communicators.
#[derive(Clone, Debug)]
pub enum Making {
    Init {
        comm: usize,
    },
    /// Of all members by this one call; they take theirs from it.
    InitAll {
        comm: usize,
    },
    /// Into the child, or into none.
    Split {
        parent: usize,
        color: i32,
        key: i32,
        child: Option<usize>,
    },
    Shrink {
        parent: usize,
        without: i32,
        child: usize,
    },
}

/// A step of one rank.
#[derive(Clone, Debug)]
pub enum Step {
    /// Some together in a group, where it says so.
    Create {
        makings: Vec<(usize, Making)>,
        grouped: bool,
    },
    /// Waits for a communicator that does not block.
    Settle(usize),
    /// Takes its handle from who made all of them.
    Take(usize),
    /// Operations by their numbers, each on a stream.
    Issue {
        ops: Vec<(usize, usize)>,
        way: Way,
    },
    /// The second stream waits for what the first has now.
    Order(usize, usize),
    Wait(usize),
    /// A message to another rank, outside of NCCL.
    Tell(usize),
    Hear(usize),
    /// Microseconds.
    Sleep(u64),
    /// After all of the rank's streams are idle, where it says so.
    Destroy {
        comm: usize,
        idle: bool,
    },
    WaitAll,
}

/// A program.
#[derive(Clone, Debug)]
pub struct Program {
    pub seed: u64,
    pub world: usize,
    pub comms: Vec<Comm>,
    pub ops: Vec<Op>,
    /// The ranks that each making takes.
    pub events: Vec<Vec<usize>>,
    pub ranks: Vec<Vec<Step>>,
}

/// Streams of a rank.
pub const STREAMS: usize = 3;

impl Making {
    /// The communicators that it needs or makes.
    pub fn comms(&self) -> Vec<usize> {
        match *self {
            Making::Init { comm } | Making::InitAll { comm } => vec![comm],
            Making::Split { parent, child, .. } => child.into_iter().chain([parent]).collect(),
            Making::Shrink { parent, child, .. } => vec![parent, child],
        }
    }

    /// Whether it is made of a communicator, on which nothing may be under way.
    pub fn is_of_parent(&self) -> bool {
        matches!(self, Making::Split { .. } | Making::Shrink { .. })
    }
}

impl Program {
    /// The streams and the communicators that a step is about.
    pub fn touches(&self, step: &Step) -> (Vec<usize>, Vec<usize>) {
        match step {
            Step::Create { makings, .. } => {
                let all = if makings.iter().any(|(_, making)| making.is_of_parent()) { STREAMS } else { 0 };
                ((0..all).collect(), makings.iter().flat_map(|(_, making)| making.comms()).collect())
            }
            Step::Settle(comm) | Step::Take(comm) => {
                (vec![], self.comms[*comm].parent.into_iter().chain([*comm]).collect())
            }
            Step::Issue { ops, .. } => ops.iter().map(|(op, stream)| (*stream, self.ops[*op].comm)).unzip(),
            Step::Order(first, second) => (vec![*first, *second], vec![]),
            Step::Wait(stream) => (vec![*stream], vec![]),
            Step::Tell(_) | Step::Hear(_) | Step::Sleep(_) => (vec![], vec![]),
            Step::Destroy { comm, idle } => ((0..if *idle { STREAMS } else { 0 }).collect(), vec![*comm]),
            Step::WaitAll => ((0..STREAMS).collect(), (0..self.comms.len()).collect()),
        }
    }

    /// A rank's steps in short lines, with a mark at the one that it is at.
    pub fn listing(&self, rank: usize, at: usize) -> String {
        let mark = |i: usize| if i == at { '>' } else { ' ' };
        let line = |(i, step)| format!("{} {}\n", mark(i), self.line(step));
        let lines: String = self.ranks[rank].iter().enumerate().map(line).collect();
        let end = if at == self.ranks[rank].len() { "> its end\n" } else { "" };
        format!("rank {rank}:\n{lines}{end}")
    }

    fn line(&self, step: &Step) -> String {
        let making = |(_, making): &(usize, Making)| match *making {
            Making::Init { comm } => {
                let Comm { members, non_blocking, .. } = &self.comms[comm];
                format!("c{comm} of {members:?}{}", if *non_blocking { ", non-blocking" } else { "" })
            }
            Making::InitAll { comm } => format!("c{comm} of all {:?} at once", self.comms[comm].members),
            Making::Split { parent, color, key, child } => {
                format!("split of c{parent}, color {color}, key {key}: {child:?}")
            }
            Making::Shrink { parent, without, child } => format!("c{child}: c{parent} without {without}"),
        };
        match step {
            Step::Create { makings, grouped } => {
                let makings: Vec<_> = makings.iter().map(making).collect();
                format!("create {}{}", if *grouped { "in a group " } else { "" }, makings.join("; "))
            }
            Step::Issue { ops, way } => {
                let op = |(op, stream): &(usize, usize)| format!("#{op} {} on s{stream}", self.ops[*op]);
                let ops: Vec<_> = ops.iter().map(op).collect();
                format!("{way:?} {}", ops.join("; "))
            }
            Step::Sleep(us) => format!("sleep {us} us"),
            Step::Destroy { comm, idle } => format!("destroy c{comm}{}", if *idle { ", idle" } else { "" }),
            other => format!("{other:?}"),
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Sum(dtype::FP16) => "sum fp16".into(),
            Kind::Sum(dtype::BF16) => "sum bf16".into(),
            Kind::Sum(dtype::FP32) => "sum fp32".into(),
            Kind::Sum(_) => "sum int32".into(),
            other => format!("{other:?}"),
        };
        let place = if self.in_place { " in place" } else { "" };
        write!(f, "{kind} x {} c{}{place}", self.count, self.comm)
    }
}

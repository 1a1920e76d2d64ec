//! Graphs: the nodes of a capture, replayed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use flashcomm_sim_schedule as schedule;
use parking_lot::Mutex;

use super::capture::{Node, NodeWork};
use super::event::Mark;
use crate::clock::{self, Clock};
use crate::cu_result::Result;

/// The records that the event nodes of one launch are about, by node.
pub struct Launched(Vec<Option<Arc<Mark>>>);

/// A launch that runs.
struct Run<'a> {
    marks: &'a [Option<Arc<Mark>>],
    /// By node: those that it still needs.
    left: Vec<AtomicUsize>,
    /// The clock of the stream when it began.
    start: Clock,
    /// By node: virtual nanoseconds at its end. A branch has a clock of its own.
    ends: Vec<AtomicU64>,
    outcome: Mutex<Result<()>>,
}

/// An instantiated graph. Launches of the same one run one after the other.
pub struct Executable {
    nodes: Vec<Node>,
    successors: Vec<Vec<usize>>,
    /// Virtual nanoseconds at the end of the last launch; held by the one that runs.
    running: Mutex<u64>,
}

impl Executable {
    /// From the nodes of a capture.
    pub fn new(nodes: Vec<Node>) -> Self {
        let mut successors = vec![Vec::new(); nodes.len()];
        for (i, node) in nodes.iter().enumerate() {
            node.needs.iter().for_each(|needed| successors[*needed].push(i));
        }
        Executable { nodes, successors, running: Mutex::new(0) }
    }

    /// Settles which records its event nodes are about, in the order in which they were captured. To be called when it is
    /// launched; the answer is for [`Executable::run`].
    pub fn launch(&self) -> Launched {
        let mark = |node: &Node| match &node.work {
            NodeWork::Task(_) => None,
            NodeWork::Record(event) => Some(event.next_mark()),
            NodeWork::Wait(event) => event.last_mark(),
        };
        Launched(self.nodes.iter().map(mark).collect())
    }

    /// Runs every node after those that it needs; branches run side by side.
    pub fn run(&self, Launched(marks): &Launched) -> Result<()> {
        let mut running = self.running.lock();
        let run = Run {
            marks,
            left: self.nodes.iter().map(|node| AtomicUsize::new(node.needs.len())).collect(),
            start: clock::current().raised(*running),
            ends: self.nodes.iter().map(|_| AtomicU64::new(0)).collect(),
            outcome: Mutex::new(Ok(())),
        };
        let ready = (0..self.nodes.len()).filter(|i| self.nodes[*i].needs.is_empty()).collect();
        thread::scope(|scope| self.follow(scope, ready, &run));
        let end = run.ends.iter().map(|end| end.load(Ordering::Acquire)).max();
        clock::set(run.start.raised(end.unwrap_or(0)));
        *running = clock::current().now_ns();
        run.outcome.into_inner()
    }

    /// Runs the first of the ready nodes and what then becomes ready, the others on threads of their own.
    fn follow<'scope, 'env>(
        &'env self,
        scope: &'scope thread::Scope<'scope, 'env>,
        mut ready: Vec<usize>,
        run: &'env Run<'env>,
    ) {
        while let Some(node) = ready.pop() {
            for other in ready.drain(..) {
                scope.spawn(move || self.follow(scope, vec![other], run));
            }
            schedule::point();
            let needs = self.nodes[node].needs.iter().map(|needed| run.ends[*needed].load(Ordering::Acquire));
            clock::set(run.start.raised(needs.max().unwrap_or(0)));
            if run.outcome.lock().is_ok() {
                schedule::step();
                match (&self.nodes[node].work, &run.marks[node]) {
                    (NodeWork::Task(task), _) => {
                        if let Err(code) = task() {
                            *run.outcome.lock() = Err(code);
                        }
                    }
                    (NodeWork::Record(_), Some(mark)) => mark.complete(),
                    (NodeWork::Wait(event), Some(mark)) => mark.wait(event.device),
                    (_, None) => {}
                }
            }
            run.ends[node].store(clock::current().now_ns(), Ordering::Release);
            let becomes_ready = |next: &&usize| run.left[**next].fetch_sub(1, Ordering::AcqRel) == 1;
            ready.extend(self.successors[node].iter().filter(becomes_ready));
        }
    }
}

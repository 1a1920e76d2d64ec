//! Graphs: the nodes of a capture, replayed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use flashcomm_sim_schedule as schedule;
use parking_lot::Mutex;

use super::capture::{Node, NodeWork};
use super::event::Mark;
use crate::cu_result::Result;

/// The records that the event nodes of one launch are about, by node.
pub struct Launched(Vec<Option<Arc<Mark>>>);

/// An instantiated graph. Launches of the same one run one after the other.
pub struct Executable {
    nodes: Vec<Node>,
    successors: Vec<Vec<usize>>,
    running: Mutex<()>,
}

impl Executable {
    /// From the nodes of a capture.
    pub fn new(nodes: Vec<Node>) -> Self {
        let mut successors = vec![Vec::new(); nodes.len()];
        for (i, node) in nodes.iter().enumerate() {
            node.needs.iter().for_each(|needed| successors[*needed].push(i));
        }
        Executable { nodes, successors, running: Mutex::new(()) }
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
        let _running = self.running.lock();
        let left: Vec<_> = self.nodes.iter().map(|node| AtomicUsize::new(node.needs.len())).collect();
        let outcome = Mutex::new(Ok(()));
        let ready = (0..self.nodes.len()).filter(|i| self.nodes[*i].needs.is_empty()).collect();
        thread::scope(|scope| self.follow(scope, ready, marks, &left, &outcome));
        outcome.into_inner()
    }

    /// Runs the first of the ready nodes and what then becomes ready, the others on threads of their own.
    fn follow<'scope, 'env>(
        &'env self,
        scope: &'scope thread::Scope<'scope, 'env>,
        mut ready: Vec<usize>,
        marks: &'env [Option<Arc<Mark>>],
        left: &'env [AtomicUsize],
        outcome: &'env Mutex<Result<()>>,
    ) {
        while let Some(node) = ready.pop() {
            for other in ready.drain(..) {
                scope.spawn(move || self.follow(scope, vec![other], marks, left, outcome));
            }
            schedule::point();
            if outcome.lock().is_ok() {
                schedule::step();
                match (&self.nodes[node].work, &marks[node]) {
                    (NodeWork::Task(task), _) => {
                        if let Err(code) = task() {
                            *outcome.lock() = Err(code);
                        }
                    }
                    (NodeWork::Record(_), Some(mark)) => mark.complete(),
                    (NodeWork::Wait(event), Some(mark)) => mark.wait(event.device),
                    (_, None) => {}
                }
            }
            let becomes_ready = |next: &&usize| left[**next].fetch_sub(1, Ordering::AcqRel) == 1;
            ready.extend(self.successors[node].iter().filter(becomes_ready));
        }
    }
}

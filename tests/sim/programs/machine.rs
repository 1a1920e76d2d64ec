//! Whether a program ends, by the application's own rules: what a call waits for on the host, and
//! what an operation waits for on its stream, in its communicator and of the other ranks. Time does
//! not matter: whatever can go on goes on, and the order does not change how far all get.

use std::collections::HashMap;

use super::GAPS;
use super::program::{Program, STREAMS, Step, Way};

/// Something on a stream.
struct Node {
    needs: Vec<usize>,
    /// The other ranks' nodes of the same operation are under this key; `None`: it needs nobody.
    meets: Option<(usize, usize)>,
    is_done: bool,
}

struct Machine<'a> {
    program: &'a Program,
    nodes: Vec<Node>,
    meetings: HashMap<(usize, usize), Vec<usize>>,
    /// The last nodes of each rank's streams and communicators.
    streams: Vec<[Option<usize>; STREAMS]>,
    comms: Vec<Vec<Option<usize>>>,
    /// Launches so far.
    launched: Vec<Vec<usize>>,
    /// Who has come to each making.
    arrived: Vec<Vec<usize>>,
    told: Vec<usize>,
    at: Vec<usize>,
}

/// Whether it does.
pub fn ends(program: &Program) -> bool {
    let (world, n_comms) = (program.world, program.comms.len());
    let mut machine = Machine {
        program,
        nodes: Vec::new(),
        meetings: HashMap::new(),
        streams: vec![[None; STREAMS]; world],
        comms: vec![vec![None; n_comms]; world],
        launched: vec![vec![0; n_comms]; world],
        arrived: vec![Vec::new(); program.events.len()],
        told: Vec::new(),
        at: vec![0; world],
    };
    while machine.goes_on() {}
    (0..world).all(|rank| machine.at[rank] == program.ranks[rank].len())
}

impl Machine<'_> {
    fn goes_on(&mut self) -> bool {
        let mut moved = false;
        for rank in 0..self.program.world {
            while let Some(step) = self.program.ranks[rank].get(self.at[rank])
                && self.does(rank, step)
            {
                self.at[rank] += 1;
                moved = true;
            }
        }
        for node in 0..self.nodes.len() {
            if !self.nodes[node].is_done && self.may_run(node) {
                self.nodes[node].is_done = true;
                moved = true;
            }
        }
        moved
    }

    fn is_done(&self, node: Option<usize>) -> bool {
        node.is_none_or(|node| self.nodes[node].is_done)
    }

    /// All ranks have come to the operation, and nothing is before it.
    fn may_run(&self, node: usize) -> bool {
        let is_next = |node: &usize| self.nodes[*node].needs.iter().all(|needed| self.nodes[*needed].is_done);
        match &self.nodes[node].meets {
            None => is_next(&node),
            Some(key) => {
                let all = &self.meetings[key];
                all.len() == self.program.comms[key.0].members.len() && all.iter().all(is_next)
            }
        }
    }

    fn is_made(&self, event: usize) -> bool {
        let have_all_come = |event: usize| self.arrived[event].len() == self.program.events[event].len();
        have_all_come(event) && (GAPS || self.made_with(event).all(have_all_come))
    }

    /// What is made by the same groups, of those that wait.
    fn made_with(&self, event: usize) -> impl Iterator<Item = usize> {
        let steps = self.arrived[event].iter().flat_map(|rank| &self.program.ranks[*rank]);
        let makings =
            steps.filter_map(|step| if let Step::Create { makings, .. } = step { Some(makings) } else { None });
        let same = makings.filter(move |makings| makings.iter().any(|(other, _)| *other == event));
        same.flatten().map(|(other, _)| *other).filter(|other| self.blocks(*other))
    }

    /// Does a step, if it need not wait.
    fn does(&mut self, rank: usize, step: &Step) -> bool {
        let is_idle = |machine: &Self| machine.streams[rank].iter().all(|last| machine.is_done(*last));
        match step {
            Step::Create { makings, .. } => {
                if makings.iter().any(|(_, making)| making.is_of_parent()) && !is_idle(self) {
                    return false;
                }
                for (event, _) in makings {
                    if !self.arrived[*event].contains(&rank) {
                        self.arrived[*event].push(rank);
                    }
                }
                let goes_on = |(event, _): &(usize, _)| self.is_made(*event) || !self.blocks(*event);
                makings.iter().all(goes_on)
            }
            Step::Settle(comm) | Step::Take(comm) => self.is_made(self.program.comms[*comm].event),
            Step::Issue { ops, way } => {
                if matches!(way, Way::Graph(_)) && !self.is_done(self.streams[rank][ops[0].1]) {
                    return false;
                }
                self.issue(rank, ops, *way);
                true
            }
            Step::Order(first, second) => {
                self.add(rank, &[*first, *second], None);
                true
            }
            Step::Wait(stream) => self.is_done(self.streams[rank][*stream]),
            Step::WaitAll => is_idle(self),
            Step::Tell(message) => {
                self.told.push(*message);
                true
            }
            Step::Hear(message) => self.told.contains(message),
            Step::Sleep(_) => true,
            // It frees memory, which waits for all that the device has been given.
            Step::Destroy { .. } => is_idle(self),
        }
    }

    fn blocks(&self, event: usize) -> bool {
        !self.program.comms.iter().any(|comm| comm.event == event && comm.non_blocking)
    }

    fn issue(&mut self, rank: usize, ops: &[(usize, usize)], way: Way) {
        let comm_of = |op: usize| self.program.ops[op].comm;
        let mut launches: Vec<(usize, Vec<usize>)> = Vec::new();
        for (op, stream) in ops {
            let together = matches!(way, Way::Group | Way::Nested);
            match launches.iter_mut().find(|(comm, _)| together && *comm == comm_of(*op)) {
                Some((_, streams)) => streams.push(*stream),
                None => launches.push((comm_of(*op), vec![*stream])),
            }
        }
        let times = if let Way::Graph(times) = way { times } else { 1 };
        for (comm, streams) in (0..times).flat_map(|_| &launches) {
            self.add(rank, streams, Some(*comm));
        }
    }

    fn add(&mut self, rank: usize, streams: &[usize], comm: Option<usize>) {
        let node = self.nodes.len();
        let before = streams.iter().filter_map(|stream| self.streams[rank][*stream]);
        let needs = before.chain(comm.and_then(|comm| self.comms[rank][comm])).collect();
        let meets = comm.map(|comm| {
            self.launched[rank][comm] += 1;
            (comm, self.launched[rank][comm])
        });
        self.nodes.push(Node { needs, meets, is_done: false });
        streams.iter().for_each(|stream| self.streams[rank][*stream] = Some(node));
        if let (Some(comm), Some(key)) = (comm, meets) {
            self.comms[rank][comm] = Some(node);
            self.meetings.entry(key).or_default().push(node);
        }
    }
}

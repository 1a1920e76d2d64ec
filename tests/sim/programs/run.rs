//! A rank does the steps of its program.

use std::collections::HashMap;
use std::ffi::c_int;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use flashcomm_test_support::*;

use super::data::{self, Place};
use super::program::{Kind, Making, Program, STREAMS, Step, Way};

/// Where ranks of a program tell each other what they do not tell by NCCL.
#[derive(Clone)]
pub enum Board {
    /// Of threads.
    Here(Arc<(Mutex<HashMap<String, Vec<u8>>>, Condvar)>),
    /// Of processes: names begin so.
    Files(Arc<Process>, String),
}

impl Board {
    pub fn tell(&self, name: &str, what: &[u8]) {
        match self {
            Board::Here(there) => {
                there.0.lock().unwrap().insert(name.into(), what.into());
                there.1.notify_all();
            }
            Board::Files(process, prefix) => process.tell(&format!("{prefix}{name}"), what),
        }
    }

    pub fn hear(&self, name: &str) -> Vec<u8> {
        match self {
            Board::Here(there) => {
                let told = there.1.wait_while(there.0.lock().unwrap(), |told| !told.contains_key(name)).unwrap();
                told[name].clone()
            }
            Board::Files(process, prefix) => process.hear(&format!("{prefix}{name}")),
        }
    }

    fn unique_id(&self, comm: usize) -> UniqueId {
        UniqueId(self.hear(&format!("id{comm}")).try_into().unwrap())
    }
}

/// One rank of a program.
pub struct Rank<'a> {
    program: &'a Program,
    rank: usize,
    board: &'a Board,
    comms: Vec<Ptr>,
    streams: Vec<Stream>,
    graphs: Vec<Graph>,
    memory: Memory,
    places: &'a [Option<Place>],
}

type Ptr = usize;

/// `ncclInProgress`.
const IN_PROGRESS: c_int = 7;

/// A call on communicators that may not block.
fn accept(result: c_int, non_blocking: bool) {
    assert!(result == 0 || non_blocking && result == IN_PROGRESS, "answer {result}");
}

fn settle(comm: Ptr) {
    let mut state = IN_PROGRESS;
    while state == IN_PROGRESS {
        ok!(ncclCommGetAsyncError(comm, &mut state));
        std::thread::sleep(Duration::from_micros(50));
    }
    assert_eq!(state, 0, "a communicator that does not block");
}

impl<'a> Rank<'a> {
    /// Does all of it, and says where it is. Wants its memory to be as it must be then.
    pub fn run(program: &'a Program, rank: usize, board: &'a Board, memory: &'a data::Memory, at: &AtomicUsize) {
        let streams: Vec<_> = (0..STREAMS).map(|_| Stream::new()).collect();
        let arena = Memory::new(memory.before.len().max(1));
        arena.write_bytes(&memory.before, &streams[0]);
        streams[0].wait();
        let (comms, graphs, places) = (vec![0; program.comms.len()], Vec::new(), &*memory.places);
        let mut me = Rank { program, rank, board, comms, streams, graphs, memory: arena, places };
        for (i, step) in program.ranks[rank].iter().enumerate() {
            at.store(i, Ordering::Relaxed);
            me.step(step);
        }
        at.store(program.ranks[rank].len(), Ordering::Relaxed);
        let after = me.memory.read_bytes(memory.after.len(), &me.streams[0]);
        if let Some(byte) = (0..after.len()).find(|i| after[*i] != memory.after[*i]) {
            let starts = |(_, place): &(usize, &Option<Place>)| place.is_some_and(|place| place.input <= byte);
            let op = memory.places.iter().enumerate().filter(starts).map(|(op, _)| op).next_back();
            panic!("rank {rank}: byte {byte} is wrong, of operation {op:?}");
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Create { makings, grouped } => self.create(makings, *grouped),
            Step::Settle(comm) => settle(self.comms[*comm]),
            Step::Take(comm) => {
                let name = format!("handle{comm}-{}", self.rank);
                self.comms[*comm] = usize::from_le_bytes(self.board.hear(&name).try_into().unwrap());
            }
            Step::Issue { ops, way } => self.issue(ops, *way),
            Step::Order(first, second) => order(&self.streams[*first], &self.streams[*second]),
            Step::Wait(stream) => self.streams[*stream].wait(),
            Step::WaitAll => self.streams.iter().for_each(Stream::wait),
            Step::Tell(message) => self.board.tell(&format!("message{message}"), &[]),
            Step::Hear(message) => drop(self.board.hear(&format!("message{message}"))),
            Step::Sleep(us) => std::thread::sleep(Duration::from_micros(*us)),
            Step::Destroy { comm, idle } => {
                if *idle {
                    self.streams.iter().for_each(Stream::wait);
                    self.graphs.clear();
                }
                ok!(ncclCommDestroy(self.comms[*comm]));
            }
        }
    }

    fn create(&mut self, makings: &[(usize, Making)], grouped: bool) {
        if makings.iter().any(|(_, making)| making.is_of_parent()) {
            self.streams.iter().for_each(Stream::wait);
        }
        let is_non_blocking = |comm: usize| self.program.comms[comm].non_blocking;
        let non_blocking = makings.iter().any(|(_, making)| is_non_blocking(making.comms()[0]));
        if grouped {
            ok!(ncclGroupStart());
        }
        let mut nowhere = 0;
        for (_, making) in makings {
            accept(self.make(making, &mut nowhere), non_blocking);
        }
        if grouped {
            accept(call!(ncclGroupEnd()), non_blocking);
        }
    }

    fn make(&mut self, making: &Making, nowhere: &mut Ptr) -> c_int {
        let rank = self.rank;
        match *making {
            Making::Init { comm } => {
                let plan = &self.program.comms[comm];
                let (world, id) = (plan.members.len() as c_int, self.board.unique_id(comm));
                let rank = plan.rank_of(rank).unwrap() as c_int;
                let place = &mut self.comms[comm];
                match plan.non_blocking {
                    true => call!(ncclCommInitRankConfig(place, world, id, rank, &Config::non_blocking())),
                    false => call!(ncclCommInitRank(place, world, id, rank)),
                }
            }
            Making::InitAll { comm } => {
                let members = &self.program.comms[comm].members;
                let devices: Vec<c_int> = members.iter().map(|member| *member as c_int).collect();
                let mut handles = vec![0; members.len()];
                let result = call!(ncclCommInitAll(handles.as_mut_ptr(), members.len() as c_int, devices.as_ptr()));
                for (member, handle) in members.iter().zip(handles) {
                    self.board.tell(&format!("handle{comm}-{member}"), &handle.to_le_bytes());
                    if *member == rank {
                        self.comms[comm] = handle;
                    }
                }
                result
            }
            Making::Split { parent, color, key, child } => {
                let parent = self.comms[parent];
                let place = child.map_or(nowhere, |child| &mut self.comms[child]);
                call!(ncclCommSplit(parent, color, key, place, std::ptr::null()))
            }
            Making::Shrink { parent, without, child } => {
                let parent = self.comms[parent];
                call!(ncclCommShrink(parent, &without, 1, &mut self.comms[child], std::ptr::null(), 0))
            }
        }
    }

    fn issue(&mut self, ops: &[(usize, usize)], way: Way) {
        let plan = |op: usize| &self.program.comms[self.program.ops[op].comm];
        let non_blocking = plan(ops[0].0).non_blocking;
        let settle_all = || {
            let comms = ops.iter().filter(|_| non_blocking).map(|(op, _)| self.program.ops[*op].comm);
            comms.for_each(|comm| settle(self.comms[comm]));
        };
        match way {
            Way::Alone => ops.iter().for_each(|(op, stream)| {
                self.call(*op, *stream, non_blocking);
                settle_all();
            }),
            Way::Group | Way::Nested => {
                let depth = |i: usize| if way == Way::Nested && i > 0 { 1 } else { 0 };
                ok!(ncclGroupStart());
                for (i, (op, stream)) in ops.iter().enumerate() {
                    (0..depth(i)).for_each(|_| ok!(ncclGroupStart()));
                    self.call(*op, *stream, non_blocking);
                    (0..depth(i)).for_each(|_| ok!(ncclGroupEnd()));
                }
                accept(call!(ncclGroupEnd()), non_blocking);
                settle_all();
            }
            Way::Graph(times) => {
                let stream = &self.streams[ops[0].1];
                stream.wait();
                let graph = stream.capture(|| ops.iter().for_each(|(op, on)| self.call(*op, *on, false)));
                (0..times).for_each(|_| graph.launch(stream));
                self.graphs.push(graph);
            }
        }
    }

    fn call(&self, op: usize, stream: usize, non_blocking: bool) {
        let Place { input, output } = self.places[op].unwrap();
        let (from, to) = (self.memory.at + input, self.memory.at + output);
        let (op, stream) = (&self.program.ops[op], self.streams[stream].0);
        let (comm, plan) = (self.comms[op.comm], &self.program.comms[op.comm]);
        let (count, whole) = (op.count, dtype::INT32);
        let result = match op.kind {
            Kind::Sum(dtype) => call!(ncclAllReduce(from, to, count, dtype, SUM, comm, stream)),
            Kind::Broadcast(root) => call!(ncclBroadcast(from, to, count, whole, root as c_int, comm, stream)),
            Kind::Gather => call!(ncclAllGather(from, to, count, whole, comm, stream)),
            Kind::Shift => {
                let (rank, world) = (plan.rank_of(self.rank).unwrap(), plan.members.len());
                let (next, before) = ((rank + 1) % world, (rank + world - 1) % world);
                ok!(ncclGroupStart());
                accept(call!(ncclSend(from, count, dtype::UINT8, next as c_int, comm, stream)), non_blocking);
                accept(call!(ncclRecv(to, count, dtype::UINT8, before as c_int, comm, stream)), non_blocking);
                call!(ncclGroupEnd())
            }
        };
        accept(result, non_blocking);
    }
}

//! Counts of what was compressed and what was forwarded, and why: by communicator and size class.
//!
//! A communicator has a block of counters, which a thread finds in a small table of its own by the handle: counting is a
//! look-up and plain additions, no lock, no allocation, no cache line that another rank writes. NCCL wants a communicator
//! used by one thread at a time, so nobody else adds to its counters; threads that break that rule lose counts, nothing
//! else. The first call of a thread on a communicator takes a lock for a moment and may allocate.
//!
//! A block is used again by another communicator when its own has ended, and never freed: a thread that still knows it sees
//! from its owner that it is another's. What ended communicators counted is kept by [`report`].
//!
//! An operation that is captured into a graph is counted when it is captured; replays are not seen.

pub mod report;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use parking_lot::Mutex;

use crate::config::Config;
use crate::nccl::{self, CommPtr, NcclResult};
use crate::route::Reason;
use crate::thread::{self, Thread};
use report::{Counts, Ended};

/// The collective and point-to-point calls that are counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "each is the NCCL function of that name, its Config form included")]
pub enum Call {
    Broadcast,
    Reduce,
    AllGather,
    ReduceScatter,
    AlltoAll,
    Gather,
    Scatter,
    Send,
    Recv,
}

impl Call {
    /// Every call but the all-reduce, in the order of the counters.
    pub const ALL: [(Call, &str); 9] = [
        (Call::Broadcast, "broadcast"),
        (Call::Reduce, "reduce"),
        (Call::AllGather, "all_gather"),
        (Call::ReduceScatter, "reduce_scatter"),
        (Call::AlltoAll, "all_to_all"),
        (Call::Gather, "gather"),
        (Call::Scatter, "scatter"),
        (Call::Send, "send"),
        (Call::Recv, "recv"),
    ];
}

const N_CALLS: usize = Call::ALL.len();
const N_REASONS: usize = Reason::ALL.len();

/// Size classes of all-reduces: below 1 KiB, then one for each power of two, the last from 4 GiB on.
pub const SIZE_CLASSES: usize = 24;

/// The class of an all-reduce of so many bytes.
pub const fn size_class(n_bytes: u64) -> usize {
    let class = (u64::BITS - n_bytes.leading_zeros()).saturating_sub(10) as usize;
    if class < SIZE_CLASSES { class } else { SIZE_CLASSES - 1 }
}

/// The fewest bytes of a class.
pub const fn class_start(class: usize) -> u64 {
    if class == 0 { 0 } else { 512 << class }
}

/// Owner of a block that is nobody's.
const FREE: usize = usize::MAX;

/// The counters of one communicator, on cache lines of their own.
#[repr(align(128))]
pub struct Counters {
    /// The communicator's handle, or [`FREE`].
    owner: AtomicUsize,
    calls: [AtomicU64; N_CALLS],
    /// Calls, bytes of the caller's, bytes sent by this rank.
    compressed: [[AtomicU64; 3]; SIZE_CLASSES],
    /// Calls, bytes of the caller's.
    forwarded: [[[AtomicU64; 2]; N_REASONS]; SIZE_CLASSES],
}

impl Counters {
    const fn new() -> Self {
        Self {
            owner: AtomicUsize::new(FREE),
            calls: [const { AtomicU64::new(0) }; N_CALLS],
            compressed: [const { [const { AtomicU64::new(0) }; 3] }; SIZE_CLASSES],
            forwarded: [const { [const { [const { AtomicU64::new(0) }; 2] }; N_REASONS] }; SIZE_CLASSES],
        }
    }

    fn clear(&self) {
        let compressed = self.compressed.iter().flatten();
        let forwarded = self.forwarded.iter().flatten().flatten();
        self.calls.iter().chain(compressed).chain(forwarded).for_each(|counter| counter.store(0, Relaxed));
    }
}

fn add(counter: &AtomicU64, n: u64) {
    // The only writer is this thread.
    counter.store(counter.load(Relaxed) + n, Relaxed);
}

/// Counts a call of a communicator, no all-reduce, that goes to the real NCCL.
#[inline]
pub fn forwarded(thread: &Thread, call: Call, comm: CommPtr) {
    add(&thread.known.counters(comm).calls[call as usize], 1);
}

/// Counts an all-reduce that goes to the real NCCL, and why.
pub fn all_reduce_forwarded(reason: Reason, n_bytes: u64, comm: CommPtr) {
    let [calls, bytes] = &counters(comm).forwarded[size_class(n_bytes)][reason as usize];
    add(calls, 1);
    add(bytes, n_bytes);
}

/// Counts a compressed all-reduce: `n_bytes` of the caller's, `n_bytes_wire` sent by this rank.
pub fn compressed(n_bytes: u64, n_bytes_wire: u64, comm: CommPtr) {
    let [calls, bytes_in, bytes_wire] = &counters(comm).compressed[size_class(n_bytes)];
    add(calls, 1);
    add(bytes_in, n_bytes);
    add(bytes_wire, n_bytes_wire);
}

/// log2 of the places in a thread's table.
const KNOWN_SHIFT: u32 = 6;

/// The counters that a thread has used lately; each handle has two places.
pub struct Known([Cell<Option<&'static Counters>>; 1 << KNOWN_SHIFT]);

fn counters(comm: CommPtr) -> &'static Counters {
    thread::current().known.counters(comm)
}

impl Known {
    /// None yet.
    #[allow(clippy::new_without_default, reason = "made by a constant expression only")]
    pub const fn new() -> Self {
        Known([const { Cell::new(None) }; 1 << KNOWN_SHIFT])
    }

    #[inline]
    fn counters(&self, comm: CommPtr) -> &'static Counters {
        let handle = comm as usize;
        let place = ((handle as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - KNOWN_SHIFT)) as usize;
        for place in [place, place ^ 1] {
            if let Some(counters) = self.0[place].get()
                && counters.owner.load(Relaxed) == handle
            {
                return counters;
            }
        }
        self.look_up(comm, place)
    }

    #[cold]
    fn look_up(&self, comm: CommPtr, place: usize) -> &'static Counters {
        // Who asks for a file per rank wants the rank also where nothing ever attaches.
        let identity = if Config::global().stats_file.is_some() { ask(comm) } else { None };
        report::become_reporter();
        let counters = REGISTRY.lock().entry(comm, identity).counters;
        self.0[place ^ 1].set(self.0[place].replace(Some(counters)));
        counters
    }
}

/// Rank and world size, by the real NCCL.
fn ask(comm: CommPtr) -> Option<(usize, usize)> {
    if comm.is_null() {
        return None;
    }
    let (mut rank, mut world) = (0, 0);
    // SAFETY: the application is using the communicator in this very call.
    let results = unsafe { [nccl::comm_user_rank(comm, &mut rank), nccl::comm_count(comm, &mut world)] };
    (results == [NcclResult::SUCCESS; 2]).then_some((rank as usize, world as usize))
}

/// What a communicator is, beside its counts.
#[derive(Clone, Debug, Default)]
pub struct About {
    /// Its place in the order of first use.
    pub number: u64,
    /// Rank and world size, where known.
    pub identity: Option<(usize, usize)>,
    /// Once it has attached and is on.
    pub attached: Option<Attached>,
}

/// What an attached communicator does.
#[derive(Clone, Debug)]
pub struct Attached {
    /// As `FLASHCOMM_BITS` has it.
    pub bits: String,
    /// As `FLASHCOMM_CODE` has it.
    pub code: &'static str,
    /// As `FLASHCOMM_EXCHANGE` has it.
    pub exchange: &'static str,
}

struct Entry {
    counters: &'static Counters,
    about: About,
}

struct Registry {
    live: BTreeMap<usize, Entry>,
    free: Vec<&'static Counters>,
    /// Communicators ever seen.
    n_seen: u64,
    ended: Ended,
}

static REGISTRY: Mutex<Registry> =
    Mutex::new(Registry { live: BTreeMap::new(), free: Vec::new(), n_seen: 0, ended: Ended::new() });

impl Registry {
    fn entry(&mut self, comm: CommPtr, identity: Option<(usize, usize)>) -> &mut Entry {
        let Registry { live, free, n_seen, .. } = self;
        let handle = comm as usize;
        let entry = live.entry(handle).or_insert_with(|| {
            let counters = free.pop().unwrap_or_else(|| Box::leak(Box::new(Counters::new())));
            counters.owner.store(handle, Relaxed);
            *n_seen += 1;
            Entry { counters, about: About { number: *n_seen, ..About::default() } }
        });
        entry.about.identity = entry.about.identity.or(identity);
        entry
    }
}

/// Notes what a communicator is, for the report.
pub fn describe(comm: CommPtr, rank: usize, world: usize, attached: Option<Attached>) {
    let mut registry = REGISTRY.lock();
    let about = &mut registry.entry(comm, Some((rank, world))).about;
    about.attached = attached;
}

/// A communicator is about to be destroyed or aborted: its handle may come again as another's.
pub fn end(comm: CommPtr) {
    let mut registry = REGISTRY.lock();
    let Some(Entry { counters, about }) = registry.live.remove(&(comm as usize)) else { return };
    let mut counts = Box::new(Counts::default());
    counts.add_counters(counters);
    counters.owner.store(FREE, Relaxed);
    counters.clear();
    registry.free.push(counters);
    let summary = log::log_enabled!(log::Level::Info).then(|| counts.summary());
    let name = report::name(&about);
    registry.ended.push(about, counts);
    drop(registry);
    if let Some(summary) = summary {
        log::info!("{name} ended: {summary}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forwarded(call: Call, comm: CommPtr) {
        super::forwarded(thread::current(), call, comm);
    }

    /// A handle that no other test uses.
    fn handle() -> CommPtr {
        static NEXT: AtomicUsize = AtomicUsize::new(64);
        NEXT.fetch_add(512, Relaxed) as CommPtr
    }

    #[test]
    fn classes_are_powers_of_two() {
        assert_eq!([0, 1, 1023].map(size_class), [0; 3]);
        for class in 1..SIZE_CLASSES {
            assert_eq!(size_class(class_start(class)), class);
            assert_eq!(size_class(class_start(class) - 1), class - 1);
        }
        assert_eq!((class_start(1), class_start(SIZE_CLASSES - 1)), (1024, 4 << 30));
        assert_eq!(size_class(u64::MAX), SIZE_CLASSES - 1);
    }

    #[test]
    fn a_communicator_counts_for_itself_whatever_threads_it_is_used_by() {
        let comms: Vec<usize> = (0..4).map(|_| handle() as usize).collect();
        std::thread::scope(|scope| {
            for (i, comm) in comms.iter().enumerate() {
                scope.spawn(move || {
                    for _ in 0..1000 {
                        forwarded(Call::Send, *comm as CommPtr);
                        all_reduce_forwarded(Reason::Small, 100, *comm as CommPtr);
                        compressed(2048 << i, 57, *comm as CommPtr);
                    }
                });
            }
        });
        for (i, comm) in comms.into_iter().enumerate() {
            forwarded(Call::Send, comm as CommPtr); // by a thread that does not know it yet
            let counts = Counts::of(comm as CommPtr);
            assert_eq!((counts.others(), counts.forwarded(), counts.bytes_forwarded()), (1001, 1000, 100_000));
            assert_eq!(counts.compressed[2 + i], [1000, 2_048_000 << i, 57_000]);
            assert_eq!((counts.n_compressed(), counts.bytes_wire()), (1000, 57_000));
        }
    }

    #[test]
    fn more_communicators_than_a_thread_knows_at_once_are_told_apart() {
        let comms: Vec<CommPtr> = (0..500).map(|_| handle()).collect();
        for round in 0..3 {
            comms.iter().enumerate().for_each(|(i, comm)| compressed(5000, i as u64, *comm));
            for (i, comm) in comms.iter().enumerate() {
                assert_eq!(Counts::of(*comm).bytes_wire(), (round + 1) * i as u64);
            }
        }
    }

    #[test]
    fn an_address_used_again_starts_from_zero_and_the_total_keeps_what_was() {
        let (first, second) = (handle(), handle());
        let before = Counts::of_process().calls[Call::Gather as usize];
        for n in 1..=200 {
            forwarded(Call::Gather, first);
            assert_eq!(Counts::of(first).others(), 1, "the block of another has been zeroed");
            forwarded(Call::Gather, second);
            end(first);
            assert_eq!(Counts::of(first).others(), 0);
            assert_eq!(Counts::of(second).others(), n);
        }
        assert_eq!(Counts::of_process().calls[Call::Gather as usize] - before, 400);
        end(second);
    }
}

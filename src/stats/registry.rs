//! Who counts where: the counters of every communicator that lives, those that a thread knows, and
//! what ended communicators have counted.
//!
//! Of communicators that have ended the last [`MAX_ENDED`] are kept one by one; older ones are
//! merged, so that a process that makes communicators without end does not grow.

use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::ptr;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use std::sync::atomic::{AtomicBool, AtomicPtr};

use once_cell::sync::OnceCell;
use parking_lot::Mutex;

use super::counters::{Counters, Counts, FREE};
use super::file::StatsFile;
use crate::config::Config;
use crate::nccl::CommPtr;

/// Ended communicators that are told one by one.
const MAX_ENDED: usize = 64;

/// log2 of the places in a thread's table.
const KNOWN_SHIFT: u32 = 6;

/// Tells rank and world size of a communicator, where it can.
pub(super) type Identify = fn(CommPtr) -> Option<(usize, usize)>;

/// The counters that a thread has used lately; each handle has two places.
pub(crate) struct Known([Cell<Option<&'static Counters>>; 1 << KNOWN_SHIFT]);

impl Known {
    /// None yet.
    #[allow(clippy::new_without_default, reason = "made by a constant expression only")]
    pub(crate) const fn new() -> Self {
        Known([const { Cell::new(None) }; 1 << KNOWN_SHIFT])
    }

    /// The counters of a communicator. `identify` is asked for its rank and world size, at the thread's first call on it.
    #[inline]
    pub(crate) fn of(&self, comm: CommPtr, identify: Identify) -> &'static Counters {
        let handle = comm as usize;
        let place = ((handle as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (u64::BITS - KNOWN_SHIFT)) as usize;
        for place in [place, place ^ 1] {
            if let Some(counters) = self.0[place].get()
                && counters.owner.load(Relaxed) == handle
            {
                return counters;
            }
        }
        self.look_up(comm, place, identify)
    }

    #[cold]
    fn look_up(&self, comm: CommPtr, place: usize, identify: Identify) -> &'static Counters {
        // Who asks for a file per rank wants the rank also where nothing ever attaches.
        let identity = if Config::global().stats_file.is_some() { identify(comm) } else { None };
        let process = Process::enter();
        let counters = process.registry.lock().entry(comm, identity).counters;
        process.begin();
        self.0[place ^ 1].set(self.0[place].replace(Some(counters)));
        counters
    }
}

/// What a communicator is, beside its counts.
#[derive(Clone, Debug, Default)]
pub(super) struct About {
    /// Its place in the order of first use.
    pub number: u64,
    /// Rank and world size, where known.
    pub identity: Option<(usize, usize)>,
    /// Once it has attached and is on.
    pub attached: Option<Attached>,
    /// Sizes that have become slow.
    pub slow: Vec<Slow>,
}

/// Sums that take much longer than when the machine was measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slow {
    /// Of the smallest of their octave.
    pub n_bytes: u64,
    /// Uncompressed.
    pub is_exact: bool,
    /// Microseconds, of the fastest in a minute.
    pub us: u64,
    /// What the largest of the octave took when it was measured.
    pub measured_us: u64,
}

/// What an attached communicator does.
#[derive(Clone, Debug)]
pub(crate) struct Attached {
    /// As `FLASHCOMM_BITS` has it.
    pub bits: String,
    /// As `FLASHCOMM_CODE` has it.
    pub code: &'static str,
    /// As `FLASHCOMM_EXCHANGE` has it.
    pub exchange: &'static str,
}

pub(super) struct Entry {
    pub(super) counters: &'static Counters,
    pub(super) about: About,
}

pub(super) struct Registry {
    pub(super) live: BTreeMap<usize, Entry>,
    free: Vec<&'static Counters>,
    /// Communicators ever seen.
    n_seen: u64,
    pub(super) ended: Ended,
}

impl Registry {
    const fn new() -> Self {
        Registry { live: BTreeMap::new(), free: Vec::new(), n_seen: 0, ended: Ended::new() }
    }

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

impl Counts {
    /// Of a communicator; nothing for one that has not been used.
    pub(crate) fn of(comm: CommPtr) -> Box<Self> {
        let mut counts = Box::new(Counts::default());
        if let Some(process) = Process::current()
            && let Some(entry) = process.registry.lock().live.get(&(comm as usize))
        {
            counts.add_counters(entry.counters);
        }
        counts
    }

    /// Of the process.
    pub(crate) fn of_process() -> Box<Self> {
        let mut counts = Box::new(Counts::default());
        let Some(process) = Process::current() else { return counts };
        let registry = process.registry.lock();
        registry.live.values().for_each(|entry| counts.add_counters(entry.counters));
        registry.ended.all().for_each(|ended| counts.add(ended));
        counts
    }
}

/// Notes what a communicator is, for the report.
pub(crate) fn describe(comm: CommPtr, rank: usize, world: usize, attached: Option<Attached>) {
    let mut registry = Process::enter().registry.lock();
    let about = &mut registry.entry(comm, Some((rank, world))).about;
    about.attached = attached;
}

/// Notes that some sums of a communicator have become slow, for the report.
pub(crate) fn note_slow(comm: CommPtr, slow: Slow) {
    if let Some(process) = Process::current()
        && let Some(entry) = process.registry.lock().live.get_mut(&(comm as usize))
    {
        entry.about.slow.push(slow);
    }
}

/// A communicator is about to be destroyed or aborted: its handle may come again as another's.
pub(crate) fn end(comm: CommPtr) {
    let Some(process) = Process::current() else { return };
    let mut registry = process.registry.lock();
    let Some(Entry { counters, about }) = registry.live.remove(&(comm as usize)) else { return };
    let mut counts = Box::new(Counts::default());
    counts.add_counters(counters);
    counters.owner.store(FREE, Relaxed);
    counters.clear();
    registry.free.push(counters);
    let summary = log::log_enabled!(log::Level::Info).then(|| counts.summary());
    let name = name(&about);
    registry.ended.push(about, counts);
    drop(registry);
    if let Some(summary) = summary {
        log::info!("{name} ended: {summary}");
    }
}

/// What ended communicators have counted.
pub(super) struct Ended {
    pub(super) last: VecDeque<(About, Box<Counts>)>,
    pub(super) merged: Option<(u64, Box<Counts>)>,
}

impl Ended {
    const fn new() -> Self {
        Self { last: VecDeque::new(), merged: None }
    }

    fn push(&mut self, about: About, counts: Box<Counts>) {
        self.last.push_back((about, counts));
        if self.last.len() > MAX_ENDED {
            let (_, oldest) = self.last.pop_front().expect("more than one");
            let (n_merged, merged) = self.merged.get_or_insert_with(Default::default);
            *n_merged += 1;
            merged.add(&oldest);
        }
    }

    fn all(&self) -> impl Iterator<Item = &Counts> {
        let merged = self.merged.iter().map(|(_, counts)| &**counts);
        self.last.iter().map(|(_, counts)| &**counts).chain(merged)
    }
}

/// A communicator, in words.
pub(super) fn name(about: &About) -> String {
    let mut text = format!("communicator {}", about.number);
    if let Some((rank, world)) = about.identity {
        text += &format!(", rank {rank} of {world}");
    }
    match &about.attached {
        Some(Attached { bits, code, exchange }) => text + &format!(" ({bits} bits, {code}, {exchange})"),
        None => text,
    }
}

/// What a process counts, and where it writes it. A fork has its own as soon as it uses a communicator: what it inherits
/// is its parent's, with locks that may be held by threads which it does not have. One that uses none has none.
pub(super) struct Process {
    id: u32,
    pub(super) registry: Mutex<Registry>,
    pub(super) file: Mutex<StatsFile>,
    has_begun: AtomicBool,
}

/// The last that was made; in a fork that has not got its own its parent's. Never freed.
static PROCESS: AtomicPtr<Process> = AtomicPtr::new(ptr::null_mut());

/// What is to be done when a process first uses a communicator.
static AT_FIRST_USE: OnceCell<fn(&'static Process)> = OnceCell::new();

impl Process {
    /// That of this process, if it has one.
    pub(super) fn current() -> Option<&'static Process> {
        // SAFETY: null, or leaked by `enter`.
        let process = unsafe { PROCESS.load(Acquire).as_ref() }?;
        (process.id == std::process::id()).then_some(process)
    }

    /// That of this process, which has one from now on.
    pub(super) fn enter() -> &'static Process {
        let last = PROCESS.load(Acquire);
        if let Some(process) = Self::current() {
            return process;
        }
        let own = Box::into_raw(Box::new(Process {
            id: std::process::id(),
            registry: Mutex::new(Registry::new()),
            file: Mutex::new(StatsFile::new(Config::global().stats_file.as_deref())),
            has_begun: AtomicBool::new(false),
        }));
        if PROCESS.compare_exchange(last, own, AcqRel, Acquire).is_err() {
            // SAFETY: made above, and nobody else has seen it.
            drop(unsafe { Box::from_raw(own) });
        }
        Self::current().expect("this thread or another has made it")
    }

    /// Has this done when a process first uses a communicator, forks included.
    pub(super) fn at_first_use(what: fn(&'static Process)) {
        let _ = AT_FIRST_USE.set(what);
    }

    fn begin(&'static self) {
        if !self.has_begun.swap(true, Relaxed)
            && let Some(what) = AT_FIRST_USE.get()
        {
            what(self);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::super::Call;
    use super::*;
    use crate::route::Reason;

    thread_local! {
        static KNOWN: Known = const { Known::new() };
    }

    fn counters(comm: CommPtr) -> &'static Counters {
        KNOWN.with(|known| known.of(comm, |_| None))
    }

    /// A handle that no other test uses.
    fn handle() -> CommPtr {
        static NEXT: AtomicUsize = AtomicUsize::new(64);
        NEXT.fetch_add(512, Relaxed) as CommPtr
    }

    #[test]
    fn a_communicator_counts_for_itself_whatever_threads_it_is_used_by() {
        let comms: Vec<usize> = (0..4).map(|_| handle() as usize).collect();
        std::thread::scope(|scope| {
            for (i, comm) in comms.iter().enumerate() {
                scope.spawn(move || {
                    for _ in 0..1000 {
                        counters(*comm as CommPtr).count(Call::Send);
                        counters(*comm as CommPtr).count_forwarded(Reason::Small, 100);
                        counters(*comm as CommPtr).count_compressed(2048 << i, 57);
                    }
                });
            }
        });
        for (i, comm) in comms.into_iter().enumerate() {
            counters(comm as CommPtr).count(Call::Send); // by a thread that does not know it yet
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
            comms.iter().enumerate().for_each(|(i, comm)| counters(*comm).count_compressed(5000, i as u64));
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
            counters(first).count(Call::Gather);
            assert_eq!(Counts::of(first).others(), 1, "the block of another has been zeroed");
            counters(second).count(Call::Gather);
            end(first);
            assert_eq!(Counts::of(first).others(), 0);
            assert_eq!(Counts::of(second).others(), n);
        }
        assert_eq!(Counts::of_process().calls[Call::Gather as usize] - before, 400);
        end(second);
    }

    #[test]
    fn ended_communicators_beyond_the_last_are_merged_and_lose_nothing() {
        let mut ended = Ended::new();
        for number in 0..MAX_ENDED as u64 + 10 {
            let mut counts = Box::new(Counts::default());
            counts.compressed[3] = [1, 10, number];
            ended.push(About { number, ..About::default() }, counts);
        }
        let mut total = Counts::default();
        ended.all().for_each(|counts| total.add(counts));
        let n = MAX_ENDED as u64 + 10;
        assert_eq!(total.compressed[3], [n, 10 * n, n * (n - 1) / 2]);
        assert_eq!((ended.last.len(), ended.merged.as_ref().unwrap().0), (MAX_ENDED, 10));
    }
}

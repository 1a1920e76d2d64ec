//! Watches, while the application runs, whether sums have become much slower than they were when this machine was measured.
//!
//! What one kernel in 16 took arrives in a slot of its communicator (`kernels/watch.cuh`): there is one for each octave of
//! bytes, of exact sums and of compressed ones. A thread looks at the slots once a second. The fastest of a minute counts:
//! the others may have waited for a rank that came late. Where even that one took too long, the log and the statistics say so,
//! once.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::background;
use crate::exchange::fused::{N_SLOTS, octave_of, slot};
use crate::nccl::CommPtr;
use crate::negotiation::tuning::figures::Figures;
use crate::stats;
use crate::verdict::Way;

/// So many times as long as measured is too long.
const FACTOR: u64 = 3;

/// By so many nanoseconds a rank may be late each time, as ranks of an engine are whose processor launches them in turn.
const APART_NS: u64 = 50_000;

/// How often a thread looks.
const PERIOD: Duration = Duration::from_secs(1);

/// For so long the fastest counts.
const SPAN: Duration = Duration::from_secs(60);

/// Of fewer sums nothing is said.
const MIN_SEEN: u32 = 10;

/// A communicator that is watched, until this is dropped.
pub(super) struct Watched {
    number: u64,
}

/// All of them.
struct Watching {
    communicators: Vec<Entry>,
    /// Of the next one.
    next: u64,
    has_thread: bool,
}

static WATCHING: Mutex<Watching> = Mutex::new(Watching { communicators: Vec::new(), next: 0, has_thread: false });

struct Entry {
    number: u64,
    /// The handle.
    comm: usize,
    rank: usize,
    /// Of the first of [`N_SLOTS`].
    slots: usize,
    spans: Box<[Span; N_SLOTS]>,
    is_told: bool,
}

/// What has been seen at a slot.
#[derive(Clone, Copy)]
struct Span {
    /// Nanoseconds that were measured; 0: not watched, or told.
    measured_ns: u64,
    /// What stood in the slot.
    last: u64,
    /// When the span began.
    since: Instant,
    n_seen: u32,
    fastest_ns: u64,
}

impl Span {
    /// What is in the slot now. Answers how long the fastest took, at the end of a span in which all took too long.
    fn look(&mut self, now: Instant, value: u64) -> Option<u64> {
        if self.measured_ns == 0 {
            return None;
        }
        if value != self.last {
            self.last = value;
            self.n_seen += 1;
            self.fastest_ns = self.fastest_ns.min(value & u64::from(u32::MAX)); // the rest tells when
        }
        if now.duration_since(self.since) < SPAN {
            return None;
        }
        let is_slow = self.n_seen >= MIN_SEEN && self.fastest_ns > self.measured_ns * FACTOR + APART_NS;
        let fastest_ns = self.fastest_ns;
        *self = Self::new(self.measured_ns, self.last, now);
        is_slow.then(|| {
            self.measured_ns = 0;
            fastest_ns
        })
    }

    fn new(measured_ns: u64, last: u64, since: Instant) -> Self {
        Self { measured_ns, last, since, n_seen: 0, fastest_ns: u64::MAX }
    }
}

/// What the largest sum of each slot took when it was measured, the slowest way that it may go; 0: not known.
fn measured(figures: &Figures) -> [u64; N_SLOTS] {
    let mut measured = [0; N_SLOTS];
    for octave in 0..N_SLOTS as u32 / 2 {
        let (start, end) = (1u64 << octave, 2u64 << octave);
        let of = |ways: &[Way]| {
            let ns = |way: &Way| figures.nanoseconds(*way, end).or_else(|| figures.nanoseconds(*way, start));
            ways.iter().filter_map(ns).max().unwrap_or(0)
        };
        measured[slot(true, start)] = of(&[Way::ExactOneHop, Way::ExactTwoHops]);
        measured[slot(false, start)] = of(&[Way::Compressed, Way::Pulled]);
    }
    measured
}

impl Watched {
    /// From now on. Answers `None` where the system has no thread for it.
    ///
    /// # Safety
    /// `slots` points to [`N_SLOTS`] words that stay until this is dropped.
    pub(super) unsafe fn begin(comm: CommPtr, rank: usize, slots: *const AtomicU64, figures: &Figures) -> Option<Self> {
        let now = Instant::now();
        let spans = Box::new(measured(figures).map(|ns| Span::new(ns, 0, now)));
        let mut watching = WATCHING.lock();
        let number = watching.next;
        watching.next += 1;
        let slots = slots as usize;
        watching.communicators.push(Entry { number, comm: comm as usize, rank, slots, spans, is_told: false });
        let watched = Self { number };
        if !std::mem::replace(&mut watching.has_thread, true) {
            drop(watching);
            if let Err(error) = background::spawn("flashcomm-watch", watch) {
                log::info!("nothing watches whether sums become slow: no thread for it: {error}");
                WATCHING.lock().has_thread = false;
                return None;
            }
        }
        Some(watched)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        WATCHING.lock().communicators.retain(|entry| entry.number != self.number);
    }
}

/// What is said of a slot.
struct Slow {
    comm: usize,
    rank: usize,
    slot: usize,
    fastest_ns: u64,
    measured_ns: u64,
    is_first: bool,
}

/// Looks as long as there is a communicator.
fn watch() {
    loop {
        thread::sleep(PERIOD);
        let is_last_thread = background::is_last_thread();
        let mut watching = WATCHING.lock();
        if watching.communicators.is_empty() || is_last_thread {
            watching.has_thread = false;
            return;
        }
        let now = Instant::now();
        let found: Vec<Slow> = watching.communicators.iter_mut().flat_map(|entry| look(entry, now)).collect();
        drop(watching);
        found.iter().for_each(tell);
    }
}

fn look(entry: &mut Entry, now: Instant) -> Vec<Slow> {
    let Entry { comm, rank, slots, spans, is_told, .. } = entry;
    let mut found = Vec::new();
    for (slot, span) in spans.iter_mut().enumerate() {
        let measured_ns = span.measured_ns;
        // SAFETY: as `begin` was promised; entries are removed before that ends.
        let value = unsafe { &*(*slots as *const AtomicU64).add(slot) }.load(Ordering::Relaxed);
        if let Some(fastest_ns) = span.look(now, value) {
            let is_first = !std::mem::replace(is_told, true);
            found.push(Slow { comm: *comm, rank: *rank, slot, fastest_ns, measured_ns, is_first });
        }
    }
    found
}

fn tell(Slow { comm, rank, slot, fastest_ns, measured_ns, is_first }: &Slow) {
    let (is_exact, n_bytes) = octave_of(*slot);
    let (us, measured_us) = (fastest_ns / 1000, measured_ns / 1000);
    stats::note_slow(*comm as CommPtr, stats::Slow { n_bytes, is_exact, us, measured_us });
    if *is_first {
        let how = if is_exact { "exact" } else { "compressed" };
        log::warn!(
            "rank {rank}: for a minute {how} sums of {n_bytes} bytes and more have taken {us} us at least, \
             and at most {measured_us} us when this machine was measured: a link has become slower, others use it, or \
             another rank is always late. `flashcomm tune` measures anew; FLASHCOMM_STATS_FILE tells which sizes"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::negotiation::tuning::figures::SIZES;

    /// Sums that take so many microseconds, one a second; what is said, and after how many seconds.
    fn watched(measured_us: u64, us: impl Fn(u64) -> Option<u64>) -> Option<(u64, u64)> {
        let start = Instant::now();
        let mut span = Span::new(measured_us * 1000, 0, start);
        (0..400).find_map(|second| {
            let value = us(second).map_or(span.last, |us| ((second + 1) << 32) | (us * 1000));
            let told = span.look(start + Duration::from_secs(second), value)?;
            assert_eq!(span.look(start + Duration::from_secs(1000), 1 << 63 | 999_999), None, "said once");
            Some((second, told / 1000))
        })
    }

    #[test]
    fn what_is_slow_for_a_minute_is_told_and_nothing_else() {
        assert_eq!(watched(100, |_| Some(351)), Some((60, 351)), "more than 3 times, and 50 us");
        assert_eq!(watched(100, |_| Some(350)), None);
        assert_eq!(watched(100, |second| Some(if second % 59 == 0 { 100 } else { 900 })), None, "some waited");
        assert_eq!(watched(100, |second| Some(if second < 130 { 100 } else { 900 })), Some((240, 900)), "since then");
        assert_eq!(watched(100, |second| (second % 7 == 0).then_some(900)), None, "too few to tell");
        assert_eq!(watched(0, |_| Some(900)), None, "nothing is known of it");
    }

    #[test]
    fn a_slot_is_held_against_the_largest_sum_that_it_has() {
        let mut figures = Figures(SIZES.map(|size| [0, 5000, 0, 10_000 + size as u32 / 100, 0, 0]).to_vec());
        figures.0[4..].iter_mut().for_each(|row| row[1] = 0);
        let measured = measured(&figures);
        assert_eq!(measured[slot(false, (1 << 20) + 5)], 10_000 + (2 << 20) / 100);
        assert_eq!(measured[slot(true, 4096)], 5000);
        assert_eq!(measured[slot(true, (512 << 10) + 1)], 5000, "of the smallest, where the largest is not known");
        assert_eq!(measured[slot(true, 1 << 20)], 0);
        assert_eq!(super::measured(&Figures::default()), [0; N_SLOTS]);
    }

    #[test]
    fn every_size_has_a_slot_that_names_its_octave() {
        for n_bytes in [1, 2, 255, 256, 4096, (1 << 20) - 1, 1 << 20, u64::MAX] {
            for is_exact in [false, true] {
                let (exact, start) = octave_of(slot(is_exact, n_bytes));
                assert_eq!(exact, is_exact);
                assert!(start <= n_bytes && (n_bytes / 2 < start || start == 1 << 31), "{n_bytes} {start}");
            }
        }
    }

    #[test]
    fn slots_of_a_communicator_that_has_ended_are_not_looked_at() {
        let slots: Vec<AtomicU64> = (0..N_SLOTS).map(|_| AtomicU64::new(0)).collect();
        // SAFETY: they stay until the end of the test.
        let watched = unsafe { Watched::begin(std::ptr::dangling_mut(), 0, slots.as_ptr(), &Figures::default()) };
        let number = watched.as_ref().unwrap().number;
        let is_there = || WATCHING.lock().communicators.iter().any(|entry| entry.number == number);
        assert!(is_there());
        drop(watched);
        assert!(!is_there());
    }
}

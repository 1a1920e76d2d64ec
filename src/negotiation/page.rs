//! Meeting over a page of shared host memory, by the ranks of one host.
//!
//! It costs no memory on the GPU and no connection of the real NCCL, and it tells for whom a rank waits. Where all ranks
//! of a communicator run on one host cannot be known before they have met. But they all have just returned from the call
//! that made it, and know a [`Key`] from that. So each comes to the page of that name. The one that completes the number of
//! ranks declares the page *complete*; one that has waited for [`PATIENCE`] declares it *given up*, and then all of them meet over
//! the real NCCL. Whichever comes first holds for all.
//!
//! The page stays for the life of the communicator: later changes meet over it, too.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::facts::BLOB_BYTES;
use super::key::Key;
use super::meeting::{Meeting, poll};
use super::over_nccl::Life;
use crate::error::{Error, Result};
use crate::exchange::shared::{Member, SharedMemory};
use crate::variables::Variables;

/// How long a rank waits at the page for the others. They are late by the time that a busy machine holds up a thread. On
/// several hosts it is paid once a process, see [`CAME`].
const PATIENCE: Duration = Duration::from_secs(2);

/// As many ranks as have come to the last page that was given up: of a larger communicator some are on other hosts.
static CAME: AtomicUsize = AtomicUsize::new(usize::MAX);

/// States of a page.
const OPEN: u32 = 0;
const COMPLETE: u32 = 1;
const GIVEN_UP: u32 = 2;

/// Where what lies in a page: the state, the number of ranks that have come, the count of [`Page::count`], then a slot for each
/// rank.
const STATE_AT: usize = 0;
const CAME_AT: usize = 4;
const COUNT_AT: usize = 8;
const SLOTS_AT: usize = 64;
/// A slot: the number of rounds that the rank has said its word in, then its words of the last two. A rank that has heard
/// a round may be in the next one while others still read; it is never two ahead.
const WORDS_AT: usize = 64;
const SLOT_BYTES: usize = WORDS_AT + 2 * BLOB_BYTES;

/// The count is closed: what is below this bit is where.
const CLOSED: u64 = 1 << 63;

/// The page of a communicator, at which all of its ranks have come together.
pub(crate) struct Page {
    shared: SharedMemory,
    member: Member,
    rank: usize,
    world: usize,
}

impl Page {
    /// Comes to the page of `key` as `rank` of `world`, and waits for the others. `None` where it was given up, or there can
    /// be none.
    ///
    /// # Errors
    /// Those of `check`, which is asked while this rank waits.
    pub(crate) fn come(key: Key, rank: usize, world: usize, check: impl Fn() -> Result<()>) -> Result<Option<Self>> {
        if Variables::global().shm_disabled || world > CAME.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let join = || {
            let shared = SharedMemory::join(key.name(), SLOTS_AT + world * SLOT_BYTES)?;
            let member = shared.become_member(rank)?;
            Ok::<_, Error>(Self { shared, member, rank, world })
        };
        let mut page = match join() {
            Ok(page) => page,
            Err(error) => {
                log::info!("rank {rank}: the ranks do not meet over shared memory: {error}");
                return Ok(None);
            }
        };
        let came = 1 + page.word(CAME_AT).fetch_add(1, Ordering::AcqRel) as usize;
        if came == world {
            page.declare(COMPLETE);
        }
        let deadline = Instant::now() + PATIENCE;
        let settled = || {
            if Instant::now() >= deadline && page.declare(GIVEN_UP) {
                let came = page.word(CAME_AT).load(Ordering::Acquire) as usize;
                log::debug!("rank {rank}: {came} of {world} ranks have come to the page");
            }
            Ok(page.word(STATE_AT).load(Ordering::Acquire) != OPEN)
        };
        let over = poll(check, settled);
        page.shared.unlink(); // who comes later has another one, or none
        over?;
        if page.word(STATE_AT).load(Ordering::Acquire) == COMPLETE {
            return Ok(Some(page));
        }
        CAME.store(page.word(CAME_AT).load(Ordering::Acquire) as usize, Ordering::Relaxed);
        Ok(None)
    }

    /// Settles the state, unless another rank has; whether this was it.
    fn declare(&self, state: u32) -> bool {
        self.word(STATE_AT).compare_exchange(OPEN, state, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The ranks that have not said their word in the round in which this one has.
    pub(crate) fn missing(&self) -> impl Iterator<Item = usize> {
        let mine = self.round(self.rank).load(Ordering::Acquire);
        (0..self.world).filter(move |rank| self.round(*rank).load(Ordering::Acquire) < mine)
    }

    /// Whether a rank that is missing has ended, or given up: it will not come.
    fn gone(&self) -> Option<usize> {
        let is_gone = |rank: &usize| !self.member.has(*rank);
        let gone = self.missing().find(is_gone)?;
        // It may have said its last word just before it ended.
        self.missing().find(|rank| *rank == gone)
    }

    /// Counts the `i`-th of something that all ranks do, each at its own pace. Answers from which one on the count was closed,
    /// if it was before.
    pub(crate) fn count(&self, i: u64) -> Option<u64> {
        let before = self.counted().fetch_max(i + 1, Ordering::AcqRel);
        (before & CLOSED != 0).then_some(before & !CLOSED)
    }

    /// Closes the count: behind what any rank has counted, or where none ever comes. Once, by one rank.
    pub(crate) fn close_count(&self, is_reached: bool) {
        let close = |count: u64| Some(CLOSED | if is_reached { count } else { !CLOSED });
        let _ = self.counted().fetch_update(Ordering::AcqRel, Ordering::Acquire, close); // never refused
    }

    fn counted(&self) -> &AtomicU64 {
        // SAFETY: 8-byte aligned, and within the page, which lives as long as `self`.
        unsafe { AtomicU64::from_ptr(self.shared.address().wrapping_byte_add(COUNT_AT).cast()) }
    }

    /// Others need not wait for this rank any more.
    pub(crate) fn leave(&self) {
        self.member.leave(self.rank);
    }

    fn round(&self, rank: usize) -> &AtomicU32 {
        self.word(SLOTS_AT + rank * SLOT_BYTES)
    }

    /// Where a rank's word of a round lies.
    fn said(&self, rank: usize, round: u32) -> *mut [u8; BLOB_BYTES] {
        let at = SLOTS_AT + rank * SLOT_BYTES + WORDS_AT + (round % 2) as usize * BLOB_BYTES;
        self.shared.address().wrapping_byte_add(at).cast()
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        // SAFETY: 4-byte aligned, and within the page, which lives as long as `self`.
        unsafe { AtomicU32::from_ptr(self.shared.address().wrapping_byte_add(at).cast()) }
    }
}

/// Ranks that have come to a page meet over it, again and again.
pub(crate) struct OverPage<'a> {
    pub page: &'a Page,
    /// Of the communicator.
    pub life: &'a Life,
}

impl Meeting for OverPage<'_> {
    fn say(&mut self, mine: &[u8; BLOB_BYTES]) -> Result<()> {
        let Page { rank, .. } = *self.page;
        let round = 1 + self.page.round(rank).load(Ordering::Relaxed);
        // SAFETY: this rank's own, and nobody reads it: all have heard the round before the last.
        unsafe { self.page.said(rank, round).write(*mine) };
        Ok(())
    }

    fn hear(&mut self) -> Result<Vec<u8>> {
        let page = self.page;
        let round = 1 + page.round(page.rank).fetch_add(1, Ordering::AcqRel);
        let mut n_looks = 0u32;
        let all_have_said = || {
            if page.missing().next().is_none() {
                return Ok(true);
            }
            n_looks += 1;
            match n_looks.is_multiple_of(64).then(|| page.gone()).flatten() {
                Some(rank) => Err(Error::RankGone { rank }),
                None => Ok(false),
            }
        };
        poll(|| self.check(), all_have_said)?;
        // SAFETY: each has been written, and stays until all have heard it.
        Ok((0..page.world).flat_map(|rank| unsafe { page.said(rank, round).read() }).collect())
    }

    fn check(&self) -> Result<()> {
        if self.life.has_ended() { Err(Error::Aborted) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::thread;

    use super::*;

    fn all(world: usize, job: impl Fn(usize) + Sync) {
        thread::scope(|scope| {
            let job = &job;
            (0..world).for_each(|rank| drop(scope.spawn(move || job(rank))));
        });
    }

    fn come(key: Key, rank: usize, world: usize) -> Option<Page> {
        Page::come(key, rank, world, || Ok(())).unwrap()
    }

    #[test]
    fn ranks_hear_everyones_word_of_every_round_whoever_is_ahead() {
        let (world, key) = (3, Key::of_process());
        all(world, |rank| {
            let (page, life) = (come(key, rank, world).expect("all come"), Life::default());
            let mut meeting = OverPage { page: &page, life: &life };
            for round in 0..300u32 {
                let word = |rank: usize| [(round as u8).wrapping_mul(7) ^ rank as u8; BLOB_BYTES];
                meeting.say(&word(rank)).unwrap();
                let heard = meeting.hear().unwrap();
                assert_eq!(heard, (0..world).flat_map(word).collect::<Vec<u8>>());
            }
        });
    }

    #[test]
    fn a_count_is_closed_where_no_rank_has_been() {
        for round in 0..200 {
            let (world, key) = (3, Key::of_process());
            let first = std::sync::Mutex::new(Vec::new());
            all(world, |rank| {
                let page = come(key, rank, world).expect("all come");
                let mut from = u64::MAX;
                for i in 0..500 {
                    if rank == 0 && i == round {
                        page.close_count(true);
                    }
                    let closed = page.count(i);
                    if closed.is_some_and(|at| i >= at) {
                        from = from.min(i);
                    } else {
                        assert_eq!(from, u64::MAX, "there is no way back");
                    }
                }
                first.lock().unwrap().push(from);
            });
            let first = first.into_inner().unwrap();
            // A rank may be through before it is closed. Whoever sees it begins with the same one.
            let seen: BTreeSet<u64> = first.iter().copied().filter(|from| *from != u64::MAX).collect();
            assert!(seen.len() <= 1 && seen.iter().all(|from| *from >= round), "{first:?}");
        }
        let page = come(Key::of_process(), 0, 1).unwrap();
        assert_eq!(page.count(0), None);
        page.close_count(false);
        assert!(page.count(1).is_some_and(|at| at > 1 << 62));
    }

    #[test]
    fn a_rank_that_ends_is_told_of_and_one_that_is_only_late_is_waited_for() {
        let key = Key::of_process();
        all(3, |rank| {
            let (page, life) = (come(key, rank, 3).expect("all come"), Life::default());
            let mut meeting = OverPage { page: &page, life: &life };
            if rank == 1 {
                thread::sleep(Duration::from_millis(700));
            }
            meeting.say(&[1; BLOB_BYTES]).unwrap();
            meeting.hear().unwrap();
            if rank == 2 {
                return;
            }
            meeting.say(&[2; BLOB_BYTES]).unwrap();
            assert!(matches!(meeting.hear(), Err(Error::RankGone { rank: 2 })));
            assert_eq!(page.missing().collect::<Vec<_>>()[..], [2]);
        });
    }
}

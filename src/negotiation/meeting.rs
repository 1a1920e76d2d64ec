//! Everyone's word to everyone, and the rounds that are made of it.
//!
//! In a round every rank contributes its [`Blob`] and every rank derives the same from the same
//! bytes. The first compares the settings; the second adds what each GPU reaches, which a rank knows
//! only when it knows where the others are. Those that follow set up an exchange ([`super::setup`], which has their steps).
//!
//! Ranks that are threads of one process take care not to be in each other's way: while one has work on the GPU that
//! waits for another, calls of the other that allocate or map memory there may wait for that very work. So they meet on the
//! host before each round. Before the first they do not know each other yet; there the meeting makes them wait for one
//! another: on the host, or as the real NCCL does.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;

use super::disagreement::Disagreement;
use super::facts::{BLOB_BYTES, Blob, agree};
use crate::error::Result;
use crate::exchange::area::Offer;

/// A way for the ranks of a communicator to tell each other something.
pub trait Meeting {
    /// Puts this rank's message where it goes out from. Waits for no other rank.
    ///
    /// # Errors
    /// When that fails.
    fn say(&mut self, mine: &[u8; BLOB_BYTES]) -> Result<()>;

    /// Everyone's message, in rank order, one behind the other. Returns when all have said theirs.
    ///
    /// # Errors
    /// When a rank cannot be reached, or as [`Meeting::check`].
    fn hear(&mut self) -> Result<Vec<u8>>;

    /// Whether to go on waiting for the others.
    ///
    /// # Errors
    /// [`crate::error::Error::Aborted`], once the communicator is aborted.
    fn check(&self) -> Result<()>;
}

impl<M: Meeting + ?Sized> Meeting for Box<M> {
    fn say(&mut self, mine: &[u8; BLOB_BYTES]) -> Result<()> {
        (**self).say(mine)
    }

    fn hear(&mut self) -> Result<Vec<u8>> {
        (**self).hear()
    }

    fn check(&self) -> Result<()> {
        (**self).check()
    }
}

/// What a round came to: all ranks' blobs, or what keeps them from going on. The same on every rank.
pub(crate) type Round = std::result::Result<Vec<Blob>, Disagreement>;

/// The rounds of one rank.
pub struct Rounds<M> {
    /// What this rank says in every round.
    pub blob: Blob,
    /// How it meets the others.
    pub meeting: M,
    /// Rounds begun.
    number: usize,
    /// Known after the first round.
    neighbors: Option<Neighbors>,
}

impl<M: Meeting> Rounds<M> {
    /// Of a rank that says `blob`.
    pub fn new(meeting: M, blob: Blob) -> Self {
        Self { blob, meeting, number: 0, neighbors: None }
    }

    /// One round: whether this rank is ready, and its offer.
    ///
    /// # Errors
    /// As for [`Meeting::hear`].
    pub fn next(&mut self, ready: bool, offer: Offer) -> Result<Round> {
        self.number += 1;
        log::debug!("rank {}: attach, round {}", self.blob.rank, self.number);
        self.meeting.say(&Blob { ready, offer, ..self.blob }.encode())?;
        // Nothing between this and the gathering may wait for work on the GPU: another rank's may wait for us from here on.
        if let Some(neighbors) = &mut self.neighbors {
            neighbors.meet(|| self.meeting.check())?;
        }
        let round = agree(&self.meeting.hear()?);
        if let (None, Ok(facts)) = (&self.neighbors, &round) {
            self.neighbors = Some(Neighbors::of(&self.blob, facts));
        }
        Ok(round)
    }

    /// Waits until all ranks of this process have heard the last round. A rank that is still reading it may have to wait for
    /// work on the GPU, also for a kernel that waits for that rank.
    ///
    /// # Errors
    /// As for [`Meeting::check`].
    pub fn meet_neighbors(&mut self) -> Result<()> {
        let Self { meeting, neighbors, .. } = self;
        neighbors.as_mut().map_or(Ok(()), |neighbors| neighbors.meet(|| meeting.check()))
    }

    /// The first operation waits for the others, too: until all are done with what attach needs, also with giving it up.
    ///
    /// # Errors
    /// Those of `check`.
    pub fn end(self, check: impl Fn() -> Result<()>) -> Result<()> {
        let Rounds { meeting, neighbors, .. } = self;
        drop(meeting);
        neighbors.map_or(Ok(()), |mut neighbors| neighbors.meet(check))
    }
}

/// The ranks of the communicator that run in this process.
struct Neighbors {
    count: usize,
    /// How often one of them has come to a meeting.
    arrivals: Arc<AtomicUsize>,
    meetings: usize,
}

impl Neighbors {
    fn of(blob: &Blob, facts: &[Blob]) -> Self {
        /// By the number of rank 0's attach.
        static ATTACHES: Mutex<Vec<(u64, Weak<AtomicUsize>)>> = Mutex::new(Vec::new());
        let mut attaches = ATTACHES.lock();
        attaches.retain(|(_, arrivals)| arrivals.strong_count() > 0);
        let known = attaches.iter().find(|(attach, _)| *attach == facts[0].attach);
        let arrivals = known.and_then(|(_, arrivals)| arrivals.upgrade()).unwrap_or_else(|| {
            let new = Arc::new(AtomicUsize::new(0));
            attaches.push((facts[0].attach, Arc::downgrade(&new)));
            new
        });
        let count = facts.iter().filter(|rank| rank.location.process == blob.location.process).count();
        Self { count, arrivals, meetings: 0 }
    }

    /// Waits until all ranks of this process have come here as often as this one.
    fn meet(&mut self, check: impl Fn() -> Result<()>) -> Result<()> {
        self.arrivals.fetch_add(1, Ordering::AcqRel);
        self.meetings += 1;
        poll(check, || Ok(self.arrivals.load(Ordering::Acquire) >= self.count * self.meetings))
    }
}

/// Waits until it is done, as long as `check` has no objection.
///
/// # Errors
/// Those of `check` and of `is_done`.
pub(crate) fn poll(check: impl Fn() -> Result<()>, mut is_done: impl FnMut() -> Result<bool>) -> Result<()> {
    let mut pause = Duration::from_micros(20);
    loop {
        check()?;
        if is_done()? {
            return Ok(());
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(2));
    }
}

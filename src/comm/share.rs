//! Which communicator has the large share of its devices ([`crate::exchange::residency`]): the first of its family that is
//! used.
//!
//! All ranks must launch alike, and none may wait for another to agree on it. So each counts the sums that it issues, on the page
//! of the communicator. The rank that leads leases the share with its first one, for all of them, and closes the count: behind what any
//! rank has issued. From there on the sums have the share. Where another communicator has it, they never do.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::exchange::residency::Seat;
use crate::negotiation::facts::Blob;
use crate::negotiation::page::Page;
use crate::negotiation::sizes;

/// A communicator's claim to the large share.
pub(crate) struct Share {
    seat: Seat,
    page: Option<Arc<Page>>,
    leads: bool,
    /// Sums that this rank has issued.
    n_issued: AtomicU64,
    /// The first that has the share, once that is known.
    from: AtomicU64,
}

/// [`Share::from`]: not known yet.
const OPEN: u64 = u64::MAX;
/// No sum has the share.
const NEVER: u64 = u64::MAX - 1;

impl Share {
    /// Of the communicator of ranks with these facts, of which this is `rank`.
    pub(super) fn new(seat: Seat, page: Option<Arc<Page>>, rank: usize, facts: &[Blob]) -> Self {
        let family = sizes::family(facts);
        seat.settle(family);
        let leads = sizes::leader(facts) == rank;
        let from = match (family, &page) {
            (None, _) => NEVER,
            (Some(_), Some(_)) => OPEN,
            // Without a page to count on, the first that is made has it.
            (Some(_), None) if sizes::are_alone(facts) => {
                if leads {
                    seat.lease();
                }
                0
            }
            (Some(_), None) => NEVER,
        };
        Self { seat, page, leads, n_issued: AtomicU64::new(0), from: AtomicU64::new(from) }
    }

    /// Whether the sum that is issued next has the share. Asked once for each, in their order.
    pub(crate) fn has_next(&self) -> bool {
        let i = self.n_issued.fetch_add(1, Ordering::Relaxed);
        let from = self.from.load(Ordering::Relaxed);
        i >= if from == OPEN { self.find(i) } else { from }
    }

    /// From which on they have it, as far as is known when the `i`-th is issued.
    #[cold]
    fn find(&self, i: u64) -> u64 {
        let Some(page) = &self.page else { return NEVER };
        if self.leads && i == 0 {
            page.close_count(self.seat.lease());
        }
        match page.count(i) {
            Some(from) => {
                self.from.store(from, Ordering::Relaxed);
                from
            }
            None => NEVER,
        }
    }

    /// For which family the devices keep their large share, as this rank sees it.
    pub(super) fn family(&self) -> u64 {
        self.seat.family()
    }

    /// A kernel may still wait for ever: nobody else may have the share.
    pub(super) fn lose(&self) {
        self.seat.lose();
    }
}

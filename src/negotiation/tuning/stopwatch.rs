//! Timing: sums are launched a few times one behind the other, and what the slowest rank took counts.
//!
//! Before each batch goes a *lead*: a sum of the real NCCL that takes longer than it takes to launch the
//! batch. So all ranks begin the batch together, and what counts is what the GPUs take, not how fast
//! threads launch.

use super::RealCalls;
use super::figures::{Figures, Row, SIZES, WAYS};
use crate::element::ElementType;
use crate::error::{Error, Result};
use crate::exchange::area::{OFFER_BYTES, Offer};
use crate::exchange::fused::Fused;
use crate::exchange::timing::Timing;
use crate::kernels::Areas;
use crate::negotiation::agreement::Agreement;
use crate::negotiation::disagreement::Disagreement;
use crate::negotiation::facts::Blob;
use crate::negotiation::meeting::{Meeting, Rounds, poll};
use crate::negotiation::setup::{Local, NotSetUp, SetUp};
use crate::verdict::Way;

/// Nanoseconds that all measurements may take together, without the first launches.
pub(super) const BUDGET_NS: u64 = 250_000_000;

/// Sums that are timed one behind the other take about so long, but are no fewer and no more than that: what ranks wait for
/// each other at the first one is shared by all.
const BATCH_NS: u64 = 300_000;
const MIN_BATCH: u64 = 2;
const MAX_BATCH: u64 = 10;

/// Bytes of the largest sum.
const LARGEST: u64 = SIZES[SIZES.len() - 1];

/// Of so many batches the middle one counts.
const BATCHES: usize = 3;

/// A lead takes no longer than about that, and has at least so many bytes.
const LEAD_NS: u64 = 150_000;
const MIN_LEAD_BYTES: u64 = 64 << 10;

/// The sum before a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Lead {
    n_bytes: u64,
    /// What it takes, about.
    ns: u64,
}

impl Lead {
    /// Where a sum of the most bytes takes so long, more than 0.
    fn of(largest_ns: u64) -> Self {
        let shares = largest_ns.div_ceil(LEAD_NS).next_power_of_two().min(LARGEST / MIN_LEAD_BYTES);
        Self { n_bytes: LARGEST / shares, ns: largest_ns / shares }
    }
}

/// What a rank measures with.
pub(super) struct Stopwatch<'a> {
    timing: Timing,
    /// Whether the communicator has the large share of its devices while it is measured.
    is_large: bool,
    lead: Lead,
    local: &'a Local<'a>,
    calls: &'a RealCalls<'a>,
}

impl Stopwatch<'_> {
    /// Issues a sum over the real NCCL. False where that was not done at once.
    fn forward(&self, n_bytes: u64) -> Result<bool> {
        let element = self.timing.element();
        (self.calls.all_reduce)((element, self.timing.buffers(), n_bytes as usize / element.n_bytes()))
    }

    /// Issues one sum. False as above.
    fn issue(&self, way: Way, n_bytes: u64, fused: Option<&Fused>) -> Result<bool> {
        match fused.filter(|_| way != Way::Forward) {
            None => self.forward(n_bytes),
            Some(fused) => {
                let Local { kernels, stream, .. } = self.local;
                self.timing.launch(way, (n_bytes as usize, self.is_large), fused, kernels, stream)?;
                Ok(true)
            }
        }
    }

    /// Nanoseconds of one of `n_sums` sums, the median of some batches; 0 where the real NCCL did not do its own at once.
    fn time(
        &mut self,
        way: Way,
        (n_bytes, n_sums, n_batches): (u64, u64, usize),
        fused: Option<&Fused>,
        check: impl Fn() -> Result<()>,
    ) -> Result<u32> {
        let stream = self.local.stream;
        let mut batches = [0; BATCHES];
        // The first sum alone: it connects ranks, loads kernels and finds memory.
        for batch in 0..=n_batches {
            let n_sums = if batch == 0 { 1 } else { n_sums };
            if batch > 0 && !self.forward(self.lead.n_bytes)? {
                return Ok(0);
            }
            self.timing.begin(stream)?;
            for _ in 0..n_sums {
                if !self.issue(way, n_bytes, fused)? {
                    return Ok(0);
                }
            }
            self.timing.end(stream)?;
            let is_over = || self.timing.is_over().map_err(Error::cuda("waiting for a measurement"));
            if let Err(error) = poll(&check, is_over) {
                if let Some(fused) = fused {
                    fused.abort();
                }
                self.timing.lose();
                return Err(error);
            }
            if let Some(ns) = batch.checked_sub(1).and_then(|batch| batches.get_mut(batch)) {
                *ns = self.timing.nanoseconds().map_err(Error::cuda("reading an event"))? / n_sums;
            }
        }
        let batches = &mut batches[..n_batches];
        batches.sort_unstable();
        Ok(u32::try_from(batches[n_batches / 2]).unwrap_or(u32::MAX).max(1))
    }
}

impl<M: Meeting> Rounds<M> {
    /// Everyone has what it takes to measure, and a lead that fits this machine.
    pub(super) fn stopwatch<'a>(
        &mut self,
        is_large: bool,
        local: &'a Local<'a>,
        calls: &'a RealCalls<'a>,
    ) -> Result<SetUp<Stopwatch<'a>>> {
        let element = if self.blob.agreement.dtypes.0 { ElementType::Fp16 } else { ElementType::Bf16 };
        let timing = Timing::new(element, LARGEST as usize, local.context.device(), local.stream);
        let round = self.next(timing.is_ok(), [0; OFFER_BYTES])?;
        let timing = match (timing, round) {
            (Ok(timing), Ok(_)) => timing,
            (timing, Err(why)) => {
                let mine = timing.err().map(|error| ("measure", error));
                return Ok(Err(NotSetUp { why, mine }));
            }
            (Err(error), Ok(_)) => return Err(error), // not possible: a rank that is not ready keeps all from going on
        };
        let lead = Lead { n_bytes: LARGEST, ns: 0 };
        let mut stopwatch = Stopwatch { timing, is_large, lead, local, calls };
        self.meet_neighbors()?;
        let mut row: Row = [0; WAYS.len()];
        row[0] = stopwatch.time(Way::Forward, (LARGEST, 1, 1), None, || self.meeting.check())?;
        Ok(match self.next(true, as_offer(&row))? {
            Ok(ranks) => match slowest(&ranks)[0] {
                0 => Err(NotSetUp { why: Disagreement::NotReady { rank: without_time(&ranks) }, mine: None }),
                ns => Ok(Stopwatch { lead: Lead::of(ns.into()), ..stopwatch }),
            },
            Err(why) => Err(NotSetUp { why, mine: None }),
        })
    }

    /// Times every way at every size over an exchange, as long as that does not take too long.
    /// `known`: of another exchange, with the times of the real NCCL.
    pub(super) fn measure(
        &mut self,
        stopwatch: &mut Stopwatch<'_>,
        fused: &Fused,
        known: Option<&Figures>,
        budget_ns: u64,
    ) -> Result<SetUp<Figures>> {
        let (mut figures, mut spent) = (Figures::default(), 0);
        let Agreement { p2p_read, host_copy, .. } = self.blob.agreement;
        let is_peer = fused.memory() == Areas::InGpuMemory;
        let is_set = if is_peer { p2p_read } else { host_copy } == Some(true); // to another way than the usual one
        for (i, size) in SIZES.into_iter().enumerate() {
            self.meet_neighbors()?;
            let n_sums = BATCH_NS
                .checked_div(figures.slowest(size))
                .map_or(MAX_BATCH, |n_sums| n_sums.clamp(MIN_BATCH, MAX_BATCH));
            let mut row: Row = [0; WAYS.len()];
            for (ns, way) in row.iter_mut().zip(WAYS) {
                let is_there = match way {
                    Way::Forward => known.is_none(),
                    Way::Compressed => !is_set,
                    Way::Pulled => is_peer && p2p_read != Some(false),
                    Way::Copied => fused.copy_staging_bytes(1).is_some(),
                    Way::ExactTwoHops => fused.world() > 2 && size <= fused.exact_room(),
                    Way::ExactOneHop => size <= fused.exact_room(),
                };
                if is_there {
                    *ns = stopwatch.time(way, (size, n_sums, BATCHES), Some(fused), || self.meeting.check())?;
                }
            }
            let round = self.next(fused.gave_up().is_none(), as_offer(&row))?;
            let ranks = match round {
                Ok(ranks) => ranks,
                Err(why) => {
                    let mine = fused.failure().map(|error| ("measure", error));
                    return Ok(Err(NotSetUp { why, mine }));
                }
            };
            let mut row = slowest(&ranks);
            match known.map(|Figures(rows)| rows.get(i)) {
                Some(Some(of_nccl)) => row[0] = of_nccl[0],
                Some(None) => break, // there is nothing to compare with
                None if row[0] == 0 => {
                    let why = Disagreement::NotReady { rank: without_time(&ranks) };
                    return Ok(Err(NotSetUp { why, mine: None }));
                }
                None => {}
            }
            figures.0.push(row);
            let n_ways = row.iter().filter(|ns| **ns != 0).count() as u64;
            let leads = BATCHES as u64 * n_ways * stopwatch.lead.ns;
            let sums = |row: &Row| row.iter().map(|ns| u64::from(*ns)).sum::<u64>();
            spent += leads + sums(&row) * (1 + BATCHES as u64 * n_sums);
            // The next size has four times the bytes.
            if spent + leads + 4 * sums(&row) * (1 + BATCHES as u64 * MIN_BATCH) > budget_ns {
                break;
            }
        }
        if self.blob.rank == 0 {
            log::info!("measured over {}: {}", fused.memory().exchange().name(), figures.in_words());
        }
        Ok(Ok(figures))
    }
}

fn as_offer(row: &Row) -> Offer {
    let mut offer = [0; OFFER_BYTES];
    for (place, ns) in offer.chunks_exact_mut(4).zip(row) {
        place.copy_from_slice(&ns.to_le_bytes());
    }
    offer
}

fn of_offer(rank: &Blob, way: usize) -> u32 {
    u32::from_le_bytes(rank.offer[4 * way..][..4].try_into().expect("4 bytes"))
}

/// The first rank that has no time of the real NCCL: its communicator does not block.
fn without_time(ranks: &[Blob]) -> usize {
    ranks.iter().position(|rank| of_offer(rank, 0) == 0).unwrap_or(0)
}

/// The slowest rank's time of each way; 0 where one of them has none.
fn slowest(ranks: &[Blob]) -> Row {
    std::array::from_fn(|i| {
        let times = || ranks.iter().map(|rank| of_offer(rank, i));
        if times().any(|ns| ns == 0) { 0 } else { times().max().unwrap_or(0) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lead_takes_about_as_long_on_any_machine() {
        let lead = |largest_us: u64| {
            let Lead { n_bytes, ns } = Lead::of(largest_us * 1000);
            (n_bytes >> 10, ns / 1000)
        };
        assert_eq!(lead(75), (16 << 10, 75), "two GPUs with NVLink");
        assert_eq!(lead(600), (4 << 10, 150), "through host memory");
        assert_eq!(lead(10_900), (128, 85), "between consumer boards");
        assert_eq!(lead(10_000_000), (64, 39_062), "no smaller than that");
    }
}

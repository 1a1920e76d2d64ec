//! Measured, not assumed: the ranks find out together which exchange and which way of a sum are
//! fastest on this machine, beside the real NCCL.
//!
//! ```text
//! recall    what all of them know from before: the same numbers, or they measure anew
//! measure   an exchange: each way at each size; the slowest rank's time counts
//! choose    from these numbers alone, the same on every rank (figures)
//! keep      for other communicators of this process, and in a file (cache)
//! ```
//!
//! Whatever keeps a rank from measuring keeps all from it: they take what was measured on other
//! machines ([`super::ranges`]).

mod cache;
pub(crate) mod figures;

use self::cache::Key;
use self::figures::{Bounds, Figures, Measured, Row, SIZES, WAYS};
use super::choice::{Preference, against};
use super::facts::{Agreement, Blob, Location};
use super::meeting::{Meeting, Rounds, poll};
use super::over_nccl::Sum;
use super::ranges;
use super::setup::{Local, NotSetUp, SetUp};
use crate::config::{ExchangeKind, Tune};
use crate::cuda;
use crate::element::ElementType;
use crate::error::{Error, Result};
use crate::exchange::Exchange;
use crate::exchange::area::{OFFER_BYTES, Offer};
use crate::exchange::fused::Fused;
use crate::exchange::timing::Timing;
use crate::kernels::Areas;
use crate::negotiation::disagreement::Disagreement;
use crate::real;
use crate::variables;
use crate::verdict::{Way, Ways};

/// Nanoseconds that all measurements may take together, without the first launches.
const BUDGET_NS: u64 = 250_000_000;

/// Sums that are timed one behind the other take about so long, and are so many at most.
const BATCH_NS: u64 = 100_000;
const MAX_BATCH: u64 = 10;

/// Of so many batches the middle one counts.
const BATCHES: usize = 3;

/// The calls of the real NCCL that a set-up makes.
pub(crate) struct RealCalls<'a> {
    /// Connects all ranks, as [`super::over_nccl::OverNccl::connect`] does.
    pub connect: &'a dyn Fn() -> Result<bool>,
    /// Issues a sum to the stream that is set up with, as [`super::over_nccl::all_reduce`] does.
    pub all_reduce: &'a dyn Fn(Sum) -> Result<bool>,
}

/// An exchange, how sums go over it, and why, where that was measured.
pub(crate) struct Tuned {
    /// What carries the payloads.
    pub exchange: Exchange,
    /// How sums go.
    pub ways: Ways,
    /// Of that exchange; where none of ours is used, of the one that came nearest to the real NCCL.
    pub figures: Option<Figures>,
}

impl<M: Meeting> Rounds<M> {
    /// Sets up the exchange that is best here, with how sums go over it.
    ///
    /// # Errors
    /// As for [`Rounds::next`], and the real NCCL's.
    pub(crate) fn set_up_tuned(
        &mut self,
        facts: &[Blob],
        local: &Local<'_>,
        calls: &RealCalls<'_>,
    ) -> Result<std::result::Result<Tuned, Disagreement>> {
        if !is_tunable(facts) {
            let exchange = self.set_up_best(facts, local, calls.connect, None)?;
            return Ok(exchange.map(|exchange| untuned(facts, exchange)));
        }
        let key = key(facts)?;
        if let Some(measured) = self.recall(&key)? {
            log::info!("rank {}: what was measured here before holds", self.blob.rank);
            let preference = preference(&measured, facts);
            let exchange = self.set_up_best(facts, local, calls.connect, Some(preference))?;
            return Ok(exchange.map(|exchange| tuned(&measured, facts, exchange)));
        }
        self.measure_all(facts, local, calls, &key)
    }

    /// What every rank knows of these ranks from before; `None` where one of them knows nothing, or something else.
    fn recall(&mut self, key: &Key) -> Result<Option<Measured>> {
        let known = cache::find(key, self.blob.agreement.tune == Tune::Cache);
        let digest = known.as_ref().map_or(0, cache::digest);
        let mut offer: Offer = [0; OFFER_BYTES];
        offer[..8].copy_from_slice(&digest.to_le_bytes());
        let round = self.next(true, offer)?;
        let all_know = round.is_ok_and(|facts| facts.iter().all(|rank| rank.offer == offer));
        Ok(known.filter(|_| all_know))
    }

    /// Sets up what may be best, measures it, and keeps the best of it.
    fn measure_all(
        &mut self,
        facts: &[Blob],
        local: &Local<'_>,
        calls: &RealCalls<'_>,
        key: &Key,
    ) -> Result<std::result::Result<Tuned, Disagreement>> {
        let mut measured = Measured::default();
        let first = match self.set_up_best(facts, local, calls.connect, None)? {
            Ok(exchange) => exchange,
            Err(disagreement) => return Ok(Err(disagreement)),
        };
        let rival = (has_rival(facts, first.kind())).then_some(Areas::InHostMemory);
        if matches!(first, Exchange::Nccl(_)) && rival.is_none() {
            return Ok(Ok(untuned(facts, first)));
        }
        // Where the areas of both have no room, the first alone is measured.
        let second = match rival {
            Some(areas) => {
                let told = |NotSetUp { why, .. }| {
                    log::info!("the exchange {} is not measured: {why}", areas.exchange().name())
                };
                self.set_up_fused(areas, facts, local)?.map_err(told).ok().map(Exchange::Fused)
            }
            None => None,
        };
        let mut exchanges: Vec<Exchange> = [Some(first), second].into_iter().flatten().collect();
        let n_exchanges = exchanges.len() as u64;
        for exchange in &exchanges {
            let Exchange::Fused(fused) = exchange else { continue };
            let known = measured.0.first().map(|(_, figures)| figures);
            match self.measure(fused, local, calls, known, (facts.len(), BUDGET_NS / n_exchanges))? {
                Ok(figures) => measured.0.push((exchange.kind(), figures)),
                Err(NotSetUp { why, mine }) => {
                    if let Some((doing, error)) = mine {
                        log::warn!("rank {} cannot {doing}: {error}", self.blob.rank);
                    }
                    if fused.is_lost() {
                        return Ok(Err(why));
                    }
                }
            }
        }
        if measured.0.is_empty() {
            log::warn!("nothing could be measured; FLASHCOMM_TUNE=off says what holds then without this");
            return Ok(Ok(untuned(facts, exchanges.swap_remove(0))));
        }
        cache::keep(key, &measured);
        let preference = preference(&measured, facts);
        if let Some(best) = exchanges.iter().position(|exchange| exchange.kind() == preference.0) {
            let exchange = exchanges.swap_remove(best);
            return Ok(Ok(tuned(&measured, facts, exchange)));
        }
        // Nothing of ours is faster at any size, and areas that nobody uses would cost memory.
        drop(exchanges);
        let exchange = self.set_up_best(facts, local, calls.connect, Some(preference))?;
        Ok(exchange.map(|exchange| tuned(&measured, facts, exchange)))
    }

    /// Times every way at every size, as long as that does not take too long.
    fn measure(
        &mut self,
        fused: &Fused,
        local: &Local<'_>,
        calls: &RealCalls<'_>,
        known: Option<&Figures>,
        (world, budget_ns): (usize, u64),
    ) -> Result<SetUp<Figures>> {
        let element = if self.blob.agreement.dtypes.0 { ElementType::Fp16 } else { ElementType::Bf16 };
        let timing = Timing::new(SIZES[SIZES.len() - 1] as usize, local.context.device(), local.stream);
        let round = self.next(timing.is_ok(), [0; OFFER_BYTES])?;
        let mut timing = match (timing, round) {
            (Ok(timing), Ok(_)) => timing,
            (timing, Err(why)) => {
                let mine = timing.err().map(|error| ("measure", error));
                return Ok(Err(NotSetUp { why, mine }));
            }
            (Err(error), Ok(_)) => return Err(error), // not possible: a rank that is not ready keeps all from going on
        };
        let (mut figures, mut spent) = (Figures::default(), 0);
        for (i, size) in SIZES.into_iter().enumerate() {
            self.meet_neighbors()?;
            let n_sums =
                BATCH_NS.checked_div(figures.slowest(size)).map_or(MAX_BATCH, |n_sums| n_sums.clamp(1, MAX_BATCH));
            let mut row: Row = [0; WAYS.len()];
            for (ns, way) in row.iter_mut().zip(WAYS) {
                let is_there = match way {
                    Way::Forward => known.is_none(),
                    Way::Compressed => true,
                    Way::ExactTwoHops => world > 2 && size <= fused.exact_room(),
                    Way::ExactOneHop => size <= fused.exact_room(),
                };
                if is_there {
                    let sums = (way, element, size as usize, n_sums);
                    *ns = self.time(&mut timing, sums, fused, local, calls)?;
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
            spent += row.iter().map(|ns| u64::from(*ns)).sum::<u64>() * (1 + BATCHES as u64 * n_sums);
            // The next size has four times the bytes.
            let next: u64 = row.iter().map(|ns| 4 * u64::from(*ns)).sum::<u64>() * (1 + BATCHES as u64);
            if spent + next > budget_ns {
                break;
            }
        }
        if self.blob.rank == 0 {
            log::info!("measured over {}: {}", fused.memory().exchange().name(), figures.in_words());
        }
        Ok(Ok(figures))
    }

    /// Nanoseconds of one sum, of several one behind the other.
    fn time(
        &self,
        timing: &mut Timing,
        (way, element, n_bytes, n_sums): (Way, ElementType, usize, u64),
        fused: &Fused,
        local: &Local<'_>,
        calls: &RealCalls<'_>,
    ) -> Result<u32> {
        let Local { kernels, stream, .. } = local;
        let mut batches = [0; BATCHES];
        // The first sum alone: it connects ranks, loads kernels and finds memory.
        for batch in 0..=BATCHES {
            timing.begin(stream)?;
            for _ in 0..if batch == 0 { 1 } else { n_sums } {
                match way {
                    Way::Forward => {
                        if !(calls.all_reduce)((element, timing.buffer(), n_bytes / element.n_bytes()))? {
                            return Ok(0);
                        }
                    }
                    _ => timing.launch(way, (element, n_bytes), fused, kernels, stream)?,
                }
            }
            timing.end(stream)?;
            let is_over = || timing.is_over().map_err(Error::cuda("waiting for a measurement"));
            if let Err(error) = poll(|| self.meeting.check(), is_over) {
                fused.abort();
                timing.lose();
                return Err(error);
            }
            if let Some(ns) = batch.checked_sub(1).and_then(|batch| batches.get_mut(batch)) {
                *ns = timing.nanoseconds().map_err(Error::cuda("reading an event"))? / n_sums;
            }
        }
        batches.sort_unstable();
        Ok(u32::try_from(batches[BATCHES / 2]).unwrap_or(u32::MAX).max(1))
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

/// Whether anything is to be found out.
fn is_tunable(facts: &[Blob]) -> bool {
    let agreement = &facts[0].agreement;
    let is_all_set = agreement.min_bytes.is_some() && agreement.exact_max.is_some();
    agreement.tune != Tune::Off && !agreement.legs.batch_invariant && !is_all_set
}

/// Whether host memory may be better than what comes first: where the GPUs have no NVLink.
fn has_rival(facts: &[Blob], first: ExchangeKind) -> bool {
    let all = (1u32 << facts.len().min(16)) - 1;
    let have_nvlink = facts.iter().all(|rank| u32::from(rank.nvlinks) == all);
    facts[0].agreement.exchange.is_none()
        && !have_nvlink
        && first != ExchangeKind::Host
        && against(ExchangeKind::Host, facts, &[], Some(Preference(ExchangeKind::Host))).is_none()
}

fn bounds(facts: &[Blob], kind: ExchangeKind) -> Bounds {
    let agreement = &facts[0].agreement;
    Bounds {
        compress_min: agreement.min_bytes,
        exact_max: agreement.exact_max,
        exact_room: ranges::exact_room(facts, kind),
    }
}

/// What was measured to be best: an exchange of ours, or none. What somebody has set stays.
fn preference(measured: &Measured, facts: &[Blob]) -> Preference {
    if let Some(kind) = facts[0].agreement.exchange {
        return Preference(kind);
    }
    let best = measured.best(|kind| bounds(facts, kind));
    let is_used = |kind: &ExchangeKind| {
        let ways = measured.of(*kind).map(|figures| figures.ways(&bounds(facts, *kind)));
        ways.is_some_and(|ways| ways.coded.entries().iter().any(|(_, way)| *way != Way::Forward))
    };
    Preference(best.filter(is_used).unwrap_or(ExchangeKind::Nccl))
}

fn tuned(measured: &Measured, facts: &[Blob], exchange: Exchange) -> Tuned {
    let kind = exchange.kind();
    match (measured.of(kind), kind) {
        (Some(figures), _) => {
            let ways = figures.ways(&bounds(facts, kind));
            Tuned { exchange, ways, figures: Some(figures.clone()) }
        }
        (None, ExchangeKind::Nccl) => {
            let of_all = measured.0.iter().map(|(_, figures)| figures);
            let nearest = of_all.filter_map(|figures| Some((figures, figures.nearest()?)));
            let nearest = nearest.min_by_key(|(_, (_, ours, nccl))| u64::from(*ours) * 1000 / u64::from(*nccl));
            Tuned { figures: nearest.map(|(figures, _)| figures.clone()), ..untuned(facts, exchange) }
        }
        // What was best cannot be set up this time.
        (None, _) => untuned(facts, exchange),
    }
}

fn untuned(facts: &[Blob], exchange: Exchange) -> Tuned {
    let ways = ranges::ways(facts, exchange.kind());
    Tuned { exchange, ways, figures: None }
}

/// All on which the measurements depend: the GPUs and how they reach each other, what the ranks have set, and the versions.
fn key(facts: &[Blob]) -> Result<Key> {
    let driver = cuda::driver_version().map_err(Error::cuda("asking for the driver's version"))?;
    let mut bytes = format!("{} {driver} {}\n", env!("CARGO_PKG_VERSION"), real::version()).into_bytes();
    bytes.extend(variables::of_nccl());
    for rank in facts {
        let process = facts.iter().position(|other| other.location.process == rank.location.process);
        let lasting = Location {
            boot: 0,
            host: 0,
            nccl_host: 0,
            shared_memory: 0,
            process: process.unwrap_or(0) as u64,
            device: 0,
            family: 0,
            ..rank.location
        };
        let agreement = Agreement { tune: Tune::Cache, ..rank.agreement };
        let lasting = Blob { location: lasting, agreement, attach: 0, offer: [0; OFFER_BYTES], ..*rank };
        bytes.extend(lasting.encode());
    }
    Ok(Key(bytes))
}

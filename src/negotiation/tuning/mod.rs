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
mod stopwatch;

use self::cache::{Key, Known};
use self::figures::{Bounds, Figures, Measured};
use self::stopwatch::BUDGET_NS;
use super::agreement::Agreement;
use super::choice::{Preference, against};
use super::facts::{Blob, Location};
use super::meeting::{Meeting, Rounds};
use super::over_nccl::Sum;
use super::ranges;
use super::setup::{Local, NotSetUp};
use super::sizes;
use crate::config::{ExchangeKind, Tune};
use crate::cuda;
use crate::error::{Error, Result};
use crate::exchange::Exchange;
use crate::exchange::area::{OFFER_BYTES, Offer};
use crate::kernels::Areas;
use crate::negotiation::disagreement::Disagreement;
use crate::real;
use crate::variables;
use crate::verdict::{Way, Ways};

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
        match self.recall(&key)? {
            Some(known) if known.is_settled() => {
                log::info!("rank {}: what was measured here before holds", self.blob.rank);
                let preference = preference(&known.measured, facts);
                let exchange = self.set_up_best(facts, local, calls.connect, Some(preference))?;
                Ok(exchange.map(|exchange| tuned(&known.measured, facts, exchange)))
            }
            known => self.measure_all(facts, local, calls, (&key, known)),
        }
    }

    /// What every rank knows of these ranks from before; `None` where one of them knows nothing, or something else.
    fn recall(&mut self, key: &Key) -> Result<Option<Known>> {
        let known = cache::find(key, self.blob.agreement.tune == Tune::Cache);
        let digest = known.as_ref().map_or(0, cache::digest);
        let mut offer: Offer = [0; OFFER_BYTES];
        offer[..8].copy_from_slice(&digest.to_le_bytes());
        let round = self.next(true, offer)?;
        let all_know = round.is_ok_and(|facts| facts.iter().all(|rank| rank.offer == offer));
        Ok(known.filter(|_| all_know))
    }

    /// Sets up what may be best, measures it, and keeps the best of it. `known`: by all ranks, from before.
    fn measure_all(
        &mut self,
        facts: &[Blob],
        local: &Local<'_>,
        calls: &RealCalls<'_>,
        (key, known): (&Key, Option<Known>),
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
        let mut stopwatch = match self.stopwatch(sizes::are_alone(facts), local, calls)? {
            Ok(stopwatch) => stopwatch,
            Err(not_set_up) => {
                self.tell(not_set_up);
                return Ok(Ok(unmeasured(facts, exchanges.swap_remove(0))));
            }
        };
        let budget_ns = BUDGET_NS / exchanges.len() as u64;
        for exchange in &exchanges {
            let Exchange::Fused(fused) = exchange else { continue };
            let known = measured.0.first().map(|(_, figures)| figures);
            match self.measure(&mut stopwatch, fused, known, budget_ns)? {
                Ok(figures) => measured.0.push((exchange.kind(), figures)),
                Err(not_set_up) => {
                    let why = self.tell(not_set_up);
                    if fused.is_lost() {
                        return Ok(Err(why));
                    }
                }
            }
        }
        if measured.0.is_empty() {
            return Ok(Ok(unmeasured(facts, exchanges.swap_remove(0))));
        }
        let known = Known::after(known, measured, self.blob.agreement.tune == Tune::Always);
        cache::keep(key, &known);
        let Known { measured, .. } = known;
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

    /// What this rank could not do is logged. Answers what the ranks know of it.
    fn tell(&self, NotSetUp { why, mine }: NotSetUp) -> Disagreement {
        if let Some((doing, error)) = mine {
            log::warn!("rank {} cannot {doing}: {error}", self.blob.rank);
        }
        why
    }
}

/// As constants have it, since ranks could not measure.
fn unmeasured(facts: &[Blob], exchange: Exchange) -> Tuned {
    log::warn!("nothing could be measured; FLASHCOMM_TUNE=off says what holds then without this");
    untuned(facts, exchange)
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

/// All on which the measurements depend: the GPUs and how they reach each other, what the ranks have set, the versions, and
/// whether the communicator has the large share of the GPUs.
fn key(facts: &[Blob]) -> Result<Key> {
    let driver = cuda::driver_version().map_err(Error::cuda("asking for the driver's version"))?;
    let (ours, nccl, alone) = (env!("CARGO_PKG_VERSION"), real::version(), sizes::are_alone(facts));
    let mut bytes = format!("{ours} {driver} {nccl} {alone}\n").into_bytes();
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

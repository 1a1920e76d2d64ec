//! An exchange is set up in rounds, and taken when every rank could.
//!
//! For `peer` and `host` three rounds: everyone has made its area; everyone has mapped all of them and
//! run the kernels once; everyone has got what the others wrote. For the exchange over the real NCCL one: everyone has its staging memory,
//! and NCCL its connections.

use std::thread;
use std::time::{Duration, Instant};

use flashcomm_wire::Plan;

use super::agreement::Agreement;
use super::choice::{Against, Preference, choose};
use super::disagreement::Disagreement;
use super::facts::{Blob, Location};
use super::identity;
use super::meeting::{Meeting, Round, Rounds, poll};
use super::ranges;
use super::sizes;
use crate::config::ExchangeKind;
use crate::cuda::{self, Context, CudaResult, Distance, Stream};
use crate::error::{Error, Result};
use crate::exchange::Exchange;
use crate::exchange::area::{OFFER_BYTES, Peer};
use crate::exchange::fused::{Fused, Prepared};
use crate::exchange::nccl::Staging;
use crate::exchange::trial::Trial;
use crate::kernels::{Areas, Kernels};
use crate::variables::Variables;

/// No offer, in rounds that are not about one.
const NOTHING: [u8; OFFER_BYTES] = [0; OFFER_BYTES];

/// An exchange that not every rank could set up.
pub struct NotSetUp {
    /// What the ranks know of it.
    pub why: Disagreement,
    /// What this rank could not do, and why, where it is one of those.
    pub mine: Option<(&'static str, Error)>,
}

/// What came of setting up `T`.
pub(crate) type SetUp<T> = std::result::Result<T, NotSetUp>;

/// What a rank sets an exchange up with.
pub struct Local<'a> {
    /// The context of its device, which is current.
    pub context: &'a Context,
    /// The kernels of the agreed codecs.
    pub kernels: &'a Kernels,
    /// A stream of ours.
    pub stream: &'a Stream,
    /// How long a kernel waits for peers.
    pub timeout: Option<Duration>,
}

impl Blob {
    /// What a rank says before it knows anything of the others: its settings, and where it runs.
    ///
    /// `block_channels`: as [`Kernels::prepare_fused`] says; 0 where there are no kernels. `family`: of its seat.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(
        rank: usize,
        agreement: Agreement,
        context: &Context,
        block_channels: usize,
        family: u64,
    ) -> Result<Self> {
        let location = Location {
            boot: identity::boot(),
            host: identity::host(),
            nccl_host: identity::nccl_host(),
            shared_memory: identity::shared_memory(),
            process: identity::process(),
            device: context.device(),
            device_uuid: context.device_uuid().map_err(Error::cuda("asking for the device's UUID"))?,
            multiprocessors: context.multiprocessors().map_err(Error::cuda("asking for an attribute"))?,
            block_channels,
            family,
        };
        let attach = identity::number_of_attach();
        let (reaches, forbids, nvlinks) = (0, 0, 0);
        let rank = rank as u32;
        Ok(Self { rank, agreement, location, reaches, forbids, nvlinks, attach, ready: true, offer: NOTHING })
    }
}

impl<M: Meeting> Rounds<M> {
    /// A round that is about no exchange.
    ///
    /// # Errors
    /// As for [`Rounds::next`].
    pub fn compare(&mut self, ready: bool) -> Result<Round> {
        self.next(ready, NOTHING)
    }

    /// Adds to the facts what each rank's GPU reaches.
    ///
    /// # Errors
    /// As for [`Rounds::next`].
    pub fn find_reach(&mut self, context: &Context, facts: &[Blob]) -> Result<Round> {
        (self.blob.reaches, self.blob.forbids, self.blob.nvlinks) =
            reach(context, facts, Variables::global()).map_err(Error::cuda("asking what the GPU reaches"))?;
        self.compare(true)
    }

    /// Sets up `peer` or `host`: areas in GPU or in host memory.
    ///
    /// # Errors
    /// As for [`Rounds::next`].
    pub fn set_up_fused(&mut self, areas: Areas, facts: &[Blob], local: &Local<'_>) -> Result<SetUp<Fused>> {
        let Local { context, kernels, stream, timeout } = local;
        let Some(layout) = sizes::layout(facts, areas.exchange()) else {
            return Ok(Err(NotSetUp { why: Disagreement::NoSharedMemory, mine: None }));
        };
        let rank = self.blob.rank as usize;
        let prepared = Prepared::new(areas, layout, context, stream)
            .and_then(|prepared| Ok((prepared, Trial::new(facts.len(), context.device())?)));
        let offer = prepared.as_ref().map_or(NOTHING, |(prepared, _)| *prepared.offer());
        let round = self.next(prepared.is_ok(), offer)?;
        let (prepared, mut trial, offers) = match (prepared, round) {
            (Ok((prepared, trial)), Ok(offers)) => (prepared, trial, offers),
            (prepared, round) => return Ok(Err(not_set_up(prepared, round, "offer memory"))),
        };
        let peer = |Blob { location, offer, .. }: &Blob| Peer {
            process: location.process,
            shared_memory: location.shared_memory,
            device: location.device,
            offer: *offer,
        };
        let peers: Vec<Peer> = offers.iter().map(peer).collect();
        let kind = areas.exchange();
        let shape = (sizes::blocks(facts, kind).usual, sizes::block_channels(facts, kind));
        let fused = prepared.connect(rank, &peers, context, shape, *timeout);
        let fused = fused.and_then(|fused| fused.warm_up(kernels, stream).map(|()| fused));
        let round = self.next(fused.is_ok(), offer)?;
        let fused = match (fused, round) {
            (Ok(fused), Ok(_)) => fused,
            (fused, round) => return Ok(Err(not_set_up(fused, round, "use others' memory"))),
        };
        let mut fused = fused;
        for pulls in [false, true].into_iter().take(1 + usize::from(may_pull(facts, areas))) {
            let tried = self.try_links(&mut trial, pulls, &fused, local)?;
            let round = self.next(tried.is_ok(), offer)?;
            if !matches!((&tried, &round), (Ok(()), Ok(_))) {
                return Ok(Err(not_set_up(tried, round, "believe its links")));
            }
        }
        fused.unlink();
        Ok(Ok(fused))
    }

    /// Sends something over every link and looks at what arrives.
    fn try_links(&mut self, trial: &mut Trial, pulls: bool, fused: &Fused, local: &Local<'_>) -> Result<Result<()>> {
        self.meet_neighbors()?;
        if let Err(error) = trial.launch(self.blob.rank as usize, pulls, fused, local.kernels, local.stream) {
            // Now, since the others' kernels wait for this one, and who waits for those may give up first.
            log::warn!("rank {}: trying the links: {error}", self.blob.rank);
            return Ok(Err(error));
        }
        let is_over = || trial.is_over().map_err(Error::cuda("waiting for the trial of the links"));
        let over = poll(|| self.meeting.check(), is_over);
        if over.is_err() {
            fused.abort();
            // It ends by itself now; where even that takes long, its memory is nobody's any more.
            let end = Instant::now() + Duration::from_secs(2);
            while trial.is_over() == Ok(false) && Instant::now() < end {
                thread::sleep(Duration::from_millis(1));
            }
            if trial.is_over() != Ok(true) {
                trial.lose();
            }
        }
        over.map(|()| trial.result(fused))
    }
}

/// Whether payloads may be read from peers' areas.
fn may_pull(facts: &[Blob], areas: Areas) -> bool {
    let agreement = &facts[0].agreement;
    areas == Areas::InGpuMemory && agreement.may(agreement.p2p_read)
}

/// What a rank that could do its part, or could not, makes of a round in which not all could.
fn not_set_up<T>(mine: Result<T>, round: Round, doing: &'static str) -> NotSetUp {
    let why = round.expect_err("a rank that is not ready keeps all from going on");
    NotSetUp { why, mine: mine.err().map(|error| (doing, error)) }
}

impl<M: Meeting> Rounds<M> {
    /// Sets up the best exchange that all ranks can, of those that the setting allows: the one that was measured to be so,
    /// if any was. `connect` makes the real NCCL connect all ranks, as [`super::over_nccl::OverNccl::connect`] does.
    ///
    /// # Errors
    /// As for [`Rounds::next`].
    pub fn set_up_best(
        &mut self,
        facts: &[Blob],
        local: &Local<'_>,
        connect: impl Fn() -> Result<bool>,
        measured: Option<Preference>,
    ) -> Result<std::result::Result<Exchange, Disagreement>> {
        let mut failed = Vec::new();
        loop {
            let choice = choose(facts, &failed, measured);
            let Some(kind) = choice.takes else {
                return Ok(Err(choice.refusal().expect("what is not taken has failed")));
            };
            let outcome = match kind {
                ExchangeKind::Nccl => self.set_up_nccl(facts, &connect)?.map(Exchange::Nccl),
                ExchangeKind::Peer => self.set_up_fused(Areas::InGpuMemory, facts, local)?.map(Exchange::Fused),
                ExchangeKind::Host => self.set_up_fused(Areas::InHostMemory, facts, local)?.map(Exchange::Fused),
            };
            match outcome {
                Ok(exchange) => {
                    let of_note = |(_, against): &(_, Against)| !matches!(against, Against::Setting(_));
                    for (other, against) in choice.passed_over.into_iter().filter(of_note) {
                        log::info!("rank {}: not over the exchange {}: {against}", self.blob.rank, other.name());
                    }
                    return Ok(Ok(exchange));
                }
                Err(NotSetUp { why, mine }) => {
                    // Loudly where no other may take its place.
                    let is_only_one = self.blob.agreement.exchange.is_some();
                    let level = if is_only_one { log::Level::Warn } else { log::Level::Info };
                    if let Some((doing, error)) = mine {
                        let rank = self.blob.rank;
                        log::log!(level, "rank {rank} cannot {doing} for the exchange {}: {error}", kind.name());
                    }
                    failed.push((kind, why));
                }
            }
        }
    }

    fn set_up_nccl(&mut self, facts: &[Blob], connect: impl Fn() -> Result<bool>) -> Result<SetUp<Staging>> {
        let Blob { rank, agreement: Agreement { legs, buffer_bytes, .. }, .. } = self.blob;
        let world = facts.len();
        // Where nothing will go this way it costs no connections, and next to no memory.
        let is_used = ranges::ways(facts, ExchangeKind::Nccl).coded.compress_min() != u64::MAX;
        let buffer_bytes = if is_used { buffer_bytes } else { Plan::staging_bytes_per_tile(world, legs) };
        if is_used && !connect()? {
            // Nothing is allocated that would be freed at once: that would wait for what the application has on the GPU.
            log::info!("rank {rank} has a non-blocking communicator");
            let why = self.compare(false)?.expect_err("this rank is not ready");
            return Ok(Err(NotSetUp { why, mine: None }));
        }
        let staging = Staging::new(world, legs, buffer_bytes);
        if let Err(error) = &staging {
            log::warn!("rank {rank} cannot compress: {error}");
        }
        Ok(match self.compare(staging.is_ok())? {
            Ok(_) => Ok(staging?),
            Err(why) => Err(NotSetUp { why, mine: None }),
        })
    }
}

/// The ranks whose GPU's memory the GPU of this context reaches, those where NCCL's variables forbid it, and those to which it
/// has NVLink, as bits.
fn reach(context: &Context, facts: &[Blob], variables: &Variables) -> CudaResult<(u16, u16, u16)> {
    let (mut reaches, mut forbids, mut nvlinks) = (0, 0, 0);
    // More ranks than bits have no exchange for which it matters.
    for (rank, Blob { location, .. }) in facts.iter().enumerate().take(u16::BITS as usize) {
        // Of a GPU that this process does not see nothing is known but that it is another one.
        let distance = match cuda::ordinal_of(&location.device_uuid)? {
            Some(ordinal) if context.reaches(ordinal)? => {
                reaches |= 1 << rank;
                context.distance(ordinal)?
            }
            Some(_) => continue,
            None => Distance::Nvl,
        };
        if distance <= Distance::Nvl && reaches >> rank & 1 != 0 {
            nvlinks |= 1 << rank;
        }
        if variables.p2p_level.is_some_and(|level| distance > level) {
            forbids |= 1 << rank;
        }
    }
    Ok((reaches, forbids, nvlinks))
}

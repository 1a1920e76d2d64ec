//! An exchange is set up in rounds, and taken when every rank could.
//!
//! For `peer` and `host` two rounds: everyone has made its area; everyone has mapped all of them and
//! run the kernels once. For the exchange over the real NCCL one: everyone has its staging memory,
//! and NCCL its connections.

use std::time::Duration;

use super::choice::{self, choose};
use super::facts::{Agreement, Blob, Disagreement, Location};
use super::identity;
use super::meeting::{Meeting, Round, Rounds};
use super::over_nccl::OverNccl;
use crate::config::ExchangeKind;
use crate::cuda::{self, Context, CudaResult, Stream};
use crate::error::{Error, Result};
use crate::exchange::Exchange;
use crate::exchange::area::{OFFER_BYTES, Peer};
use crate::exchange::fused::{Fused, Prepared};
use crate::exchange::nccl::Staging;
use crate::exchange::residency::Seat;
use crate::kernels::{AreaMemory, Kernels};

/// No offer, in rounds that are not about one.
const NOTHING: [u8; OFFER_BYTES] = [0; OFFER_BYTES];

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
    /// `block_channels`: as [`Kernels::prepare_fused`] says; 0 where there are no kernels.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(
        rank: usize,
        agreement: Agreement,
        context: &Context,
        block_channels: usize,
        seat: &Seat,
    ) -> Result<Self> {
        let location = Location {
            host: identity::host(),
            process: identity::process(),
            device: context.device(),
            device_uuid: context.device_uuid().map_err(Error::cuda("asking for the device's UUID"))?,
            multiprocessors: context.multiprocessors().map_err(Error::cuda("asking for an attribute"))?,
            block_channels,
            is_first: seat.is_first,
        };
        let attach = identity::number_of_attach();
        Ok(Self { rank: rank as u32, agreement, location, reaches: 0, attach, ready: true, offer: NOTHING })
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
        self.blob.reaches = reach(context, facts).map_err(Error::cuda("asking what the GPU reaches"))?;
        self.compare(true)
    }

    /// Sets up `peer` or `host`.
    ///
    /// # Errors
    /// As for [`Rounds::next`].
    pub fn set_up_fused(
        &mut self,
        kind: ExchangeKind,
        facts: &[Blob],
        Local { context, kernels, stream, timeout }: &Local<'_>,
    ) -> Result<std::result::Result<Fused, Disagreement>> {
        let memory = if kind == ExchangeKind::Peer { AreaMemory::Gpu } else { AreaMemory::Host };
        let Some(rings) = choice::rings(facts) else { return Ok(Err(Disagreement::NoSharedMemory)) };
        let rank = self.blob.rank as usize;
        let prepared = Prepared::new(memory, rings, context, stream);
        if let Err(error) = &prepared {
            self.log_refusal(kind, "offer memory", error);
        }
        let offer = prepared.as_ref().map_or(NOTHING, |prepared| *prepared.offer());
        let offers = match self.next(prepared.is_ok(), offer)? {
            Ok(offers) => offers,
            Err(disagreement) => return Ok(Err(disagreement)),
        };
        let peer = |Blob { location, offer, .. }: &Blob| Peer {
            process: location.process,
            device: location.device,
            offer: *offer,
        };
        let peers: Vec<Peer> = offers.iter().map(peer).collect();
        let fused = prepared?.connect(rank, &peers, context, choice::block_channels(facts), *timeout);
        let fused = fused.and_then(|fused| fused.warm_up(kernels, stream).map(|()| fused));
        if let Err(error) = &fused {
            self.log_refusal(kind, "use others' memory", error);
        }
        Ok(match self.next(fused.is_ok(), offer)? {
            Ok(_) => {
                let mut fused = fused?;
                fused.unlink();
                Ok(fused)
            }
            Err(disagreement) => Err(disagreement),
        })
    }

    /// Says why an exchange cannot be: loudly where no other may take its place.
    fn log_refusal(&self, kind: ExchangeKind, what: &str, error: &Error) {
        let is_only_one = self.blob.agreement.exchange.is_some();
        let level = if is_only_one { log::Level::Warn } else { log::Level::Info };
        log::log!(level, "rank {} cannot {what} for the exchange {}: {error}", self.blob.rank, kind.name());
    }
}

impl Rounds<OverNccl<'_>> {
    /// Sets up the best exchange that all ranks can, of those that the setting allows.
    ///
    /// # Errors
    /// As for [`Rounds::next`].
    pub fn set_up_best(
        &mut self,
        facts: &[Blob],
        local: &Local<'_>,
    ) -> Result<std::result::Result<Exchange, Disagreement>> {
        let mut failed = Vec::new();
        loop {
            let choice = choose(facts, &failed);
            let Some(kind) = choice.takes else {
                return Ok(Err(choice.refusal().expect("what is not taken has failed")));
            };
            let outcome = match kind {
                ExchangeKind::Nccl => {
                    for (other, against) in choice.passed_over {
                        log::info!("rank {}: not over the exchange {}: {against}", self.blob.rank, other.name());
                    }
                    self.set_up_nccl()?.map(Exchange::Nccl)
                }
                kind => self.set_up_fused(kind, facts, local)?.map(Exchange::Fused),
            };
            match outcome {
                Ok(exchange) => return Ok(Ok(exchange)),
                Err(disagreement) => failed.push((kind, disagreement)),
            }
        }
    }

    fn set_up_nccl(&mut self) -> Result<std::result::Result<Staging, Disagreement>> {
        let Blob { rank, agreement: Agreement { legs, buffer_bytes, .. }, .. } = self.blob;
        let staging = Staging::new(self.meeting.world(), legs, buffer_bytes);
        if let Err(error) = &staging {
            log::warn!("rank {rank} cannot compress: {error}");
        }
        let takes_calls = self.meeting.connect()?;
        if !takes_calls {
            log::info!("rank {rank} has a non-blocking communicator");
        }
        Ok(match self.compare(staging.is_ok() && takes_calls)? {
            Ok(_) => Ok(staging?),
            Err(disagreement) => Err(disagreement),
        })
    }
}

/// The ranks whose GPU's memory the GPU of this context reaches, as bits.
fn reach(context: &Context, facts: &[Blob]) -> CudaResult<u16> {
    let mut reaches = 0;
    // More ranks than bits have no exchange for which it matters.
    for (rank, Blob { location, .. }) in facts.iter().enumerate().take(u16::BITS as usize) {
        if let Some(ordinal) = cuda::ordinal_of(&location.device_uuid)?
            && context.reaches(ordinal)?
        {
            reaches |= 1 << rank;
        }
    }
    Ok(reaches)
}

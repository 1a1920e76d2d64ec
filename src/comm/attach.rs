//! Attach: the ranks of a communicator agree, when it is created, whether and how they compress.
//!
//! It goes in rounds ([`crate::negotiation`]): the ranks compare their settings and what they reach, then try the exchanges
//! that are possible, the best first. The first that *every* rank could set up is the communicator's.
//!
//! A change of width that an engine asks for ([`change_all`]) is another attach, after a round in which the ranks compare what
//! they ask for. Where all are ready the new setup takes the old one's place on every rank, otherwise on none.
//!
//! All of it runs on a thread of its own for each communicator. So the wait can be bounded, although NCCL's own calls
//! cannot: a rank without the shim never answers. And one thread may attach all communicators of a group together,
//! in whatever order other ranks get to theirs. Where it fails midway, something of it may be under way on the
//! communicator still, and other ranks may be further: such a communicator is *failed*, and refuses every call.

use std::mem::ManuallyDrop;
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use flashcomm_wire::{Legs, Width};

use super::communicator::{Attached, Comm};
use super::leftovers;
use super::order::Order;
use super::share::Share;
use super::wait::Wait;
use super::watch::Watched;
use crate::config::Config;
use crate::cuda::{self, Context, RelaxedCapture, Stream};
use crate::error::{self, Error, Result};
use crate::exchange::Exchange;
use crate::exchange::residency::Seat;
use crate::kernels::Kernels;
use crate::nccl::{CommPtr, NcclResult};
use crate::negotiation::agreement::Agreement;
use crate::negotiation::disagreement::{Disagreement, MAX_SETUPS};
use crate::negotiation::facts::Blob;
use crate::negotiation::meeting::{Meeting, Rounds, poll};
use crate::negotiation::over_nccl::{self, OverNccl, Sum};
use crate::negotiation::page::OverPage;
use crate::negotiation::setup::Local;
use crate::negotiation::tuning::figures::Figures;
use crate::negotiation::tuning::{RealCalls, Tuned};
use crate::real;
use crate::stats;
use crate::verdict::{Verdict, Ways};

/// Attaches communicators that have just been created; waits until all have a verdict.
///
/// # Errors
/// [`Error::AttachTimeout`] when a rank does not answer, or what the driver or the real NCCL answered to a call that
/// peers rely on. The communicator is failed then.
pub(crate) fn attach_all(comms: &[Arc<Comm>]) -> Result<()> {
    let wish = Wish { legs: Config::global().legs, switched_off: false };
    let waits = comms.iter().map(|comm| start(comm, wish)).collect();
    all(waits, |comm, outcome| {
        match outcome {
            Outcome::New(attached) => put_on(comm, attached, wish),
            Outcome::Known | Outcome::Refused(_) => comm.settle_off(), // attach has told why
        }
        Ok(())
    })
}

/// As [`attach_all`], for communicators that do not block: each stays in progress until it has a
/// verdict. None waits for another of its group, to which other ranks may come later.
pub(crate) fn attach_in_background(comms: Vec<Arc<Comm>>) {
    for comm in comms {
        comm.set_meeting(true);
        thread::spawn(move || {
            let _ = attach_all(std::slice::from_ref(&comm)); // it has told of an error, and the communicator has it
            comm.set_meeting(false);
        });
    }
}

/// A change that an engine asks for. What is `None` stays.
#[derive(Clone)]
pub(crate) struct Change {
    /// The communicator.
    pub comm: Arc<Comm>,
    /// Widths of the reduce leg and of the gather leg.
    pub widths: Option<(Width, Width)>,
    /// Off or on.
    pub switched_off: Option<bool>,
}

/// Makes changes that all ranks ask for alike; attaches communicators that have no verdict yet on the way.
///
/// # Errors
/// [`Error::Refused`] on every rank, where the ranks ask for different things, or one of them cannot; all keep what
/// they had. Otherwise as for [`attach_all`].
pub(crate) fn change_all(changes: &[Change]) -> Result<()> {
    if !Config::global().enable {
        return Err(Error::Refused("FLASHCOMM_ENABLE=0: nothing is compressed in this process".into()));
    }
    if changes.iter().any(|change| change.comm.verdict() == Verdict::Off) {
        return Err(Error::Refused("all ranks of the communicator forward to the real NCCL; the log says why".into()));
    }
    let waits: Vec<_> = changes.iter().map(|change| start(&change.comm, change.wish())).collect();
    all(waits, |comm, outcome| {
        let change = changes.iter().find(|change| Arc::ptr_eq(&change.comm, comm)).expect("it was started for one");
        let wish = change.wish();
        match outcome {
            Outcome::New(attached) => put_on(comm, attached, wish),
            Outcome::Known => {
                comm.use_setup(wish.legs, wish.switched_off);
                describe(comm);
            }
            Outcome::Refused(disagreement) => {
                comm.settle_off(); // unless it was on
                return Err(Error::Refused(format!("the communicator stays as it is: {disagreement}")));
            }
        }
        Ok(())
    })
}

impl Change {
    fn wish(&self) -> Wish {
        let mut legs = self.comm.attached().map_or(Config::global().legs, |attached| attached.legs);
        if let Some(widths) = self.widths {
            // A code that has no kernels for them gives way to the default one.
            let choose = |code| {
                let chosen = Legs::choose(code, widths, legs.reduce.group)?;
                Some(chosen.with_batch_invariant(legs.batch_invariant))
            };
            legs = choose(Config::global().code).or_else(|| choose(None)).expect("the default code takes all widths");
        }
        let is_off = self.comm.verdict() == Verdict::SwitchedOff;
        Wish { legs, switched_off: self.switched_off.unwrap_or(is_off) }
    }
}

/// What a communicator is to become.
#[derive(Clone, Copy)]
struct Wish {
    legs: Legs,
    switched_off: bool,
}

/// What the ranks came to.
enum Outcome {
    /// All have this.
    New(Box<Attached>),
    /// All have had it before.
    Known,
    /// All stay as they were; a communicator without a verdict is off.
    Refused(Disagreement),
}

fn put_on(comm: &Comm, attached: Box<Attached>, wish: Wish) {
    comm.settle(attached, wish.switched_off);
    describe(comm);
}

fn describe(comm: &Comm) {
    if let Some(on) = comm.attached() {
        let (bits, code, exchange) = (on.legs.to_string(), on.legs.code().name(), on.exchange.kind().name());
        stats::describe(comm.handle(), on.rank, on.world, Some(stats::Attached { bits, code, exchange }));
    }
}

fn start(comm: &Arc<Comm>, wish: Wish) -> Wait<Outcome> {
    Wait::start(comm, move |comm| attach(comm, wish))
}

/// Waits for all, within the attach timeout, and does `then` with what each came to; the last error.
fn all(waits: Vec<Wait<Outcome>>, mut then: impl FnMut(&Arc<Comm>, Outcome) -> Result<()>) -> Result<()> {
    let timeout = Config::global().attach_timeout;
    let deadline = Instant::now() + timeout;
    let mut result = Ok(());
    for wait in waits {
        let outcome = wait.until(deadline).unwrap_or(Err(Error::AttachTimeout(timeout)));
        let comm = wait.comm;
        if let Err(error) = outcome.and_then(|outcome| then(&comm, outcome)) {
            if !matches!(error, Error::Refused(_)) {
                log::error!("attach failed: {error}"); // of a refusal the log has told
            }
            error::remember(&error);
            if !matches!(error, Error::Refused(_) | Error::Aborted) {
                comm.fail(&error);
            }
            result = Err(error);
        }
    }
    result
}

/// The attach of one communicator, or its change to other widths.
fn attach(comm: &Comm, wish: Wish) -> Result<Outcome> {
    let _kept = leftovers::keep();
    let check = || if comm.is_aborted() { Err(Error::Aborted) } else { Ok(()) };
    if comm.is_meeting() {
        // Still in the making; what comes of that the real NCCL tells the application, too.
        poll(check, || Ok(comm.life.call(|| real::state(comm.handle()))? != NcclResult::IN_PROGRESS))?;
    }
    match Own::of(comm) {
        Ok(own) if own.world == 1 => Ok(Outcome::Refused(Disagreement::Alone)),
        Ok(own) => meet(comm, own, wish),
        Err(error) => {
            log::warn!("a communicator is forwarded to the real NCCL: {error}");
            Ok(Outcome::Refused(Disagreement::NotReady { rank: 0 }))
        }
    }
}

/// The rounds of one communicator.
fn meet(comm: &Comm, Own { rank, world, device, context }: Own, Wish { legs, switched_off }: Wish) -> Result<Outcome> {
    let check = || if comm.is_aborted() { Err(Error::Aborted) } else { Ok(()) };
    let agreement = Agreement { legs, switched_off, ..Agreement::from(Config::global()) };
    let _entered = context.enter().map_err(Error::cuda("entering the context"))?;
    let _relaxed = RelaxedCapture::enter().map_err(Error::cuda("leaving the capture mode"))?;
    let first = comm.setups().next();
    let share = comm.setups().find_map(|setup| setup.share.clone());
    let seat = share.is_none().then(|| Seat::take(device));
    let family = || share.as_ref().map_or_else(|| seat.as_ref().map_or(0, Seat::family), |share| share.family());
    let stream = Rc::new(Stream::new().map_err(Error::cuda("creating a stream"))?);
    let over_nccl = || OverNccl::new(comm.handle(), &comm.life, device, (rank, world), stream.clone());
    let begin = |blob| {
        let meeting: Box<dyn Meeting + '_> = match comm.page(rank, world)? {
            Some(page) => Box::new(OverPage { page, life: &comm.life }),
            None => Box::new(over_nccl()?),
        };
        Ok(Rounds::new(meeting, blob))
    };

    let mut rounds = None;
    if first.is_some() {
        // What is loaded or allocated may wait for work on the GPU; so first all ranks come, and have issued what they
        // were to issue before, then that work ends.
        let rounds = rounds.insert(begin(Blob::new(rank, agreement, &context, 0, family())?)?);
        if let Err(disagreement) = rounds.compare(true)? {
            return Ok(refused(comm, rank, disagreement));
        }
        poll(check, || Ok(comm.is_idle()))?;
    }
    if comm.attached_with(legs).is_some() {
        drop(stream);
        rounds.map_or(Ok(()), |rounds: Rounds<_>| rounds.end(check))?;
        return Ok(Outcome::Known);
    }
    if comm.setups().count() == MAX_SETUPS {
        return Ok(refused(comm, rank, Disagreement::TooManyWidths));
    }

    let loaded = load(device, &context, (legs, world), comm.mixes_graphs());
    comm.recording.prepare(device);
    if let Err(error) = &loaded {
        log::warn!("rank {rank} cannot compress: {error}");
    }
    let block_channels = loaded.as_ref().map_or(0, |loaded| loaded.block_channels);
    let mut rounds = match rounds {
        Some(mut rounds) => {
            rounds.blob.location.block_channels = block_channels;
            rounds
        }
        None => begin(Blob::new(rank, agreement, &context, block_channels, family())?)?,
    };
    let facts = match rounds.compare(loaded.is_ok())? {
        Ok(facts) => facts,
        Err(disagreement) => return Ok(refused(comm, rank, disagreement)),
    };
    comm.recording.begin(facts[0].attach, rank, world);
    let Loaded { kernels, order, .. } = loaded?;
    let local = Local { context: &context, kernels: &kernels, stream: &stream, timeout: Config::global().timeout };
    let all_reduce = &|sum: Sum| over_nccl::all_reduce(comm.handle(), &comm.life, sum, &stream);
    let calls = RealCalls { connect: &|| over_nccl()?.connect(), all_reduce };
    let set_up = match rounds.find_reach(&context, &facts)? {
        Ok(facts) => rounds.set_up_tuned(&facts, &local, &calls)?,
        Err(disagreement) => Err(disagreement),
    };
    drop(stream);
    rounds.end(check)?; // what exchanges that were given up needed has been freed
    let Tuned { exchange, ways, figures } = match set_up {
        Ok(tuned) => tuned,
        Err(disagreement) => return Ok(refused(comm, rank, disagreement)),
    };

    log_on((rank, world), legs, &exchange, &ways, figures.as_ref());
    let order = first.map_or_else(|| Arc::new(order), |first| first.order.clone());
    let page = comm.page(rank, world)?.cloned();
    let new_share = || seat.map(|seat| Arc::new(Share::new(seat, page, rank, &facts)));
    let share = if matches!(exchange, Exchange::Fused(_)) { share.or_else(new_share) } else { None };
    let (watched, exchange) = (watch(comm, rank, &exchange, figures.as_ref()), ManuallyDrop::new(exchange));
    let attached = Attached { rank, world, legs, ways, figures, context, kernels, watched, exchange, order, share };
    Ok(Outcome::New(Box::new(attached)))
}

/// Looks from now on whether sums take much longer than was measured, where something was.
fn watch(comm: &Comm, rank: usize, exchange: &Exchange, figures: Option<&Figures>) -> Option<Watched> {
    let (Exchange::Fused(fused), Some(figures)) = (exchange, figures) else { return None };
    // SAFETY: the slots belong to the exchange, which is freed after what this returns is dropped.
    unsafe { Watched::begin(comm.handle(), rank, fused.watched_slots(), figures) }
}

/// What every exchange needs.
struct Loaded {
    kernels: Kernels,
    block_channels: usize,
    order: Order,
}

fn load(device: i32, context: &Context, (legs, world): (Legs, usize), mixes_graphs: bool) -> Result<Loaded> {
    let kernels = Kernels::load(device, legs, world)
        .map_err(Error::cuda("loading the kernels (is the driver older than the CUDA that built flashcomm?)"))?;
    let block_channels = kernels.prepare_fused(context).map_err(Error::cuda("readying the fused kernel"))?;
    let order = Order::new(mixes_graphs).map_err(Error::cuda("creating an event"))?;
    Ok(Loaded { kernels, block_channels, order })
}

fn log_on((rank, world): (usize, usize), legs: Legs, exchange: &Exchange, ways: &Ways, figures: Option<&Figures>) {
    let (exact_max, compress_min) = (ways.plain.exact_max(), ways.coded.compress_min());
    let mut from = match compress_min {
        u64::MAX => "nothing unless FLASHCOMM_MIN_BYTES says so".into(),
        compress_min => format!("from {compress_min} bytes up"),
    };
    if exact_max > 0 {
        from += &format!("; exact sums of other operations up to {exact_max} bytes");
    }
    if figures.is_some() {
        from += "; as measured here";
    }
    let blocks = match exchange {
        Exchange::Fused(fused) => match fused.max_blocks() {
            (usual, large) if usual == large => format!(" {usual} blocks,"),
            (usual, large) => format!(" {usual} blocks, or {large} where it is the first that is used,"),
        },
        Exchange::Nccl(_) => String::new(),
    };
    let (code, name) = (legs.code().name(), exchange.kind().name());
    log::info!("rank {rank} of {world}: on, {legs} bits ({code}), exchange {name},{blocks} {from}");
    if compress_min == u64::MAX && rank == 0 {
        let why = match figures.and_then(Figures::nearest) {
            Some((n_bytes, ours, nccl)) => format!(
                "measured here, the real NCCL is faster: {n_bytes} bytes take {} us at best, over the real NCCL {} us",
                ours / 1000,
                nccl / 1000
            ),
            None => format!("over the exchange {name} the real NCCL is faster, or sends less"),
        };
        log::warn!(
            "a communicator of {world} ranks compresses nothing: {why}. FLASHCOMM_MIN_BYTES compresses anyway; \
             FLASHCOMM_LOG=info says what is against the other exchanges"
        );
    }
}

/// What a rank knows by itself.
struct Own {
    rank: usize,
    world: usize,
    device: i32,
    /// The primary context of the device, which the real NCCL uses, too.
    context: Context,
}

impl Own {
    /// # Errors
    /// Where there is no driver, or the real NCCL does not tell.
    fn of(comm: &Comm) -> Result<Self> {
        let rank = query(comm, "ncclCommUserRank", real::comm_user_rank)?;
        let world = query(comm, "ncclCommCount", real::comm_count)?;
        let device = query(comm, "ncclCommCuDevice", real::comm_cu_device)? as i32;
        cuda::init().map_err(Error::cuda("initializing the driver"))?;
        let context = Context::retain(device).map_err(Error::cuda("retaining the context"))?;
        Ok(Self { rank, world, device, context })
    }
}

/// The communicator stays as it is, by agreement. Every rank knows; one tells.
fn refused(comm: &Comm, rank: usize, disagreement: Disagreement) -> Outcome {
    let level = if rank == 0 { log::Level::Warn } else { log::Level::Info };
    let what = match comm.verdict() {
        Verdict::Open => "all ranks forward to the real NCCL",
        _ => "all ranks keep the width that they had",
    };
    log::log!(level, "{what}: {disagreement}");
    Outcome::Refused(disagreement)
}

/// Asks the real NCCL for one number of a communicator.
fn query(comm: &Comm, function: &'static str, ask: unsafe fn(CommPtr, *mut i32) -> NcclResult) -> Result<usize> {
    let mut number = 0;
    // SAFETY: the application has just used the handle, and it is not aborted.
    let result = unsafe { ask(comm.handle(), &mut number) };
    if result != NcclResult::SUCCESS {
        return Err(Error::Nccl { function, result });
    }
    Ok(number as usize)
}

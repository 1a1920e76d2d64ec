//! Attach: the ranks of a communicator agree, once, whether and how they compress.
//!
//! It goes in rounds. In each, every rank contributes a [`Blob`] through a real all-gather on a stream of ours, and every
//! rank derives the same verdict from the same bytes. The first round compares the settings. Then the exchanges that are
//! possible are tried, the best first: each rank prepares and says so, with what the others need to map its memory; each
//! maps it and says so. The first exchange that *every* rank could set up is the communicator's. For the one over the
//! real NCCL a few bytes go between every two ranks, so that NCCL has its connections (the hot path must not make
//! them, least of all inside a capture).
//!
//! Ranks that are threads of one process take care not to be in each other's way: while one has work on the GPU that
//! waits for another, calls of the other that allocate or map memory there may wait for that very work. So they meet on the
//! host before each round but the first (where the real NCCL, which connects the ranks, meets for them).
//!
//! A change of width that an engine asks for ([`change_all`]) is another attach, after a round in which the ranks compare what
//! they ask for. Where all are ready the new setup takes the old one's place on every rank, otherwise on none.
//!
//! All of it runs on a thread of its own for each communicator. So the wait can be bounded, although NCCL's own calls
//! cannot: a rank without the shim never answers. And one thread may attach all communicators of a group together,
//! in whatever order other ranks get to theirs.

use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use cudarc::driver::sys;
use flashcomm_wire::rings::MAX_WORLD;
use flashcomm_wire::{Legs, Rings, Width};
use once_cell::sync::Lazy;
use parking_lot::Mutex;

use super::blob::{Agreement, BLOB_BYTES, Blob, Disagreement, Place, agree};
use super::{Attached, Comm, MAX_SETUPS, Order};
use crate::config::{Config, ExchangeChoice};
use crate::cuda::{self, Context, CudaResult, DeviceMemory, Event, RelaxedCapture, Stream};
use crate::error::{self, Error, Result};
use crate::exchange::fused::{self, Fused, Kind, Offer, Peer, Seat};
use crate::exchange::nccl::Staging;
use crate::exchange::{self, Exchange, Transfer};
use crate::kernels::Kernels;
use crate::nccl::{self, NcclResult};
use crate::route::Verdict;
use crate::stats;

/// Attaches every communicator of `comms` that has no verdict yet; waits until all have one.
///
/// # Errors
/// [`Error::AttachTimeout`] when a rank does not answer, or what the driver or the real NCCL answered to a call that
/// peers rely on. The communicator is off then, but operations of other ranks may be stuck, as after any NCCL error.
pub fn attach_all<'a>(comms: impl Iterator<Item = &'a Arc<Comm>>) -> Result<()> {
    let wish = Wish { legs: Config::global().legs, switched_off: false };
    let mut waits: Vec<Wait> = Vec::new();
    for comm in comms.filter(|comm| comm.verdict() == Verdict::Open) {
        // A group may use it several times; two attaches at once would get into each other's rounds.
        if !waits.iter().any(|wait| Arc::ptr_eq(&wait.comm, comm)) {
            waits.push(Wait::start(comm, wish));
        }
    }
    all(waits, |comm, outcome| {
        match outcome {
            Outcome::New(attached) => put_on(comm, attached, wish),
            Outcome::Known | Outcome::Refused(_) => comm.settle_off(), // attach has told why
        }
        Ok(())
    })
}

/// A change that an engine asks for. What is `None` stays.
#[derive(Clone)]
pub struct Change {
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
pub fn change_all(changes: &[Change]) -> Result<()> {
    if !Config::global().enable {
        return Err(Error::Refused("FLASHCOMM_ENABLE=0: nothing is compressed in this process".into()));
    }
    if changes.iter().any(|change| change.comm.verdict() == Verdict::Off) {
        return Err(Error::Refused("all ranks of the communicator forward to the real NCCL; the log says why".into()));
    }
    let waits: Vec<Wait> = changes.iter().map(|change| Wait::start(&change.comm, change.wish())).collect();
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
            let choose = |code| Legs::choose(code, widths, legs.reduce.group);
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
        let (bits, code, exchange) = (on.legs.to_string(), on.legs.code().name(), on.exchange.name());
        stats::describe(comm.handle(), on.rank, on.world, Some(stats::Attached { bits, code, exchange }));
    }
}

/// One communicator's rounds, on a thread of their own.
struct Wait {
    comm: Arc<Comm>,
    answer: Receiver<Result<Outcome>>,
}

impl Wait {
    fn start(comm: &Arc<Comm>, wish: Wish) -> Self {
        let (sender, answer) = channel();
        let there = comm.clone();
        thread::spawn(move || {
            let outcome = attach(&there, wish);
            // Before anybody goes on: whoever destroys the communicator next is to be the last that holds it, so that
            // what it has is free for the communicator after it.
            drop(there);
            // Nobody waits any more after a timeout; then the result is dropped.
            let _ = sender.send(outcome);
        });
        Wait { comm: comm.clone(), answer }
    }
}

/// Waits for all, within the attach timeout, and does `then` with what each came to; the last error.
fn all(waits: Vec<Wait>, mut then: impl FnMut(&Arc<Comm>, Outcome) -> Result<()>) -> Result<()> {
    if waits.is_empty() {
        return Ok(()); // as for nearly every all-reduce: not even the time is asked for
    }
    let timeout = Config::global().attach_timeout;
    let deadline = Instant::now() + timeout;
    let mut result = Ok(());
    for Wait { comm, answer } in waits {
        let outcome = match answer.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Timeout) => Err(Error::AttachTimeout(timeout)),
            Err(RecvTimeoutError::Disconnected) => Err(Error::Aborted), // the thread panicked, and its message is out
        };
        if let Err(error) = outcome.and_then(|outcome| then(&comm, outcome)) {
            if !matches!(error, Error::Refused(_)) {
                log::error!("attach failed: {error}"); // of a refusal the log has told
            }
            error::remember(&error);
            // What the real NCCL refused (a communicator still in the making) may go well the next time; then
            // this rank must not be off alone.
            if !matches!(error, Error::Nccl { .. }) {
                comm.settle_off();
            }
            result = Err(error);
        }
    }
    result
}

/// The attach of one communicator, or its change to other widths.
fn attach(comm: &Comm, wish: Wish) -> Result<Outcome> {
    let rank = query(comm, "ncclCommUserRank", nccl::comm_user_rank)?;
    let world = query(comm, "ncclCommCount", nccl::comm_count)?;
    if world == 1 {
        return Ok(Outcome::Refused(Disagreement::Alone));
    }
    let Wish { legs, switched_off } = wish;
    let agreement = Agreement { legs, switched_off, ..Agreement::from(Config::global()) };
    let (device, context) = device_of(comm)?;
    let _entered = context.enter().map_err(Error::cuda("entering the context"))?;
    let _relaxed = RelaxedCapture::enter().map_err(Error::cuda("leaving the capture mode"))?;
    let nothing = [0; fused::OFFER_BYTES];
    let order = comm.setups().next().map(|first| first.order.clone());
    let seat = comm.setups().find_map(|setup| setup.seat.clone()).unwrap_or_else(|| Arc::new(Seat::take(device)));
    let mut rounds = match &order {
        // What is loaded or allocated may wait for work on the GPU; so first all ranks come, and have issued what they
        // were to issue before, then that work ends.
        Some(_) => {
            let place = place(device, &context, 0, &seat)?;
            let blob =
                Blob { rank: rank as u32, agreement, place, attach: number_of_attach(), ready: true, offer: nothing };
            let wire = Wire::new(comm, device, rank, world)?;
            let mut rounds = Rounds { blob, wire, number: 0, neighbors: None };
            match rounds.next(true, nothing)? {
                Ok(peers) => rounds.neighbors = Some(Neighbors::of(&blob, &peers)),
                Err(disagreement) => return Ok(refused(comm, rank, disagreement)),
            }
            poll(comm, || Ok(comm.is_idle()))?;
            if comm.attached_with(legs).is_some() {
                rounds.end()?;
                return Ok(Outcome::Known);
            }
            if comm.setups().count() == MAX_SETUPS {
                return Ok(refused(comm, rank, Disagreement::TooManyWidths));
            }
            Some(rounds)
        }
        None => None,
    };
    let loaded = load(device, &context, legs);
    comm.recording.prepare(device);
    if let Err(error) = &loaded {
        log::warn!("rank {rank} cannot compress: {error}");
    }
    let ready = loaded.is_ok();
    let place = place(device, &context, loaded.as_ref().map_or(0, |loaded| loaded.block_channels), &seat)?;
    let mut rounds = match rounds.take() {
        Some(rounds) => Rounds { blob: Blob { place, ready, ..rounds.blob }, ..rounds },
        None => {
            let blob = Blob { rank: rank as u32, agreement, place, attach: number_of_attach(), ready, offer: nothing };
            Rounds { blob, wire: Wire::new(comm, device, rank, world)?, number: 0, neighbors: None }
        }
    };

    let peers = match rounds.next(ready, nothing)? {
        Ok(peers) => peers,
        Err(disagreement) => return Ok(refused(comm, rank, disagreement)),
    };
    comm.recording.begin(peers[0].attach, rank, world);
    rounds.neighbors.get_or_insert_with(|| Neighbors::of(&rounds.blob, &peers));
    let Loaded { kernels, last, .. } = loaded?;
    let exchange = match agree_on_exchange(&mut rounds, &context, &kernels, &peers)? {
        Ok(exchange) => exchange,
        Err(disagreement) => {
            rounds.end()?; // what the exchanges needed has been freed
            return Ok(refused(comm, rank, disagreement));
        }
    };

    rounds.end()?;
    let one_host = is_one_host(&peers);
    let min_bytes = agreement.min_bytes.unwrap_or(exchange.default_min_bytes(world, one_host));
    let from = match min_bytes {
        u64::MAX => "nothing unless FLASHCOMM_MIN_BYTES says so".into(),
        min_bytes => format!("from {min_bytes} bytes up"),
    };
    let blocks = match &exchange {
        Exchange::Fused(fused) => format!(" {} blocks,", fused.max_blocks()),
        Exchange::Nccl(_) => String::new(),
    };
    let (code, name) = (legs.code().name(), exchange.name());
    log::info!("rank {rank} of {world}: on, {legs} bits ({code}), exchange {name},{blocks} {from}");
    let order = order.unwrap_or_else(|| Arc::new(Mutex::new(Order { last, captured: None })));
    let seat = matches!(exchange, Exchange::Fused(_)).then_some(seat);
    let exchange = ManuallyDrop::new(exchange);
    let attached = Attached { rank, world, legs, min_bytes, context, kernels, exchange, order, seat };
    Ok(Outcome::New(Box::new(attached)))
}

/// What every exchange needs.
struct Loaded {
    kernels: Kernels,
    block_channels: usize,
    last: Event,
}

fn load(device: i32, context: &Context, legs: Legs) -> Result<Loaded> {
    let kernels = Kernels::load(device, legs)
        .map_err(Error::cuda("loading the kernels (is the driver older than the CUDA that built flashcomm?)"))?;
    let block_channels = kernels.prepare_fused(context).map_err(Error::cuda("readying the fused kernel"))?;
    let last = Event::new().map_err(Error::cuda("creating an event"))?;
    Ok(Loaded { kernels, block_channels, last })
}

fn place(device: i32, context: &Context, block_channels: usize, seat: &Seat) -> Result<Place> {
    let multiprocessors = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    Ok(Place {
        host: host(),
        process: process(),
        device,
        device_uuid: context.device_uuid().map_err(Error::cuda("asking for the device's UUID"))?,
        multiprocessors: context.attribute(multiprocessors).map_err(Error::cuda("asking for an attribute"))?,
        block_channels,
        is_first: seat.is_first,
    })
}

fn is_one_host(peers: &[Blob]) -> bool {
    peers.iter().all(|peer| peer.place.host == peers[0].place.host)
}

/// Sets up the best exchange that all ranks can, of those that the setting allows.
fn agree_on_exchange(
    rounds: &mut Rounds<'_>,
    context: &Context,
    kernels: &Kernels,
    peers: &[Blob],
) -> Result<std::result::Result<Exchange, Disagreement>> {
    let kinds: &[Kind] = match rounds.blob.agreement.exchange {
        ExchangeChoice::Auto => &[Kind::Peer, Kind::Host],
        ExchangeChoice::Peer => &[Kind::Peer],
        ExchangeChoice::Host => &[Kind::Host],
        ExchangeChoice::Nccl => &[],
    };
    let mut refusal = None;
    for kind in kinds {
        match fused_rings(peers) {
            Some(rings) => match fused_exchange(rounds, context, kernels, *kind, rings, peers)? {
                Ok(fused) => return Ok(Ok(Exchange::Fused(fused))),
                Err(disagreement) => refusal = Some(disagreement),
            },
            None => refusal = Some(Disagreement::NoSharedMemory),
        }
    }
    match refusal {
        Some(disagreement) if rounds.blob.agreement.exchange != ExchangeChoice::Auto => Ok(Err(disagreement)),
        Some(disagreement) => {
            log::info!("rank {}: the payloads go over the real NCCL: {disagreement}", rounds.blob.rank);
            nccl_exchange(rounds)
        }
        None => nccl_exchange(rounds),
    }
}

/// The receive areas that all ranks can have alike; `None` where no fused exchange is possible.
fn fused_rings(peers: &[Blob]) -> Option<Rings> {
    let agreement = peers[0].agreement;
    if !is_one_host(peers) || peers.len() > MAX_WORLD {
        return None;
    }
    let sharing = |peer: &Blob| peers.iter().filter(|other| other.place.device_uuid == peer.place.device_uuid).count();
    let sharing = peers.iter().map(sharing).max()?;
    let multiprocessors = peers.iter().map(|peer| peer.place.multiprocessors).min()?;
    let block_channels = block_channels(peers);
    let is_first = peers.iter().all(|peer| peer.place.is_first);
    let n_channels = fused::block_limit(multiprocessors, sharing, is_first, agreement.max_ctas) * block_channels;
    Rings::within(peers.len(), agreement.legs, n_channels, agreement.buffer_bytes)
}

fn block_channels(peers: &[Blob]) -> usize {
    peers.iter().map(|peer| peer.place.block_channels).min().unwrap_or(0)
}

/// Whether an exchange can be faster than the real NCCL, as far as this rank can tell. Host memory is not where NCCL has the
/// memory of the GPUs: it can map that in ways that are not ours (CUDA IPC), where containers forbid those.
fn is_worthwhile(kind: Kind, context: &Context, peers: &[Blob]) -> CudaResult<bool> {
    if kind == Kind::Peer || peers[0].agreement.exchange != ExchangeChoice::Auto {
        return Ok(true);
    }
    for peer in peers {
        match cuda::ordinal_of(&peer.place.device_uuid)? {
            Some(ordinal) if context.reaches(ordinal)? => {}
            _ => return Ok(true),
        }
    }
    Ok(false)
}

/// Two rounds: everyone has made its area; everyone has mapped all of them.
fn fused_exchange(
    rounds: &mut Rounds<'_>,
    context: &Context,
    kernels: &Kernels,
    kind: Kind,
    rings: Rings,
    peers: &[Blob],
) -> Result<std::result::Result<Fused, Disagreement>> {
    let rank = rounds.blob.rank as usize;
    let prepared = match is_worthwhile(kind, context, peers) {
        Ok(true) => fused::Prepared::new(kind, rings, context, &rounds.wire.stream),
        Ok(false) => Err(Error::Unmappable(
            "the GPUs reach each other's memory, over which the real NCCL is faster (FLASHCOMM_EXCHANGE=host takes it anyway)",
        )),
        Err(error) => Err(Error::cuda("asking what the GPU reaches")(error)),
    };
    if let Err(error) = &prepared {
        log::log!(rounds.refusal(), "rank {rank} cannot offer memory for the exchange {}: {error}", kind.name());
    }
    let offer = prepared.as_ref().map_or(rounds.blob.offer, |prepared| *prepared.offer());
    let offers = match rounds.next(prepared.is_ok(), offer)? {
        Ok(offers) => offers,
        Err(disagreement) => return Ok(Err(disagreement)),
    };
    let peers: Vec<Peer> = offers
        .iter()
        .map(|Blob { place, offer, .. }| Peer { process: place.process, device: place.device, offer: *offer })
        .collect();
    let timeout = Config::global().timeout;
    let fused = prepared?.connect(rank, &peers, context, block_channels(&offers), timeout);
    let fused = fused.and_then(|fused| fused.warm_up(kernels, &rounds.wire.stream).map(|()| fused));
    if let Err(error) = &fused {
        log::log!(rounds.refusal(), "rank {rank} cannot use others' memory for the exchange {}: {error}", kind.name());
    }
    Ok(match rounds.next(fused.is_ok(), offer)? {
        Ok(_) => {
            let mut fused = fused?;
            fused.unlink();
            Ok(fused)
        }
        Err(disagreement) => Err(disagreement),
    })
}

/// One round: everyone has its staging memory, and NCCL its connections.
fn nccl_exchange(rounds: &mut Rounds<'_>) -> Result<std::result::Result<Exchange, Disagreement>> {
    let Agreement { legs, buffer_bytes, .. } = rounds.blob.agreement;
    let (rank, world) = (rounds.blob.rank, rounds.wire.world);
    let staging = Staging::new(world, legs, buffer_bytes);
    if let Err(error) = &staging {
        log::warn!("rank {rank} cannot compress: {error}");
    }
    rounds.wire.connect()?;
    // A communicator that does not block takes calls one at a time, each to be waited for: nothing for a hot path.
    if rounds.wire.is_nonblocking {
        log::info!("rank {rank} has a non-blocking communicator");
    }
    Ok(match rounds.next(staging.is_ok() && !rounds.wire.is_nonblocking, rounds.blob.offer)? {
        Ok(_) => Ok(Exchange::Nccl(staging?)),
        Err(disagreement) => Err(disagreement),
    })
}

/// The rounds of an attach.
struct Rounds<'a> {
    /// What this rank says in every round.
    blob: Blob,
    wire: Wire<'a>,
    /// Rounds begun.
    number: usize,
    /// Known after the first round.
    neighbors: Option<Neighbors>,
}

/// The ranks of the communicator that run in this process.
struct Neighbors {
    count: usize,
    /// How often one of them has come to a meeting.
    arrivals: Arc<AtomicUsize>,
    meetings: usize,
}

impl Neighbors {
    fn of(blob: &Blob, peers: &[Blob]) -> Self {
        /// By the number of rank 0's attach.
        static ATTACHES: Mutex<Vec<(u64, Weak<AtomicUsize>)>> = Mutex::new(Vec::new());
        let mut attaches = ATTACHES.lock();
        attaches.retain(|(_, arrivals)| arrivals.strong_count() > 0);
        let known = attaches.iter().find(|(attach, _)| *attach == peers[0].attach);
        let arrivals = known.and_then(|(_, arrivals)| arrivals.upgrade()).unwrap_or_else(|| {
            let new = Arc::new(AtomicUsize::new(0));
            attaches.push((peers[0].attach, Arc::downgrade(&new)));
            new
        });
        let count = peers.iter().filter(|peer| peer.place.process == blob.place.process).count();
        Self { count, arrivals, meetings: 0 }
    }

    /// Waits until all ranks of this process have come here as often as this one.
    fn meet(&mut self, comm: &Comm) -> Result<()> {
        self.arrivals.fetch_add(1, Ordering::AcqRel);
        self.meetings += 1;
        poll(comm, || Ok(self.arrivals.load(Ordering::Acquire) >= self.count * self.meetings))
    }
}

impl Rounds<'_> {
    /// How loud a rank says why an exchange cannot be: unless another may take its place, the communicator stays off.
    fn refusal(&self) -> log::Level {
        if self.blob.agreement.exchange == ExchangeChoice::Auto { log::Level::Info } else { log::Level::Warn }
    }

    /// One round: whether this rank is ready, and its offer. All ranks' blobs, or what keeps them from going on.
    fn next(&mut self, ready: bool, offer: Offer) -> Result<std::result::Result<Vec<Blob>, Disagreement>> {
        self.number += 1;
        log::debug!("rank {}: attach, round {}", self.blob.rank, self.number);
        self.wire.write(&Blob { ready, offer, ..self.blob }.encode())?;
        self.meet()?;
        Ok(agree(&self.wire.all_gather()?))
    }

    fn meet(&mut self) -> Result<()> {
        self.neighbors.as_mut().map_or(Ok(()), |neighbors| neighbors.meet(self.wire.comm))
    }

    /// The first operation waits for the others, too: until all are done with what attach needs, also with giving it up.
    fn end(self) -> Result<()> {
        let Rounds { wire, neighbors, .. } = self;
        let comm = wire.comm;
        drop(wire);
        neighbors.map_or(Ok(()), |mut neighbors| neighbors.meet(comm))
    }
}

/// The device of a communicator and its primary context, which the real NCCL uses, too.
///
/// # Errors
/// Where there is no driver, or the real NCCL does not tell the device (yet).
pub fn device_of(comm: &Comm) -> Result<(i32, Context)> {
    let device = query(comm, "ncclCommCuDevice", nccl::comm_cu_device)? as i32;
    cuda::init().map_err(Error::cuda("initializing the driver"))?;
    let context = Context::retain(device).map_err(Error::cuda("retaining the context"))?;
    Ok((device, context))
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
fn query(comm: &Comm, function: &'static str, ask: unsafe fn(nccl::CommPtr, *mut i32) -> NcclResult) -> Result<usize> {
    let mut number = 0;
    // SAFETY: the application has just used the handle, and it is not aborted.
    let result = unsafe { ask(comm.handle(), &mut number) };
    if result != NcclResult::SUCCESS {
        return Err(Error::Nccl { function, result });
    }
    Ok(number as usize)
}

/// The real NCCL's collectives on a stream of ours, waited for with an eye on the abort.
struct Wire<'a> {
    comm: &'a Comm,
    rank: usize,
    world: usize,
    stream: Stream,
    done: Event,
    memory: Option<DeviceMemory>,
    device: i32,
    is_nonblocking: bool,
}

/// Scratch memory of attaches, by device, used again and never freed: freeing may wait for all work of the device,
/// some of which may wait for another rank that attaches.
static SCRATCH: Mutex<Vec<(i32, DeviceMemory)>> = Mutex::new(Vec::new());

impl<'a> Wire<'a> {
    fn new(comm: &'a Comm, device: i32, rank: usize, world: usize) -> Result<Self> {
        let stream = Stream::new().map_err(Error::cuda("creating a stream"))?;
        let done = Event::new().map_err(Error::cuda("creating an event"))?;
        let n_bytes = (2 * world - 1) * BLOB_BYTES;
        let used_before = {
            let mut scratch = SCRATCH.lock();
            let fits = |(owner, memory): &(i32, DeviceMemory)| *owner == device && memory.n_bytes() >= n_bytes;
            scratch.iter().position(fits).map(|i| scratch.swap_remove(i).1)
        };
        let memory = match used_before {
            Some(memory) => memory,
            None => DeviceMemory::new(n_bytes).map_err(Error::cuda("allocating for attach"))?,
        };
        Ok(Self { comm, rank, world, stream, done, memory: Some(memory), device, is_nonblocking: false })
    }

    fn memory(&self) -> &DeviceMemory {
        self.memory.as_ref().expect("there until dropped")
    }

    /// Puts this rank's blob where it goes out from.
    fn write(&self, blob: &[u8; BLOB_BYTES]) -> Result<()> {
        let mine = self.world * BLOB_BYTES;
        self.memory().write(mine, blob, &self.stream).map_err(Error::cuda("writing the blob"))
    }

    /// Everyone's blob, in rank order.
    fn all_gather(&mut self) -> Result<Vec<u8>> {
        // SAFETY: the ranges lie in our memory, the handle and the stream live.
        let result = unsafe { exchange::nccl::all_gather(std::iter::once(self.transfer())) };
        self.finish("ncclAllGather", result)?;
        let mut gathered = vec![0; self.world * BLOB_BYTES];
        self.memory().read(0, &mut gathered, &self.stream).map_err(Error::cuda("reading the blobs"))?;
        Ok(gathered)
    }

    /// Takes something through hop 1, so that the real NCCL connects every two ranks. (Hop 2's connections are those
    /// of the rounds.)
    fn connect(&mut self) -> Result<()> {
        // SAFETY: the ranges lie in our memory, the handle and the stream live.
        let result = unsafe { exchange::nccl::all_to_all(std::iter::once(self.transfer())) };
        self.finish("ncclSend and ncclRecv", result)
    }

    /// One hop with a blob in every slot: everyone's at the start of our memory, behind them those to send.
    fn transfer(&self) -> Transfer {
        Transfer {
            comm: self.comm.handle(),
            rank: self.rank,
            world: self.world,
            outgoing: self.memory().at(self.world * BLOB_BYTES),
            incoming: self.memory().at(0),
            slot_bytes: BLOB_BYTES,
            stream: self.stream.handle(),
        }
    }

    /// Waits until what was issued has run. The thread that called is blocked by this, as it is when NCCL connects.
    fn finish(&mut self, function: &'static str, result: NcclResult) -> Result<()> {
        if result == NcclResult::IN_PROGRESS {
            self.is_nonblocking = true;
            poll(self.comm, || {
                let mut state = NcclResult::SUCCESS;
                // SAFETY: the handle lives while the communicator is not aborted, which `poll` has just seen.
                let asked = unsafe { nccl::comm_get_async_error(self.comm.handle(), &mut state) };
                match (asked, state) {
                    (NcclResult::SUCCESS, NcclResult::SUCCESS) => Ok(true),
                    (NcclResult::SUCCESS, NcclResult::IN_PROGRESS) => Ok(false),
                    (NcclResult::SUCCESS, result) | (result, _) => Err(Error::Nccl { function, result }),
                }
            })?;
        } else if result != NcclResult::SUCCESS {
            return Err(Error::Nccl { function, result });
        }
        // SAFETY: the stream is ours.
        unsafe { self.done.record(self.stream.handle(), false) }.map_err(Error::cuda("recording an event"))?;
        poll(self.comm, || self.done.is_complete().map_err(Error::cuda("waiting for the other ranks")))
    }
}

/// Waits until it is done or the communicator is aborted.
fn poll(comm: &Comm, mut is_done: impl FnMut() -> Result<bool>) -> Result<()> {
    let mut pause = Duration::from_micros(20);
    loop {
        if comm.is_aborted() {
            return Err(Error::Aborted);
        }
        if is_done()? {
            return Ok(());
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(2));
    }
}

impl Drop for Wire<'_> {
    fn drop(&mut self) {
        // After an abort something may still write to it; then it is left alone.
        if let Some(memory) = self.memory.take().filter(|_| self.done.is_complete() == Ok(true)) {
            SCRATCH.lock().push((self.device, memory));
        }
    }
}

/// A number that no other attach has, of whatever process.
fn number_of_attach() -> u64 {
    static ATTACHES: AtomicU64 = AtomicU64::new(0);
    process().wrapping_add(ATTACHES.fetch_add(1, Ordering::Relaxed))
}

/// A number that no other process of the host has.
fn process() -> u64 {
    static PROCESS: Lazy<u64> = Lazy::new(|| {
        let mut bytes = [0u8; 8];
        // SAFETY: `bytes` has the room that it says. Where the system has no random numbers the process id must do.
        unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        u64::from_le_bytes(bytes) ^ u64::from(std::process::id())
    });
    *PROCESS
}

/// A hash of the boot id: the same for all processes of one running kernel, containers included. 0 where the system
/// does not tell.
fn host() -> u64 {
    let id = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    // FNV-1a
    id.iter().fold(if id.is_empty() { 0 } else { 0xcbf2_9ce4_8422_2325 }, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

//! Attach: the ranks of a communicator agree, once, whether and how they compress.
//!
//! Each rank contributes a [`Blob`] through a real all-gather on a stream of ours; every rank derives the same verdict
//! from the same bytes. Where they agree, a second round sends a few bytes between every two ranks, so that the real
//! NCCL has its connections (the hot path must not make them, least of all inside a capture), and confirms that
//! *every* rank got there. Only then is the communicator on.
//!
//! All of it runs on a thread of its own for each communicator. So the wait can be bounded, although NCCL's own calls
//! cannot: a rank without the shim never answers. And one thread may attach all communicators of a group together,
//! in whatever order other ranks get to theirs.

use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use flashcomm_wire::Plan;
use parking_lot::Mutex;

use super::blob::{Agreement, BLOB_BYTES, Blob, Disagreement, agree};
use super::{Attached, Comm, Order};
use crate::config::Config;
use crate::cuda::{self, Context, DeviceMemory, Event, RelaxedCapture, Stream};
use crate::error::{Error, Result};
use crate::exchange::{self, Transfer};
use crate::kernels::Kernels;
use crate::nccl::{self, NcclResult};

/// Attaches every communicator of `comms` that has no verdict yet; waits until all have one.
///
/// # Errors
/// [`Error::AttachTimeout`] when a rank does not answer, or what the driver or the real NCCL answered to a call that
/// peers rely on. The communicator is off then, but operations of other ranks may be stuck, as after any NCCL error.
pub fn attach_all<'a>(comms: impl Iterator<Item = &'a Arc<Comm>>) -> Result<()> {
    let timeout = Config::global().attach_timeout;
    let deadline = Instant::now() + timeout;
    let waits: Vec<(Arc<Comm>, Receiver<Result<Option<Attached>>>)> =
        comms.filter(|comm| comm.state.get().is_none()).map(|comm| (comm.clone(), start(comm.clone()))).collect();
    let mut outcome = Ok(());
    for (comm, answer) in waits {
        let settled = match answer.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(settled) => settled,
            Err(RecvTimeoutError::Timeout) => Err(Error::AttachTimeout(timeout)),
            Err(RecvTimeoutError::Disconnected) => Err(Error::Aborted), // the thread panicked, and its message is out
        };
        match settled {
            Ok(attached) => comm.settle(attached),
            Err(error) => {
                log::error!("attach failed: {error}");
                // What the real NCCL refused (a communicator still in the making) may go well the next time; then
                // this rank must not be off alone.
                if !matches!(error, Error::Nccl { .. }) {
                    comm.settle(None);
                }
                outcome = Err(error);
            }
        }
    }
    outcome
}

/// Starts the attach of one communicator on a thread of its own.
fn start(comm: Arc<Comm>) -> Receiver<Result<Option<Attached>>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        // Nobody waits any more after a timeout; then the result is dropped.
        let _ = sender.send(attach(&comm));
    });
    receiver
}

/// The attach of one communicator: attached, or off by agreement.
fn attach(comm: &Comm) -> Result<Option<Attached>> {
    let rank = query(comm, "ncclCommUserRank", nccl::comm_user_rank)?;
    let world = query(comm, "ncclCommCount", nccl::comm_count)?;
    if world == 1 {
        return Ok(None);
    }
    let config = Config::global();
    let agreement = Agreement::from(config);
    let (device, context) = device_of(comm)?;
    let _entered = context.enter().map_err(Error::cuda("entering the context"))?;
    let _relaxed = RelaxedCapture::enter().map_err(Error::cuda("leaving the capture mode"))?;
    let mut wire = Wire::new(comm, device, rank, world)?;

    // Round 1: the settings.
    let blob = Blob { rank: rank as u32, agreement, ready: true, host: host() };
    if let Err(disagreement) = agree(&wire.all_gather(&blob.encode())?) {
        return Ok(off(rank, &disagreement));
    }
    // Round 2: everyone is ready.
    let prepared = prepare(device, world, &agreement);
    if let Err(error) = &prepared {
        log::warn!("rank {rank} cannot compress: {error}");
    }
    // A communicator that does not block takes calls one at a time, each to be waited for: nothing for a hot path.
    if wire.is_nonblocking {
        log::info!("rank {rank} has a non-blocking communicator");
    }
    wire.connect()?;
    let ready = prepared.is_ok() && !wire.is_nonblocking;
    let blobs = match agree(&wire.all_gather(&Blob { ready, ..blob }.encode())?) {
        Ok(blobs) => blobs,
        Err(disagreement) => return Ok(off(rank, &disagreement)),
    };
    let Prepared { kernels, staging, last } = prepared?;

    let one_host = blobs.iter().all(|peer| peer.host == blob.host);
    let min_bytes = agreement.min_bytes.unwrap_or(exchange::default_min_bytes(one_host));
    let hosts = if one_host { "one host" } else { "several hosts" };
    log::info!("rank {rank} of {world}: on, {} bits, from {min_bytes} bytes up, {hosts}", agreement.legs);
    let order = Mutex::new(Order { last, captured: None });
    let (legs, buffer_bytes) = (agreement.legs, agreement.buffer_bytes);
    Ok(Some(Attached {
        rank,
        world,
        legs,
        buffer_bytes,
        min_bytes,
        context,
        kernels,
        staging: ManuallyDrop::new(staging),
        order,
    }))
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

/// The communicator stays off, by agreement. Every rank knows; one tells.
fn off(rank: usize, disagreement: &Disagreement) -> Option<Attached> {
    let level = if rank == 0 { log::Level::Warn } else { log::Level::Info };
    log::log!(level, "all ranks forward to the real NCCL: {disagreement}");
    None
}

/// What a rank needs before it can say that it is ready.
struct Prepared {
    kernels: Kernels,
    staging: DeviceMemory,
    last: Event,
}

fn prepare(device: i32, world: usize, agreement: &Agreement) -> Result<Prepared> {
    let kernels = Kernels::load(device, agreement.legs)
        .map_err(Error::cuda("loading the kernels (is the driver older than the CUDA that built flashcomm?)"))?;
    let n_bytes = Plan::staging_bytes(world, agreement.legs, agreement.buffer_bytes);
    if n_bytes == 0 {
        return Err(Error::BufferTooSmall { world });
    }
    let staging = DeviceMemory::new(n_bytes)
        .map_err(Error::cuda("allocating the staging memory (FLASHCOMM_BUFFER_MIB makes it smaller)"))?;
    let last = Event::new().map_err(Error::cuda("creating an event"))?;
    Ok(Prepared { kernels, staging, last })
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

    /// Everyone's blob, in rank order.
    fn all_gather(&mut self, blob: &[u8; BLOB_BYTES]) -> Result<Vec<u8>> {
        let mine = self.world * BLOB_BYTES;
        self.memory().write(mine, blob, &self.stream).map_err(Error::cuda("writing the blob"))?;
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
            self.poll(|comm| {
                let mut state = NcclResult::SUCCESS;
                // SAFETY: the handle lives while the communicator is not aborted, which `poll` has just seen.
                let asked = unsafe { nccl::comm_get_async_error(comm.handle(), &mut state) };
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
        self.poll(|_| self.done.is_complete().map_err(Error::cuda("waiting for the other ranks")))
    }

    fn poll(&self, mut is_done: impl FnMut(&Comm) -> Result<bool>) -> Result<()> {
        let mut pause = Duration::from_micros(20);
        loop {
            if self.comm.is_aborted() {
                return Err(Error::Aborted);
            }
            if is_done(self.comm)? {
                return Ok(());
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(2));
        }
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

/// A hash of the boot id: the same for all processes of one running kernel, containers included. 0 where the system
/// does not tell.
fn host() -> u64 {
    let id = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    // FNV-1a
    id.iter().fold(if id.is_empty() { 0 } else { 0xcbf2_9ce4_8422_2325 }, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

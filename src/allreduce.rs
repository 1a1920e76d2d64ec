//! The compressed all-reduce, top to bottom.
//!
//! ```text
//! quantize      each other rank's chunk of my input                      -> outgoing, a slot per owner
//! hop 1         every slot to its owner                                  -> incoming, a slot per sender
//! reduce        decode, add in rank order, my own chunk unquantized, quantize -> outgoing, my slot
//! hop 2         every owner's slot to everyone                           -> outgoing, a slot per owner
//! dequantize    all chunks                                               -> the caller's output
//! ```
//!
//! Operations come in batches: one alone, or all of a group. A batch runs in *waves*; a wave takes the next slice of
//! one operation of each communicator through all five steps together, so that one thread that drives several
//! ranks has all their transfers in one NCCL group (alone, the first would wait for the second for ever). Everything is
//! issued to the caller's streams; nothing waits on the host.

use std::ffi::c_void;
use std::sync::Arc;

use flashcomm_wire::Plan;

use crate::comm::{Attached, Comm, attach};
use crate::config::Config;
use crate::cuda::{self, Capture, Entered, StreamHandle};
use crate::error::{Error, Result};
use crate::exchange::{self, Transfer};
use crate::kernels::{ElementType, Piece};
use crate::nccl::{self, NcclResult, StreamPtr};
use crate::route::{self, Reason, Request, Route};
use crate::stats;

/// An all-reduce as the application asked for it.
#[derive(Clone)]
pub struct Operation {
    /// Its communicator.
    pub comm: Arc<Comm>,
    /// Input, `count` elements.
    pub input: *const c_void,
    /// Output; may be the input.
    pub output: *mut c_void,
    /// What is asked.
    pub request: Request,
    /// The storage type, of a request that is a candidate.
    pub element: ElementType,
    /// The application's stream.
    pub stream: StreamPtr,
}

impl Operation {
    /// Where it goes by what is known of its communicator now.
    pub fn route(&self) -> Route {
        let is_capturing = || !matches!(self.capture(), Ok(Capture::None));
        route::route(self.element, &self.request, self.comm.verdict(), Config::global(), is_capturing)
    }

    fn stream(&self) -> StreamHandle {
        self.stream.cast()
    }

    /// In doubt (no driver, a stream that the driver does not take) this is an error, and the call is forwarded.
    fn capture(&self) -> std::result::Result<Capture, ()> {
        if !driver_is_there() {
            return Err(());
        }
        // SAFETY: the application's stream; where there is no current context yet, the driver says so.
        unsafe { cuda::capture_of(self.stream()) }.map_err(drop)
    }

    /// Hands it to the real NCCL unchanged.
    fn forward(&self) -> NcclResult {
        let Request { count, datatype, op } = self.request;
        // SAFETY: the application's own arguments.
        unsafe { nccl::all_reduce(self.input, self.output, count, datatype, op, self.comm.handle(), self.stream) }
    }
}

fn driver_is_there() -> bool {
    static THERE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *THERE.get_or_init(|| cuda::is_available() && cuda::init().is_ok())
}

/// Runs a batch in order: attaches the communicators that have no verdict, forwards what is not compressed, and
/// compresses the rest. Empties `batch` and keeps its memory.
pub fn run(batch: &mut Vec<Operation>) -> NcclResult {
    let mut result = attach::attach_all(batch.iter().map(|operation| &operation.comm));
    if result.is_ok() {
        result = forward_some(batch).and_then(|()| compress(batch));
    }
    batch.clear();
    match result {
        Ok(()) => NcclResult::SUCCESS,
        Err(error) => {
            log::error!("all-reduce: {error}");
            NcclResult::from(&error)
        }
    }
}

/// Forwards, in one real group, the operations that turn out not to be compressed, and takes them out of the batch.
fn forward_some(batch: &mut Vec<Operation>) -> Result<()> {
    let reason = |operation: &Operation| match operation.route() {
        Route::Compress(_) => None,
        Route::Forward(reason) => Some(reason),
        Route::Attach(_) => Some(Reason::CommunicatorOff), // a communicator that has just been aborted
    };
    if batch.iter().all(|operation| reason(operation).is_none()) {
        return Ok(());
    }
    let issue = || {
        let mut result = NcclResult::SUCCESS;
        batch.retain(|operation| match reason(operation) {
            Some(reason) if result == NcclResult::SUCCESS => {
                stats::all_reduce_forwarded(reason);
                result = operation.forward();
                false
            }
            reason => reason.is_none(),
        });
        result
    };
    // SAFETY: the application's own arguments.
    match unsafe { exchange::nccl::grouped(issue) } {
        NcclResult::SUCCESS | NcclResult::IN_PROGRESS => Ok(()),
        result => Err(Error::Nccl { function: "ncclAllReduce", result }),
    }
}

/// One slice of one operation, on its way through the five steps.
struct Step<'a> {
    operation: &'a Operation,
    attached: &'a Attached,
    plan: Plan,
    slice: usize,
    capture: Capture,
}

fn compress(batch: &[Operation]) -> Result<()> {
    // An operation alone, the common case, needs no bookkeeping of communicators.
    if let [operation] = batch {
        let mut step = Step::first(operation)?;
        for slice in 0..step.plan.n_slices() {
            step.slice = slice;
            run_wave(std::slice::from_ref(&step))?;
        }
        return Ok(());
    }
    let mut queued: Vec<Step<'_>> = batch.iter().map(Step::first).collect::<Result<_>>()?;
    while !queued.is_empty() {
        let (wave, mut rest) = next_wave(queued);
        run_wave(&wave)?;
        // What has slices left goes back to the front, to keep the order of its communicator.
        let unfinished = wave.into_iter().filter(|step| step.slice + 1 < step.plan.n_slices());
        let mut next: Vec<Step<'_>> = unfinished.map(|step| Step { slice: step.slice + 1, ..step }).collect();
        next.append(&mut rest);
        queued = next;
    }
    Ok(())
}

/// The first step of each communicator, and the others in order.
fn next_wave(queued: Vec<Step<'_>>) -> (Vec<Step<'_>>, Vec<Step<'_>>) {
    let (mut wave, mut rest): (Vec<Step<'_>>, Vec<Step<'_>>) = (Vec::new(), Vec::new());
    for step in queued {
        let is_taken = wave.iter().any(|other| Arc::ptr_eq(&other.operation.comm, &step.operation.comm));
        if is_taken { rest.push(step) } else { wave.push(step) }
    }
    (wave, rest)
}

/// Takes the steps of a wave through the all-reduce together.
fn run_wave(wave: &[Step<'_>]) -> Result<()> {
    for step in wave {
        step.quantize()?;
    }
    step_nccl("hop 1", {
        // SAFETY: the steps' areas and the application's streams.
        unsafe { exchange::nccl::transfer(wave.iter().flat_map(Step::transfers)) }
    })?;
    for step in wave {
        step.reduce()?;
    }
    step_nccl("hop 2", {
        let issue = || {
            let mut results = wave.iter().map(Step::all_gather);
            results.find(|result| *result != NcclResult::SUCCESS).unwrap_or(NcclResult::SUCCESS)
        };
        // SAFETY: as for hop 1.
        unsafe { exchange::nccl::grouped(issue) }
    })?;
    for step in wave {
        step.dequantize()?;
    }
    Ok(())
}

fn step_nccl(function: &'static str, result: NcclResult) -> Result<()> {
    if result == NcclResult::SUCCESS { Ok(()) } else { Err(Error::Nccl { function, result }) }
}

impl<'a> Step<'a> {
    fn first(operation: &'a Operation) -> Result<Self> {
        let attached = operation.comm.attached().ok_or(Error::Aborted)?;
        let count = operation.request.count;
        let plan = Plan::new(count, attached.world, attached.legs, attached.buffer_bytes)
            .map_err(|_| Error::BufferTooSmall { world: attached.world })?;
        let n_bytes = count * operation.element.n_bytes();
        stats::compressed(n_bytes as u64, plan.wire_bytes() as u64);
        let _entered = attached.context.enter().map_err(Error::cuda("entering the context"))?;
        // SAFETY: the application's stream, of the communicator's context.
        let capture = unsafe { cuda::capture_of(operation.stream()) }.map_err(Error::cuda("asking for a capture"))?;
        Ok(Self { operation, attached, plan, slice: 0, capture })
    }

    fn quantize(&self) -> Result<()> {
        let (input, stream) = (self.operation.input, self.operation.stream());
        let _entered = self.enter()?;
        // SAFETY: the application's stream, of the context just entered.
        unsafe { self.attached.begin(stream, self.capture) }.map_err(Error::cuda("ordering the all-reduce"))?;
        // SAFETY: the application vouches for its input, the plan for the staging area.
        unsafe { self.attached.kernels.quantize(self.piece(), self.attached.rank, input, self.outgoing(), stream) }
            .map_err(Error::cuda("launching quantize"))
    }

    /// To each other owner its payload, from each other rank mine.
    fn transfers(&self) -> impl Iterator<Item = Transfer> {
        let (attached, plan, slice) = (self.attached, &self.plan, self.slice);
        let tile_bytes = plan.legs().reduce.tile_bytes();
        let receive_bytes = plan.slice_tiles(attached.rank, slice) * tile_bytes;
        (0..attached.world).filter(move |peer| *peer != attached.rank).map(move |peer| Transfer {
            comm: self.operation.comm.handle(),
            peer,
            send: attached.staging.at(plan.reduce_slot(peer)),
            send_bytes: plan.slice_tiles(peer, slice) * tile_bytes,
            receive: attached.staging.at(attached.incoming_at() + plan.incoming_slot(attached.rank, peer)),
            receive_bytes,
            stream: self.operation.stream(),
        })
    }

    fn reduce(&self) -> Result<()> {
        let (attached, plan) = (self.attached, &self.plan);
        if plan.slice_tiles(attached.rank, self.slice) == 0 {
            return Ok(());
        }
        let incoming = attached.staging.at(attached.incoming_at());
        let mine = attached.staging.at(plan.gather_slot(attached.rank, self.slice));
        let (input, stream) = (self.operation.input, self.operation.stream());
        let _entered = self.enter()?;
        // SAFETY: the application vouches for its input, the plan for the staging areas.
        unsafe { attached.kernels.reduce(self.piece(), attached.rank, input, incoming, mine, stream) }
            .map_err(Error::cuda("launching reduce"))
    }

    fn all_gather(&self) -> NcclResult {
        let (comm, stream) = (self.operation.comm.handle(), self.operation.stream());
        let slot_bytes = self.plan.gather_slot(1, self.slice);
        // SAFETY: the plan keeps the slots within the area.
        unsafe { exchange::nccl::all_gather(self.outgoing(), self.attached.rank, slot_bytes, comm, stream) }
    }

    fn dequantize(&self) -> Result<()> {
        let (output, stream) = (self.operation.output, self.operation.stream());
        let _entered = self.enter()?;
        // SAFETY: the application vouches for its output, the plan for the staging area.
        unsafe { self.attached.kernels.dequantize(self.piece(), self.outgoing(), output, stream) }
            .map_err(Error::cuda("launching dequantize"))?;
        // SAFETY: the application's stream, of the context just entered.
        unsafe { self.attached.end(stream, self.capture) }.map_err(Error::cuda("ordering the all-reduce"))
    }

    fn piece(&self) -> Piece<'_> {
        Piece { plan: &self.plan, slice: self.slice, element: self.operation.element }
    }

    fn outgoing(&self) -> *mut c_void {
        self.attached.staging.at(0)
    }

    fn enter(&self) -> Result<Entered> {
        self.attached.context.enter().map_err(Error::cuda("entering the context"))
    }
}

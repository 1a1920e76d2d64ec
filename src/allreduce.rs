//! An all-reduce of ours, top to bottom.
//!
//! Where the ranks share memory, one kernel does all of it, launched on the caller's stream: `kernels/exact.cu` a small one,
//! uncompressed, `kernels/all_reduce.cu` a large one in two hops, `kernels/one_hop.cu` one of two ranks. Over the real NCCL
//! a large one takes five steps:
//!
//! ```text
//! quantize      each other rank's chunk of my input                      -> outgoing, a slot per owner
//! hop 1         every slot to its owner                                  -> incoming, a slot per sender
//! reduce        decode, add in rank order, my own chunk unquantized, quantize -> outgoing, the first slot
//! hop 2         every owner's sum to everyone                            -> incoming, a slot per owner
//! dequantize    all chunks                                               -> the caller's output
//! ```
//!
//! or three, between two ranks: quantize all of my input, an all-gather, combine what both sent.
//!
//! Operations come in batches: one alone, or all of a group. Fused ones are launched in order. The others run in *waves*;
//! a wave takes the next slice of one operation of each communicator through all five steps together, so that one
//! thread that drives several ranks has all their transfers in one NCCL group (alone, the first would wait for the
//! second for ever). Everything is issued to the caller's streams, or in some groups to streams beside them ([`aside`]);
//! nothing waits on the host.

mod aside;
mod operation;

use std::ffi::c_void;

use flashcomm_wire::Plan;

use aside::join;
pub(crate) use aside::take_aside;
pub(crate) use operation::Operation;
use operation::{Planned, enter};

use crate::comm::Attached;
use crate::cuda::{self, Capture, StreamHandle};
use crate::error::{self, Error, Result};
use crate::exchange::Exchange;
use crate::exchange::fused::{Call, Fused};
use crate::exchange::nccl::Staging;
use crate::exchange::nccl::{self as over_nccl, Transfer};
use crate::kernels::Piece;
use crate::nccl::NcclResult;
use crate::nvtx::Ranges;
use crate::route::Route;
use crate::thread;
use crate::verdict::Carrier;

impl Operation {
    /// Issues all of it, as one kernel.
    fn launch(&self, attached: &Attached, fused: &Fused) -> Result<()> {
        let mut ranges = Ranges::default();
        self.mark(attached, &mut ranges);
        if self.aside.is_some() || !self.is_of_green_context() {
            return self.launch_on(self.stream(), attached, fused);
        }
        let ours = self.fork()?;
        let launched = self.launch_on(ours, attached, fused);
        // Also where nothing was launched: a capture wants all that it has forked joined.
        let joined = self.join(ours);
        launched.and(joined)
    }

    /// Issues it to `stream`, which has the whole GPU.
    fn launch_on(&self, stream: StreamHandle, attached: &Attached, fused: &Fused) -> Result<()> {
        let route = self.route();
        let by_copies = route == Route::Compress(Carrier::Copies);
        let staging_bytes = fused.copy_staging_bytes(self.request.count).filter(|_| by_copies).unwrap_or(usize::MAX);
        let plan = match route {
            Route::Exact { .. } => None,
            _ => Some(self.plan(attached, staging_bytes)?),
        };
        let call = Call {
            element: self.element,
            scale: self.scale(attached),
            input: self.input,
            output: self.output,
            is_large: attached.share.as_ref().is_some_and(|share| share.has_next()),
            pulls: route == Route::Compress(Carrier::Reads),
        };
        let _entered = enter(attached)?;
        // SAFETY: a stream of the communicator's context.
        let capture = unsafe { cuda::capture_of(stream) }.map_err(Error::cuda("asking for a capture"))?;
        // SAFETY: as above.
        unsafe { attached.order.begin(stream, capture) }.map_err(Error::cuda("ordering the all-reduce"))?;
        match &plan {
            // SAFETY: the application vouches for its buffers.
            Some(plan) if by_copies => unsafe { fused.by_copies(&attached.kernels, plan, &call, stream) }?,
            // SAFETY: as above.
            Some(plan) => unsafe { fused.all_reduce(&attached.kernels, plan, &call, stream) }?,
            None => {
                let (count, two_hops) = (self.request.count, route == Route::Exact { two_hops: true });
                // SAFETY: as above.
                unsafe { fused.exact(&attached.kernels, (count, two_hops), &call, stream) }?;
                thread::current().counters(self.comm.handle()).count_exact(self.request.n_bytes());
            }
        }
        // SAFETY: as above.
        unsafe { attached.order.end(stream, capture) }.map_err(Error::cuda("ordering the all-reduce"))
    }

    /// How it runs over the real NCCL, from `first_wave` on.
    fn schedule(&self, attached: &Attached, staging: &Staging, first_wave: usize) -> Result<Planned> {
        let plan = self.plan(attached, staging.buffer_bytes)?;
        let _entered = enter(attached)?;
        // SAFETY: the application's stream, of the communicator's context.
        let capture = unsafe { cuda::capture_of(self.stream()) }.map_err(Error::cuda("asking for a capture"))?;
        Ok(Planned { plan, capture, first_wave })
    }
}

/// Runs a batch in order: forwards what is not ours after all, and takes the rest. Empties `batch` and keeps
/// its memory.
pub(crate) fn run(batch: &mut Vec<Operation>) -> NcclResult {
    batch.iter().for_each(Operation::record);
    let result = forward_some(batch).and_then(|forwarded| issue(batch).map(|()| forwarded));
    let joined = join(batch);
    let result = result.and_then(|forwarded| joined.map(|()| forwarded));
    let result = result.inspect_err(|error| {
        log::error!("all-reduce: {error}");
        error::remember(error);
    });
    batch.clear();
    result.unwrap_or_else(|error| NcclResult::from(&error))
}

/// Empties a batch that is not to run, and keeps its memory.
pub(crate) fn discard(batch: &mut Vec<Operation>) {
    if let Err(error) = join(batch) {
        log::error!("all-reduce: {error}");
    }
    batch.clear();
}

/// Forwards, in one real group, the operations of communicators that a change in the same group has switched off, and takes
/// them out of the batch.
/// Answers `ncclInProgress` where a communicator that does not block says so: the application must wait for it.
fn forward_some(batch: &mut Vec<Operation>) -> Result<NcclResult> {
    let reason = |operation: &Operation| match operation.route() {
        Route::Exact { .. } | Route::Compress(_) => None,
        Route::Forward(reason) => Some(reason),
    };
    if batch.iter().all(|operation| reason(operation).is_none()) {
        return Ok(NcclResult::SUCCESS);
    }
    let issue = || {
        let mut result = NcclResult::SUCCESS;
        batch.retain(|operation| match reason(operation) {
            Some(reason) if result == NcclResult::SUCCESS => {
                thread::current()
                    .counters(operation.comm.handle())
                    .count_forwarded(reason, operation.request.n_bytes());
                result = operation.forward();
                false
            }
            reason => reason.is_none(),
        });
        result
    };
    // SAFETY: the application's own arguments.
    match unsafe { over_nccl::grouped(issue) } {
        result @ (NcclResult::SUCCESS | NcclResult::IN_PROGRESS) => Ok(result),
        result => Err(Error::Nccl { function: "ncclAllReduce", result }),
    }
}

fn issue(batch: &mut [Operation]) -> Result<()> {
    let mut n_waves = 0;
    let mut ranges = Ranges::default(); // of those that run in waves: all of them are under way until the last wave
    for i in 0..batch.len() {
        let (before, operation) = (&batch[..i], &batch[i]);
        let attached = operation.attached()?;
        match &*attached.exchange {
            Exchange::Fused(fused) => operation.launch(attached, fused)?,
            Exchange::Nccl(staging) => {
                // One operation of a communicator ends before its next one begins.
                let previous = before.iter().rev().find(|other| other.is_of_same_comm(operation));
                let first_wave = previous.and_then(|other| other.planned.as_ref()).map_or(0, Planned::end_wave);
                operation.mark(attached, &mut ranges);
                let planned = operation.schedule(attached, staging, first_wave)?;
                n_waves = n_waves.max(planned.end_wave());
                batch[i].planned = Some(planned);
            }
        }
    }
    (0..n_waves).try_for_each(|wave| run_wave(batch, wave))
}

/// Takes the slices of a wave through the all-reduce together.
fn run_wave(batch: &[Operation], wave: usize) -> Result<()> {
    let steps = || batch.iter().filter_map(move |operation| Step::of(operation, wave));
    steps().try_for_each(|step| step.quantize())?;
    // SAFETY: the plans' areas and the application's streams.
    let result = unsafe { over_nccl::all_to_all(steps().map(|step| step.hop1())) };
    Error::check("hop 1 over the real NCCL", result)?;
    let two_hops = || steps().filter(|step| step.plan.one_hop().is_none());
    two_hops().try_for_each(|step| step.reduce())?;
    // SAFETY: as for hop 1.
    let result = unsafe { over_nccl::all_gather(two_hops().map(|step| step.hop2())) };
    Error::check("hop 2 over the real NCCL", result)?;
    steps().try_for_each(|step| step.decode())
}

/// One slice of one operation, on its way through the five steps, or three if one hop is enough.
struct Step<'a> {
    operation: &'a Operation,
    attached: &'a Attached,
    staging: &'a Staging,
    plan: &'a Plan,
    capture: Capture,
    slice: usize,
}

impl<'a> Step<'a> {
    /// The slice of `operation` that is in `wave`, if any.
    fn of(operation: &'a Operation, wave: usize) -> Option<Self> {
        let Planned { plan, capture, first_wave } = operation.planned.as_ref()?;
        let slice = wave.checked_sub(*first_wave).filter(|slice| *slice < plan.n_slices())?;
        let attached = operation.comm.attached_with(plan.legs())?;
        let Exchange::Nccl(staging) = &*attached.exchange else { return None };
        Some(Self { operation, attached, staging, plan, capture: *capture, slice })
    }

    fn quantize(&self) -> Result<()> {
        let (input, stream) = (self.operation.input, self.operation.stream());
        let _entered = enter(self.attached)?;
        // SAFETY: the application's stream, of the context just entered.
        unsafe { self.attached.order.begin(stream, self.capture) }.map_err(Error::cuda("ordering the all-reduce"))?;
        // SAFETY: the application vouches for its input, the plan for the staging area.
        unsafe { self.attached.kernels.quantize(self.piece(), self.attached.rank, input, self.outgoing(), stream) }
            .map_err(Error::cuda("launching quantize"))
    }

    /// Where this rank's payloads are. In one hop that is its slot of what comes in.
    fn outgoing(&self) -> *mut c_void {
        match self.plan.one_hop() {
            Some(_) => {
                let slot = self.attached.rank * self.plan.reduce_slot_bytes(self.slice);
                self.staging.incoming().wrapping_byte_add(slot)
            }
            None => self.staging.outgoing(),
        }
    }

    /// To each other owner its payload, from each other rank mine.
    fn hop1(&self) -> Transfer {
        self.transfer(self.plan.reduce_slot_bytes(self.slice))
    }

    fn reduce(&self) -> Result<()> {
        let attached = self.attached;
        if self.plan.slice_tiles(attached.rank, self.slice) == 0 {
            return Ok(());
        }
        let (input, stream) = (self.operation.input, self.operation.stream());
        let _entered = enter(self.attached)?;
        // SAFETY: the application vouches for its input, the plan for the staging areas.
        unsafe {
            attached.kernels.reduce(
                self.piece(),
                attached.rank,
                input,
                self.staging.incoming(),
                self.staging.outgoing(),
                stream,
            )
        }
        .map_err(Error::cuda("launching reduce"))
    }

    /// My sum to everyone.
    fn hop2(&self) -> Transfer {
        self.transfer(self.plan.gather_slot_bytes(self.slice))
    }

    fn transfer(&self, slot_bytes: usize) -> Transfer {
        Transfer {
            comm: self.operation.comm.handle(),
            rank: self.attached.rank,
            world: self.attached.world,
            outgoing: self.outgoing(),
            incoming: self.staging.incoming(),
            slot_bytes,
            stream: self.operation.stream(),
        }
    }

    /// What came in, to elements.
    fn decode(&self) -> Result<()> {
        let (output, stream) = (self.operation.output, self.operation.stream());
        let (kernels, incoming) = (&self.attached.kernels, self.staging.incoming());
        let _entered = enter(self.attached)?;
        let launched = match self.plan.one_hop() {
            // SAFETY: the application vouches for its output, the plan for the staging area.
            Some(_) => unsafe { kernels.combine(self.piece(), incoming, output, stream) },
            // SAFETY: as above.
            None => unsafe { kernels.dequantize(self.piece(), incoming, output, stream) },
        };
        launched.map_err(Error::cuda("launching the last kernel of an all-reduce"))?;
        // SAFETY: the application's stream, of the context just entered.
        unsafe { self.attached.order.end(stream, self.capture) }.map_err(Error::cuda("ordering the all-reduce"))
    }

    fn piece(&self) -> Piece<'_> {
        let scale = self.operation.scale(self.attached);
        Piece { plan: self.plan, slice: self.slice, element: self.operation.element, scale }
    }
}

//! Issues an all-reduce whose payloads copy engines carry: [`super::copies`] has the protocol.

use std::ffi::c_void;
use std::time::Duration;

use flashcomm_wire::Plan;
use flashcomm_wire::rings::MAX_WORLD;

use super::launch::nanoseconds;
use super::{Call, Fused};
use crate::cuda::{self, CudaResult, StreamHandle};
use crate::error::{Error, Result};
use crate::exchange::copies::{Copies, CopyRoom, Hop, Lane};
use crate::kernels::{Kernels, Piece, SignalArgs, WaitArgs};

impl Fused {
    /// Bytes of staging memory that a plan of [`Fused::by_copies`] is to be made for, of so many elements; `None` where
    /// copy engines carry nothing.
    pub(crate) fn copy_staging_bytes(&self, count: usize) -> Option<usize> {
        self.copies.as_ref().map(|copies| copies.room.staging_bytes_of(count))
    }

    /// Issues a compressed all-reduce, cut by `plan` for the staging memory, to `stream`, of the current context.
    ///
    /// # Errors
    /// As for [`Fused::all_reduce`].
    ///
    /// # Safety
    /// As for [`Fused::all_reduce`].
    pub unsafe fn by_copies(&self, kernels: &Kernels, plan: &Plan, call: &Call, stream: StreamHandle) -> Result<()> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        // SAFETY: as the caller vouches.
        unsafe { self.launch_copies(kernels, plan, call, self.timeout, stream) }
    }

    /// The same whatever became of earlier ones, with a timeout of its own.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// As for [`Fused::all_reduce`].
    pub(in crate::exchange) unsafe fn launch_copies(
        &self,
        kernels: &Kernels,
        plan: &Plan,
        call: &Call,
        timeout: Option<Duration>,
        stream: StreamHandle,
    ) -> Result<()> {
        let copies = self.copies.as_ref().expect("the way is not taken without them");
        let issue = || {
            // SAFETY: as the caller vouches.
            let lane = copies.lane(unsafe { cuda::capture_of(stream) }?)?;
            let run = Run { fused: self, copies, lane: &lane, kernels, plan, call, timeout, stream };
            // SAFETY: as the caller vouches.
            unsafe { run.issue() }
        };
        issue().map_err(Error::cuda("copying the payloads of an all-reduce"))
    }

    /// Runs the kernels between the copies once, as [`Fused::warm_up`] does.
    pub(super) fn warm_up_copies(&self, kernels: &Kernels, stream: StreamHandle) -> CudaResult<()> {
        let Some(copies) = &self.copies else { return Ok(()) };
        let (count, words) = (copies.counts.at(0).cast(), [std::ptr::null_mut(); MAX_WORLD]);
        // SAFETY: with nobody to wait for and to tell they touch the count only.
        unsafe {
            kernels.wait(&self.wait_args(count, words), stream)?;
            kernels.signal(&SignalArgs { count, words, step: 0 }, stream)
        }
    }

    /// Where a rank's area has its words and slots.
    fn copies_of(&self, rank: usize) -> *mut c_void {
        self.areas[rank].wrapping_byte_add(self.layout.copies_at())
    }

    fn wait_args(&self, count: *mut u32, words: [*mut u32; MAX_WORLD]) -> WaitArgs {
        let (abort, gave_up) = (self.control.address().cast(), self.gave_up_ptr());
        WaitArgs { count, words, abort, gave_up, timeout_ns: 0, step: 0, lag: 0 }
    }
}

/// One all-reduce.
struct Run<'a> {
    fused: &'a Fused,
    copies: &'a Copies,
    lane: &'a Lane,
    kernels: &'a Kernels,
    plan: &'a Plan,
    call: &'a Call,
    timeout: Option<Duration>,
    stream: StreamHandle,
}

impl Run<'_> {
    /// Issues it.
    ///
    /// # Safety
    /// As for [`Fused::all_reduce`].
    unsafe fn issue(&self) -> CudaResult<()> {
        let Lane { begun, sent, out, into, .. } = self.lane;
        // SAFETY: all streams are of the current context; the caller vouches for the rest.
        unsafe {
            begun.record(self.stream, false)?;
            begun.make_wait(out.handle(), false)?;
            begun.make_wait(into.handle(), false)?;
            for slice in 0..=self.plan.n_slices() {
                if slice < self.plan.n_slices() {
                    self.send(slice)?;
                }
                if let Some(slice) = slice.checked_sub(1) {
                    self.finish(slice)?;
                }
            }
            // The stream of what comes in has been joined: the last kernel waits for it.
            sent[(self.plan.n_slices() - 1) % 2].make_wait(self.stream, false)
        }
    }

    /// Quantizes a slice and lets the first hop begin.
    unsafe fn send(&self, slice: usize) -> CudaResult<()> {
        let (buffer, lane) = (slice % 2, self.lane);
        // SAFETY: as for `issue`.
        unsafe {
            if slice >= 2 {
                lane.sent[buffer].make_wait(self.stream, false)?;
            }
            let (rank, input) = (self.fused.rank, self.call.input);
            self.kernels.quantize(self.piece(slice), rank, input, self.outgoing(slice), self.stream)?;
            if slice >= 2 {
                lane.done[buffer].make_wait(lane.into.handle(), false)?;
            }
            self.carry(Hop::First, slice)
        }
    }

    /// What comes behind the first hop.
    unsafe fn finish(&self, slice: usize) -> CudaResult<()> {
        let (buffer, copies, lane, output) = (slice % 2, self.copies, self.lane, self.call.output);
        let incoming = copies.stagings[buffer].incoming();
        // SAFETY: as for `issue`.
        unsafe {
            lane.come[buffer].make_wait(self.stream, false)?;
            if self.plan.one_hop().is_some() {
                self.kernels.combine(self.piece(slice), incoming, output, self.stream)?;
            } else {
                lane.sent[buffer].make_wait(self.stream, false)?;
                let (rank, sum) = (self.fused.rank, copies.stagings[buffer].outgoing());
                if self.plan.slice_tiles(rank, slice) > 0 {
                    self.kernels.reduce(self.piece(slice), rank, self.call.input, incoming, sum, self.stream)?;
                }
                self.carry(Hop::Second, slice)?;
                lane.come[buffer].make_wait(self.stream, false)?;
                self.kernels.dequantize(self.piece(slice), incoming, output, self.stream)?;
            }
            lane.done[buffer].record(self.stream, false)
        }
    }

    /// One hop of a slice: what the caller's stream has made, out, and what the others have, in.
    unsafe fn carry(&self, hop: Hop, slice: usize) -> CudaResult<()> {
        let (buffer, copies, lane, fused) = (slice % 2, self.copies, self.lane, self.fused);
        let (rank, world) = (fused.rank, fused.world());
        let (room, out, into) = (copies.room, lane.out.handle(), lane.into.handle());
        let slot_bytes = match hop {
            Hop::First => self.plan.reduce_slot_bytes(slice),
            Hop::Second => self.plan.gather_slot_bytes(slice),
        };
        // In the second hop a rank fetches its own sum, too: that stands with the others' then.
        let fetches = |from: &usize| *from != rank || hop == Hop::Second;
        let words = |word: &dyn Fn(usize) -> *mut u32| -> [*mut u32; MAX_WORLD] {
            let is_there = |rank: &usize| *rank < world && fetches(rank);
            std::array::from_fn(|rank| if is_there(&rank) { word(rank) } else { std::ptr::null_mut() })
        };
        let at = |rank: usize, at: usize| fused.copies_of(rank).wrapping_byte_add(at);
        let n_filled = copies.counts.at(hop as usize * 4).cast();
        let n_emptied = copies.counts.at((2 + hop as usize) * 4).cast();
        let lag = if slice == 0 { 0 } else { 1 };
        // SAFETY: as for `issue`; slots and words are within the areas.
        unsafe {
            lane.made[buffer].record(self.stream, false)?;
            lane.made[buffer].make_wait(out, false)?;
            let emptied = words(&|reader| at(rank, CopyRoom::read_at(hop, reader)).cast());
            let wait = WaitArgs { lag, ..fused.wait_args(n_filled, emptied) };
            self.kernels.wait(&self.in_time(wait), out)?;
            let source = if hop == Hop::First { self.outgoing(slice) } else { copies.stagings[buffer].outgoing() };
            let target = at(rank, room.slot_at(hop, buffer, 0));
            cuda::copy(target, source, room.n_filled(hop) * slot_bytes, out)?;
            let mine = std::array::from_fn(|i| match i {
                0 => at(rank, CopyRoom::written_at(hop)).cast(),
                _ => std::ptr::null_mut(),
            });
            self.kernels.signal(&SignalArgs { count: n_filled, words: mine, step: 1 }, out)?;
            lane.sent[buffer].record(out, false)?;

            // What this rank has sent is there about when what the others have sent is.
            lane.sent[buffer].make_wait(into, false)?;
            let filled = words(&|peer| at(peer, CopyRoom::written_at(hop)).cast());
            let wait = WaitArgs { step: 1, ..fused.wait_args(n_emptied, filled) };
            self.kernels.wait(&self.in_time(wait), into)?;
            for from in (0..world).filter(fetches) {
                let slot = match hop {
                    Hop::First if !room.is_one_hop() => Plan::outgoing_slot(from, rank) * slot_bytes,
                    _ => 0,
                };
                let target = copies.stagings[buffer].incoming().wrapping_byte_add(from * slot_bytes);
                cuda::copy(target, at(from, room.slot_at(hop, buffer, slot)), slot_bytes, into)?;
            }
            let told = words(&|peer| at(peer, CopyRoom::read_at(hop, rank)).cast());
            self.kernels.signal(&SignalArgs { count: n_emptied, words: told, step: 0 }, into)?;
            lane.come[buffer].record(into, false)
        }
    }

    fn in_time(&self, wait: WaitArgs) -> WaitArgs {
        WaitArgs { timeout_ns: nanoseconds(self.timeout), ..wait }
    }

    /// Where the payloads of the first hop are made: in one hop in this rank's slot of what comes in.
    fn outgoing(&self, slice: usize) -> *mut c_void {
        let staging = &self.copies.stagings[slice % 2];
        match self.plan.one_hop() {
            Some(_) => staging.incoming().wrapping_byte_add(self.fused.rank * self.plan.reduce_slot_bytes(slice)),
            None => staging.outgoing(),
        }
    }

    fn piece(&self, slice: usize) -> Piece<'_> {
        Piece { plan: self.plan, slice, element: self.call.element, scale: self.call.scale }
    }
}

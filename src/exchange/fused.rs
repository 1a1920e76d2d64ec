//! The exchanges `peer` and `host`: one kernel does the whole all-reduce over receive areas that every rank can write.
//!
//! The two differ only in where an [`Area`] lives. How attach brings one about: every rank *prepares* its side and offers
//! its area; when all have, each *connects* to the others'; when all could, the exchange is on.

use std::ffi::c_void;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use flashcomm_wire::{Legs, Plan, Rings, rings};

use super::area::{Area, Mapped, Offer, Peer};
use crate::cuda::{Context, DeviceMemory, PinnedMemory, Stream, StreamHandle};
use crate::element::ElementType;
use crate::error::{Error, Result};
use crate::kernels::{self, ABORTED, AllReduceArgs, Areas, GaveUp, Kernels};

/// What this rank has made for an exchange, before the others' areas are known.
pub(crate) struct Prepared {
    rings: Rings,
    area: Area,
    offer: Offer,
    signals: DeviceMemory,
    control: PinnedMemory,
}

/// A fused exchange of one rank.
pub struct Fused {
    rings: Rings,
    rank: usize,
    max_blocks: usize,
    usual_blocks: usize,
    block_channels: usize,
    areas: [*mut c_void; rings::MAX_WORLD],
    mine: Area,
    _theirs: Vec<Mapped>,
    signals: DeviceMemory,
    control: PinnedMemory,
    timeout: Option<Duration>,
    is_reported: AtomicBool,
}

// SAFETY: addresses that only kernels follow.
unsafe impl Send for Fused {}
// SAFETY: as above.
unsafe impl Sync for Fused {}

/// An all-reduce.
pub struct Call {
    /// The storage type.
    pub element: ElementType,
    /// What the sum is multiplied with.
    pub scale: f32,
    /// The operation's elements.
    pub input: *const c_void,
    /// The same; may be the input.
    pub output: *mut c_void,
    /// Whether it has the device's large share; the same on all ranks.
    pub is_large: bool,
}

/// Bytes of the control memory: the abort word, then at [`GAVE_UP_AT`] a [`GaveUp`].
const CONTROL_BYTES: usize = 4096;
const GAVE_UP_AT: usize = 128;

impl Prepared {
    /// Makes this rank's area, zeroed, in the current context.
    ///
    /// # Errors
    /// When memory or the driver does not allow it.
    pub(crate) fn new(memory: Areas, rings: Rings, context: &Context, stream: &Stream) -> Result<Self> {
        let (area, offer) = Area::new(memory, rings.area_bytes(), context, stream)?;
        let signals =
            DeviceMemory::new(rings.channels * 4).map_err(Error::cuda("allocating the channels' counters"))?;
        signals.clear(stream).map_err(Error::cuda("clearing the channels' counters"))?;
        let control = PinnedMemory::new(CONTROL_BYTES).map_err(Error::cuda("allocating the abort word"))?;
        Ok(Self { rings, area, offer, signals, control })
    }

    /// What the others need to map the area.
    pub(crate) fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Maps the others' areas.
    ///
    /// `peers`: every rank, this one included; then blocks of the usual share, and channels that a block may have.
    ///
    /// # Errors
    /// When one cannot be mapped.
    pub(crate) fn connect(
        self,
        rank: usize,
        peers: &[Peer],
        context: &Context,
        (usual_blocks, block_channels): (usize, usize),
        timeout: Option<Duration>,
    ) -> Result<Fused> {
        let mut areas = [std::ptr::null_mut(); rings::MAX_WORLD];
        let mut theirs = Vec::new();
        for (peer, about) in peers.iter().enumerate() {
            areas[peer] = if peer == rank {
                self.area.address()
            } else {
                let mapped = self.area.map(about, &peers[rank], self.rings.area_bytes(), context)?;
                let address = mapped.address;
                theirs.push(mapped);
                address
            };
        }
        let max_blocks = (self.rings.channels / block_channels).max(1);
        Ok(Fused {
            rings: self.rings,
            rank,
            max_blocks,
            usual_blocks: usual_blocks.min(max_blocks),
            block_channels: block_channels.min(self.rings.channels),
            areas,
            mine: self.area,
            _theirs: theirs,
            signals: self.signals,
            control: self.control,
            timeout,
            is_reported: AtomicBool::new(false),
        })
    }
}

impl Fused {
    /// Every rank has mapped everything: what was named for that needs no name any more.
    pub fn unlink(&mut self) {
        self.mine.unlink();
    }

    /// The agreed codecs.
    pub(super) fn legs(&self) -> Legs {
        self.rings.legs
    }

    /// Where the areas live.
    pub fn memory(&self) -> Areas {
        self.mine.memory()
    }

    /// Blocks of a kernel at most: in the usual share, and in the large one, where the communicator may get that.
    pub fn max_blocks(&self) -> (usize, usize) {
        (self.usual_blocks, self.max_blocks)
    }

    /// Issues an all-reduce cut by `plan` to `stream`, of the current context.
    ///
    /// # Errors
    /// The driver's; [`Error::GaveUp`] when an earlier one did not come to its end.
    ///
    /// # Safety
    /// The buffers hold the operation's elements until it has run.
    pub unsafe fn all_reduce(&self, kernels: &Kernels, plan: &Plan, call: &Call, stream: StreamHandle) -> Result<()> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        // SAFETY: as the caller vouches.
        unsafe { self.launch(kernels, plan, call, self.timeout, stream) }
    }

    /// The same whatever became of earlier ones, with a timeout of its own.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// As for [`Fused::all_reduce`].
    pub(super) unsafe fn launch(
        &self,
        kernels: &Kernels,
        plan: &Plan,
        call: &Call,
        timeout: Option<Duration>,
        stream: StreamHandle,
    ) -> Result<()> {
        let Call { element, scale, input, output, is_large } = *call;
        let chunk_tiles = plan.chunk_tiles();
        let max_blocks = if is_large { self.max_blocks } else { self.usual_blocks };
        // Few tiles rather spread over multiprocessors than share one; many take as few blocks as do with as many rounds.
        let block_channels = chunk_tiles.div_ceil(max_blocks).min(self.block_channels);
        let n_rounds = chunk_tiles.div_ceil(max_blocks * block_channels);
        let n_blocks = chunk_tiles.div_ceil(n_rounds * block_channels);
        let (count, chunk_tiles) = (plan.count() as u64, chunk_tiles as u64);
        let timeout_ns = timeout.map_or(0, |timeout| u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX));
        let args = AllReduceArgs { input, output, count, chunk_tiles, scale, timeout_ns, ..self.args() };
        // SAFETY: the areas are every rank's and stay; the caller vouches for the rest; the blocks fit by `residency`.
        unsafe { kernels.all_reduce(element, self.memory(), (n_blocks, block_channels), &args, stream) }
            .map_err(Error::cuda("launching the all-reduce"))
    }

    /// Runs the kernels once over nothing, as large as they ever are. What the driver does at the first launch of a kernel
    /// (loading it, making room for its local memory) may wait for all work of the device; were that another rank's
    /// all-reduce, which waits for this one's, both would wait for ever.
    ///
    /// # Errors
    /// The driver's.
    pub fn warm_up(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        for element in ElementType::ALL {
            let shape = (self.max_blocks, self.block_channels);
            // SAFETY: without tiles the kernel touches no memory.
            unsafe { kernels.all_reduce(element, self.memory(), shape, &self.args(), stream.handle()) }
                .map_err(Error::cuda("launching the all-reduce for the first time"))?;
        }
        stream.synchronize().map_err(Error::cuda("running the all-reduce for the first time"))
    }

    /// What all launches have in common; the operation is to be filled in.
    fn args(&self) -> AllReduceArgs {
        AllReduceArgs {
            input: std::ptr::null(),
            output: std::ptr::null_mut(),
            count: 0,
            chunk_tiles: 0,
            areas: self.areas.map(<*mut c_void>::cast),
            signals: self.signals.at(0).cast(),
            abort: self.control.address().cast(),
            gave_up: self.gave_up_ptr(),
            timeout_ns: 0,
            rank: self.rank as u32,
            world: self.rings.world as u32,
            max_channels: self.rings.channels as u32,
            group_shift: kernels::group_shift(self.rings.legs.reduce),
            scale: 1.0,
            batch_invariant: self.rings.legs.batch_invariant.into(),
        }
    }

    /// Frees every kernel of this rank that waits (invariant I5).
    pub fn abort(&self) {
        self.word(0).store(1, Ordering::SeqCst);
    }

    fn is_aborted(&self) -> bool {
        self.word(0).load(Ordering::Relaxed) != 0
    }

    /// Whether a kernel may not have run to its end, here or on a peer.
    pub(crate) fn is_lost(&self) -> bool {
        self.is_aborted() || self.gave_up().is_some()
    }

    /// What a kernel that gave up was waiting for.
    pub fn gave_up(&self) -> Option<GaveUp> {
        if self.word(GAVE_UP_AT + offset_of!(GaveUp, why)).load(Ordering::Acquire) == 0 {
            return None;
        }
        // SAFETY: it lies in the control memory; the kernel that gave up wrote it before the word just seen.
        Some(unsafe { self.gave_up_ptr().read_volatile() })
    }

    fn gave_up_ptr(&self) -> *mut GaveUp {
        self.control.address().wrapping_byte_add(GAVE_UP_AT).cast()
    }

    /// The error of a kernel that gave up, logged when first asked for.
    pub fn failure(&self) -> Option<Error> {
        let GaveUp { why, peer, channel, iteration, .. } = self.gave_up()?;
        let error = Error::GaveUp { rank: self.rank, peer, channel, iteration, is_aborted: why == ABORTED };
        if !self.is_reported.swap(true, Ordering::Relaxed) {
            log::error!("{error}");
        }
        Some(error)
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        // SAFETY: 4-byte aligned words of the control memory, which lives as long as `self`.
        unsafe { AtomicU32::from_ptr(self.control.address().wrapping_byte_add(at).cast()) }
    }
}

impl Drop for Fused {
    fn drop(&mut self) {
        // When all its kernels have run to their end, every peer has done its part, and nobody writes here any more.
        if self.is_lost() {
            self.mine.lose();
        }
    }
}

//! The exchanges `peer` and `host`: one kernel does the whole all-reduce, compressed or exact, over receive areas that every
//! rank can write.
//!
//! The two differ only in where an [`Area`] lives. How attach brings one about: every rank *prepares* its side and offers
//! its area; when all have, each *connects* to the others'; when all could, the exchange is on.

mod carry;
mod launch;

use std::ffi::c_void;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use flashcomm_wire::mailboxes::{STRIPE_VECS, VEC_BYTES};
use flashcomm_wire::{Legs, Mailboxes, Rings, rings};

pub(crate) use self::launch::Call;
use super::area::{Area, Mapped, Offer, Peer};
use super::copies::{Copies, CopyRoom};
use crate::cuda::{Context, DeviceMemory, PinnedMemory, Stream};
use crate::error::{Error, Result};
use crate::kernels::{ABORTED, Areas, GaveUp};

/// What this rank has made for an exchange, before the others' areas are known.
pub(crate) struct Prepared {
    layout: Layout,
    area: Area,
    offer: Offer,
    counters: DeviceMemory,
    control: PinnedMemory,
    copies: Option<Copies>,
}

/// A fused exchange of one rank.
pub struct Fused {
    layout: Layout,
    rank: usize,
    max_blocks: usize,
    usual_blocks: usize,
    block_channels: usize,
    areas: [*mut c_void; rings::MAX_WORLD],
    mine: Area,
    _theirs: Vec<Mapped>,
    /// How often each channel has signalled, then the epoch of each block that has mailboxes.
    counters: DeviceMemory,
    control: PinnedMemory,
    copies: Option<Copies>,
    timeout: Option<Duration>,
    is_reported: AtomicBool,
    is_watched: AtomicBool,
}

// SAFETY: addresses that only kernels follow.
unsafe impl Send for Fused {}
// SAFETY: as above.
unsafe impl Sync for Fused {}

/// What an area has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    /// First, for compressed all-reduces.
    pub rings: Rings,
    /// Then, for exact ones, where there are any.
    pub mailboxes: Option<Mailboxes>,
    /// Then, for compressed ones that copy engines carry, where they may.
    pub copies: Option<CopyRoom>,
}

impl Layout {
    /// Bytes of it.
    pub fn n_bytes(&self) -> usize {
        self.copies_at() + self.copies.map_or(0, |room| room.n_bytes())
    }

    /// A multiple of 128.
    fn copies_at(&self) -> usize {
        self.mailboxes_at() + self.mailboxes.map_or(0, |mailboxes| mailboxes.area_bytes())
    }

    /// A multiple of 128.
    fn mailboxes_at(&self) -> usize {
        self.rings.area_bytes()
    }
}

/// Bytes of the control memory: the abort word, then at [`GAVE_UP_AT`] a [`GaveUp`], then at [`SLOTS_AT`] what kernels took.
const CONTROL_BYTES: usize = 4096;
const GAVE_UP_AT: usize = 128;
const SLOTS_AT: usize = 1024;

/// Slots for what kernels took: of compressed sums, one for each octave of bytes, then of exact ones.
pub(crate) const N_SLOTS: usize = 64;

/// Of smaller sums nothing is noted: their kernels take 3 us, of which two looks at a clock are a part, and what a link carries
/// is none.
const WATCHED_MIN_BYTES: usize = 64 << 10;

/// The slot of a sum.
#[inline]
pub(crate) fn slot(is_exact: bool, n_bytes: u64) -> usize {
    let octave = n_bytes.max(1).ilog2() as usize;
    octave.min(N_SLOTS / 2 - 1) + if is_exact { N_SLOTS / 2 } else { 0 }
}

/// Whether the sums of a slot are exact, and the bytes of the smallest.
pub(crate) fn octave_of(slot: usize) -> (bool, u64) {
    (slot >= N_SLOTS / 2, 1 << (slot % (N_SLOTS / 2)))
}

impl Prepared {
    /// Makes this rank's area, zeroed, in the current context.
    ///
    /// # Errors
    /// When memory or the driver does not allow it.
    pub(crate) fn new(memory: Areas, layout: Layout, context: &Context, stream: &Stream) -> Result<Self> {
        let (area, offer) = Area::new(memory, layout.n_bytes(), context, stream)?;
        let n_counters = layout.rings.channels + layout.mailboxes.map_or(0, |mailboxes| mailboxes.blocks);
        let counters = DeviceMemory::new(n_counters * 4).map_err(Error::cuda("allocating the kernels' counters"))?;
        counters.clear(stream).map_err(Error::cuda("clearing the kernels' counters"))?;
        let control = PinnedMemory::new(CONTROL_BYTES).map_err(Error::cuda("allocating the abort word"))?;
        let copies = layout.copies.map(|room| Copies::new(room, stream)).transpose()?;
        Ok(Self { layout, area, offer, counters, control, copies })
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
                let mapped = self.area.map(about, &peers[rank], self.layout.n_bytes(), context)?;
                let address = mapped.address;
                theirs.push(mapped);
                address
            };
        }
        let channels = self.layout.rings.channels;
        let max_blocks = (channels / block_channels).max(1);
        Ok(Fused {
            layout: self.layout,
            rank,
            max_blocks,
            usual_blocks: usual_blocks.min(max_blocks),
            block_channels: block_channels.min(channels),
            areas,
            mine: self.area,
            _theirs: theirs,
            counters: self.counters,
            control: self.control,
            copies: self.copies,
            timeout,
            is_reported: AtomicBool::new(false),
            is_watched: AtomicBool::new(false),
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
        self.layout.rings.legs
    }

    /// Ranks of the communicator.
    pub(crate) fn world(&self) -> usize {
        self.layout.rings.world
    }

    /// Bytes of a sum for which there are mailboxes; 0 where there are none.
    pub(crate) fn exact_room(&self) -> u64 {
        self.layout.mailboxes.map_or(0, |room| (room.blocks * room.block_stripes * STRIPE_VECS * VEC_BYTES) as u64)
    }

    /// Where the areas live.
    pub fn memory(&self) -> Areas {
        self.mine.memory()
    }

    /// Blocks of a kernel at most: in the usual share, and in the large one, where the communicator may get that.
    pub fn max_blocks(&self) -> (usize, usize) {
        (self.usual_blocks, self.max_blocks)
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

    /// Where kernels leave what they took, from now on: the first of [`N_SLOTS`] words, which live as long as `self`.
    pub(crate) fn watched_slots(&self) -> *const AtomicU64 {
        self.is_watched.store(true, Ordering::Relaxed);
        self.control.address().wrapping_byte_add(SLOTS_AT).cast()
    }

    /// Where a kernel leaves that; null where nobody looks, or where the sum is so small that to look would be felt.
    fn took(&self, is_exact: bool, n_bytes: usize) -> *mut u64 {
        if n_bytes < WATCHED_MIN_BYTES || !self.is_watched.load(Ordering::Relaxed) {
            return std::ptr::null_mut();
        }
        let slots: *mut u64 = self.control.address().wrapping_byte_add(SLOTS_AT).cast();
        slots.wrapping_add(slot(is_exact, n_bytes as u64))
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

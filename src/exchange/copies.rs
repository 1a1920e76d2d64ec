//! What it takes to let copy engines carry the payloads over host memory. (`fused/carry.rs` issues it.)
//!
//! All-reduces over host memory whose payloads copy engines carry: for machines on which kernels reach host memory much
//! slower than those do.
//!
//! The kernels of the exchange over the real NCCL code, slice by slice, in GPU memory. What is sent goes into this rank's
//! own area, where all others fetch it:
//!
//! ```text
//! the caller's stream  quantize 0   quantize 1   combine 0   quantize 2   combine 1 ...
//! out                        free?  copy 0 signal    free?  copy 1 signal ...
//! in                                wait copy 0 signal    wait copy 1 signal ...
//! ```
//!
//! in one hop; in two, reduce, copies of the sum out and in, and dequantize stand in the place of combine. There are two of
//! each buffer, here and in the area, so that a slice is coded while others are under way.
//!
//! Words in the area tell of it: `written`, how often its owner has ever filled a buffer, and for each reader `read`, how
//! often that has emptied one; both for each hop. A buffer is filled when all readers have emptied it, at an operation's
//! first slice both of them, for which of the two is next is not the same from operation to operation.

use std::sync::Arc;

use flashcomm_wire::rings::MAX_WORLD;
use flashcomm_wire::{Legs, Plan, TILE_ELEMS};

use parking_lot::Mutex;

use super::nccl::Staging;
use crate::cuda::{self, Capture, CudaResult, DeviceMemory, Event, RelaxedCapture, Stream};
use crate::error::{Error, Result};

/// Bytes of staging memory of a slice at most; there are two of them.
const STAGING_BYTES: usize = 8 << 20;

/// A slice sends as many bytes as the geometric mean of this and what the operation sends. Large slices make the first
/// and the last one long, in which only one direction of the link is busy; each takes some 10 us beside its bytes.
const SLICE_UNIT: usize = 256 << 10;

/// Bytes from one word to the next.
const WORD_BYTES: usize = 128;

/// What an area has for copies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CopyRoom {
    /// Ranks.
    pub world: usize,
    /// The agreed codecs.
    pub legs: Legs,
    /// The agreed bound of memory (`FLASHCOMM_BUFFER_MIB`), half of which the staging of two slices may take.
    pub buffer_bytes: usize,
}

/// A hop.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Hop {
    /// To the owners of chunks; in one hop to all.
    First,
    /// From there to all.
    Second,
}

impl CopyRoom {
    /// Bytes of it.
    pub fn n_bytes(&self) -> usize {
        self.slot_at(Hop::Second, 2, 0)
    }

    fn staging_bytes(&self) -> usize {
        STAGING_BYTES.min(self.buffer_bytes / 4).max(Plan::staging_bytes_per_tile(self.world, self.legs))
    }

    /// Bytes of staging memory that an operation of so many elements is to be cut for.
    pub(super) fn staging_bytes_of(&self, count: usize) -> usize {
        let n_chunks = if self.is_one_hop() { 1 } else { self.world };
        let tile_bytes = self.n_filled(Hop::First) * self.legs.reduce.tile_bytes();
        let sent = count.div_ceil(TILE_ELEMS).div_ceil(n_chunks) * tile_bytes;
        let slice_tiles = ((sent * SLICE_UNIT).isqrt() / tile_bytes).max(1);
        (slice_tiles * Plan::staging_bytes_per_tile(self.world, self.legs)).min(self.staging_bytes())
    }

    pub(super) fn is_one_hop(&self) -> bool {
        self.legs.one_hop(self.world).is_some()
    }

    /// Slots that a rank fills in a hop.
    pub(super) fn n_filled(&self, hop: Hop) -> usize {
        match hop {
            Hop::First if !self.is_one_hop() => self.world - 1,
            Hop::Second if self.is_one_hop() => 0,
            _ => 1,
        }
    }

    /// Bytes of a slot at most.
    fn slot_bytes(&self) -> usize {
        let n_outgoing = if self.is_one_hop() { 0 } else { self.world - 1 };
        Plan::staging_bytes(self.world, self.legs, self.staging_bytes()) / (n_outgoing + self.world)
    }

    /// Where in it byte `at` of a buffer is.
    pub(super) fn slot_at(&self, hop: Hop, buffer: usize, at: usize) -> usize {
        let before = match hop {
            Hop::First => buffer * self.n_filled(Hop::First),
            Hop::Second => 2 * self.n_filled(Hop::First) + buffer * self.n_filled(Hop::Second),
        };
        self.words_bytes() + before * self.slot_bytes() + at
    }

    fn words_bytes(&self) -> usize {
        2 * (1 + MAX_WORLD) * WORD_BYTES
    }

    /// Where the owner of the area tells how often it has filled a buffer.
    pub(super) fn written_at(hop: Hop) -> usize {
        hop as usize * (1 + MAX_WORLD) * WORD_BYTES
    }

    /// Where `reader` tells how often it has emptied one.
    pub(super) fn read_at(hop: Hop, reader: usize) -> usize {
        Self::written_at(hop) + (1 + reader) * WORD_BYTES
    }
}

/// What a rank has for them.
pub(super) struct Copies {
    pub room: CopyRoom,
    pub stagings: [Staging; 2],
    /// How often this rank has filled a buffer, and emptied one of each other rank: of both hops.
    pub counts: DeviceMemory,
    /// One, as a rule: see [`Copies::lane`].
    lanes: Mutex<Vec<Arc<Lane>>>,
}

/// The streams of an operation, and what orders them.
pub(super) struct Lane {
    pub out: Stream,
    pub into: Stream,
    pub begun: Event,
    /// Of each buffer: what the kernels made is there to be sent; it has been; what was sent to this rank is there; it has
    /// been decoded.
    pub made: [Event; 2],
    pub sent: [Event; 2],
    pub come: [Event; 2],
    pub done: [Event; 2],
}

// SAFETY: streams and events, which the driver locks.
unsafe impl Sync for Lane {}

impl Lane {
    fn new() -> CudaResult<Self> {
        let events = || -> CudaResult<[Event; 2]> { Ok([Event::new()?, Event::new()?]) };
        Ok(Self {
            out: Stream::urgent()?,
            into: Stream::urgent()?,
            begun: Event::new()?,
            made: events()?,
            sent: events()?,
            come: events()?,
            done: events()?,
        })
    }

    fn does(&self, capture: Capture) -> bool {
        // SAFETY: a stream of ours.
        let now = unsafe { cuda::capture_of(self.out.handle()) };
        now == Ok(capture)
    }
}

impl Copies {
    /// In the current context. The first lane is made here: see [`crate::comm::aside`].
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn new(room: CopyRoom, stream: &Stream) -> Result<Self> {
        let staging = || Staging::new(room.world, room.legs, room.staging_bytes());
        let counts = DeviceMemory::new(4 * 4).map_err(Error::cuda("allocating the copies' counters"))?;
        counts.clear(stream).map_err(Error::cuda("clearing the copies' counters"))?;
        let lane = Lane::new().map_err(Error::cuda("making streams for copies"))?;
        let lanes = Mutex::new(vec![Arc::new(lane)]);
        Ok(Self { room, stagings: [staging()?, staging()?], counts, lanes })
    }

    /// A lane for an operation on a stream that does `capture`. One that a capture has drawn in belongs to it until it ends:
    /// meanwhile other captures and what is not captured need another one, which is made then, in the current context.
    ///
    /// # Errors
    /// The driver's.
    pub(super) fn lane(&self, capture: Capture) -> CudaResult<Arc<Lane>> {
        let mut lanes = self.lanes.lock();
        let that = |capture: Capture| lanes.iter().find(|lane| lane.does(capture)).cloned();
        if let Some(lane) = that(capture).or_else(|| that(Capture::None)) {
            return Ok(lane);
        }
        let _relaxed = RelaxedCapture::enter()?;
        let lane = Arc::new(Lane::new()?);
        lanes.push(lane.clone());
        Ok(lane)
    }
}

//! Inputs of real all-reduces, saved for `flashcomm codec`: `FLASHCOMM_RECORD` and `FLASHCOMM_RECORD_DIR`.
//!
//! Candidates (fp16 and bf16 sums and averages, whether they are compressed or not) are counted on each communicator, which all its
//! ranks do alike; so all ranks save the same calls, and the files of one call, one of each rank, belong together.
//!
//! # Which calls
//!
//! The calls 1, 2 to 3, 4 to 7 and so on are *octaves*. One call of each is saved, from 21 asked for on two, from 41 on
//! three and so on, until there are as many as were asked for: the samples spread over the job, whose length nobody knows.
//! Which one in its octave is taken from the octave's number by a hash: a model of 32 layers would otherwise be met at the
//! same layer every time. What is captured into a graph is counted and not saved, and replays are not seen.
//!
//! # How
//!
//! The first [`SAMPLE_BYTES`] of the input, whole tiles, are copied into pinned memory on the caller's stream in front of the
//! all-reduce, and an event behind the copy. Whoever calls later, the end of a communicator and that of the process look
//! whether the event has happened, and write the file then; nobody waits for it. A sample has its place in the
//! memory for itself, so that none is left out because another has not been written.
//!
//! Memory and events are made in attach before its first round, like the kernels: no rank has work then that waits for
//! another rank's attach. They are not freed, but kept for another communicator: freeing may wait for all
//! work of the device. Whatever goes wrong ends the recording, never the call.

use std::collections::HashMap;
use std::ffi::c_void;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};

use flashcomm_wire::TILE_ELEMS;
use once_cell::sync::OnceCell;
use parking_lot::Mutex;
use parking_lot::Once;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

use crate::config::Config;
use crate::cuda::{self, Capture, Context, CudaResult, Event, Lent, PinnedMemory, RelaxedCapture, StreamHandle};
use crate::element::ElementType;

/// Bytes of a sample at most: 128 tiles.
pub(crate) const SAMPLE_BYTES: usize = 128 * TILE_ELEMS * 2;

/// The names in the header of a file.
pub(crate) mod header {
    /// The version of flashcomm, by which a file of ours is told.
    pub const FLASHCOMM: &str = "flashcomm";
    /// The communicator's number.
    pub const COMMUNICATOR: &str = "communicator";
    /// The call's number on the communicator, from 1.
    pub const CALL: &str = "call";
    /// Whose input it is.
    pub const RANK: &str = "rank";
    /// Ranks of the communicator.
    pub const WORLD: &str = "world";
    /// Elements of the whole input, of which the file may hold the first.
    pub const COUNT: &str = "count";
}

/// What is recorded of one communicator.
#[derive(Default)]
pub(crate) struct Recording {
    /// Candidates so far.
    calls: AtomicU64,
    /// `None` where it could not be made.
    room: OnceCell<Option<Arc<Room>>>,
    identity: OnceCell<Identity>,
}

/// What tells a communicator's files.
#[derive(Clone, Copy)]
struct Identity {
    /// Known to all its ranks, and no other communicator's.
    number: u64,
    rank: usize,
    world: usize,
}

/// Where samples wait until they are written.
struct Room {
    context: Context,
    memory: Lent<PinnedMemory>,
    /// The ends of the copies, one for each place.
    events: Vec<Event>,
    /// Places taken.
    taken: AtomicUsize,
    /// A copy may be under way of which no event tells.
    is_lost: AtomicBool,
}

/// A candidate whose input is to be saved.
pub(crate) struct Input {
    /// Its number on the communicator, from 1.
    pub call: u64,
    /// Where it is.
    pub at: *const c_void,
    /// Elements.
    pub count: usize,
    /// Their type.
    pub element: ElementType,
    /// The application's stream.
    pub stream: StreamHandle,
}

/// A sample on its way.
struct Sample {
    room: Arc<Room>,
    place: usize,
    n_bytes: usize,
    identity: Identity,
    call: u64,
    count: usize,
    element: ElementType,
}

static PENDING: Mutex<Vec<Sample>> = Mutex::new(Vec::new());
/// Samples in [`PENDING`]: mostly none, which is seen without its lock.
static N_PENDING: AtomicUsize = AtomicUsize::new(0);
static N_WRITTEN: AtomicUsize = AtomicUsize::new(0);
/// Samples whose context has gone before they were complete.
static N_LOST: AtomicUsize = AtomicUsize::new(0);
/// No file could be written; the log has said so.
static IS_OFF: AtomicBool = AtomicBool::new(false);
/// The process whose samples these are, not a fork of it.
static PROCESS: AtomicU32 = AtomicU32::new(0);

impl Recording {
    /// Counts a candidate. Its number, where its input is to be saved.
    #[inline]
    pub(crate) fn count(&self) -> Option<u64> {
        match Config::global().record {
            0 => None,
            wanted => self.count_one(wanted),
        }
    }

    #[cold]
    fn count_one(&self, wanted: usize) -> Option<u64> {
        poll();
        let call = self.calls.fetch_add(1, Relaxed) + 1;
        is_wanted(call, wanted).then_some(call)
    }

    /// Makes room, in attach before its first round. Does nothing where nothing is recorded.
    pub(crate) fn prepare(&self, device: i32) {
        let wanted = Config::global().record;
        if wanted == 0 {
            return;
        }
        self.room.get_or_init(|| match Room::new(device, wanted) {
            Ok(room) => Some(Arc::new(room)),
            Err(error) => {
                log::warn!("FLASHCOMM_RECORD: no memory for the inputs of a communicator: {error}");
                None
            }
        });
    }

    /// The ranks have met: names the communicator, and begins.
    pub(crate) fn begin(&self, number: u64, rank: usize, world: usize) {
        if self.room.get().is_some_and(|room| room.is_some()) {
            let _ = self.identity.set(Identity { number, rank, world });
            at_exit();
        }
    }

    /// Saves an input as the stream will have it, unless the stream captures.
    ///
    /// # Safety
    /// The input is good until what is issued to the stream now has run; the stream is live and of the communicator's
    /// context.
    pub(crate) unsafe fn take(&self, input: &Input) {
        let (Some(Some(room)), Some(identity)) = (self.room.get(), self.identity.get()) else { return };
        if IS_OFF.load(Relaxed) {
            return;
        }
        let n_bytes = input.count.saturating_mul(input.element.n_bytes()).min(SAMPLE_BYTES);
        // SAFETY: as the caller vouches.
        match unsafe { room.copy(input, n_bytes) } {
            Ok(Some(place)) => {
                let Input { call, count, element, .. } = *input;
                let (room, identity) = (room.clone(), *identity);
                PENDING.lock().push(Sample { room, place, n_bytes, identity, call, count, element });
                N_PENDING.fetch_add(1, Relaxed);
            }
            Ok(None) => {}
            Err(error) => log::warn!("FLASHCOMM_RECORD: call {} is not saved: {error}", input.call),
        }
    }
}

/// Whether call `call`, from 1, is one of those to be saved.
fn is_wanted(call: u64, wanted: usize) -> bool {
    let octave = call.ilog2();
    let size = 1u64 << octave;
    let parts = (wanted.div_ceil(20) as u64).min(size);
    (0..parts).any(|part| {
        let [start, end] = [part, part + 1].map(|part| size / parts * part + (size % parts).min(part));
        size + start + hash(u64::from(octave) << 8 | part) % (end - start) == call
    })
}

/// SplitMix64's.
fn hash(x: u64) -> u64 {
    let x = x.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

impl Room {
    /// Room for so many samples, in the current context, that of `device`.
    fn new(device: i32, n_samples: usize) -> CudaResult<Self> {
        let context = Context::retain(device)?;
        let events = (0..n_samples).map(|_| Event::new()).collect::<CudaResult<Vec<_>>>()?;
        let memory = Lent::new(device, n_samples * SAMPLE_BYTES)?;
        let (taken, is_lost) = (AtomicUsize::new(0), AtomicBool::new(false));
        Ok(Self { context, memory, events, taken, is_lost })
    }

    /// Issues the copy of an input to a place of its own; none while the stream captures, or where all are taken.
    ///
    /// # Safety
    /// As for [`Recording::take`].
    unsafe fn copy(&self, input: &Input, n_bytes: usize) -> CudaResult<Option<usize>> {
        let _entered = self.context.enter()?;
        // SAFETY: as the caller vouches.
        if !matches!(unsafe { cuda::capture_of(input.stream) }, Ok(Capture::None)) {
            return Ok(None);
        }
        let place = self.taken.fetch_add(1, Relaxed);
        let Some(event) = self.events.get(place) else { return Ok(None) };
        // SAFETY: the place is this sample's alone; the rest as the caller vouches.
        unsafe { self.memory.read_later(place * SAMPLE_BYTES, input.at, n_bytes, input.stream) }?;
        // SAFETY: as the caller vouches.
        unsafe { event.record(input.stream, false) }.inspect_err(|_| self.is_lost.store(true, Relaxed))?;
        Ok(Some(place))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if self.is_lost.load(Relaxed) {
            self.memory.lose();
        }
    }
}

/// Writes the samples whose copies have run.
pub(crate) fn poll() {
    if N_PENDING.load(Relaxed) == 0 || PROCESS.load(Relaxed) != std::process::id() {
        return;
    }
    let done: Vec<Sample> = {
        // To ask an event would break a capture of another thread otherwise.
        let Ok(_relaxed) = RelaxedCapture::enter() else { return };
        let mut pending = PENDING.lock();
        let done: Vec<Sample> = pending.extract_if(.., |sample| sample.is_done()).collect();
        N_PENDING.fetch_sub(done.len(), Relaxed);
        done
    };
    // Without the lock: another rank of this process need not wait for the disk.
    for sample in done.iter().filter(|sample| !sample.room.is_lost.load(Relaxed)) {
        sample.write();
    }
}

impl Sample {
    /// Whether there is nothing more to wait for.
    fn is_done(&self) -> bool {
        let ask = || {
            let _entered = self.room.context.enter()?;
            self.room.events[self.place].is_complete()
        };
        ask().unwrap_or_else(|error| {
            log::debug!("FLASHCOMM_RECORD: call {} is lost: {error}", self.call);
            self.room.is_lost.store(true, Relaxed);
            N_LOST.fetch_add(1, Relaxed);
            true
        })
    }

    fn write(&self) {
        if IS_OFF.load(Relaxed) {
            return;
        }
        let path = self.path();
        let written = fs::create_dir_all(&Config::global().record_dir).map_err(|error| error.to_string());
        match written.and_then(|()| self.write_to(&path)) {
            Ok(()) => {
                N_WRITTEN.fetch_add(1, Relaxed);
                log::debug!("FLASHCOMM_RECORD: wrote {}", path.display());
            }
            Err(error) => {
                if !IS_OFF.swap(true, Relaxed) {
                    log::warn!("FLASHCOMM_RECORD: cannot write {}: {error}; nothing more is saved", path.display());
                }
            }
        }
    }

    fn path(&self) -> PathBuf {
        let Identity { number, rank, world } = self.identity;
        let name = format!("{number:016x}-call{:08}-rank{rank}of{world}.safetensors", self.call);
        Config::global().record_dir.join(name)
    }

    fn write_to(&self, path: &std::path::Path) -> Result<(), String> {
        let Identity { number, rank, world } = self.identity;
        let start = self.room.memory.address().wrapping_byte_add(self.place * SAMPLE_BYTES).cast::<u8>();
        // SAFETY: the place is this sample's, at least as long, and its copy has run.
        let bytes = unsafe { std::slice::from_raw_parts(start, self.n_bytes) };
        let dtype = match self.element {
            ElementType::Fp16 => Dtype::F16,
            ElementType::Bf16 => Dtype::BF16,
            ElementType::Fp32 => Dtype::F32,
        };
        let about = [
            (header::FLASHCOMM, env!("CARGO_PKG_VERSION").into()),
            (header::COMMUNICATOR, format!("{number:016x}")),
            (header::CALL, self.call.to_string()),
            (header::RANK, rank.to_string()),
            (header::WORLD, world.to_string()),
            (header::COUNT, self.count.to_string()),
        ];
        let about: HashMap<String, String> = about.into_iter().map(|(name, value)| (name.into(), value)).collect();
        let tensor = TensorView::new(dtype, vec![self.n_bytes / self.element.n_bytes()], bytes);
        let written = tensor.and_then(|tensor| serialize_to_file([("input", tensor)], Some(about), path));
        written.map_err(|error| error.to_string())
    }
}

/// Arranges for what is to be done when the process ends.
fn at_exit() {
    extern "C" fn end() {
        // Nothing may unwind into libc.
        let _ = std::panic::catch_unwind(|| {
            if PROCESS.load(Relaxed) != std::process::id() {
                return;
            }
            poll();
            match N_PENDING.load(Relaxed) + N_LOST.load(Relaxed) {
                0 => {}
                left => log::warn!("FLASHCOMM_RECORD: {left} samples were not complete when the process ended"),
            }
            let dir = Config::global().record_dir.display();
            log::info!("FLASHCOMM_RECORD: {} samples are in {dir}", N_WRITTEN.load(Relaxed));
        });
    }
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        PROCESS.store(std::process::id(), Relaxed);
        // SAFETY: the function lives as long as this library; handlers of one that is unloaded run then.
        unsafe { libc::atexit(end) };
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(wanted: usize, up_to: u64) -> Vec<u64> {
        (1..up_to).filter(|call| is_wanted(*call, wanted)).take(wanted).collect()
    }

    #[test]
    fn each_octave_has_its_share_up_to_what_is_wanted() {
        for (n, parts) in [(1, 1), (16, 1), (20, 1), (21, 2), (64, 4)] {
            let calls = wanted(n, 1 << 17);
            for octave in 0..16u32 {
                let of_octave = calls.iter().filter(|call| call.ilog2() == octave).count();
                let expected = parts.min(1 << octave);
                let is_last = calls.len() == n && calls.last().is_some_and(|last| last.ilog2() <= octave);
                assert!(of_octave == expected || is_last && of_octave <= expected, "{n}: {octave}: {calls:?}");
            }
        }
        assert_eq!(wanted(16, 1 << 20).len(), 16);
    }

    #[test]
    fn no_layer_of_a_model_is_met_every_time() {
        for layers in [32, 64, 80] {
            let mut places: Vec<u64> =
                wanted(20, 1 << 20).into_iter().filter(|call| *call > layers).map(|call| call % layers).collect();
            let n = places.len();
            places.sort_unstable();
            places.dedup();
            assert!(places.len() * 4 >= n * 3, "{layers}: {places:?} of {n}");
        }
    }
}

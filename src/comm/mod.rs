//! What the shim knows of a communicator: a side table keyed by the real `ncclComm_t` (invariant I2: the handle is
//! never wrapped).
//!
//! An entry appears at the first candidate all-reduce and is dropped before a destroy or an abort is forwarded, since
//! NCCL uses addresses again. Its verdict is settled once, by [`attach`]; what it then holds is freed with it,
//! as soon as the last operation that uses it has run.
//!
//! An engine may change the widths later, at points that all ranks agree on. Each pair of widths has a *setup* of its own,
//! as if it were another communicator's: kernels, receive areas, counters. The setups of earlier widths stay as long as the
//! communicator, since graphs that were captured with them may be replayed whenever the application likes.

pub mod attach;
pub mod blob;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use flashcomm_wire::Legs;
use once_cell::sync::{Lazy, OnceCell};
use parking_lot::{Mutex, RwLock};

use crate::cuda::{self, Capture, Context, CudaResult, Dependencies, Event, GraphNode, RelaxedCapture, StreamHandle};
use crate::error::{self, Error};
use crate::exchange::Exchange;
use crate::exchange::fused::Seat;
use crate::kernels::Kernels;
use crate::nccl::CommPtr;
use crate::record::Recording;
use crate::route::Verdict;

/// One communicator of this process, one rank of it.
pub struct Comm {
    handle: CommHandle,
    aborted: AtomicBool,
    /// [`OPEN`], [`OFF`], or the number of the setup in use.
    state: AtomicUsize,
    /// An engine has switched it off, on all ranks.
    switched_off: AtomicBool,
    setups: [OnceCell<Box<Attached>>; MAX_SETUPS],
    /// Its inputs that are to be saved.
    pub recording: Recording,
}

/// The ranks have not met yet.
const OPEN: usize = usize::MAX;
/// All ranks forward, for good.
const OFF: usize = usize::MAX - 1;

/// Pairs of widths that a communicator may have in its life: each keeps its memory.
pub const MAX_SETUPS: usize = 8;

/// What an attached communicator holds for a pair of widths.
pub struct Attached {
    /// This rank.
    pub rank: usize,
    /// Ranks of the communicator.
    pub world: usize,
    /// The agreed codecs.
    pub legs: Legs,
    /// The agreed threshold.
    pub min_bytes: u64,
    /// The context of the communicator's device.
    pub context: Context,
    /// Kernels of the agreed codecs, in that context.
    pub kernels: Kernels,
    /// What carries the payloads.
    pub exchange: ManuallyDrop<Exchange>,
    order: Arc<Mutex<Order>>,
    /// With a fused exchange: shared by the communicator's setups, which never run at once.
    seat: Option<Arc<Seat>>,
}

/// The events that chain the communicator's operations, of whatever setup and on whatever stream.
struct Order {
    /// The end of the last operation, eager or replayed.
    last: Event,
    /// The last operation within the capture that was last seen.
    captured: Option<Captured>,
}

/// An operation that has been captured.
struct Captured {
    /// In the capture of this id.
    capture: u64,
    /// Its end.
    end: Event,
    /// The nodes that record [`Order::last`] at each replay.
    records: Vec<GraphNode>,
}

// SAFETY: the nodes are handles, used while their capture goes on and under the lock of the order.
unsafe impl Send for Captured {}

/// The application's `ncclComm_t`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct CommHandle(CommPtr);

// SAFETY: NCCL's handles may be passed between threads; that they are used by one at a time is the application's duty.
unsafe impl Send for CommHandle {}
// SAFETY: as above.
unsafe impl Sync for CommHandle {}

impl Comm {
    /// The real handle.
    pub fn handle(&self) -> CommPtr {
        self.handle.0
    }

    /// What the ranks agreed on.
    pub fn verdict(&self) -> Verdict {
        match self.state.load(Ordering::Acquire) {
            OPEN => Verdict::Open,
            OFF => Verdict::Off,
            _ if self.switched_off.load(Ordering::Relaxed) => Verdict::SwitchedOff,
            setup => self.setups[setup].get().map_or(Verdict::Off, |on| Verdict::On { min_bytes: on.min_bytes }),
        }
    }

    /// The setup in use, when the verdict is on (or was, before it was switched off).
    pub fn attached(&self) -> Option<&Attached> {
        self.setups.get(self.state.load(Ordering::Acquire))?.get().map(|attached| &**attached)
    }

    /// The setup of a pair of widths, if it has ever been in use.
    pub fn attached_with(&self, legs: Legs) -> Option<&Attached> {
        self.setups().find(|attached| attached.legs == legs)
    }

    /// Every setup, the oldest first.
    fn setups(&self) -> impl Iterator<Item = &Attached> {
        self.setups.iter().map_while(|setup| setup.get().map(|attached| &**attached))
    }

    /// Whether the application has aborted or destroyed the communicator. Its handle must not be used any more.
    pub fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::Acquire)
    }

    /// Frees the kernels that wait for other ranks (invariant I5).
    fn abort(&self) {
        self.aborted.store(true, Ordering::Release);
        for attached in self.setups() {
            if let Exchange::Fused(fused) = &*attached.exchange {
                fused.abort();
            }
        }
    }

    /// Its device, where it was ever attached.
    fn device(&self) -> Option<i32> {
        self.setups().next().map(|attached| attached.context.device())
    }

    /// What went wrong on the GPU, if anything.
    fn failure(&self) -> Option<Error> {
        self.setups().find_map(Attached::failure)
    }

    /// Whether all of its operations have run.
    fn is_idle(&self) -> bool {
        self.setups().next().is_none_or(Attached::is_idle)
    }

    /// All ranks forward from now on. Does nothing once the verdict is settled: a settlement that comes late is that of a
    /// thread that nobody waited for.
    fn settle_off(&self) {
        let _ = self.state.compare_exchange(OPEN, OFF, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Takes a setup into use, at a point that all ranks agree on.
    fn settle(&self, attached: Box<Attached>, switched_off: bool) {
        if self.state.load(Ordering::Acquire) == OFF {
            return; // too late, as above
        }
        let legs = attached.legs;
        let mut place = Some(attached);
        for setup in &self.setups {
            if let Some(attached) = place.take()
                && let Err(attached) = setup.set(attached)
            {
                place = Some(attached);
            }
        }
        self.use_setup(legs, switched_off);
    }

    /// As [`Comm::settle`], for widths that have been in use before.
    fn use_setup(&self, legs: Legs, switched_off: bool) {
        if let Some(setup) = self.setups().position(|attached| attached.legs == legs) {
            self.switched_off.store(switched_off, Ordering::Relaxed);
            self.state.store(setup, Ordering::Release);
        }
    }
}

impl Attached {
    /// Starts an operation on `stream`: it will run after the communicator's previous one.
    ///
    /// # Safety
    /// `stream` is live and of the communicator's context, which is current.
    pub unsafe fn begin(&self, stream: StreamHandle, capture: Capture) -> CudaResult<()> {
        let order = self.order.lock();
        match capture {
            // SAFETY: the caller vouches for the stream.
            Capture::None => unsafe { order.last.make_wait(stream, false) },
            Capture::Active(id) => match &order.captured {
                // Within one graph the edge is drawn in the graph.
                // SAFETY: as above; the event was recorded in this very capture.
                Some(captured) if captured.capture == id => unsafe { captured.end.make_wait(stream, false) },
                // A graph's first operation waits, at each replay, for what was last before that replay.
                // SAFETY: as above.
                _ => unsafe { order.last.make_wait(stream, true) },
            },
        }
    }

    /// Ends an operation on `stream`: the next one will run after it.
    ///
    /// # Safety
    /// As for [`Attached::begin`].
    pub unsafe fn end(&self, stream: StreamHandle, capture: Capture) -> CudaResult<()> {
        let mut order = self.order.lock();
        let Capture::Active(id) = capture else {
            // SAFETY: the caller vouches for the stream.
            return unsafe { order.last.record(stream, false) };
        };
        // Each replay records the end for whoever comes from outside of the graph. In the graph that stands beside the
        // operations, one record behind the other: no operation is held up by it.
        // SAFETY: as above.
        let mut operation = unsafe { cuda::capture_dependencies(stream)? };
        let same = order.captured.as_mut().filter(|captured| captured.capture == id);
        let (end, mut records) = match same {
            Some(captured) => (None, std::mem::take(&mut captured.records)),
            None => (Some(Event::new()?), Vec::new()),
        };
        // SAFETY: as above; the nodes are of this capture.
        unsafe { cuda::update_capture_dependencies(stream, &mut records, Dependencies::Add)? };
        // SAFETY: as above.
        unsafe { order.last.record(stream, true)? };
        // SAFETY: as above.
        let records = unsafe { cuda::capture_dependencies(stream)? };
        // SAFETY: as above.
        unsafe { cuda::update_capture_dependencies(stream, &mut operation, Dependencies::Set)? };
        match (&mut order.captured, end) {
            (Some(captured), None) => captured.records = records,
            (captured, end) => {
                let end = end.expect("made for a capture that is new");
                *captured = Some(Captured { capture: id, end, records });
            }
        }
        let captured = order.captured.as_ref().expect("set above");
        // SAFETY: as above.
        unsafe { captured.end.record(stream, false) }
    }

    /// The error of a kernel that gave up waiting for another rank.
    pub fn failure(&self) -> Option<Error> {
        match &*self.exchange {
            Exchange::Fused(fused) => fused.failure(),
            Exchange::Nccl(_) => None,
        }
    }

    fn is_idle(&self) -> bool {
        // An error here means that the context is lost; nothing runs in it any more.
        self.order.lock().last.is_complete().unwrap_or(true)
    }
}

impl Drop for Attached {
    /// Whoever lets go of it last may have another context or none: a thread that attached, or one that aborts.
    fn drop(&mut self) {
        let _relaxed = RelaxedCapture::enter();
        let _entered = self.context.enter();
        // SAFETY: not used any more; dropped here only.
        unsafe { ManuallyDrop::drop(&mut self.exchange) };
    }
}

type Table = HashMap<CommHandle, Arc<Comm>, BuildHasherDefault<AddressHasher>>;

static TABLE: Lazy<RwLock<Table>> = Lazy::new(Default::default);

/// Spreads the bits of an address (Fibonacci hashing): a look-up is on the path of every candidate all-reduce.
#[derive(Default)]
struct AddressHasher(u64);

impl Hasher for AddressHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_usize(usize::from(*byte)));
    }
    fn write_usize(&mut self, address: usize) {
        self.0 = (self.0 ^ address as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }
}

/// Communicators that are gone but whose last operation has not run yet.
static RETIRED: Mutex<Vec<Arc<Comm>>> = Mutex::new(Vec::new());

/// The entry of a communicator, made at its first use. `handle` is not null.
pub fn of(handle: CommPtr) -> Arc<Comm> {
    let handle = CommHandle(handle);
    if let Some(comm) = TABLE.read().get(&handle) {
        return comm.clone();
    }
    let new = || Comm {
        handle,
        aborted: AtomicBool::new(false),
        state: AtomicUsize::new(OPEN),
        switched_off: AtomicBool::new(false),
        setups: Default::default(),
        recording: Recording::default(),
    };
    TABLE.write().entry(handle).or_insert_with(|| Arc::new(new())).clone()
}

/// The entry of a communicator, if it has one.
pub fn known(handle: CommPtr) -> Option<Arc<Comm>> {
    TABLE.read().get(&CommHandle(handle)).cloned()
}

/// Drops the entry of a communicator that is about to be destroyed. What it holds stays until [`reap`] finds that its
/// last operation has run.
/// Its device, where it was attached.
pub fn retire(handle: CommPtr) -> Option<i32> {
    let comm = TABLE.write().remove(&CommHandle(handle))?;
    comm.aborted.store(true, Ordering::Release);
    let device = comm.device()?;
    RETIRED.lock().push(comm);
    Some(device)
}

/// Drops the entry of a communicator that is about to be aborted, and frees its waiting kernels.
/// Its device, where it was attached.
pub fn abort(handle: CommPtr) -> Option<i32> {
    if let Some(comm) = TABLE.read().get(&CommHandle(handle)) {
        comm.abort();
    }
    retire(handle)
}

/// As [`abort`], for a handle that stays: from now on the real NCCL answers what is done with it.
pub fn turn_off(handle: CommPtr) {
    abort(handle);
    of(handle).settle_off();
}

/// What went wrong in a communicator on the GPU, if anything.
pub fn failure(handle: CommPtr) -> Option<Error> {
    TABLE.read().get(&CommHandle(handle))?.failure()
}

/// Frees the staging of retired communicators that are idle. Waits for nothing of a communicator, but frees memory,
/// which the driver may synchronize: for the end and the beginning of communicators only.
///
/// Only those of `device`, that of the communicator that has ended: on another one a rank of another thread may have
/// work that waits for this very thread, and freeing waits for it.
pub fn reap(device: i32) {
    // To ask an event and to free memory would break a capture of another thread otherwise.
    let _relaxed = RelaxedCapture::enter();
    let idle: Vec<Arc<Comm>> = {
        let mut retired = RETIRED.lock();
        let all = std::mem::take(&mut *retired);
        let (idle, busy) = all.into_iter().partition(|comm| comm.device() == Some(device) && comm.is_idle());
        *retired = busy;
        idle
    };
    for error in idle.iter().filter_map(|comm| comm.failure()) {
        error::remember(&error);
    }
    drop(idle);
}

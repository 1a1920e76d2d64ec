//! The side table: communicators by handle, and those that are gone but still at work.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use once_cell::sync::Lazy;
use parking_lot::{Mutex, RwLock};

use super::communicator::{Comm, CommHandle};
use crate::cuda::RelaxedCapture;
use crate::error::{self, Error};
use crate::nccl::CommPtr;
use crate::negotiation::key::Key;

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
pub(crate) fn of(handle: CommPtr) -> Arc<Comm> {
    let handle = CommHandle(handle);
    if let Some(comm) = TABLE.read().get(&handle) {
        return comm.clone();
    }
    TABLE.write().entry(handle).or_insert_with(|| Arc::new(Comm::new(handle.0))).clone()
}

/// What is known of a communicator from the call that made it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin {
    /// Whether its captured calls keep their order with others.
    pub mixes_graphs: bool,
    /// By which its ranks find each other, where they can.
    pub key: Option<Key>,
}

/// The entry of a communicator that has just been created. `handle` is not null.
pub(crate) fn created(handle: CommPtr, origin: Origin) -> Arc<Comm> {
    let comm = of(handle);
    comm.set_mixes_graphs(origin.mixes_graphs);
    comm.set_key(origin.key);
    comm
}

/// The entry of a communicator, if it has one.
pub(crate) fn known(handle: CommPtr) -> Option<Arc<Comm>> {
    TABLE.read().get(&CommHandle(handle)).cloned()
}

/// Drops the entry of a communicator that is about to be destroyed. What it holds stays until [`reap`] finds that its
/// last operation has run.
/// Its device, where it was attached.
pub(crate) fn retire(handle: CommPtr) -> Option<i32> {
    let comm = TABLE.write().remove(&CommHandle(handle))?;
    comm.retire();
    let device = comm.device()?;
    RETIRED.lock().push(comm);
    Some(device)
}

/// Drops the entry of a communicator that is about to be aborted, and frees its waiting kernels.
/// Its device, where it was attached.
pub(crate) fn abort(handle: CommPtr) -> Option<i32> {
    if let Some(comm) = TABLE.read().get(&CommHandle(handle)) {
        comm.abort();
    }
    retire(handle)
}

/// As [`abort`], for a handle that stays: from now on the real NCCL answers what is done with it.
pub(crate) fn turn_off(handle: CommPtr) {
    abort(handle);
    of(handle).settle_off();
}

/// What went wrong in a communicator on the GPU, if anything.
pub(crate) fn failure(handle: CommPtr) -> Option<Error> {
    TABLE.read().get(&CommHandle(handle))?.failure()
}

/// Why the ranks of a communicator could not meet, where they could not.
pub(crate) fn failed_attach(handle: CommPtr) -> Option<Error> {
    TABLE.read().get(&CommHandle(handle))?.failed_attach()
}

/// Whether the ranks of a communicator are meeting while the application goes on.
pub(crate) fn is_meeting(handle: CommPtr) -> bool {
    TABLE.read().get(&CommHandle(handle)).is_some_and(|comm| comm.is_meeting())
}

/// Frees the staging of retired communicators that are idle. Waits for nothing of a communicator, but frees memory,
/// which the driver may synchronize: for the end and the beginning of communicators only.
///
/// Only those of `device`, that of the communicator that has ended: on another one a rank of another thread may have
/// work that waits for this very thread, and freeing waits for it.
pub(crate) fn reap(device: i32) {
    // To ask an event and to free memory would break a capture of another thread otherwise.
    let _relaxed = RelaxedCapture::enter();
    let idle: Vec<Arc<Comm>> = {
        let mut retired = RETIRED.lock();
        let all = std::mem::take(&mut *retired);
        // A thread that has it may be about to launch its last operation: aborts come from other threads.
        let is_held = |comm: &Arc<Comm>| Arc::strong_count(comm) > 1;
        let is_over = |comm: &Arc<Comm>| comm.device() == Some(device) && !is_held(comm) && comm.is_idle();
        let (idle, busy) = all.into_iter().partition(is_over);
        *retired = busy;
        idle
    };
    for error in idle.iter().filter_map(|comm| comm.failure()) {
        error::remember(&error);
    }
    drop(idle);
}

/// Whether this process has no communicator any more. One that compresses nothing counts, too: to free memory would wait for
/// what the real NCCL has under way on it, and that may wait for this thread.
pub(super) fn is_last() -> bool {
    TABLE.read().is_empty()
}

/// Frees what those held that have ended, on every device: nobody is left for whom that could wait. Whether that was all.
pub(super) fn is_empty() -> bool {
    let devices: HashSet<i32> = RETIRED.lock().iter().filter_map(|comm| comm.device()).collect();
    devices.into_iter().for_each(reap);
    RETIRED.lock().is_empty()
}

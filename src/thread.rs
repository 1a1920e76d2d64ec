//! What a thread of the application keeps between calls. One variable for all of it, since to find it (`__tls_get_addr`)
//! is most of what a counted call costs.

use std::cell::Cell;
use std::ptr;

use crate::nccl::CommPtr;
use crate::real;
use crate::stats::{Counters, Known};

/// A thread's own.
pub struct Thread {
    /// How many of our exports it is in the real library through.
    pub real_depth: Cell<u32>,
    /// Whether it has forwarded a call since its last group began.
    pub has_forwarded: Cell<bool>,
    /// Counters that it has used.
    known: Known,
}

impl Thread {
    /// The counters of a communicator that this thread uses.
    #[inline]
    pub fn counters(&self, comm: CommPtr) -> &'static Counters {
        self.known.of(comm, real::identity)
    }
}

/// The calling thread's.
///
/// A reference, since `LocalKey::with` would take what a call goes on with through memory.
#[inline]
pub fn current() -> &'static Thread {
    // SAFETY: initialized by a constant and without a destructor, it is there as long as the thread; and it is not Sync, so
    // that no other thread gets the reference.
    unsafe { &*THREAD.with(ptr::from_ref) }
}

thread_local! {
    static THREAD: Thread = const { Thread { real_depth: Cell::new(0), has_forwarded: Cell::new(false), known: Known::new() } };
}

//! What a thread of the application keeps between calls. One variable for all of it, since to find it (`__tls_get_addr`)
//! is most of what a counted call costs.

use std::cell::Cell;
use std::ptr;

use crate::nccl::CommPtr;
use crate::real;
use crate::stats::{Counters, Known};

/// A thread's own.
pub struct Thread {
    /// How many of our exports it is in the real library through, and above that how many calls it has forwarded
    /// ([`Thread::n_forwarded`]). In one word, since a counted call writes it anyway.
    real: Cell<u64>,
    /// Counters that it has used.
    known: Known,
}

/// The bits of the depth.
const DEPTH: u64 = 0xff;
/// One call, above the depth.
const ONE_CALL: u64 = DEPTH + 1;

impl Thread {
    /// Whether it is inside the real library, called by one of our exports.
    pub fn is_in_real_nccl(&self) -> bool {
        self.real.get() & DEPTH != 0
    }

    /// Calls that it has forwarded so far, of those that the shim sees; where NCCL makes them itself it may miss some.
    pub fn n_forwarded(&self) -> u64 {
        self.real.get() / ONE_CALL
    }

    /// Calls the real library such that calls it makes back to us are recognized; after `first`, where this is none of those.
    /// `is_forwarded`: counts it.
    #[inline]
    pub fn in_real_nccl<T>(&self, is_forwarded: bool, first: impl FnOnce(&Self), call: impl FnOnce() -> T) -> T {
        let before = self.real.get();
        if before & DEPTH == 0 {
            first(self);
        }
        self.real.set(before + 1);
        let result = call();
        self.real.set(before + if is_forwarded { ONE_CALL } else { 0 });
        result
    }

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
    static THREAD: Thread = const { Thread { real: Cell::new(0), known: Known::new() } };
}

//! What a thread of the application keeps between calls. One variable for all of it, since to find it (`__tls_get_addr`)
//! is most of what a counted call costs.

use std::cell::Cell;

use crate::stats::Known;

/// A thread's own.
pub struct Thread {
    /// How many of our exports it is in the real library through.
    pub real_depth: Cell<u32>,
    /// Counters that it has used.
    pub known: Known,
}

thread_local! {
    /// This thread's.
    pub static THREAD: Thread = const { Thread { real_depth: Cell::new(0), known: Known::new() } };
}

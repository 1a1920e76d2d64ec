//! Counts of what was compressed and what was forwarded, and why.
//!
//! Every thread that calls has counters of its own, so counting is a plain addition: no lock, no shared cache line.
//! They live as long as the process (some hundred bytes for each thread that ever called NCCL). [`Stats::collect`]
//! adds them up; the sum is exact for calls that have returned.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;
use serde::Serialize;

use crate::config::Config;
use crate::route::Reason;

/// The collective and point-to-point calls that are counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "each is the NCCL function of that name, its Config form included")]
pub enum Call {
    AllReduce,
    Broadcast,
    Reduce,
    AllGather,
    ReduceScatter,
    AlltoAll,
    Gather,
    Scatter,
    Send,
    Recv,
}

impl Call {
    /// Every call, in the order of the counters.
    pub const ALL: [(Call, &str); 10] = [
        (Call::AllReduce, "all_reduce"),
        (Call::Broadcast, "broadcast"),
        (Call::Reduce, "reduce"),
        (Call::AllGather, "all_gather"),
        (Call::ReduceScatter, "reduce_scatter"),
        (Call::AlltoAll, "all_to_all"),
        (Call::Gather, "gather"),
        (Call::Scatter, "scatter"),
        (Call::Send, "send"),
        (Call::Recv, "recv"),
    ];
}

/// Calls forwarded by kind, then all-reduces forwarded by reason, then the three of compressed all-reduces.
const N_CALLS: usize = Call::ALL.len();
const N_REASONS: usize = Reason::ALL.len();
const COMPRESSED: usize = N_CALLS + N_REASONS;
const BYTES_IN: usize = COMPRESSED + 1;
const BYTES_WIRE: usize = COMPRESSED + 2;
const N_COUNTERS: usize = COMPRESSED + 3;

type Counters = [AtomicU64; N_COUNTERS];

static THREADS: Mutex<Vec<&'static Counters>> = Mutex::new(Vec::new());

thread_local! {
    static MINE: Cell<Option<&'static Counters>> = const { Cell::new(None) };
}

fn add(counter: usize, n: u64) {
    let mine = MINE.get().unwrap_or_else(register_thread);
    // The only writer is this thread.
    mine[counter].store(mine[counter].load(Relaxed) + n, Relaxed);
}

#[cold]
fn register_thread() -> &'static Counters {
    let counters: &'static Counters = Box::leak(Box::new([const { AtomicU64::new(0) }; N_COUNTERS]));
    THREADS.lock().push(counters);
    MINE.set(Some(counters));
    counters
}

/// Counts a call that goes to the real NCCL.
#[inline]
pub fn forwarded(call: Call) {
    add(call as usize, 1);
}

/// Counts an all-reduce that goes to the real NCCL, and why.
pub fn all_reduce_forwarded(reason: Reason) {
    add(Call::AllReduce as usize, 1);
    add(N_CALLS + reason as usize, 1);
}

/// Counts a compressed all-reduce: `n_bytes_in` of the caller's, `n_bytes_wire` sent by this rank.
pub fn compressed(n_bytes_in: u64, n_bytes_wire: u64) {
    add(COMPRESSED, 1);
    add(BYTES_IN, n_bytes_in);
    add(BYTES_WIRE, n_bytes_wire);
}

/// The counts of the process so far.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize)]
pub struct Stats {
    /// All-reduces compressed.
    pub all_reduces_compressed: u64,
    /// Bytes of those, as the caller sees them.
    pub bytes_in: u64,
    /// Bytes that this process's ranks put on the wire for them.
    pub bytes_wire: u64,
    /// Calls that went to the real NCCL, by kind.
    pub forwarded: BTreeMap<&'static str, u64>,
    /// All-reduces among them, by reason.
    pub all_reduces_forwarded_because: BTreeMap<&'static str, u64>,
}

impl Stats {
    /// Adds up the counters of all threads.
    pub fn collect() -> Self {
        let threads = THREADS.lock();
        let sum = |counter: usize| threads.iter().map(|counters| counters[counter].load(Relaxed)).sum();
        Self {
            all_reduces_compressed: sum(COMPRESSED),
            bytes_in: sum(BYTES_IN),
            bytes_wire: sum(BYTES_WIRE),
            forwarded: Call::ALL.iter().map(|(call, name)| (*name, sum(*call as usize))).collect(),
            all_reduces_forwarded_because: Reason::ALL
                .iter()
                .map(|reason| (reason.name(), sum(N_CALLS + *reason as usize)))
                .collect(),
        }
    }

    /// Calls forwarded, of any kind.
    pub fn total_forwarded(&self) -> u64 {
        self.forwarded.values().sum()
    }
}

/// Arranges for `FLASHCOMM_STATS_FILE` to be written when the process exits; later calls do nothing.
pub fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        if Config::global().stats_file.is_some() {
            // SAFETY: the function lives as long as this library, which the process keeps loaded (RTLD_NODELETE is
            // not needed: atexit handlers of a library run when it is unloaded).
            unsafe { libc::atexit(write_at_exit) };
        }
    });
}

extern "C" fn write_at_exit() {
    // Nothing may unwind into libc.
    let _ = std::panic::catch_unwind(|| {
        if let Some(path) = &Config::global().stats_file {
            write(path);
        }
    });
}

fn write(path: &Path) {
    let written = serde_json::to_vec_pretty(&Stats::collect())
        .map_err(std::io::Error::other)
        .and_then(|json| std::fs::write(path, json));
    if let Err(error) = written {
        log::error!("FLASHCOMM_STATS_FILE={}: {error}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_all_threads_add_up() {
        let before = Stats::collect();
        let threads: Vec<_> = (0..4)
            .map(|_| {
                std::thread::spawn(|| {
                    for _ in 0..1000 {
                        forwarded(Call::Send);
                        all_reduce_forwarded(Reason::Small);
                        compressed(200, 57);
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        let after = Stats::collect();
        assert_eq!(after.forwarded["send"] - before.forwarded["send"], 4000);
        assert_eq!(after.forwarded["all_reduce"] - before.forwarded["all_reduce"], 4000);
        assert_eq!(after.all_reduces_forwarded_because["small"] - before.all_reduces_forwarded_because["small"], 4000);
        assert_eq!(after.all_reduces_compressed - before.all_reduces_compressed, 4000);
        assert_eq!((after.bytes_in - before.bytes_in, after.bytes_wire - before.bytes_wire), (800_000, 228_000));
    }
}

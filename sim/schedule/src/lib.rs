//! Schedules and faults of the simulators, from the environment, so that a failure replays from its seed.
//!
//! * `FLASHCOMM_SIM_SEED=n`: pseudo-random delays at every asynchronous point ([`point`]). Unset: none.
//! * `FLASHCOMM_SIM_FAIL=alloc:3,launch:5`: the third allocation and the fifth launch of the process fail. The kinds
//!   are those that callers give to [`fails`].
//! * `FLASHCOMM_SIM_KILL=n`: the process is killed at its n-th step ([`step`]): the n-th call or piece of stream work
//!   that other ranks may wait for. Set it to `0` and a file's path in `FLASHCOMM_SIM_STEPS_FILE` to learn how many
//!   steps a run has.
//!
//! Delays depend on the seed and on the number of the point within the process. Which thread comes to which point
//! first is the operating system's, so a seed narrows a schedule down; it does not fix it to the last instruction.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use once_cell::sync::Lazy;
use parking_lot::Mutex;

static SEED: Lazy<Option<u64>> = Lazy::new(|| number("FLASHCOMM_SIM_SEED"));
static KILL: Lazy<Option<u64>> = Lazy::new(|| number("FLASHCOMM_SIM_KILL"));
static POINTS: AtomicU64 = AtomicU64::new(0);
static STEPS: AtomicU64 = AtomicU64::new(0);

/// Calls still to go until the one that fails, by kind.
static FAIL: Lazy<Mutex<HashMap<String, u64>>> = Lazy::new(|| {
    let text = std::env::var("FLASHCOMM_SIM_FAIL").unwrap_or_default();
    let rules = text.split(',').filter_map(|rule| {
        let (kind, n) = rule.split_once(':')?;
        Some((kind.trim().to_string(), n.trim().parse().ok()?))
    });
    Mutex::new(rules.collect())
});

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.trim().parse().ok()
}

/// An asynchronous point: whatever comes next may come later, as the seed has it.
pub fn point() {
    let Some(seed) = *SEED else { return };
    let random = mix(seed ^ mix(POINTS.fetch_add(1, Ordering::Relaxed)));
    match random % 16 {
        0 => std::thread::sleep(Duration::from_micros(random / 16 % 300)),
        1..=4 => std::thread::yield_now(),
        _ => {}
    }
}

/// A step that other ranks may wait for: the process may be told to die here.
pub fn step() {
    let Some(at) = *KILL else { return };
    let n = STEPS.fetch_add(1, Ordering::SeqCst) + 1;
    if let Some(path) = std::env::var_os("FLASHCOMM_SIM_STEPS_FILE") {
        // Only a hint for tests; a run that cannot write it says nothing of its steps.
        let _ = std::fs::write(path, n.to_string());
    }
    if n == at {
        // SAFETY: kills this very process, as told.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
}

/// Whether this call of this kind is the one that is told to fail.
pub fn fails(kind: &str) -> bool {
    let mut rules = FAIL.lock();
    let Some(left) = rules.get_mut(kind) else { return false };
    *left = left.wrapping_sub(1);
    *left == 0
}

/// SplitMix64's finalizer.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

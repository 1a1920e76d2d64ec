//! Virtual time. Where `FLASHCOMM_SIM_FABRIC` names a fabric, each stream has a clock, which only
//! its work moves: by what the fabric says that it takes, and up to the time of an event that it
//! waits for.
//!
//! A stream has one thread at a time, so its clock is its thread's; one that begins later goes on from
//! where the last one was. Clocks begin at 0. Those of
//! different streams have to do with each other only by events, by the legacy stream, and where a
//! graph has branches; those of ranks have not at all. So a rank's times do not depend on when its
//! peers come, and the difference of two events of one stream is what lies between them.

use std::cell::Cell;

use flashcomm_sim_fabric::{Fabric, chosen};
use once_cell::sync::Lazy;

use crate::cu_result::Result;

/// The clock of a stream.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    now_ns: u64,
    /// The device of the stream.
    device: i32,
}

thread_local! {
    static CLOCK: Cell<Clock> = const { Cell::new(Clock { now_ns: 0, device: 0 }) };
}

/// `FLASHCOMM_SIM_SLOW=device:factor`: on that device everything takes so many times as long.
static SLOW: Lazy<Option<(i32, f64)>> = Lazy::new(|| {
    let text = std::env::var("FLASHCOMM_SIM_SLOW").ok().filter(|text| !text.is_empty())?;
    let parsed = text.split_once(':').and_then(|(device, factor)| {
        let factor: f64 = factor.trim().parse().ok()?;
        Some((device.trim().parse().ok()?, factor)).filter(|_| factor.is_finite() && factor > 0.0)
    });
    if parsed.is_none() {
        eprintln!("FLASHCOMM_SIM_SLOW: {text} is not device:factor, as 1:2.5 is");
        std::process::abort();
    }
    parsed
});

/// Whether there is virtual time.
pub fn is_virtual() -> bool {
    chosen().is_some()
}

/// This thread's clock.
pub fn current() -> Clock {
    CLOCK.get()
}

/// Gives this thread a clock.
pub fn set(clock: Clock) {
    CLOCK.set(clock);
}

/// The device of this thread's stream.
pub fn device() -> i32 {
    current().device
}

/// Moves this thread's clock by what the fabric says that its work takes, in nanoseconds. Without
/// a fabric nothing is asked.
///
/// # Errors
/// Those of who is asked.
pub fn take(ns: impl FnOnce(&Fabric) -> Result<u64>) -> Result<()> {
    chosen().map_or(Ok(()), |fabric| ns(fabric).map(advance))
}

/// Moves this thread's clock by so many nanoseconds, more on a slow device.
pub fn advance(ns: u64) {
    let Clock { now_ns, device } = current();
    let factor = SLOW.filter(|(slow, _)| *slow == device).map_or(1.0, |(_, factor)| factor);
    let ns = if factor == 1.0 { ns } else { (ns as f64 * factor).round() as u64 };
    set(Clock { now_ns: now_ns.saturating_add(ns), device });
}

/// Moves this thread's clock up to a time.
pub fn raise(to_ns: u64) {
    let clock = current();
    set(clock.raised(to_ns));
}

impl Clock {
    /// That of a new stream.
    pub fn of(device: i32) -> Self {
        Clock { now_ns: 0, device }
    }

    /// Its time in nanoseconds.
    pub fn now_ns(self) -> u64 {
        self.now_ns
    }

    /// The same, but not before a time.
    pub fn raised(self, to_ns: u64) -> Self {
        Clock { now_ns: self.now_ns.max(to_ns), ..self }
    }
}

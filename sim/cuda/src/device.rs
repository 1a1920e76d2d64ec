//! Devices, their primary contexts, and which is current on a thread.

use std::cell::RefCell;
use std::sync::atomic::{AtomicI32, AtomicI64, Ordering};

use flashcomm_sim_fabric::{Fabric, chosen};
use once_cell::sync::Lazy;

use crate::cu_result::{CuResult, Result};
use crate::green::Green;

/// Multiprocessors of a device.
pub const MULTIPROCESSORS: i32 = 16;

/// A device with its primary context, the only one that it has.
pub struct Device {
    /// Its number.
    pub ordinal: i32,
    /// Bytes allocated on it.
    pub used_bytes: AtomicI64,
    /// Blocks of the kernel that was launched last.
    pub last_blocks: AtomicI32,
    retained: AtomicI32,
    /// An error of the context, which every later call answers.
    error: AtomicI32,
}

static DEVICES: Lazy<Vec<Device>> = Lazy::new(|| {
    let new =
        |ordinal| Device { ordinal, used_bytes: 0.into(), last_blocks: 0.into(), retained: 0.into(), error: 0.into() };
    let default = chosen().map_or(8, |fabric| fabric.n_gpus() as i64);
    (0..setting("FLASHCOMM_SIM_DEVICES", default) as i32).map(new).collect()
});

fn setting(variable: &str, default: i64) -> i64 {
    std::env::var(variable).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(default)
}

/// A setting that is 0 or not. By default it is as the fabric has it, and on without one.
fn flag(variable: &str, of_fabric: impl FnOnce(&Fabric) -> bool) -> bool {
    setting(variable, chosen().is_none_or(of_fabric).into()) != 0
}

/// Multiprocessors of a device that this process may use: all, or what `FLASHCOMM_SIM_THREAD_PERCENTAGE` leaves it, as
/// `CUDA_MPS_ACTIVE_THREAD_PERCENTAGE` does.
pub fn affinity() -> i32 {
    static AFFINITY: Lazy<i32> = Lazy::new(|| {
        let percentage = setting("FLASHCOMM_SIM_THREAD_PERCENTAGE", 100).clamp(1, 100) as i32;
        (MULTIPROCESSORS * percentage / 100).max(1)
    });
    *AFFINITY
}

/// Bytes of memory of each device.
pub fn total_bytes() -> i64 {
    static TOTAL: Lazy<i64> = Lazy::new(|| setting("FLASHCOMM_SIM_MEMORY_MIB", 16384) << 20);
    *TOTAL
}

/// Whether devices can use each other's memory.
pub fn reach_each_other() -> bool {
    static REACH: Lazy<bool> = Lazy::new(|| flag("FLASHCOMM_SIM_PEER_ACCESS", |fabric| fabric.peer_access));
    *REACH
}

/// Whether it is NVLink over which they can.
pub fn have_nvlink() -> bool {
    static NVLINK: Lazy<bool> = Lazy::new(|| flag("FLASHCOMM_SIM_NVLINK", |fabric| fabric.nvlink));
    *NVLINK
}

/// What becomes of what a kernel writes to the memory of another rank's GPU: `FLASHCOMM_SIM_STORES`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stores {
    /// It arrives.
    Arrive,
    /// `lost`: it does not.
    Lost,
    /// `garbled`: payloads arrive as something else, signals as they are.
    Garbled,
}

/// What becomes of it.
pub fn stores() -> Stores {
    static STORES: Lazy<Stores> = Lazy::new(|| match std::env::var("FLASHCOMM_SIM_STORES").as_deref() {
        Ok("lost") => Stores::Lost,
        Ok("garbled") => Stores::Garbled,
        _ => Stores::Arrive,
    });
    *STORES
}

/// Number of devices.
pub fn count() -> i32 {
    DEVICES.len() as i32
}

/// Device `ordinal`.
pub fn of(ordinal: i32) -> Result<&'static Device> {
    DEVICES.get(usize::try_from(ordinal).unwrap_or(usize::MAX)).ok_or(CuResult::INVALID_DEVICE)
}

/// A context that may be current.
#[derive(Clone, Copy)]
pub enum Current {
    /// A device's primary one.
    Primary(&'static Device),
    /// That of a green context.
    Green(&'static Green),
}

impl Current {
    /// Its device.
    pub fn device(self) -> &'static Device {
        match self {
            Current::Primary(device) => device,
            Current::Green(green) => green.device,
        }
    }

    /// Its handle: no address of anything.
    pub fn handle(self) -> usize {
        match self {
            Current::Primary(device) => 0x5200_0000_0000_0000 + (device.ordinal as usize + 1) * 16,
            Current::Green(green) => 0x5300_0000_0000_0000 | green.handle,
        }
    }

    /// That of a handle; `None` of the null one.
    pub fn of_handle(handle: usize) -> Result<Option<Self>> {
        if handle == 0 {
            return Ok(None);
        }
        let mut primary = DEVICES.iter().map(Current::Primary);
        if let Some(found) = primary.find(|primary| primary.handle() == handle) {
            return Ok(Some(found));
        }
        Green::of_context(handle).map(|green| Some(Current::Green(green)))
    }
}

thread_local! {
    static STACK: RefCell<Vec<Option<Current>>> = const { RefCell::new(Vec::new()) };
}

/// The device of this thread's current context, if there is one and nothing has gone wrong in it.
pub fn current() -> Result<&'static Device> {
    current_context().map(Current::device)
}

/// This thread's current context, if there is one and nothing has gone wrong in it.
pub fn current_context() -> Result<Current> {
    let current = peek().ok_or(CuResult::INVALID_CONTEXT)?;
    current.device().check()?;
    Ok(current)
}

/// This thread's current context.
pub fn peek() -> Option<Current> {
    STACK.with_borrow(|stack| stack.last().copied().flatten())
}

/// Makes a context current.
pub fn push(context: Option<Current>) {
    STACK.with_borrow_mut(|stack| stack.push(context));
}

/// Takes the current context off this thread's stack.
pub fn pop() -> Result<Option<Current>> {
    STACK.with_borrow_mut(Vec::pop).ok_or(CuResult::INVALID_CONTEXT)
}

/// Replaces the current context.
pub fn set(context: Option<Current>) {
    STACK.with_borrow_mut(|stack| {
        stack.pop();
        stack.extend(context.map(Some));
    });
}

impl Device {
    /// What has gone wrong in the context, if anything.
    pub fn check(&self) -> Result<()> {
        match self.error.load(Ordering::Acquire) {
            0 => Ok(()),
            code => Err(CuResult(code)),
        }
    }

    /// Marks the context as lost.
    pub fn lose(&self, code: CuResult) {
        let _ = self.error.compare_exchange(0, code.0, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Retains the primary context.
    pub fn retain(&self) {
        self.retained.fetch_add(1, Ordering::Relaxed);
    }

    /// Releases it once; whoever released it as often as it was retained gets an error.
    pub fn release(&self) -> Result<()> {
        let released = self.retained.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n > 0).then_some(n - 1));
        released.map(drop).map_err(|_| CuResult::INVALID_CONTEXT)
    }
}

//! Memory that is lent: used again when it comes back, and freed when there is no communicator any more.
//!
//! To free memory, the driver waits for all work of the device. Some of that may wait for another
//! rank, which may be a thread of this process that waits for us. And device memory that another
//! process has mapped must not go while it has. So whatever is needed while ranks are at work, or
//! is shared with them, comes from here.

use std::mem::ManuallyDrop;
use std::ops::Deref;

use parking_lot::Mutex;

use super::context::Context;
use super::driver::CudaResult;
use super::memory::{DeviceMemory, PinnedMemory};

/// Memory that can be lent.
pub(crate) trait Lendable: Sized + 'static {
    /// New memory, in the current context.
    fn allocate(n_bytes: usize) -> CudaResult<Self>;
    /// Its size.
    fn n_bytes(&self) -> usize;
    /// What is not lent now, with the device that it belongs to.
    fn idle() -> &'static Mutex<Vec<(i32, Self)>>;
}

impl Lendable for DeviceMemory {
    fn allocate(n_bytes: usize) -> CudaResult<Self> {
        DeviceMemory::new(n_bytes)
    }
    fn n_bytes(&self) -> usize {
        DeviceMemory::n_bytes(self)
    }
    fn idle() -> &'static Mutex<Vec<(i32, Self)>> {
        static IDLE: Mutex<Vec<(i32, DeviceMemory)>> = Mutex::new(Vec::new());
        &IDLE
    }
}

impl Lendable for PinnedMemory {
    fn allocate(n_bytes: usize) -> CudaResult<Self> {
        PinnedMemory::new(n_bytes)
    }
    fn n_bytes(&self) -> usize {
        PinnedMemory::n_bytes(self)
    }
    fn idle() -> &'static Mutex<Vec<(i32, Self)>> {
        static IDLE: Mutex<Vec<(i32, PinnedMemory)>> = Mutex::new(Vec::new());
        &IDLE
    }
}

/// Frees all memory that is not lent. For the time when no other rank of this process is at work and no other process has
/// any of it.
pub(crate) fn free_idle() {
    free_all::<DeviceMemory>();
    free_all::<PinnedMemory>();
}

fn free_all<M: Lendable>() {
    for (device, memory) in std::mem::take(&mut *M::idle().lock()) {
        let Ok(context) = Context::retain(device) else { continue };
        let _entered = context.enter();
        drop(memory);
    }
}

/// Memory on loan until this is dropped. Its bytes are what the last borrower left.
#[derive(Debug)]
pub(crate) struct Lent<M: Lendable> {
    device: i32,
    memory: ManuallyDrop<M>,
    is_lost: bool,
}

impl<M: Lendable> Lent<M> {
    /// `n_bytes` for use by `device`, whose context is current.
    ///
    /// # Errors
    /// The driver's, where none is idle and no more can be had.
    pub(crate) fn new(device: i32, n_bytes: usize) -> CudaResult<Self> {
        let idle = {
            let mut idle = M::idle().lock();
            let fits = |(owner, memory): &(i32, M)| *owner == device && memory.n_bytes() == n_bytes;
            idle.iter().position(fits).map(|i| idle.swap_remove(i).1)
        };
        let memory = idle.map_or_else(|| M::allocate(n_bytes), Ok)?;
        Ok(Self { device, memory: ManuallyDrop::new(memory), is_lost: false })
    }

    /// Something may still write to it, and nothing tells when that stops: nobody may have it again.
    pub(crate) fn lose(&mut self) {
        self.is_lost = true;
    }
}

impl<M: Lendable> Deref for Lent<M> {
    type Target = M;
    fn deref(&self) -> &M {
        &self.memory
    }
}

impl<M: Lendable> Drop for Lent<M> {
    fn drop(&mut self) {
        if !self.is_lost {
            // SAFETY: not used any more.
            M::idle().lock().push((self.device, unsafe { ManuallyDrop::take(&mut self.memory) }));
        }
    }
}

//! Who this process is, for ranks that compare where they run.

use std::sync::atomic::{AtomicU64, Ordering};

use once_cell::sync::Lazy;

/// A number that no other attach has, of whatever process.
pub(super) fn number_of_attach() -> u64 {
    static ATTACHES: AtomicU64 = AtomicU64::new(0);
    process().wrapping_add(ATTACHES.fetch_add(1, Ordering::Relaxed))
}

/// A number that no other process of the host has.
pub(super) fn process() -> u64 {
    static PROCESS: Lazy<u64> = Lazy::new(|| {
        let mut bytes = [0u8; 8];
        // SAFETY: `bytes` has the room that it says. Where the system has no random numbers the process id must do.
        unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        u64::from_le_bytes(bytes) ^ u64::from(std::process::id())
    });
    *PROCESS
}

/// A hash of the boot id: the same for all processes of one running kernel, containers included. 0 where the system
/// does not tell.
pub(super) fn host() -> u64 {
    let id = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    // FNV-1a
    id.iter().fold(if id.is_empty() { 0 } else { 0xcbf2_9ce4_8422_2325 }, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

//! Who this process is, for ranks that compare where they run.

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};

use once_cell::sync::Lazy;

use crate::variables::Variables;

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

/// A hash of the boot id: the same for all processes of one running kernel, containers included. 0 where the system does
/// not tell.
pub(super) fn boot() -> u64 {
    hash(&boot_id())
}

/// The same, or of `NCCL_HOSTID`, where that is set.
pub(super) fn host() -> u64 {
    Variables::global().host_id.as_ref().map_or_else(boot, |id| hash(id.as_bytes()))
}

/// What NCCL takes for a host: a name and a boot id, so that a container with a name of its own is a host of its own.
pub(super) fn nccl_host() -> u64 {
    let mut name = [0u8; 256];
    // SAFETY: `name` has the room that it says; the last byte stays 0.
    unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) };
    match &Variables::global().host_id {
        Some(id) => hash(id.as_bytes()),
        None => hash(&[&name[..], &boot_id()].concat()),
    }
}

/// Which file system `/dev/shm` is: ranks that have the same one can share memory. 0 where there is none, or where
/// `NCCL_SHM_DISABLE` says that it is not to be used.
pub(super) fn shared_memory() -> u64 {
    match Variables::global().shm_disabled {
        true => 0,
        false => std::fs::metadata("/dev/shm").map_or(0, |folder| folder.dev()),
    }
}

fn boot_id() -> Vec<u8> {
    std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

/// FNV-1a; of nothing 0.
pub(super) fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(if bytes.is_empty() { 0 } else { 0xcbf2_9ce4_8422_2325 }, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

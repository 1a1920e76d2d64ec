//! flashcomm's own calls, for C and C++ engines. `include/flashcomm.h` is generated from this file.

#![allow(non_camel_case_types, non_snake_case, reason = "C's names")]

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::route::Reason;
use crate::stats::SIZE_CLASSES;
use crate::stats::report::Counts;
use crate::{comm, error};

/// Result of a flashcomm call, with the values of ncclResult_t.
pub type flashcommResult_t = c_int;

/// The call did what it says.
pub const FLASHCOMM_SUCCESS: flashcommResult_t = 0;
/// A bug in flashcomm.
pub const FLASHCOMM_INTERNAL_ERROR: flashcommResult_t = 3;
/// A pointer was null, or a structure's size is not one that this version knows.
pub const FLASHCOMM_INVALID_ARGUMENT: flashcommResult_t = 4;

/// Size classes of flashcommStats_t: class 0 has the all-reduces below 1 KiB, class i those from 512 << i bytes on, and
/// the last everything from 4 GiB on.
pub const FLASHCOMM_SIZE_CLASSES: usize = 24;
/// Places for reasons in flashcommStats_t; flashcommReasonName tells which are used.
pub const FLASHCOMM_REASONS: usize = 16;

/// The all-reduces of one size class.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct flashcommSizeStats_t {
    /// Compressed.
    pub compressed: u64,
    /// Bytes of those, as the application sees them.
    pub bytesIn: u64,
    /// Bytes that this process put on the wire for them.
    pub bytesOnWire: u64,
    /// Gone to the real NCCL as they were.
    pub forwarded: u64,
    /// Bytes of those.
    pub bytesForwarded: u64,
}

/// What the shim has done so far. Set `size` to sizeof(flashcommStats_t) before the call; later versions add members at
/// the end only, and a library takes the sizes of all versions up to its own.
///
/// A call that was captured into a graph counts once, when it was captured; replays are not seen.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct flashcommStats_t {
    /// sizeof(flashcommStats_t), set by the caller.
    pub size: usize,
    /// All-reduces that were compressed.
    pub allReducesCompressed: u64,
    /// All-reduces that went to the real NCCL as they were.
    pub allReducesForwarded: u64,
    /// Other collectives, sends and receives, all of which go to the real NCCL.
    pub othersForwarded: u64,
    /// Bytes of the compressed all-reduces, as the application sees them.
    pub bytesIn: u64,
    /// Bytes that this process put on the wire for them.
    pub bytesOnWire: u64,
    /// Bytes of the all-reduces that went to the real NCCL.
    pub bytesForwarded: u64,
    /// The all-reduces that went to the real NCCL, by reason: see flashcommReasonName.
    pub forwardedBecause: [u64; FLASHCOMM_REASONS],
    /// The all-reduces by size.
    pub sizes: [flashcommSizeStats_t; FLASHCOMM_SIZE_CLASSES],
}

/// What the first version of the structure had.
const STATS_1_BYTES: usize = 6 * 8;

/// Writes the version of flashcomm, major * 10000 + minor * 100 + patch, to `*version`.
///
/// # Safety
/// `version` is null or points to an int.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashcommGetVersion(version: *mut c_int) -> flashcommResult_t {
    // SAFETY: null or valid, says the caller.
    let Some(version) = (unsafe { version.as_mut() }) else {
        return FLASHCOMM_INVALID_ARGUMENT;
    };
    *version = VERSION;
    FLASHCOMM_SUCCESS
}

/// Writes the counts of this process to `*stats`: of all communicators, those that have ended included. May be called at
/// any time, from any thread.
///
/// # Safety
/// `stats` is null or points to a flashcommStats_t whose `size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashcommGetStats(stats: *mut flashcommStats_t) -> flashcommResult_t {
    // SAFETY: as the caller vouches.
    unsafe { fill(stats, Counts::of_process) }
}

/// As flashcommGetStats, for `comm`, an ncclComm_t, alone: since its first call, zeros if there was none.
///
/// # Safety
/// `comm` is a communicator of this process; `stats` is null or points to a flashcommStats_t whose `size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashcommGetCommStats(comm: *const c_void, stats: *mut flashcommStats_t) -> flashcommResult_t {
    if comm.is_null() {
        return FLASHCOMM_INVALID_ARGUMENT;
    }
    // SAFETY: as the caller vouches.
    unsafe { fill(stats, || Counts::of(comm.cast_mut().cast())) }
}

/// The name of a reason, an index of forwardedBecause, as in the file of FLASHCOMM_STATS_FILE; null for one that there is not.
#[unsafe(no_mangle)]
pub extern "C" fn flashcommReasonName(reason: c_int) -> *const c_char {
    let reason = usize::try_from(reason).ok().and_then(|reason| Reason::ALL.get(reason));
    reason.map_or(std::ptr::null(), |reason| reason.c_name().as_ptr())
}

/// # Safety
/// `stats` is null or points to as many bytes as its first member, the size, says.
unsafe fn fill(stats: *mut flashcommStats_t, counts: impl FnOnce() -> Box<Counts>) -> flashcommResult_t {
    if stats.is_null() {
        return FLASHCOMM_INVALID_ARGUMENT;
    }
    // SAFETY: the member is there whatever the version.
    let size = unsafe { (&raw const (*stats).size).read() };
    if size != STATS_1_BYTES && size != size_of::<flashcommStats_t>() {
        return FLASHCOMM_INVALID_ARGUMENT;
    }
    let Ok(filled) = catch_unwind(AssertUnwindSafe(|| in_c(&counts(), size))) else {
        return FLASHCOMM_INTERNAL_ERROR;
    };
    // SAFETY: there are `size` bytes, says the caller, and here no fewer.
    unsafe { std::ptr::copy_nonoverlapping((&raw const filled).cast::<u8>(), stats.cast::<u8>(), size) };
    FLASHCOMM_SUCCESS
}

fn in_c(counts: &Counts, size: usize) -> flashcommStats_t {
    let mut forwarded_because = [0; FLASHCOMM_REASONS];
    forwarded_because.iter_mut().zip(counts.because()).for_each(|(to, [calls, _])| *to = calls);
    let class = |class: usize| {
        let [compressed, bytes_in, bytes_wire] = counts.compressed[class];
        let sum = |i: usize| counts.forwarded[class].iter().map(|counters| counters[i]).sum();
        flashcommSizeStats_t {
            compressed,
            bytesIn: bytes_in,
            bytesOnWire: bytes_wire,
            forwarded: sum(0),
            bytesForwarded: sum(1),
        }
    };
    flashcommStats_t {
        size,
        allReducesCompressed: counts.n_compressed(),
        allReducesForwarded: counts.forwarded(),
        othersForwarded: counts.others(),
        bytesIn: counts.bytes_in(),
        bytesOnWire: counts.bytes_wire(),
        bytesForwarded: counts.bytes_forwarded(),
        forwardedBecause: forwarded_because,
        sizes: std::array::from_fn(class),
    }
}

const _: () = assert!(FLASHCOMM_SIZE_CLASSES == SIZE_CLASSES && Reason::ALL.len() <= FLASHCOMM_REASONS);

/// What went wrong last, in words: for `comm`, an ncclComm_t, if it is not null and something did, else in this process.
/// An empty string where nothing has gone wrong. Names the rank that was waited for where a wait was given up.
///
/// The string is good until the calling thread calls this again.
///
/// # Safety
/// `comm` is null or a communicator that has not been destroyed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashcommGetLastError(comm: *const c_void) -> *const c_char {
    thread_local! {
        static TEXT: RefCell<CString> = RefCell::default();
    }
    let text = || {
        let error = if comm.is_null() { None } else { comm::failure(comm.cast_mut().cast()) };
        let text = error.map_or_else(error::last, |error| error.to_string());
        let text = CString::new(text).unwrap_or_default();
        TEXT.with_borrow_mut(|place| {
            *place = text;
            place.as_ptr()
        })
    };
    catch_unwind(AssertUnwindSafe(text)).unwrap_or(c"an internal error of flashcomm".as_ptr())
}

const VERSION: c_int = number(env!("CARGO_PKG_VERSION_MAJOR")) * 10_000
    + number(env!("CARGO_PKG_VERSION_MINOR")) * 100
    + number(env!("CARGO_PKG_VERSION_PATCH"));

/// The number that `text` spells.
const fn number(text: &str) -> c_int {
    let (bytes, mut i, mut value) = (text.as_bytes(), 0, 0);
    while i < bytes.len() {
        value = value * 10 + (bytes[i] - b'0') as c_int;
        i += 1;
    }
    value
}

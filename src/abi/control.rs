//! flashcomm's own calls, for C and C++ engines. `include/flashcomm.h` is generated from this file.

#![allow(non_camel_case_types, non_snake_case, reason = "C's names")]

use std::cell::RefCell;
use std::ffi::{CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::stats::Stats;
use crate::{comm, error};

/// Result of a flashcomm call, with the values of ncclResult_t.
pub type flashcommResult_t = c_int;

/// The call did what it says.
pub const FLASHCOMM_SUCCESS: flashcommResult_t = 0;
/// A bug in flashcomm.
pub const FLASHCOMM_INTERNAL_ERROR: flashcommResult_t = 3;
/// A pointer was null, or a structure's size is not one that this version knows.
pub const FLASHCOMM_INVALID_ARGUMENT: flashcommResult_t = 4;

/// What the shim has done in this process so far. Set `size` to sizeof(flashcommStats_t) before the call; later
/// versions add members at the end only.
#[repr(C)]
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
}

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

/// Writes the counts of this process to `*stats`. May be called at any time, from any thread.
///
/// # Safety
/// `stats` is null or points to a flashcommStats_t whose `size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashcommGetStats(stats: *mut flashcommStats_t) -> flashcommResult_t {
    // SAFETY: null or valid, says the caller.
    let Some(stats) = (unsafe { stats.as_mut() }) else {
        return FLASHCOMM_INVALID_ARGUMENT;
    };
    if stats.size != size_of::<flashcommStats_t>() {
        return FLASHCOMM_INVALID_ARGUMENT;
    }
    let Ok(counted) = catch_unwind(Stats::collect) else {
        return FLASHCOMM_INTERNAL_ERROR;
    };
    let all_reduces = counted.forwarded["all_reduce"];
    stats.allReducesCompressed = counted.all_reduces_compressed;
    stats.allReducesForwarded = all_reduces;
    stats.othersForwarded = counted.total_forwarded() - all_reduces;
    stats.bytesIn = counted.bytes_in;
    stats.bytesOnWire = counted.bytes_wire;
    FLASHCOMM_SUCCESS
}

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

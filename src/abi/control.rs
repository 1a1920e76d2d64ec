//! flashcomm's own calls, for C and C++ engines. `include/flashcomm.h` is generated from this file.
//!
//! To change what a communicator does is a collective of all its ranks (invariant I3): they compare what they ask for, all
//! get ready, and all change or none does. A local switch would do as long as every rank throws it at the same place;
//! where one does not, or lacks the memory, the job would hang or sum what was coded otherwise.

#![allow(non_camel_case_types, non_snake_case, reason = "C's names")]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::offset_of;

use flashcomm_wire::{Code, Width};

use super::boundary::{guarded, guarded_or};
use super::group;
use crate::comm::attach::Change;
use crate::config::Config;
use crate::nccl::CommPtr;
use crate::route::Reason;
use crate::stats::{Counts, SIZE_CLASSES};
use crate::verdict::Verdict;
use crate::{comm, error};

/// Result of a flashcomm call, with the values of ncclResult_t.
pub type flashcommResult_t = c_int;

/// The call did what it says.
pub const FLASHCOMM_SUCCESS: flashcommResult_t = 0;
/// A bug in flashcomm.
pub const FLASHCOMM_INTERNAL_ERROR: flashcommResult_t = 3;
/// A pointer was null, a number is out of its range, or a structure's size is not one that this version knows.
pub const FLASHCOMM_INVALID_ARGUMENT: flashcommResult_t = 4;
/// The communicator cannot do what is asked; flashcommGetLastError says why. The same on all ranks.
#[allow(dead_code, reason = "for the header; NcclResult has the value here")]
pub const FLASHCOMM_INVALID_USAGE: flashcommResult_t = 5;
/// Another rank did not answer.
#[allow(dead_code, reason = "for the header; NcclResult has the value here")]
pub const FLASHCOMM_REMOTE_ERROR: flashcommResult_t = 6;

/// State of a communicator: its ranks have not met yet. They do when it is created through the shim; one that does not block
/// meets in the background.
pub const FLASHCOMM_UNATTACHED: c_int = 0;
/// State of a communicator: its ranks compress, unless the engine has switched it off.
pub const FLASHCOMM_ON: c_int = 1;
/// State of a communicator: its ranks forward everything, for good: one rank, settings that differ, a rank that could not.
pub const FLASHCOMM_OFF: c_int = 2;

/// What a communicator does. Set `size` to sizeof(flashcommCommInfo_t) before the call; as with flashcommStats_t, later
/// versions add members at the end.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct flashcommCommInfo_t {
    /// sizeof(flashcommCommInfo_t), set by the caller.
    pub size: usize,
    /// FLASHCOMM_UNATTACHED, FLASHCOMM_ON or FLASHCOMM_OFF.
    pub state: c_int,
    /// 0 while the engine has it switched off.
    pub enabled: c_int,
    /// Bits per element in hop 1, to the rank that sums; before the ranks have met, those of FLASHCOMM_BITS.
    pub reduceBits: c_int,
    /// Bits per element in hop 2, from the rank that sums.
    pub gatherBits: c_int,
    /// This rank; -1 where the state is not FLASHCOMM_ON.
    pub rank: c_int,
    /// Ranks of the communicator; 0 where the state is not FLASHCOMM_ON.
    pub nRanks: c_int,
    /// All-reduces of this many bytes and more are compressed; UINT64_MAX: none is.
    pub minBytes: u64,
    /// What carries the payloads: "peer", "host", "nccl"; empty where the state is not FLASHCOMM_ON.
    pub exchange: *const c_char,
    /// What the bits say: "plain" or "blocks"; before the ranks have met, that of FLASHCOMM_CODE.
    pub code: *const c_char,
    /// Other all-reduces of this many bytes and less are summed exactly by the shim, those of float, too; 0: none is.
    pub exactMaxBytes: u64,
}

/// What the first version of the structure had.
const EARLIER_COMM_INFO_BYTES: usize = offset_of!(flashcommCommInfo_t, exactMaxBytes);

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
    /// All-reduces that the shim summed exactly.
    pub allReducesExact: u64,
    /// Bytes of those.
    pub bytesExact: u64,
    /// The same all-reduces by size class.
    pub exactBySize: [u64; FLASHCOMM_SIZE_CLASSES],
}

/// What earlier versions of the structure had.
const EARLIER_STATS_BYTES: [usize; 2] =
    [offset_of!(flashcommStats_t, bytesForwarded), offset_of!(flashcommStats_t, allReducesExact)];

/// Writes the version of flashcomm, major * 10000 + minor * 100 + patch, to `*version`.
///
/// # Safety
/// `version` is null or points to an int.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashcommGetVersion(version: *mut c_int) -> flashcommResult_t {
    answer("flashcommGetVersion", || {
        // SAFETY: null or valid, says the caller.
        let Some(version) = (unsafe { version.as_mut() }) else {
            return FLASHCOMM_INVALID_ARGUMENT;
        };
        *version = VERSION;
        FLASHCOMM_SUCCESS
    })
}

/// Writes the counts of this process to `*stats`: of all communicators, those that have ended included. May be called at
/// any time, from any thread.
///
/// # Safety
/// `stats` is null or points to a flashcommStats_t whose `size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashcommGetStats(stats: *mut flashcommStats_t) -> flashcommResult_t {
    // SAFETY: as the caller vouches.
    answer("flashcommGetStats", || unsafe { fill(stats, Counts::of_process) })
}

/// As flashcommGetStats, for `comm`, an ncclComm_t, alone: since its first call, zeros if there was none.
///
/// # Safety
/// `comm` is a communicator of this process; `stats` is null or points to a flashcommStats_t whose `size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashcommGetCommStats(comm: *const c_void, stats: *mut flashcommStats_t) -> flashcommResult_t {
    answer("flashcommGetCommStats", || match comm.is_null() {
        true => FLASHCOMM_INVALID_ARGUMENT,
        // SAFETY: as the caller vouches.
        false => unsafe { fill(stats, || Counts::of(comm.cast_mut().cast())) },
    })
}

/// The name of a reason, an index of forwardedBecause, as in the file of FLASHCOMM_STATS_FILE; null for one that there is not.
#[unsafe(no_mangle)]
pub extern "C" fn flashcommReasonName(reason: c_int) -> *const c_char {
    guarded_or("flashcommReasonName", std::ptr::null(), || {
        let reason = usize::try_from(reason).ok().and_then(|reason| Reason::ALL.get(reason));
        reason.map_or(std::ptr::null(), |reason| reason.c_name().as_ptr())
    })
}

/// # Safety
/// `stats` is null or points to as many bytes as its first member, the size, says.
unsafe fn fill(stats: *mut flashcommStats_t, counts: impl FnOnce() -> Box<Counts>) -> flashcommResult_t {
    if stats.is_null() {
        return FLASHCOMM_INVALID_ARGUMENT;
    }
    // SAFETY: the member is there whatever the version.
    let size = unsafe { (&raw const (*stats).size).read() };
    if !EARLIER_STATS_BYTES.contains(&size) && size != size_of::<flashcommStats_t>() {
        return FLASHCOMM_INVALID_ARGUMENT;
    }
    let filled = in_c(&counts(), size);
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
        allReducesExact: counts.n_exact(),
        bytesExact: counts.bytes_exact(),
        exactBySize: counts.exact.map(|[calls, _]| calls),
    }
}

const _: () = assert!(FLASHCOMM_SIZE_CLASSES == SIZE_CLASSES && Reason::ALL.len() <= FLASHCOMM_REASONS);

/// Writes what `comm`, an ncclComm_t, does to `*info`. Asks no other rank; may be called at any time.
///
/// # Safety
/// `comm` is a communicator of this process; `info` is null or points to a flashcommCommInfo_t whose `size` is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashcommGetCommInfo(
    comm: *const c_void,
    info: *mut flashcommCommInfo_t,
) -> flashcommResult_t {
    answer("flashcommGetCommInfo", || {
        if comm.is_null() || info.is_null() {
            return FLASHCOMM_INVALID_ARGUMENT;
        }
        // SAFETY: the member is there whatever the version.
        let size = unsafe { (&raw const (*info).size).read() };
        if size != EARLIER_COMM_INFO_BYTES && size != size_of::<flashcommCommInfo_t>() {
            return FLASHCOMM_INVALID_ARGUMENT;
        }
        let known = flashcommCommInfo_t { size, ..info_of(comm.cast_mut().cast()) };
        // SAFETY: there are `size` bytes, says the caller, and here no fewer.
        unsafe { std::ptr::copy_nonoverlapping((&raw const known).cast::<u8>(), info.cast::<u8>(), size) };
        FLASHCOMM_SUCCESS
    })
}

/// Sets the bits per element of `comm`, an ncclComm_t: 2 to 8, or 16 for elements as they are, in hop 1, to the rank that
/// sums, and in hop 2, from it, where they are no fewer.
///
/// A collective: every rank of the communicator calls alike, at the same place in the order of its calls on that
/// communicator. It returns when all ranks have changed, or none has, within FLASHCOMM_ATTACH_TIMEOUT_S; a rank that does not
/// call makes the others wait that long, and the communicator is of no more use to them.
///
/// - All-reduces issued before keep the old width, those issued after have the new one. The host waits until those before have
///   run on the GPU, loads the kernels of the new width and makes receive areas for it; nothing of that is left for the next
///   all-reduce, which may be in a graph capture.
/// - A graph that was captured before keeps the width that it was captured with, whenever it is replayed. Therefore each
///   pair of widths keeps its memory (FLASHCOMM_BUFFER_MIB at most) until the communicator ends. There may be 8 in its
///   life; to go back to one costs no memory.
/// - Between ncclGroupStart and ncclGroupEnd it takes effect at the outermost end, for which a thread that drives several
///   ranks calls it there; what it answers is answered by ncclGroupEnd. Do not mix it with all-reduces of the communicator in
///   one group.
/// - Not while a stream that has all-reduces of the communicator is captured, nor while another thread uses it.
/// - A communicator whose ranks have not met (FLASHCOMM_UNATTACHED) meets here, with these bits.
///
/// FLASHCOMM_INVALID_USAGE on all ranks, and nothing changes (but one that was FLASHCOMM_UNATTACHED is FLASHCOMM_OFF): where ranks ask for different bits, the communicator is
/// FLASHCOMM_OFF, FLASHCOMM_ENABLE is 0, or a rank has no memory for the new width. flashcommGetLastError says which.
///
/// # Safety
/// `comm` is a communicator of this process that has not been destroyed or aborted.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashcommSetCommBits(
    comm: *const c_void,
    reduceBits: c_int,
    gatherBits: c_int,
) -> flashcommResult_t {
    answer("flashcommSetCommBits", || {
        let width = |bits: c_int| u8::try_from(bits).ok().and_then(Width::new);
        match (width(reduceBits), width(gatherBits)) {
            (Some(reduce), Some(gather))
                if reduce <= gather && reduce.is_uncompressed() == gather.is_uncompressed() =>
            {
                change(comm, Some((reduce, gather)), None)
            }
            _ => FLASHCOMM_INVALID_ARGUMENT,
        }
    })
}

/// Switches `comm`, an ncclComm_t, off (0: all-reduces go to the real NCCL, and are exact) or on again (1).
///
/// A collective, for which everything holds that flashcommSetCommBits says. A graph that was captured while it was on
/// stays compressed, and one that was captured while it was off stays plain.
///
/// # Safety
/// As for flashcommSetCommBits.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashcommSetCommEnabled(comm: *const c_void, enabled: c_int) -> flashcommResult_t {
    answer("flashcommSetCommEnabled", || match enabled {
        0 | 1 => change(comm, None, Some(enabled == 0)),
        _ => FLASHCOMM_INVALID_ARGUMENT,
    })
}

/// Runs the body of a call of our own.
fn answer(function: &'static str, body: impl FnOnce() -> flashcommResult_t) -> flashcommResult_t {
    guarded_or(function, FLASHCOMM_INTERNAL_ERROR, body)
}

fn change(comm: *const c_void, widths: Option<(Width, Width)>, switched_off: Option<bool>) -> flashcommResult_t {
    if comm.is_null() {
        return FLASHCOMM_INVALID_ARGUMENT;
    }
    group::change(Change { comm: comm::of(comm.cast_mut().cast()), widths, switched_off }).0
}

fn info_of(handle: CommPtr) -> flashcommCommInfo_t {
    let comm = comm::known(handle);
    let verdict = comm.as_ref().map_or(Verdict::Open, |comm| comm.verdict());
    let attached = comm.as_ref().and_then(|comm| comm.attached());
    let legs = attached.map_or(Config::global().legs, |attached| attached.legs);
    flashcommCommInfo_t {
        size: size_of::<flashcommCommInfo_t>(),
        state: match verdict {
            _ if !Config::global().enable => FLASHCOMM_OFF,
            Verdict::Open => FLASHCOMM_UNATTACHED,
            Verdict::On(_) | Verdict::SwitchedOff => FLASHCOMM_ON,
            Verdict::Off => FLASHCOMM_OFF,
        },
        enabled: c_int::from(verdict != Verdict::SwitchedOff),
        reduceBits: legs.reduce.width.bits().into(),
        gatherBits: legs.gather.width.bits().into(),
        rank: attached.map_or(-1, |attached| attached.rank as c_int),
        nRanks: attached.map_or(0, |attached| attached.world as c_int),
        minBytes: attached.map_or(u64::MAX, |attached| attached.ways.coded.compress_min()),
        exchange: attached.map_or(c"", |attached| attached.exchange.kind().c_name()).as_ptr(),
        code: code_name(legs.code()).as_ptr(),
        exactMaxBytes: attached.map_or(0, |attached| attached.ways.plain.exact_max()),
    }
}

/// [`Code::name`] for C.
const fn code_name(code: Code) -> &'static CStr {
    match code {
        Code::Plain => c"plain",
        Code::Blocks => c"blocks",
    }
}

/// What went wrong last, in words: for `comm`, an ncclComm_t, if it is not null and something did, else in this process.
/// An empty string where nothing has gone wrong. Names the rank that was waited for where a wait was given up.
///
/// The string stays as it is as long as the process.
///
/// # Safety
/// `comm` is null or a communicator that has not been destroyed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flashcommGetLastError(comm: *const c_void) -> *const c_char {
    let text = || {
        let error = if comm.is_null() { None } else { comm::failure(comm.cast_mut().cast()) };
        error.map_or_else(error::last, |error| error::in_c(error.to_string())).as_ptr()
    };
    guarded("flashcommGetLastError", text)
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

//! How a communicator's sums go, by their size, for `flashcomm doctor` and for engines that route by size.

use std::ffi::{c_int, c_void};

use super::boundary::guarded_or;
use super::control::{FLASHCOMM_INTERNAL_ERROR, FLASHCOMM_INVALID_ARGUMENT, FLASHCOMM_SUCCESS, flashcommResult_t};
use crate::comm;
use crate::config::Config;
use crate::nccl::{DataType, RedOp};
use crate::route::{self, Request, Route};
use crate::verdict::{Carrier, Verdict, Way};

/// Ways of a sum.
pub const FLASHCOMM_WAYS: usize = 6;

/// To the real NCCL.
pub const FLASHCOMM_WAY_FORWARDED: c_int = 0;
/// Uncompressed; every rank's whole input to every other.
pub const FLASHCOMM_WAY_EXACT_ONE_HOP: c_int = 1;
/// Uncompressed; to the owner of a chunk, and from there to all.
pub const FLASHCOMM_WAY_EXACT_TWO_HOPS: c_int = 2;
/// At the communicator's bits.
pub const FLASHCOMM_WAY_COMPRESSED: c_int = 3;
/// The same, read from the ranks that have it, not written to those that want it. The same bits.
pub const FLASHCOMM_WAY_PULLED: c_int = 4;
/// The same through memory of the host, carried by copy engines. The same bits.
pub const FLASHCOMM_WAY_COPIED: c_int = 5;

/// Their numbers.
const fn number(way: Way) -> c_int {
    match way {
        Way::Forward => FLASHCOMM_WAY_FORWARDED,
        Way::ExactOneHop => FLASHCOMM_WAY_EXACT_ONE_HOP,
        Way::ExactTwoHops => FLASHCOMM_WAY_EXACT_TWO_HOPS,
        Way::Compressed => FLASHCOMM_WAY_COMPRESSED,
        Way::Pulled => FLASHCOMM_WAY_PULLED,
        Way::Copied => FLASHCOMM_WAY_COPIED,
    }
}

/// How a sum goes. Set `size` to sizeof(flashcommWay_t) before the call.
#[repr(C)]
#[derive(Clone, Copy)]
#[allow(non_camel_case_types, non_snake_case, reason = "a C interface")]
pub struct flashcommWay_t {
    /// sizeof(flashcommWay_t), set by the caller.
    pub size: usize,
    /// A FLASHCOMM_WAY_ number.
    pub way: c_int,
    /// What it takes on this machine each way, in nanoseconds, as the ranks have measured it (FLASHCOMM_TUNE): between
    /// the sizes that were measured on a straight line. 0: not known.
    pub nanoseconds: [u64; FLASHCOMM_WAYS],
}

/// Writes to `*way` how ncclAllReduce of `comm`, an ncclComm_t, takes a sum of `nBytes` bytes of `datatype`, an
/// ncclDataType_t: the same on all ranks. Asks no other rank; may be called at any time.
///
/// # Safety
/// `comm` is a communicator of this process; `way` is null or points to a flashcommWay_t whose `size` is set.
#[unsafe(no_mangle)]
#[allow(non_snake_case, reason = "a C interface")]
pub unsafe extern "C" fn flashcommGetCommWay(
    comm: *const c_void,
    datatype: c_int,
    nBytes: u64,
    way: *mut flashcommWay_t,
) -> flashcommResult_t {
    guarded_or("flashcommGetCommWay", FLASHCOMM_INTERNAL_ERROR, || {
        if comm.is_null() || way.is_null() {
            return FLASHCOMM_INVALID_ARGUMENT;
        }
        // SAFETY: the member is there whatever the version.
        let size = unsafe { (&raw const (*way).size).read() };
        if size != size_of::<flashcommWay_t>() {
            return FLASHCOMM_INVALID_ARGUMENT;
        }
        let comm = comm::known(comm.cast_mut().cast());
        let datatype = DataType(datatype);
        let count = usize::try_from(nBytes / datatype.n_bytes().max(1)).unwrap_or(usize::MAX);
        let request = Request { count, datatype, op: RedOp::SUM };
        let verdict = comm.as_ref().map_or(Verdict::Open, |comm| comm.verdict());
        let config = Config::global();
        let route = route::candidate(&request, config)
            .map_or_else(Route::Forward, |element| route::route(element, &request, verdict, config));
        let taken = match route {
            Route::Forward(_) => Way::Forward,
            Route::Exact { two_hops: false } => Way::ExactOneHop,
            Route::Exact { two_hops: true } => Way::ExactTwoHops,
            Route::Compress(Carrier::Writes) => Way::Compressed,
            Route::Compress(Carrier::Reads) => Way::Pulled,
            Route::Compress(Carrier::Copies) => Way::Copied,
        };
        let figures = comm.as_ref().and_then(|comm| comm.attached()?.figures.as_ref());
        let mut nanoseconds = [0; FLASHCOMM_WAYS];
        for way in Way::ALL {
            nanoseconds[number(way) as usize] =
                figures.and_then(|figures| figures.nanoseconds(way, nBytes)).unwrap_or(0);
        }
        // SAFETY: there is room for it, says the caller by its size.
        unsafe { way.write(flashcommWay_t { size, way: number(taken), nanoseconds }) };
        FLASHCOMM_SUCCESS
    })
}

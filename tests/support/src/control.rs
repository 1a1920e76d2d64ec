//! What the shim tells of itself: its statistics, the state of a communicator, its last error.

use std::ffi::{CStr, c_char, c_int, c_void};

use crate::api::{Ptr, api, open, symbol};
use crate::libraries::built;
use crate::ok;

/// `flashcommCommInfo_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Info {
    pub size: usize,
    pub state: c_int,
    pub enabled: c_int,
    pub reduce_bits: c_int,
    pub gather_bits: c_int,
    pub rank: c_int,
    pub n_ranks: c_int,
    pub min_bytes: u64,
    exchange: *const c_char,
    code: *const c_char,
    pub exact_max_bytes: u64,
}

impl Info {
    /// Of a communicator.
    pub fn of(comm: Ptr) -> Self {
        // SAFETY: numbers and a pointer, for which zeros will do.
        let mut info: Info = unsafe { std::mem::zeroed() };
        info.size = size_of::<Info>();
        // SAFETY: `size` is set.
        assert_eq!(unsafe { (api().flashcommGetCommInfo)(comm, &mut info) }, 0);
        info
    }

    pub fn code(&self) -> &str {
        // SAFETY: as below.
        unsafe { CStr::from_ptr(self.code) }.to_str().unwrap()
    }

    pub fn exchange(&self) -> &str {
        // SAFETY: a string of the shim's, which stays.
        unsafe { CStr::from_ptr(self.exchange) }.to_str().unwrap()
    }
}

/// `flashcommStats_t`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stats {
    pub size: usize,
    pub compressed: u64,
    pub forwarded: u64,
    pub others: u64,
    pub bytes_in: u64,
    pub bytes_wire: u64,
    pub bytes_forwarded: u64,
    pub because: [u64; 16],
    /// Compressed, bytes in, bytes on the wire, forwarded, bytes forwarded.
    pub sizes: [[u64; 5]; 24],
    pub exact: u64,
    pub bytes_exact: u64,
    pub exact_by_size: [u64; 24],
}

impl Stats {
    /// Nothing counted.
    pub const NONE: Stats = Stats {
        size: size_of::<Stats>(),
        compressed: 0,
        forwarded: 0,
        others: 0,
        bytes_in: 0,
        bytes_wire: 0,
        bytes_forwarded: 0,
        because: [0; 16],
        sizes: [[0; 5]; 24],
        exact: 0,
        bytes_exact: 0,
        exact_by_size: [0; 24],
    };

    /// Of a communicator.
    pub fn of(comm: Ptr) -> Self {
        let mut stats = Stats::NONE;
        // SAFETY: `size` is set.
        assert_eq!(unsafe { (api().flashcommGetCommStats)(comm, &mut stats) }, 0);
        stats
    }

    /// All-reduces forwarded for a reason, by name.
    pub fn because(&self, name: &str) -> u64 {
        type ReasonName = unsafe extern "C" fn(c_int) -> *const c_char;
        let address = symbol(open(&built("libflashcomm.so")), "flashcommReasonName");
        // SAFETY: the function of this name has this signature; what it answers, if not null, is NUL-terminated.
        let name_of = |reason| unsafe {
            let text = std::mem::transmute::<*mut c_void, ReasonName>(address)(reason);
            (!text.is_null()).then(|| CStr::from_ptr(text).to_str().unwrap())
        };
        assert_eq!((name_of(-1), name_of(16)), (None, None));
        let reason = (0..16).find(|reason| name_of(*reason) == Some(name));
        self.because[reason.unwrap_or_else(|| panic!("no reason {name}")) as usize]
    }
}

/// `flashcommGetLastError` of a communicator, or of the process for 0.
pub fn last_error(comm: Ptr) -> String {
    text_of("flashcommGetLastError", comm)
}

/// `ncclGetLastError`, as frameworks ask.
pub fn nccl_last_error(comm: Ptr) -> String {
    text_of("ncclGetLastError", comm)
}

/// Its twin, which the simulated NCCL does not have.
pub fn pnccl_last_error(comm: Ptr) -> String {
    text_of("pncclGetLastError", comm)
}

fn text_of(function: &str, comm: Ptr) -> String {
    let address = symbol(open(&built("libflashcomm.so")), function);
    // SAFETY: a function of this name has this signature.
    let function = unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn(Ptr) -> *const c_char>(address) };
    // SAFETY: a communicator or 0; what it answers is NUL-terminated and stays until there is another error.
    unsafe { CStr::from_ptr(function(comm)) }.to_str().unwrap().to_string()
}

/// Exact all-reduces of this process so far.
pub fn n_exact() -> u64 {
    let mut stats = Stats::NONE;
    ok!(flashcommGetStats((&raw mut stats).cast()));
    stats.exact
}

/// Compressed all-reduces of this process so far.
pub fn n_compressed() -> u64 {
    let mut stats = [48, 0, 0, 0, 0, 0];
    ok!(flashcommGetStats(&mut stats));
    stats[1]
}

/// `flashcommWay_t`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Way {
    size: usize,
    pub way: c_int,
    /// Forwarded, exact in one hop and in two, compressed.
    pub nanoseconds: [u64; 6],
}

impl Way {
    /// Of a sum of so many bytes.
    pub fn of(comm: Ptr, datatype: c_int, n_bytes: u64) -> Self {
        let mut way = Way { size: size_of::<Way>(), way: -1, nanoseconds: [0; 6] };
        // SAFETY: `size` is set.
        assert_eq!(unsafe { (api().flashcommGetCommWay)(comm, datatype, n_bytes, &mut way) }, 0);
        way
    }
}

//! What can go wrong in the shim's own work, what to do about it, and what the application is told.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_char};
use std::fmt;
use std::time::Duration;

use parking_lot::Mutex;

use crate::cuda::CudaError;
use crate::nccl::{CommPtr, NcclResult, load};

/// An error of our own work; forwarded calls answer for themselves.
#[derive(Debug)]
pub enum Error {
    /// The driver refused.
    Cuda {
        /// What we were doing.
        doing: &'static str,
        /// The driver's answer.
        source: CudaError,
    },
    /// The real NCCL refused a call of ours.
    Nccl {
        /// The function.
        function: &'static str,
        /// Its answer.
        result: NcclResult,
    },
    /// Not every rank answered the attach in time.
    AttachTimeout(Duration),
    /// A rank ended, or could not go on, while the others waited for its word.
    RankGone {
        /// That one.
        rank: usize,
    },
    /// `FLASHCOMM_BUFFER_MIB` does not hold one tile for each rank.
    BufferTooSmall {
        /// Ranks of the communicator.
        world: usize,
    },
    /// The operating system refused.
    System {
        /// What we were doing.
        doing: &'static str,
        /// Its answer.
        error: std::io::Error,
    },
    /// Another rank's memory cannot be mapped, or not by all, and why.
    Unmappable(&'static str),
    /// A kernel gave up waiting for another rank.
    GaveUp {
        /// The rank that waited.
        rank: usize,
        /// The rank that had not signalled.
        peer: u32,
        /// The channel that waited.
        channel: u32,
        /// Its iteration.
        iteration: u32,
        /// Whether the communicator was aborted; else the deadline passed.
        is_aborted: bool,
    },
    /// The ranks of a communicator could not meet, as was told then.
    Failed {
        /// What was answered then.
        result: NcclResult,
        /// Why.
        why: String,
    },
    /// A control call that cannot be met, on any rank, and why.
    Refused(String),
    /// The communicator was aborted or destroyed while we used it.
    Aborted,
}

/// Our results.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// For `map_err`: a driver error while doing `doing`.
    pub fn cuda(doing: &'static str) -> impl Fn(CudaError) -> Error {
        move |source| Error::Cuda { doing, source }
    }

    /// What the real NCCL answered to `function`, as a result.
    pub fn check(function: &'static str, result: NcclResult) -> Result<()> {
        if result == NcclResult::SUCCESS { Ok(()) } else { Err(Error::Nccl { function, result }) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Cuda { doing, source } => write!(f, "{doing}: {source}"),
            Error::Nccl { function, result } => {
                write!(f, "{function} answered {} (NCCL_DEBUG=WARN tells more)", result.0)
            }
            Error::AttachTimeout(waited) => write!(
                f,
                "not every rank of the communicator answered within {} s. Most likely a rank runs without the shim or \
                 with FLASHCOMM_ENABLE=0: load it with the same settings on all ranks, or on none. If a rank is only \
                 slow, raise FLASHCOMM_ATTACH_TIMEOUT_S",
                waited.as_secs()
            ),
            Error::RankGone { rank } => {
                write!(f, "rank {rank} ended, or could not go on, while the ranks met; its own log says more")
            }
            Error::BufferTooSmall { world } => {
                write!(f, "the staging memory is too small for {world} ranks; raise FLASHCOMM_BUFFER_MIB")
            }
            Error::System { doing, error } => write!(f, "{doing}: {error}"),
            Error::Unmappable(why) => f.write_str(why),
            Error::Failed { why, .. } => write!(f, "the ranks of this communicator could not meet; abort it. {why}"),
            Error::Refused(why) => f.write_str(why),
            Error::GaveUp { rank, peer, channel, iteration, is_aborted } => {
                let why = if *is_aborted { "the communicator was aborted" } else { "FLASHCOMM_TIMEOUT_S passed" };
                write!(
                    f,
                    "rank {rank} gave up waiting for rank {peer} in an all-reduce (channel {channel}, iteration \
                     {iteration}): {why}. The communicator is of no more use; abort it and look at what rank {peer} does"
                )
            }
            Error::Aborted => f.write_str("the communicator was aborted"),
        }
    }
}

impl std::error::Error for Error {}

/// The last of our errors in this process, for `flashcommGetLastError` and `ncclGetLastError`.
struct Last {
    text: &'static CStr,
    /// What the real NCCL had to say at that time. It tells nobody when it fails in a call that is a bare jump; what it
    /// says afterwards, if it is something else, is the newer error.
    real: CString,
}

static LAST: Mutex<Option<Last>> = Mutex::new(None);

/// Keeps an error for [`last`] and [`newest`].
pub(crate) fn remember(error: &Error) {
    let real = last_of_real().unwrap_or_default();
    let text = match error {
        // It knows the reason.
        Error::Nccl { .. } if !real.is_empty() => in_c(format!("{error}: {}", real.to_string_lossy())),
        _ => in_c(error.to_string()),
    };
    *LAST.lock() = Some(Last { text, real });
}

/// The last error that was remembered; empty where there was none.
pub(crate) fn last() -> &'static CStr {
    LAST.lock().as_ref().map_or(c"", |last| last.text)
}

/// The last error that was remembered, unless the real NCCL has had another one since.
pub(crate) fn newest() -> Option<&'static CStr> {
    let real = last_of_real().unwrap_or_default();
    LAST.lock().as_ref().filter(|last| real.is_empty() || real == last.real).map(|last| last.text)
}

/// A text for C, which stays: a program may keep the pointer as it may keep that of NCCL's. Each text is kept once.
pub(crate) fn in_c(text: String) -> &'static CStr {
    static TEXTS: Mutex<BTreeSet<&'static CStr>> = Mutex::new(BTreeSet::new());
    let text = CString::new(text).unwrap_or_default();
    let mut texts = TEXTS.lock();
    if let Some(known) = texts.get(text.as_c_str()) {
        return known;
    }
    let text: &'static CStr = Box::leak(text.into_boxed_c_str());
    texts.insert(text);
    text
}

/// What the real NCCL calls its last error; not by the jump table, which would log that an old NCCL has no such function.
fn last_of_real() -> Option<CString> {
    let function = load::real_library()?.find("ncclGetLastError")?;
    // SAFETY: NCCL's function of this signature, in every version that has it; it does not look at the communicator.
    let text = unsafe {
        std::mem::transmute::<*const (), unsafe extern "C" fn(CommPtr) -> *const c_char>(function)(std::ptr::null_mut())
    };
    // SAFETY: null, or NCCL's own string.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_owned())
}

impl From<&Error> for NcclResult {
    fn from(error: &Error) -> Self {
        match error {
            Error::Cuda { .. } => NcclResult::UNHANDLED_CUDA_ERROR,
            Error::Nccl { result, .. } | Error::Failed { result, .. } => *result,
            Error::System { .. } | Error::Unmappable(_) => NcclResult::SYSTEM_ERROR,
            Error::AttachTimeout(_) | Error::RankGone { .. } | Error::GaveUp { .. } => NcclResult::REMOTE_ERROR,
            Error::BufferTooSmall { .. } | Error::Refused(_) | Error::Aborted => NcclResult::INVALID_USAGE,
        }
    }
}

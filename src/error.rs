//! What can go wrong in the shim's own work, what to do about it, and what the application is told.

use std::fmt;
use std::time::Duration;

use parking_lot::Mutex;

use crate::cuda::CudaError;
use crate::nccl::NcclResult;

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

/// The last of our errors in this process, for `flashcommGetLastError`.
static LAST: Mutex<String> = Mutex::new(String::new());

/// Keeps an error for [`last`].
pub(crate) fn remember(error: &Error) {
    *LAST.lock() = error.to_string();
}

/// The last error that was remembered; empty where there was none.
pub(crate) fn last() -> String {
    LAST.lock().clone()
}

impl From<&Error> for NcclResult {
    fn from(error: &Error) -> Self {
        match error {
            Error::Cuda { .. } => NcclResult::UNHANDLED_CUDA_ERROR,
            Error::Nccl { result, .. } | Error::Failed { result, .. } => *result,
            Error::System { .. } | Error::Unmappable(_) => NcclResult::SYSTEM_ERROR,
            Error::AttachTimeout(_) | Error::GaveUp { .. } => NcclResult::REMOTE_ERROR,
            Error::BufferTooSmall { .. } | Error::Refused(_) | Error::Aborted => NcclResult::INVALID_USAGE,
        }
    }
}

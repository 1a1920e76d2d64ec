//! What can go wrong in the shim's own work, what to do about it, and what the application is told.

use std::fmt;
use std::time::Duration;

use crate::cuda::CudaError;
use crate::nccl::NcclResult;

/// An error of our own work; forwarded calls answer for themselves.
#[derive(Clone, Debug)]
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
                 with FLASHCOMM_ENABLE=0: load it with the same settings on all ranks, or on none. If the ranks are \
                 only slow to start, raise FLASHCOMM_ATTACH_TIMEOUT_S",
                waited.as_secs()
            ),
            Error::BufferTooSmall { world } => {
                write!(f, "the staging memory is too small for {world} ranks; raise FLASHCOMM_BUFFER_MIB")
            }
            Error::Aborted => f.write_str("the communicator was aborted"),
        }
    }
}

impl std::error::Error for Error {}

impl From<&Error> for NcclResult {
    fn from(error: &Error) -> Self {
        match error {
            Error::Cuda { .. } => NcclResult::UNHANDLED_CUDA_ERROR,
            Error::Nccl { result, .. } => *result,
            Error::AttachTimeout(_) => NcclResult::REMOTE_ERROR,
            Error::BufferTooSmall { .. } | Error::Aborted => NcclResult::INVALID_USAGE,
        }
    }
}

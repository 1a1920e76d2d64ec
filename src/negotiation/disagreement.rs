//! Why a communicator stays off, in words that name the cure.

use std::fmt;

use flashcomm_wire::WIRE_VERSION;

/// Pairs of widths that a communicator may have in its life: each keeps its memory.
pub(crate) const MAX_SETUPS: usize = 8;

/// Why a communicator stays off.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Disagreement {
    /// A rank's blob is not one of this wire version.
    Foreign {
        /// The rank.
        rank: usize,
        /// Its wire version, if it was a blob at all.
        version: Option<u32>,
    },
    /// A setting differs from rank 0's.
    Setting {
        /// The rank.
        rank: usize,
        /// The variable.
        setting: &'static str,
        /// The rank's value.
        theirs: String,
        /// Rank 0's value.
        first: String,
    },
    /// A rank could not prepare; its own log says why.
    NotReady {
        /// The rank.
        rank: usize,
    },
    /// The ranks have no memory that all could share.
    NoSharedMemory,
    /// NCCL's variables say that a rank must not use another's GPU memory.
    PeerForbidden {
        /// The rank.
        rank: usize,
    },
    /// The ranks have no /dev/shm in common, or must not use it.
    HostForbidden {
        /// The first that differs from rank 0, or has none.
        rank: usize,
    },
    /// It has one rank.
    Alone,
    /// It has had [`MAX_SETUPS`] other pairs of widths.
    TooManyWidths,
}

impl fmt::Display for Disagreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Disagreement::Foreign { rank, version: Some(version) } => write!(
                f,
                "rank {rank} runs a flashcomm of wire version {version}, this one has {WIRE_VERSION}; install the \
                 same flashcomm everywhere"
            ),
            Disagreement::Foreign { rank, version: None } => {
                write!(f, "rank {rank} answered something that is not flashcomm's; install the same everywhere")
            }
            Disagreement::Setting { rank, setting, theirs, first } => {
                write!(f, "rank {rank} has {setting}={theirs}, rank 0 has {first}; set it alike on all ranks")
            }
            Disagreement::NoSharedMemory => f.write_str(
                "FLASHCOMM_EXCHANGE=peer and host take ranks of one host, 16 at most, and FLASHCOMM_BUFFER_MIB must have \
                 room for them; FLASHCOMM_EXCHANGE=auto or nccl takes any",
            ),
            Disagreement::PeerForbidden { rank } => write!(
                f,
                "NCCL_P2P_DISABLE or NCCL_P2P_LEVEL of rank {rank} says that GPUs are not to use each other's memory"
            ),
            Disagreement::HostForbidden { rank } => write!(
                f,
                "rank {rank} has another /dev/shm than rank 0, as in a container of its own, or none, or NCCL_SHM_DISABLE says \
                 that it is not to be used"
            ),
            Disagreement::Alone => f.write_str("the communicator has one rank, and nothing to compress"),
            Disagreement::TooManyWidths => write!(
                f,
                "the communicator has had {MAX_SETUPS} pairs of widths, each of which keeps its memory; use one of those"
            ),
            Disagreement::NotReady { rank } => write!(f, "rank {rank} could not; see that rank's log"),
        }
    }
}

//! Fabrics: how long traffic between the GPUs of a machine takes, by a file that describes it.
//!
//! The simulators keep virtual time by one (`FLASHCOMM_SIM_FABRIC=FILE`), so that a test can say
//! which way of summing is the fastest on a machine that nobody here has. That proves that a
//! decision is right where the machine is as described. It says nothing about speed.
//!
//! * [`file`](mod@file): what a file may say, and what is refused.
//! * [`topology`]: nodes, links and the route between two places.
//! * [`traffic`]: how long flows take that are under way at once, collapse included.
//! * [`sum`]: how long an all-reduce takes, by NCCL or by one of the shim's ways, and the floor.
//!
//! Rank `r` is on GPU `r` modulo the number of GPUs. Bandwidths are in GB/s, 10^9 bytes a second,
//! which is bytes a nanosecond; times are in nanoseconds. All functions are pure: the same on every
//! rank, whatever the wall clock does.

pub mod file;
pub mod sum;
pub mod topology;
pub mod traffic;

use std::path::Path;

use once_cell::sync::Lazy;

pub use file::{Collapse, Gpu, HostMemory, Nccl};
pub use sum::{Carrier, Hops, Memory, Sum, Way};
pub use topology::{NodeKind, Place};
pub use traffic::{Flow, Mover, Traffic};

use topology::Topology;

/// A machine.
#[derive(Clone, Debug)]
pub struct Fabric {
    /// What machine it stands for, and where its numbers come from.
    pub about: String,
    /// Whether GPUs can use each other's memory.
    pub peer_access: bool,
    /// Whether it is NVLink over which they can.
    pub nvlink: bool,
    /// What every GPU is like.
    pub gpu: Gpu,
    /// What NCCL makes of the links.
    pub nccl: Nccl,
    /// How GPUs reach pinned host memory.
    pub host_memory: HostMemory,
    /// Where simultaneous writes collapse, if they do.
    pub collapse: Option<Collapse>,
    /// Nodes and links.
    pub topology: Topology,
}

impl Fabric {
    /// The fabric of a file's text.
    ///
    /// # Errors
    /// What is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, String> {
        file::parse(text)
    }

    /// The fabric of a file.
    ///
    /// # Errors
    /// What is wrong with the file, with its name.
    pub fn load(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string());
        text.and_then(|text| Self::parse(&text)).map_err(|error| format!("{}: {error}", path.display()))
    }

    /// Number of GPUs.
    pub fn n_gpus(&self) -> usize {
        self.topology.n_gpus()
    }

    /// The GPU that a rank is on.
    pub fn gpu_of(&self, rank: usize) -> usize {
        rank % self.n_gpus()
    }
}

/// The fabric that `FLASHCOMM_SIM_FABRIC` names; `None` where it is unset or empty. A file that is
/// not good ends the process, with one message.
pub fn chosen() -> Option<&'static Fabric> {
    static CHOSEN: Lazy<Option<Fabric>> = Lazy::new(|| {
        let path = std::env::var_os("FLASHCOMM_SIM_FABRIC").filter(|path| !path.is_empty())?;
        match Fabric::load(Path::new(&path)) {
            Ok(fabric) => Some(fabric),
            Err(error) => {
                eprintln!("FLASHCOMM_SIM_FABRIC: {error}");
                std::process::abort()
            }
        }
    });
    CHOSEN.as_ref()
}

//! One rank: a device, a stream, a communicator, and the calls that it makes on them.
//!
//! Nothing is freed before the process ends: freeing memory waits for the whole device, also for another rank on it that
//! waits for this one.

use std::ffi::c_int;
use std::sync::OnceLock;

use anyhow::{Result, ensure};
use flashcomm::tooling::control::flashcommWay_t;
use serde::{Deserialize, Serialize};

use super::api::{Cuda, Nccl, Ptr, UniqueId, call};
use super::party::Party;

/// `ncclSum`.
const SUM: c_int = 0;
/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: u32 = 1;
/// `CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`: the other ranks' threads do as they like meanwhile.
const CAPTURE_THREAD_LOCAL: c_int = 1;

/// Element types; the codes are those of `ncclDataType_t`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "they say it")]
pub enum Dtype {
    Fp16 = 6,
    Bf16 = 9,
    #[value(skip)]
    Fp32 = 7,
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Dtype::Fp16 => "fp16",
            Dtype::Bf16 => "bf16",
            Dtype::Fp32 => "fp32",
        })
    }
}

impl Dtype {
    /// Bytes of an element.
    pub fn n_bytes(self) -> usize {
        if self == Dtype::Fp32 { 4 } else { 2 }
    }
}

/// A rank of a job, on a thread of its own.
pub struct Rank<'a> {
    /// The process.
    pub party: &'a Party,
    /// Which of the process's ranks.
    pub index: usize,
    /// Which of the job's.
    pub rank: usize,
    /// Ranks of the job.
    pub world: usize,
    /// NCCL or the shim.
    pub nccl: &'static Nccl,
    cuda: &'static Cuda,
    comm: Ptr,
    stream: Ptr,
}

/// The process's libraries.
fn libraries(party: &Party) -> Result<(&'static Cuda, &'static Nccl)> {
    static LIBRARIES: OnceLock<Result<(Cuda, Nccl), String>> = OnceLock::new();
    let load = || Ok((Cuda::load()?, Nccl::load(&party.told.nccl)?));
    let loaded = LIBRARIES.get_or_init(|| load().map_err(|error: anyhow::Error| format!("{error:#}")));
    loaded.as_ref().map(|(cuda, nccl)| (cuda, nccl)).map_err(|error| anyhow::anyhow!("{error}"))
}

impl<'a> Rank<'a> {
    /// Rank number `index` of the process: makes its device current on this thread and joins the communicator.
    pub fn join(party: &'a Party, index: usize) -> Result<Self> {
        let (cuda, nccl) = libraries(party)?;
        let (rank, world) = (party.told.first + index, party.told.world);
        let (mut context, mut stream) = (0, 0);
        let device = rank % cuda.device_count()?.max(1);
        call!(cuda, cuDevicePrimaryCtxRetain(&mut context, device as c_int))?;
        call!(cuda, cuCtxSetCurrent(context))?;
        call!(cuda, cuStreamCreate(&mut stream, NON_BLOCKING))?;

        let mut id = UniqueId([0; 128]);
        if rank == 0 {
            call!(nccl, ncclGetUniqueId(&mut id))?;
        }
        let ids = party.meet(index, &id.0.to_vec())?;
        id.0.copy_from_slice(&ids[0]);
        let mut comm = 0;
        call!(nccl, ncclCommInitRank(&mut comm, world as c_int, id, rank as c_int))?;
        Ok(Rank { party, index, rank, world, nccl, cuda, comm, stream })
    }

    /// How the shim takes a sum of so many bytes.
    pub fn way(&self, dtype: Dtype, n_bytes: u64) -> Result<flashcommWay_t> {
        self.nccl.way(self.comm, dtype as c_int, n_bytes)
    }

    /// What carries the shim's payloads.
    pub fn exchange(&self) -> Result<String> {
        self.nccl.exchange(self.comm)
    }

    /// Leaves the communicator.
    pub fn leave(self) -> Result<()> {
        self.wait()?;
        call!(self.nccl, ncclCommDestroy(self.comm))
    }

    /// What every rank brings, in rank order; also a barrier.
    pub fn meet<T: Serialize + serde::de::DeserializeOwned>(&self, value: &T) -> Result<Vec<T>> {
        self.party.meet(self.index, value)
    }

    /// Device memory, for as long as the process runs.
    pub fn allocate(&self, n_bytes: usize) -> Result<Ptr> {
        let mut at = 0;
        call!(self.cuda, cuMemAlloc_v2(&mut at, n_bytes.max(1)))?;
        Ok(at)
    }

    /// Copies to the device and waits.
    pub fn write(&self, to: Ptr, bytes: &[u8]) -> Result<()> {
        call!(self.cuda, cuMemcpyHtoDAsync_v2(to, bytes.as_ptr(), bytes.len(), self.stream))?;
        self.wait()
    }

    /// Copies from the device and waits.
    pub fn read(&self, from: Ptr, n_bytes: usize) -> Result<Vec<u8>> {
        // First: a copy to memory that is not pinned may keep the other ranks of this process out of the driver while it
        // waits, and what it waits for may need them.
        self.wait()?;
        let mut bytes = vec![0; n_bytes];
        call!(self.cuda, cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr(), from, n_bytes, self.stream))?;
        self.wait()?;
        Ok(bytes)
    }

    /// Waits for the stream.
    pub fn wait(&self) -> Result<()> {
        call!(self.cuda, cuStreamSynchronize(self.stream))
    }

    /// Issues a sum all-reduce of `n_bytes`.
    pub fn all_reduce(&self, from: Ptr, to: Ptr, n_bytes: usize, dtype: Dtype) -> Result<()> {
        let count = n_bytes / dtype.n_bytes();
        call!(self.nccl, ncclAllReduce(from, to, count, dtype as c_int, SUM, self.comm, self.stream))
    }

    /// An event that takes the time.
    pub fn event(&self) -> Result<Ptr> {
        let mut event = 0;
        call!(self.cuda, cuEventCreate(&mut event, 0))?;
        Ok(event)
    }

    /// Records an event.
    pub fn record(&self, event: Ptr) -> Result<()> {
        call!(self.cuda, cuEventRecord(event, self.stream))
    }

    /// Microseconds between two events that have happened.
    pub fn elapsed_us(&self, from: Ptr, to: Ptr) -> Result<f64> {
        let mut ms = 0.0;
        call!(self.cuda, cuEventElapsedTime(&mut ms, from, to))?;
        Ok(f64::from(ms) * 1e3)
    }

    /// What `issue` issues, as a graph.
    pub fn capture(&self, issue: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let (mut graph, mut executable) = (0, 0);
        call!(self.cuda, cuStreamBeginCapture_v2(self.stream, CAPTURE_THREAD_LOCAL))?;
        let issued = issue();
        call!(self.cuda, cuStreamEndCapture(self.stream, &mut graph))?;
        issued?;
        ensure!(graph != 0, "the capture came to nothing");
        call!(self.cuda, cuGraphInstantiateWithFlags(&mut executable, graph, 0))?;
        self.cuda.upload(executable, self.stream)?;
        self.wait()?;
        Ok(Graph { graph, executable })
    }

    /// Launches a graph.
    pub fn launch(&self, graph: &Graph) -> Result<()> {
        call!(self.cuda, cuGraphLaunch(graph.executable, self.stream))
    }

    /// Frees a graph that is not running.
    pub fn drop_graph(&self, graph: Graph) -> Result<()> {
        call!(self.cuda, cuGraphExecDestroy(graph.executable))?;
        call!(self.cuda, cuGraphDestroy(graph.graph))
    }
}

/// A captured graph.
pub struct Graph {
    graph: Ptr,
    executable: Ptr,
}

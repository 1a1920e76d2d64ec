//! The doctor's child processes: one for each GPU (two where there is one). They meet over the command's pipes, and go
//! through the rounds of an attach with the shim's own code, as the ranks of a job would. No kernel waits.

use anyhow::{Context as _, Result, anyhow, ensure};
use flashcomm::tooling::cuda::sys::CUdevice_attribute_enum as Attribute;
use flashcomm::tooling::cuda::{self, Context, CudaResult, Stream};
use flashcomm::tooling::kernels::Kernels;
use flashcomm::tooling::negotiation::{
    self, Agreement, Areas, BLOB_BYTES, Blob, Error, Local, Meeting, NotSetUp, Rounds, Seat, layout,
};
use flashcomm::tooling::settings::Config;
use serde::{Deserialize, Serialize};

use crate::client::api::{Cuda, call};
use crate::client::party::{Assignment, Party};

/// What the driver says of a GPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Gpu {
    /// As the runtime numbers it.
    pub ordinal: usize,
    /// As its maker calls it.
    pub name: String,
    /// Bytes of its memory.
    pub memory_bytes: usize,
    /// Compute capability.
    pub capability: String,
    /// NUMA node that it hangs on, where the system tells.
    pub numa_node: Option<u32>,
    /// Whether it can reach the memory of each GPU; itself: yes.
    pub reaches: Vec<bool>,
    /// Whether the shim's kernels can be loaded, or why not.
    pub kernels: std::result::Result<(), String>,
}

/// What came of it at one rank.
#[derive(Debug, Serialize, Deserialize)]
pub struct Tried {
    /// The rank's GPU.
    pub gpu: Gpu,
    /// The rank's facts, as the ranks of a job tell them.
    pub facts: Vec<u8>,
    /// Whether the exchange `peer` could be set up, or why not.
    pub peer: std::result::Result<(), String>,
    /// Whether the exchange `host` could be set up, or why not.
    pub host: std::result::Result<(), String>,
    /// Bytes of a rank's receive area; 0 where there is none.
    pub area_bytes: usize,
}

/// In a child: tries.
pub fn child(told: Assignment) -> Result<()> {
    let party = Party::new(told)?;
    let tried = attempt(&party)?;
    party.answer_alone(&tried)
}

fn attempt(party: &Party) -> Result<Tried> {
    let driver = Cuda::load()?;
    let count = driver.device_count()?;
    ensure!(count > 0, "the CUDA driver shows no GPU");
    let ordinal = party.told.first % count;
    cuda::init()?;
    let context = Context::retain(ordinal as i32)?;
    let _entered = context.enter()?;
    let config = Config::global();
    let loaded = Kernels::load(ordinal as i32, config.legs, party.told.world)
        .and_then(|kernels| Ok((kernels.prepare_fused(&context)?, kernels)));
    let kernels = loaded.as_ref().map(|_| ()).map_err(ToString::to_string);
    let gpu = describe(&driver, &context, ordinal, kernels)?;

    let block_channels = loaded.as_ref().map_or(0, |(block_channels, _)| *block_channels);
    let seat = Seat::take(ordinal as i32);
    let mine = Blob::new(party.told.first, Agreement::from(config), &context, block_channels, seat.family())?;
    let mut rounds = Rounds::new(OverPipes { party, said: None }, mine);
    let facts = rounds.compare(true)?.map_err(|disagreement| anyhow!("{disagreement}"))?;
    let facts = rounds.find_reach(&context, &facts)?.map_err(|disagreement| anyhow!("{disagreement}"))?;
    let layout = |areas: Areas| layout(&facts, areas.exchange());
    let stream = Stream::new()?;
    let mut set_up = |areas| -> Result<std::result::Result<(), String>> {
        // The ranks skip it alike: without kernels on one there are no areas for any.
        let (Some(_), Ok((_, kernels))) = (layout(areas), &loaded) else {
            return Ok(Err("there are no kernels for it, or FLASHCOMM_BUFFER_MIB is too small".into()));
        };
        let local = Local { context: &context, kernels, stream: &stream, timeout: None };
        Ok(rounds.set_up_fused(areas, &facts, &local)?.map(|_| ()).map_err(|NotSetUp { why, mine }| match mine {
            Some((_, error)) => error.to_string(),
            None => why.to_string(),
        }))
    };
    let area_bytes = |areas| layout(areas).map_or(0, |layout| layout.n_bytes());
    let (peer, host) = (set_up(Areas::InGpuMemory)?, set_up(Areas::InHostMemory)?);
    let facts = rounds.blob.encode().to_vec();
    Ok(Tried { gpu, facts, peer, host, area_bytes: area_bytes(Areas::InGpuMemory) })
}

fn describe(cuda: &Cuda, context: &Context, ordinal: usize, kernels: std::result::Result<(), String>) -> Result<Gpu> {
    let mut memory_bytes = 0;
    call!(cuda, cuDeviceTotalMem_v2(&mut memory_bytes, ordinal as i32))?;
    let count = cuda.device_count()?;
    let reaches = (0..count).map(|other| context.reaches(other as i32)).collect::<CudaResult<_>>()?;
    let major = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok(Gpu {
        ordinal,
        name: cuda.device_name(ordinal)?,
        memory_bytes,
        capability: format!("{major}.{minor}"),
        numa_node: context.numa_node(),
        reaches,
        kernels,
    })
}

/// Meeting over the pipes to the command.
struct OverPipes<'a> {
    party: &'a Party,
    said: Option<Vec<u8>>,
}

impl Meeting for OverPipes<'_> {
    fn say(&mut self, mine: &[u8; BLOB_BYTES]) -> negotiation::Result<()> {
        self.said = Some(mine.to_vec());
        Ok(())
    }

    fn hear(&mut self) -> negotiation::Result<Vec<u8>> {
        let mine = self.said.take().context("it has said nothing");
        let heard: Result<Vec<Vec<u8>>> = mine.and_then(|mine| self.party.meet(0, &mine));
        let failed = |error: anyhow::Error| Error::System {
            doing: "meeting the other processes",
            error: std::io::Error::other(error),
        };
        Ok(heard.map_err(failed)?.concat())
    }

    fn check(&self) -> negotiation::Result<()> {
        Ok(())
    }
}

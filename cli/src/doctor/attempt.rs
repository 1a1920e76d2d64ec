//! The doctor's child processes: one for each GPU (two where there is one), which set up the exchanges between them with
//! the shim's own code, as the ranks of a job would. Nothing is computed; no kernel waits.

use anyhow::{Result, anyhow, ensure};
use flashcomm::config::Config;
use flashcomm::cuda::sys::CUdevice_attribute_enum as Attribute;
use flashcomm::cuda::{Context, CudaResult, Stream};
use flashcomm::exchange::fused::{Kind, Offer, Peer, Prepared, block_limit};
use flashcomm::kernels::Kernels;
use flashcomm_wire::Rings;
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
    /// Whether the exchange `peer` could be set up, or why not.
    pub peer: std::result::Result<(), String>,
    /// Whether the exchange `host` could be set up, or why not.
    pub host: std::result::Result<(), String>,
    /// Bytes of a rank's receive area; 0 where there is none.
    pub area_bytes: usize,
}

/// What the others must know.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Place {
    process: u64,
    ordinal: usize,
    multiprocessors: usize,
    block_channels: usize,
}

/// In a child: tries.
pub fn child(told: Assignment) -> Result<()> {
    let party = Party::new(told)?;
    let tried = attempt(&party)?;
    party.answer_alone(&tried)
}

fn attempt(party: &Party) -> Result<Tried> {
    let cuda = Cuda::load()?;
    let count = cuda.device_count()?;
    ensure!(count > 0, "the CUDA driver shows no GPU");
    let ordinal = party.told.first % count;
    flashcomm::cuda::init()?;
    let context = Context::retain(ordinal as i32)?;
    let _entered = context.enter()?;
    let config = Config::global();
    let kernels = Kernels::load(ordinal as i32, config.legs).and_then(|kernels| kernels.prepare_fused(&context));

    let mut memory_bytes = 0;
    call!(&cuda, cuDeviceTotalMem_v2(&mut memory_bytes, ordinal as i32))?;
    let reaches = (0..count).map(|other| context.reaches(other as i32)).collect::<CudaResult<_>>()?;
    let major = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    let gpu = Gpu {
        ordinal,
        name: cuda.device_name(ordinal)?,
        memory_bytes,
        capability: format!("{major}.{minor}"),
        numa_node: context.numa_node(),
        reaches,
        kernels: kernels.as_ref().map(|_| ()).map_err(ToString::to_string),
    };

    let place = Place {
        process: u64::from(std::process::id()),
        ordinal,
        multiprocessors: context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        block_channels: kernels.unwrap_or(0),
    };
    let places: Vec<Place> = party.meet(0, &place)?;
    let multiprocessors = places.iter().map(|place| place.multiprocessors).min().unwrap_or(0);
    let block_channels = places.iter().map(|place| place.block_channels).min().unwrap_or(0);
    let sharing = places.len().div_ceil(count);
    let n_channels = block_limit(multiprocessors, sharing, true, config.max_ctas) * block_channels;
    let rings = Rings::within(places.len(), config.legs, n_channels, config.buffer_bytes);
    let stream = Stream::new()?;
    let exchange = |kind| set_up(party, kind, rings, (&context, &stream), &places, block_channels);
    let (peer, host) = (exchange(Kind::Peer)?, exchange(Kind::Host)?);
    Ok(Tried { gpu, peer, host, area_bytes: rings.map_or(0, |rings| rings.area_bytes()) })
}

/// Sets up one exchange with the others; what this rank could not do is the inner error.
fn set_up(
    party: &Party,
    kind: Kind,
    rings: Option<Rings>,
    (context, stream): (&Context, &Stream),
    places: &[Place],
    block_channels: usize,
) -> Result<std::result::Result<(), String>> {
    let rings = rings.ok_or("there are no kernels for it, or FLASHCOMM_BUFFER_MIB is too small".to_string());
    let prepared =
        rings.and_then(|rings| Prepared::new(kind, rings, context, stream).map_err(|error| error.to_string()));
    let offer = prepared.as_ref().ok().map(|prepared| prepared.offer().to_vec());
    let offers: Vec<Option<Vec<u8>>> = party.meet(0, &offer)?;
    let prepared = match prepared {
        Ok(prepared) => prepared,
        Err(why) => return Ok(Err(why)),
    };
    let peers: Option<Vec<Peer>> = places
        .iter()
        .zip(&offers)
        .map(|(place, offer)| {
            let offer = Offer::try_from(offer.as_deref()?).ok()?;
            Some(Peer { process: place.process, device: place.ordinal as i32, offer })
        })
        .collect();
    let Some(peers) = peers else { return Ok(Err("another rank could not make its memory".into())) };
    let connected = prepared.connect(party.told.first, &peers, context, block_channels, None);
    // Nobody's memory goes before everyone has mapped it.
    let all: Vec<bool> = party.meet(0, &connected.is_ok())?;
    ensure!(all.len() == places.len(), anyhow!("a rank is missing"));
    Ok(connected.map(|_| ()).map_err(|error| error.to_string()))
}

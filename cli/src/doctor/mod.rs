//! `flashcomm doctor`: whether this machine is fit for the shim, and what it would do here.
//!
//! Nothing is guessed that can be tried: the real NCCL is opened as the shim opens it, and the exchanges are set up between
//! processes by the shim's own code. Child processes do all that, so a driver that crashes is an answer, too.

pub mod attempt;
mod words;

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use flashcomm::tooling::negotiation::{
    Against, Blob, Choice, Disagreement, agree, choose, default_exact_max_bytes, default_min_bytes,
};
use flashcomm::tooling::settings::{Config, ExchangeKind, Tune};
use flashcomm_wire::rings::MAX_WORLD;
use serde::Serialize;

use self::attempt::{Gpu, Tried};
use super::bench::report::{Earlier, earlier};
use super::client::job::{Job, Start};
use super::client::machine::{LibraryPaths, Machine, NoGpu, RealNccl, soname_of};
use super::client::party::Role;
use super::provenance::Provenance;
use super::tune::{self, Answer};

/// Arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit code: 0 where the machine is fit, 1 where it is not, 2 where it has no GPU.")]
pub struct Args {
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    /// A file that flashcomm bench --json has written: from which size on it measured the shim to be faster
    #[arg(long, value_name = "FILE")]
    bench: Option<PathBuf>,
    /// Try the command out on the simulator
    #[arg(long, hide = true)]
    simulator: bool,
    #[command(flatten)]
    paths: LibraryPaths,
}

/// How long the attempts may take together.
const LIMIT: Duration = Duration::from_secs(60);

/// Everything that is found out.
#[derive(Debug, Serialize)]
struct Findings {
    #[serde(flatten)]
    provenance: Provenance,
    shim: PathBuf,
    /// What `run` preloads with the shim, for who opens NCCL by its name; absent where it is missing.
    soname: Option<PathBuf>,
    simulated: bool,
    fit: bool,
    /// What keeps it from being fit, each with what helps.
    problems: Vec<String>,
    nccl: Option<RealNccl>,
    /// As people write it.
    driver: Option<String>,
    gpus: Vec<Gpu>,
    numa_nodes: Vec<NumaNode>,
    shared_memory: Option<SharedMemory>,
    /// What was tried between processes; absent without a GPU.
    exchanges: Option<Exchanges>,
    measured: Option<Earlier>,
    /// How sums go by what the ranks measure; absent with FLASHCOMM_TUNE=off.
    tuned: Option<Answer>,
}

#[derive(Debug, Serialize)]
struct NumaNode {
    node: u32,
    cpus: String,
}

#[derive(Debug, Serialize)]
struct SharedMemory {
    total_bytes: u64,
    free_bytes: u64,
}

/// What may carry the payloads between ranks on this host.
#[derive(Debug, Serialize)]
struct Exchanges {
    /// Processes that tried.
    ranks: usize,
    cuda_ipc: bool,
    peer: Possible,
    host: Possible,
    nccl: Possible,
    /// What the setting, `auto` by default, comes to here, and why.
    setting: String,
    takes: Option<&'static str>,
    because: String,
}

#[derive(Debug, Serialize)]
struct Possible {
    possible: bool,
    why_not: Option<String>,
    /// Bytes up to which other all-reduces are summed exactly by default; absent: none is.
    exact_max_bytes: Option<u64>,
    /// Bytes from which on all-reduces are compressed by default; absent: never.
    min_bytes_on_one_host: Option<u64>,
    min_bytes_between_hosts: Option<u64>,
}

/// Runs it; whether the machine is fit. Without a GPU it is an error, after everything else has been told.
pub fn run(args: &Args) -> Result<bool> {
    let measured = args.bench.as_deref().map(earlier).transpose()?;
    let mut machine = Machine::unseen(&args.paths, args.simulator)?;
    let mut report = Findings {
        provenance: Provenance::at(SystemTime::now()),
        shim: machine.shim.clone(),
        soname: soname_of(&machine.shim),
        simulated: machine.is_simulated(),
        fit: false,
        problems: vec![],
        nccl: None,
        driver: None,
        gpus: vec![],
        numa_nodes: numa_nodes(),
        shared_memory: shared_memory(),
        exchanges: None,
        measured,
        tuned: None,
    };
    match machine.find_nccl()? {
        Ok(nccl) => report.nccl = Some(nccl),
        Err(why) => report.problems.push(format!(
            "no real NCCL: {why}. Install one (pip install nvidia-nccl-cu13), or name it by --nccl-lib or FLASHCOMM_NCCL_LIB"
        )),
    }
    let no_gpu = match machine.find_gpus()? {
        Ok(()) => {
            report.driver = Some(format!("{}.{}", machine.driver / 1000, machine.driver / 10 % 100));
            try_exchanges(&machine, &mut report)?;
            if Config::global().tune != Tune::Off && report.nccl.is_some() {
                measure(&machine, &mut report);
            }
            None
        }
        Err(why) => {
            report.problems.push(format!("no GPU: {why}"));
            Some(why)
        }
    };
    report.fit = report.problems.is_empty();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", words::in_words(&report, args.bench.as_deref()));
    }
    match no_gpu {
        Some(why) => Err(NoGpu(format!("no GPU: {why}")).into()),
        None => Ok(report.fit),
    }
}

/// Sets the exchanges up between processes, and tells what the shim would take.
fn try_exchanges(machine: &Machine, report: &mut Findings) -> Result<()> {
    let world = machine.gpus.len().clamp(2, MAX_WORLD);
    let start = Start { role: Role::Doctor, world, processes: true, limit: LIMIT, ..Start::default() };
    let tried = Job::start(machine, &start).and_then(|mut job| job.answers::<Tried>(LIMIT));
    let tried = match tried {
        Ok(tried) => tried,
        Err(error) => {
            report.problems.push(format!("{world} processes could not try the exchanges: {error:#}"));
            return Ok(());
        }
    };
    let failed = |of: fn(&Tried) -> &std::result::Result<(), String>| {
        tried.iter().enumerate().find_map(|(rank, tried)| Some((rank, of(tried).as_ref().err()?.clone())))
    };
    let (no_peer, no_host) = (failed(|tried| &tried.peer), failed(|tried| &tried.host));
    let facts: Vec<u8> = tried.iter().flat_map(|tried| tried.facts.clone()).collect();
    let facts = agree(&facts).map_err(|disagreement| anyhow::anyhow!("{disagreement}"))?;
    let area_bytes = tried.iter().map(|tried| tried.area_bytes).max().unwrap_or(0);
    report.gpus = tried.into_iter().map(|tried| tried.gpu).collect();
    report.gpus.sort_by_key(|gpu| gpu.ordinal);
    report.gpus.dedup_by_key(|gpu| gpu.ordinal);
    let wanted = area_bytes as u64 * world as u64;
    report.problems.extend(report.gpus.iter().filter_map(without_kernels));
    report.problems.extend(report.shared_memory.as_ref().and_then(|shared| {
        let (_, why) = no_host.as_ref().filter(|_| no_peer.is_some())?;
        small_shared_memory(shared, wanted, why)
    }));

    let has_kernels = report.gpus.iter().all(|gpu| gpu.kernels.is_ok());
    let (takes, because) = match has_kernels {
        true => decide(&facts, &no_peer, &no_host),
        false => (None, "without kernels every call goes to the real NCCL".into()),
    };
    if takes.is_none() && has_kernels {
        report.problems.push(format!("{because}. Leave FLASHCOMM_EXCHANGE out"));
    }
    let in_words = |failed: Failed| failed.map(|(rank, why)| format!("rank {rank}: {why}"));
    report.exchanges = Some(Exchanges {
        ranks: world,
        cuda_ipc: no_peer.is_none(),
        peer: possible(ExchangeKind::Peer, world, in_words(no_peer)),
        host: possible(ExchangeKind::Host, world, in_words(no_host)),
        nccl: possible(ExchangeKind::Nccl, world, report.nccl.is_none().then(|| "no real NCCL".to_string())),
        setting: facts[0].agreement.exchange.map_or("auto", ExchangeKind::name).into(),
        takes: takes.map(ExchangeKind::name),
        because,
    });
    Ok(())
}

/// Lets the ranks of a job measure, or recall what they have measured before.
fn measure(machine: &Machine, report: &mut Findings) {
    let world = machine.gpus.len().clamp(2, MAX_WORLD);
    match tune::decided(machine, world, &[]) {
        Ok((answer, _)) => report.tuned = Some(answer),
        Err(error) => report.problems.push(format!("{world} processes could not measure: {error:#}")),
    }
}

/// What is wrong with a GPU that does not take the kernels.
fn without_kernels(Gpu { ordinal, name, capability, kernels, .. }: &Gpu) -> Option<String> {
    let why = kernels.as_ref().err()?;
    Some(format!(
        "GPU {ordinal} ({name}, compute capability {capability}) does not take the kernels: {why}. They want 8.0 or newer, \
         and a driver as new as the CUDA that built flashcomm (13.0: driver 580)"
    ))
}

/// What is wrong where the exchange host wants more bytes of /dev/shm than are free.
fn small_shared_memory(SharedMemory { free_bytes, .. }: &SharedMemory, wanted: u64, why: &str) -> Option<String> {
    (*free_bytes < wanted).then(|| {
        format!(
            "the exchange host wants {wanted} bytes of /dev/shm, {free_bytes} are free ({why}); make it larger (docker run \
             --shm-size), or FLASHCOMM_BUFFER_MIB smaller"
        )
    })
}

/// The first rank that could not set an exchange up, and why.
type Failed = Option<(usize, String)>;

/// What the ranks of a job would take here, and why: the shim's own choice, of what was tried.
fn decide(facts: &[Blob], no_peer: &Failed, no_host: &Failed) -> (Option<ExchangeKind>, String) {
    let of = |kind| match kind {
        ExchangeKind::Peer => no_peer,
        ExchangeKind::Host => no_host,
        ExchangeKind::Nccl => &None,
    };
    let failed = |kind| Some((kind, Disagreement::NotReady { rank: of(kind).as_ref()?.0 }));
    let failed: Vec<_> = ExchangeKind::ALL.into_iter().filter_map(failed).collect();
    let Choice { takes, passed_over } = choose(facts, &failed, None);
    let weighed = passed_over.iter().filter(|(_, against)| !matches!(against, Against::Setting(_)));
    let against = weighed.map(|(kind, against)| match (against, of(*kind)) {
        (Against::Impossible(_), Some((rank, why))) => {
            format!("{} is impossible here (rank {rank}: {why})", kind.name())
        }
        _ => format!("not {}: {against}", kind.name()),
    });
    let world = facts.len();
    let mut because: Vec<String> = against.collect();
    because.push(match takes {
        Some(ExchangeKind::Peer) => format!("{world} processes could map each other's GPU memory"),
        Some(ExchangeKind::Host) => format!("{world} processes could share pinned host memory"),
        Some(ExchangeKind::Nccl) if choice_is_free(facts) => {
            "over NCCL on one host nothing is compressed unless FLASHCOMM_MIN_BYTES says so".into()
        }
        Some(ExchangeKind::Nccl) => "FLASHCOMM_EXCHANGE says so".into(),
        None => "so every call goes to the real NCCL".into(),
    });
    (takes, because.join("; "))
}

fn choice_is_free(facts: &[Blob]) -> bool {
    facts[0].agreement.exchange.is_none()
}

fn possible(kind: ExchangeKind, world: usize, why_not: Option<String>) -> Possible {
    let from = |one_host| Some(default_min_bytes(kind, world, 1, one_host)).filter(|n_bytes| *n_bytes != u64::MAX);
    Possible {
        possible: why_not.is_none(),
        why_not,
        exact_max_bytes: Some(default_exact_max_bytes(kind, world)).filter(|n_bytes| *n_bytes != 0),
        min_bytes_on_one_host: from(true),
        // The others reach no other host.
        min_bytes_between_hosts: from(false).filter(|_| kind == ExchangeKind::Nccl),
    }
}

fn numa_nodes() -> Vec<NumaNode> {
    let entries = std::fs::read_dir("/sys/devices/system/node").into_iter().flatten().flatten();
    let mut nodes: Vec<NumaNode> = entries
        .filter_map(|entry| {
            let node = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
            let cpus = std::fs::read_to_string(entry.path().join("cpulist")).ok()?.trim().to_string();
            Some(NumaNode { node, cpus })
        })
        .collect();
    nodes.sort_by_key(|node| node.node);
    nodes
}

fn shared_memory() -> Option<SharedMemory> {
    // SAFETY: all zeros is a value of this structure of integers.
    let mut found: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: a NUL-terminated path and a valid place.
    let failed = unsafe { libc::statvfs(c"/dev/shm".as_ptr(), &mut found) } != 0;
    let bytes = |blocks: libc::fsblkcnt_t| blocks * found.f_frsize;
    (!failed).then(|| SharedMemory { total_bytes: bytes(found.f_blocks), free_bytes: bytes(found.f_bavail) })
}

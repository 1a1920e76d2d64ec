//! What this machine has: the shim, the real NCCL, GPUs, or the simulators in their place.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use flashcomm::tooling::nccl::RealLibrary;
use flashcomm::tooling::nccl::SYMBOLS;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use super::api::{Cuda, Nccl, call};
use super::job::{Job, Start};
use super::party::{Assignment, Party, Role};
use crate::run::python;

/// Where the libraries are, if not where they are looked for. Named as the options of `run`, which come from the settings.
#[derive(Clone, Debug, clap::Args)]
pub struct LibraryPaths {
    /// The shim [default: libflashcomm.so beside this command, or in ../lib]
    #[arg(long, value_name = "FILE")]
    shim: Option<PathBuf>,
    /// The real NCCL [default: that of python3's packages, or what the loader finds as libnccl.so.2]
    #[arg(long, value_name = "FILE", env = "FLASHCOMM_NCCL_LIB")]
    nccl_lib: Option<PathBuf>,
}

/// Where ranks may run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// On GPUs, and on the simulator where there are none.
    Any,
    /// On GPUs.
    Gpu,
    /// On the simulator, also where there are GPUs.
    Simulator,
}

/// A real NCCL, as the shim finds it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RealNccl {
    /// Where it is.
    pub path: PathBuf,
    /// As people write it.
    pub version: String,
    /// Functions of newer ones that it lacks.
    pub lacks: Vec<String>,
}

/// There is no GPU, and one was wanted.
#[derive(Debug)]
pub struct NoGpu(pub String);

impl std::fmt::Display for NoGpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NoGpu {}

/// The libraries and what they said of themselves.
pub struct Machine {
    /// `libflashcomm.so`.
    pub shim: PathBuf,
    /// The real NCCL, or the simulated one.
    pub nccl: PathBuf,
    /// Names of the GPUs.
    pub gpus: Vec<String>,
    /// As `cuDriverGetVersion` has it: 13000 is 13.0.
    pub driver: u32,
    /// As `ncclGetVersion` has it: 23203 is 2.32.3.
    pub nccl_version: u32,
    /// Why there is no GPU, if this is the simulator.
    pub no_gpu: Option<String>,
    /// The simulators under the names of what they stand for.
    simulators: Option<TempDir>,
}

/// What a child process found.
#[derive(Serialize, Deserialize)]
struct Found {
    /// Names and driver version.
    gpus: Result<(Vec<String>, u32), String>,
    nccl: Result<u32, String>,
}

/// The first NCCL that lets several ranks of one process, or of several on one host, share a GPU.
const SHARES_GPUS: u32 = 23003;
/// Thread blocks of NCCL's kernels where ranks share a GPU and nothing else is asked for: with its own choice they are
/// more than fit on it together, and wait for one another for ever.
const SHARED_CTAS: u32 = 8;

impl Machine {
    /// The machine, or the simulators in its place, before it has been looked at.
    pub fn unseen(paths: &LibraryPaths, simulator: bool) -> Result<Self> {
        let shim = find_shim(paths.shim.as_deref())?;
        let simulators = simulator.then(simulators).transpose()?;
        let nccl = match &simulators {
            Some(simulators) => simulators.path().join("libnccl.so.2"),
            None => nccl(paths),
        };
        Ok(Machine { shim, nccl, gpus: vec![], driver: 0, nccl_version: 0, no_gpu: None, simulators })
    }

    /// Looks for GPUs only; the inner error says why there is none.
    pub fn find_gpus(&mut self) -> Result<Result<(), String>> {
        Ok(self.probe()?.gpus.map(|(gpus, driver)| (self.gpus, self.driver) = (gpus, driver)))
    }

    /// The real NCCL; the inner error says why there is none.
    pub fn find_nccl(&self) -> Result<Result<RealNccl, String>> {
        real_nccl(Some(&self.nccl).filter(|path| path.as_os_str() != NCCL).map(PathBuf::as_path))
    }

    /// Looks around. Libraries are opened in a child process, so that this one stays without a driver and its threads.
    pub fn find(paths: &LibraryPaths, wanted: Wanted) -> Result<Self> {
        let mut machine = Self::unseen(paths, false)?;
        if wanted != Wanted::Simulator {
            let found = machine.probe()?;
            match found.gpus {
                Ok((gpus, driver)) => {
                    machine.nccl_version = found.nccl.map_err(|why| anyhow!(why))?;
                    (machine.gpus, machine.driver) = (gpus, driver);
                    return Ok(machine);
                }
                Err(why) if wanted == Wanted::Gpu => {
                    bail!(NoGpu(format!("this needs a GPU, since the simulator proves nothing about speed: {why}")))
                }
                Err(why) => machine.no_gpu = Some(why),
            }
        }
        let simulators = simulators()?;
        machine.nccl = simulators.path().join("libnccl.so.2");
        machine.simulators = Some(simulators);
        let found = machine.probe()?;
        (machine.gpus, machine.driver) = found.gpus.map_err(|why| anyhow!("the simulated driver: {why}"))?;
        machine.nccl_version = found.nccl.map_err(|why| anyhow!("the simulated NCCL: {why}"))?;
        Ok(machine)
    }

    fn probe(&self) -> Result<Found> {
        let limit = Duration::from_secs(60);
        let mut job = Job::start(self, &Start { role: Role::Probe, limit, ..Start::default() })?;
        job.answers(limit)?.pop().context("one answer")
    }

    /// Whether nothing here is real.
    pub fn is_simulated(&self) -> bool {
        self.simulators.is_some()
    }

    /// Whether that many ranks must share GPUs.
    pub fn shares(&self, world: usize) -> bool {
        !self.is_simulated() && world > self.gpus.len()
    }

    /// In one line.
    pub fn describe(&self) -> String {
        if self.is_simulated() {
            return "the simulator: it proves results, and nothing about speed".into();
        }
        let driver = (self.driver / 1000, self.driver / 10 % 100);
        let count = if self.gpus.len() == 1 { String::new() } else { format!("{} x ", self.gpus.len()) };
        format!("{count}{}, CUDA driver {}.{}, NCCL {}", self.gpus[0], driver.0, driver.1, version(self.nccl_version))
    }

    /// Whether ranks that share a GPU may be threads of one process.
    pub fn takes_threads(&self, world: usize) -> bool {
        !self.shares(world) || self.nccl_version >= SHARES_GPUS
    }

    /// NCCL's settings for rank `rank` of `world`, where ranks share a GPU.
    pub fn sharing(&self, world: usize, rank: usize) -> Vec<(String, String)> {
        if !self.shares(world) {
            return vec![];
        }
        if self.nccl_version >= SHARES_GPUS {
            return vec![
                ("NCCL_MULTI_RANK_GPU_ENABLE".into(), "1".into()),
                ("NCCL_MAX_CTAS".into(), SHARED_CTAS.to_string()),
                // Ranks must not wait for each other in a queue of the hardware that their streams happen to share.
                ("CUDA_DEVICE_MAX_CONNECTIONS".into(), "32".into()),
                // Nor for the driver to load one's first kernel, or to give it a stack, while another's waits.
                ("CUDA_MODULE_LOADING".into(), "EAGER".into()),
                ("NCCL_SET_STACK_SIZE".into(), "1".into()),
            ];
        }
        // An older NCCL refuses two ranks on a GPU, unless it takes them for ranks of two hosts.
        vec![("NCCL_HOSTID".into(), format!("flashcomm-rank-{rank}"))]
    }

    /// This command again, as a child that finds these libraries.
    pub fn again(&self) -> Result<Command> {
        let mut command = Command::new(env::current_exe()?);
        command.env("FLASHCOMM_NCCL_LIB", &self.nccl);
        // What is measured is opened by name; a shim preloaded on top would stand before the real NCCL's own calls.
        if let Some(preloads) = env::var_os("LD_PRELOAD") {
            command.env("LD_PRELOAD", without_flashcomm(&preloads.to_string_lossy()));
        }
        if let Some(simulators) = &self.simulators {
            let mut paths = vec![simulators.path().to_owned()];
            paths.extend(env::split_paths(&env::var_os("LD_LIBRARY_PATH").unwrap_or_default()));
            command
                .env("LD_LIBRARY_PATH", env::join_paths(paths).unwrap_or_else(|_| OsString::from(simulators.path())));
        }
        Ok(command)
    }
}

/// NCCL's version as people write it.
pub fn version(code: u32) -> String {
    format!("{}.{}.{}", code / 10000, code / 100 % 100, code % 100)
}

/// A value of `LD_PRELOAD` without the shim and its other name.
fn without_flashcomm(preloads: &str) -> String {
    let is_ours = |path: &&str| {
        Path::new(path).file_name().is_some_and(|name| [SHIM_FILE, SONAME_FILE].iter().any(|ours| name == *ours))
    };
    preloads.split([':', ' ']).filter(|path| !is_ours(path)).collect::<Vec<_>>().join(":")
}

/// The real NCCL at `named`, or the one that the shim finds by itself, or why it cannot be used. A child process opens
/// it, so that nothing of it stays here.
pub fn real_nccl(named: Option<&Path>) -> Result<Result<RealNccl, String>> {
    let nccl = named.unwrap_or(Path::new("")).to_owned();
    let nobody = PathBuf::new();
    let machine =
        Machine { shim: nobody, nccl, gpus: vec![], driver: 0, nccl_version: 0, no_gpu: None, simulators: None };
    let limit = Duration::from_secs(60);
    let mut job = Job::start(&machine, &Start { role: Role::Nccl, limit, ..Start::default() })?;
    job.answers(limit)?.pop().context("one answer")
}

/// In a child: the real NCCL.
pub fn find_nccl(told: Assignment) -> Result<()> {
    let party = Party::new(told)?;
    let named = party.told.nccl.as_os_str();
    let found = if named.is_empty() {
        RealLibrary::search().map_err(|tried| tried.join("; "))
    } else {
        RealLibrary::open(named)
    };
    party.answer_alone(&found.map(|library| {
        let names = SYMBOLS.iter().map(|(name, ..)| *name).filter(|name| !name.starts_with('p'));
        RealNccl {
            path: library.path().into(),
            version: library.version().to_string(),
            lacks: names.filter(|name| library.find(name).is_none()).map(String::from).collect(),
        }
    }))
}

/// In a child: what there is.
pub fn probe(told: Assignment) -> Result<()> {
    let party = Party::new(told)?;
    let gpus = || {
        let cuda = Cuda::load()?;
        let count = cuda.device_count()?;
        ensure!(count > 0, "the CUDA driver shows no GPU; is CUDA_VISIBLE_DEVICES empty?");
        let mut driver = 0;
        call!(&cuda, cuDriverGetVersion(&mut driver))?;
        let names = (0..count).map(|ordinal| cuda.device_name(ordinal)).collect::<Result<_>>()?;
        Ok((names, driver as u32))
    };
    let nccl = || Nccl::load(&party.told.nccl)?.version();
    let in_words = |error: anyhow::Error| format!("{error:#}");
    party.answer_alone(&Found { gpus: gpus().map_err(in_words), nccl: nccl().map_err(in_words) })
}

/// Whether the shim has a function of NCCL's.
pub fn is_known(function: &str) -> bool {
    SYMBOLS.iter().any(|(name, ..)| *name == function)
}

/// The name that NCCL goes by.
const NCCL: &str = "libnccl.so.2";
/// The shim's file.
pub const SHIM_FILE: &str = "libflashcomm.so";
/// The file of its other name, which the crate `soname/` makes.
pub const SONAME_FILE: &str = "libflashcomm_soname.so";

/// The NCCL that is named; or that of the Python that a user has at hand; or what the loader finds.
fn nccl(paths: &LibraryPaths) -> PathBuf {
    let named = paths.nccl_lib.clone().filter(|path| !path.as_os_str().is_empty());
    let of_python = || python::nccl_of(&python::find("python3".as_ref())?);
    named.or_else(of_python).unwrap_or_else(|| NCCL.into())
}

/// The shim that is named, or the one of this command.
pub fn find_shim(named: Option<&Path>) -> Result<PathBuf> {
    if let Some(path) = named {
        // A name without a slash would be looked up elsewhere by the loader.
        return path.canonicalize().with_context(|| format!("no shim at --shim {}", path.display()));
    }
    beside(SHIM_FILE).map_err(|looked| {
        anyhow!("no libflashcomm.so in {looked}; build it with cargo build --lib, or name it by --shim")
    })
}

/// The file that gives a shim NCCL's name, which stands beside it.
pub fn soname_of(shim: &Path) -> Option<PathBuf> {
    Some(shim.with_file_name(SONAME_FILE)).filter(|path| path.exists())
}

/// A library beside this command or in ../lib; otherwise where it was looked for.
fn beside(name: &str) -> Result<PathBuf, String> {
    let exe = env::current_exe().map_err(|error| error.to_string())?;
    let here = exe.parent().unwrap_or(Path::new("/"));
    let lib = here.parent().unwrap_or(here).join("lib");
    // In the package for Python the simulators stand in a directory of their own.
    let candidates = [here.join(name), lib.join(name), lib.join("flashcomm").join(name)];
    let found = candidates.iter().find(|path| path.exists());
    found.cloned().ok_or_else(|| format!("{} or {}", here.display(), lib.display()))
}

/// A directory with the simulators under the names that programs look for.
fn simulators() -> Result<TempDir> {
    let dir = tempfile::tempdir()?;
    let (cuda, nccl) = ("libflashcomm_sim_cuda.so", "libflashcomm_sim_nccl.so");
    for (name, file) in [("libcuda.so.1", cuda), ("libcuda.so", cuda), ("libnccl.so.2", nccl)] {
        let library = beside(file).map_err(|looked| {
            anyhow!("no {file} in {looked}; build it with cargo build -p flashcomm-sim-cuda -p flashcomm-sim-nccl")
        })?;
        std::os::unix::fs::symlink(library.canonicalize()?, dir.path().join(name))?;
    }
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(nccl_version: u32, gpus: usize) -> Machine {
        Machine {
            shim: "libflashcomm.so".into(),
            nccl: "libnccl.so.2".into(),
            gpus: vec!["a GPU".into(); gpus],
            driver: 13000,
            nccl_version,
            no_gpu: None,
            simulators: None,
        }
    }

    #[test]
    fn ranks_share_a_gpu_as_their_nccl_lets_them() {
        let names = |machine: &Machine, rank| -> Vec<String> {
            machine.sharing(2, rank).into_iter().map(|(name, value)| format!("{name}={value}")).collect()
        };
        let (new, old, enough) = (with(23203, 1), with(22809, 1), with(22809, 2));
        assert!(new.takes_threads(2) && !old.takes_threads(2) && enough.takes_threads(2));
        let expected = [
            "NCCL_MULTI_RANK_GPU_ENABLE=1",
            "NCCL_MAX_CTAS=8",
            "CUDA_DEVICE_MAX_CONNECTIONS=32",
            "CUDA_MODULE_LOADING=EAGER",
            "NCCL_SET_STACK_SIZE=1",
        ];
        assert_eq!(names(&new, 1), expected);
        assert_eq!(names(&old, 1), ["NCCL_HOSTID=flashcomm-rank-1"]);
        assert_ne!(names(&old, 0), names(&old, 1));
        assert!(names(&enough, 1).is_empty());
    }

    #[test]
    fn a_preloaded_shim_does_not_reach_the_children() {
        let preloads = "/a/libflashcomm.so:/a/libflashcomm_soname.so:/b/other.so /c/libflashcomm.so";
        assert_eq!(without_flashcomm(preloads), "/b/other.so");
    }
}

//! `flashcomm run`: a command with the shim in front of its NCCL.
//!
//! It looks at what would run, refuses what cannot work with the reason and the cure, sets the environment, says what it
//! set, and becomes the command: signals, output and exit code are the command's own. `--print-env` prints the
//! environment instead, for a container or a unit file; `--check` waits for the command's end and says what came to the shim.

mod check;
mod elf;
mod engine;
mod preload;
mod print;
pub mod python;
mod settings;

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Result, bail};

use self::elf::NcclOf;
use self::engine::Engine;
use self::preload::{Preload, is_flashcomm, is_same, preloaded_nccl};
use self::print::Format;
use self::settings::Settings;
use super::client::machine::{self, RealNccl};

/// Exit codes of a job that was not started, as those of env(1) and nohup(1).
const REFUSED: u8 = 125;
const NOT_STARTED: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Where engines that open NCCL by themselves look for its path.
const PATH_VARIABLES: [&str; 2] = ["VLLM_NCCL_SO_PATH", "SGLANG_NCCL_SO_PATH"];

/// Arguments.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit code: that of the command; 125 where flashcomm refuses to start it, 126 where it cannot be \
                        started, 127 where there is no such command."
)]
pub struct Args {
    /// Set what makes this engine hand its all-reduces to NCCL, and say what was set
    #[arg(long, value_enum)]
    engine: Option<Engine>,
    /// Print the environment instead of starting a command, for a shell, for docker --env-file or for systemd
    #[arg(long, value_enum, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "shell")]
    print_env: Option<Format>,
    /// Start it although no real NCCL was found, or PyTorch brings one that cannot be replaced
    #[arg(long)]
    force: bool,
    /// Wait for the command's end, and say then whether its NCCL was reached
    #[arg(long, conflicts_with = "print_env")]
    check: bool,
    /// Say nothing but errors
    #[arg(long, short)]
    quiet: bool,
    /// The shim [default: libflashcomm.so beside this command, or in ../lib]
    #[arg(long, value_name = "FILE")]
    shim: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, required_unless_present = "print_env")]
    command: Vec<OsString>,
}

/// What is to be started.
struct Launch {
    command: Vec<OsString>,
    /// In the order in which they are told.
    variables: Vec<(String, String)>,
    notes: Vec<String>,
}

impl Launch {
    fn set(&mut self, name: &str, value: impl Into<String>) {
        match self.variables.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => *known = value.into(),
            None => self.variables.push((name.into(), value.into())),
        }
    }
}

/// Why something cannot work, and what helps.
struct Refusal {
    reason: String,
    cure: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.\n  {}", self.reason, self.cure)
    }
}

/// Becomes the command; comes back only where it could not, or is to wait for its end.
pub fn run(args: &Args) -> ExitCode {
    let job = match prepare(args) {
        Ok(job) => job,
        Err(error) => return fail(&format!("{error:#}"), REFUSED),
    };
    if let Some(format) = args.print_env {
        return match print::lines(format, &job.variables) {
            Ok(lines) => {
                print!("{lines}");
                if !args.quiet {
                    job.notes.iter().for_each(|note| eprintln!("flashcomm run: {note}"));
                }
                ExitCode::SUCCESS
            }
            Err(error) => fail(&format!("{error:#}"), REFUSED),
        };
    }
    let Some(program) = python::find(&job.command[0]) else {
        return fail(&format!("there is no command {:?}", job.command[0]), NOT_FOUND);
    };
    if !args.quiet {
        job.variables.iter().for_each(|(name, value)| eprintln!("flashcomm run: {name}={value}"));
        job.notes.iter().for_each(|note| eprintln!("flashcomm run: {note}"));
    }
    let mut command = Command::new(&program);
    command.arg0(&job.command[0]).args(&job.command[1..]).envs(job.variables);
    let error = match args.check.then(|| check::run(&mut command)) {
        None => command.exec(),
        Some(Ok(Ok(code))) => return code,
        Some(Ok(Err(error))) => error,
        Some(Err(error)) => return fail(&format!("{error:#}"), REFUSED),
    };
    fail(&format!("cannot start {}: {error}", program.display()), NOT_STARTED)
}

fn fail(why: &str, code: u8) -> ExitCode {
    eprintln!("flashcomm run: {why}");
    ExitCode::from(code)
}

fn prepare(args: &Args) -> Result<Launch> {
    let config = args.settings.check()?;
    let shim = machine::find_shim(args.shim.as_deref())?;
    let shim = shim.canonicalize().unwrap_or(shim);
    let mut preload = Preload::new(&shim)?;
    if args.check && args.settings.value(check::STATISTICS).is_some() {
        bail!("--check reads the statistics itself; leave {} out", check::STATISTICS);
    }

    let mut job = Launch { command: args.command.clone(), variables: vec![], notes: vec![] };
    job.set("LD_PRELOAD", preload.value());
    for name in PATH_VARIABLES {
        job.set(name, shim.to_string_lossy());
    }
    args.settings.iter().for_each(|(name, value)| job.set(name, value));
    for (name, value) in args.engine.map_or(&[][..], Engine::variables) {
        job.set(name, *value);
    }
    for (name, word) in args.engine.map_or(&[][..], Engine::lists) {
        job.set(name, engine::with_word(&env::var(name).unwrap_or_default(), word));
    }

    let certain = python::of_command(&args.command);
    let python = certain.clone().or_else(|| python::find(OsStr::new("python3")));
    let packages = python.as_deref().and_then(python::packages_of);
    let torch = packages.as_ref().and_then(|packages| packages.torch.as_deref());
    let torch_cuda = torch.map(|torch| torch.join(python::TORCH_CUDA));
    let mut torch_nccl = NcclOf::Loader(None);
    // What a Python has that the command may not run at all is no reason to refuse.
    if let (Some(torch), Some(torch_cuda), Some(python)) = (torch, &torch_cuda, &certain) {
        let refusal = if torch_cuda.exists() {
            torch_nccl = elf::nccl_of(torch_cuda)?;
            (torch_nccl == NcclOf::Itself).then(|| built_in(torch))
        } else {
            (args.engine == Some(Engine::Torch)).then(|| without_cuda(torch, python))
        };
        if let Some(refusal) = refusal {
            // vLLM's own communicator opens NCCL by its path, whatever PyTorch has.
            if !args.force && args.engine != Some(Engine::Vllm) {
                bail!("{refusal}");
            }
            job.notes.push(refusal.to_string());
        }
    }

    let of_torch = if let NcclOf::Loader(path) = torch_nccl { path } else { None };
    let of_python = of_torch.or_else(|| packages?.nccl);
    let found = find_nccl(&args.settings, &shim, of_python.as_deref(), certain.is_some())?;
    job.notes.extend(preload.without_soname(found.as_ref().ok().map(|(nccl, _)| nccl)));
    job.set("LD_PRELOAD", preload.value());
    match found {
        Ok((nccl, is_to_be_set)) => {
            if is_to_be_set {
                // The command may go to another directory.
                let path = nccl.path.canonicalize().unwrap_or_else(|_| nccl.path.clone());
                job.set("FLASHCOMM_NCCL_LIB", path.to_string_lossy());
            }
            job.notes.push(format!("in front of NCCL {} at {}", nccl.version, nccl.path.display()));
        }
        Err(refusal) if args.force => job.notes.push(refusal.to_string()),
        Err(refusal) => bail!("{refusal}"),
    }
    let asked = engine::asks_for_batch_invariance(&job.command, |name| env::var_os(name));
    if !config.enable {
        job.notes.push("FLASHCOMM_ENABLE=0: every call goes to the real NCCL".into());
    } else if let Some(asked) = asked.filter(|_| !config.legs.batch_invariant) {
        job.set("FLASHCOMM_ENABLE", "0");
        job.notes.push(format!(
            "{asked} wants results that do not depend on the batch, so every call goes to the real NCCL; \
             --batch-invariant 1 compresses so that they do not"
        ));
    }
    if let Some(engine) = args.engine {
        prepare_engine(engine, &mut job);
    }
    Ok(job)
}

/// Adds the engine's options to its command, or tells them.
fn prepare_engine(engine: Engine, job: &mut Launch) {
    let (added, told) = engine.missing_options(&job.command);
    if !added.is_empty() {
        job.notes.push(format!("added to the command: {}", added.join(" ")));
        job.command.extend(added.into_iter().map(OsString::from));
    }
    if !told.is_empty() {
        let name = engine.name();
        job.notes.push(format!(
            "{name} has no environment variable for these options; add them to its own: {}",
            told.join(" ")
        ));
    }
    let has = |option: &&&str| job.command.iter().any(|word| word == **option);
    for option in engine.unwanted().iter().filter(has) {
        job.notes.push(format!("{option} hands all-reduces to others than NCCL; leave it out"));
    }
    if engine == Engine::Torch {
        job.notes.push("torch.distributed's backend nccl needs nothing set".into());
    }
}

/// The real NCCL of the job, and whether the shim must be told.
fn find_nccl(
    settings: &Settings,
    shim: &Path,
    of_python: Option<&Path>,
    is_certain: bool,
) -> Result<std::result::Result<(RealNccl, bool), Refusal>> {
    if let Some(path) = settings.value("FLASHCOMM_NCCL_LIB") {
        return Ok(match machine::real_nccl(Some(Path::new(&path)))? {
            Ok(nccl) => Ok((nccl, true)),
            Err(why) => Err(Refusal {
                reason: format!("FLASHCOMM_NCCL_LIB={} cannot be used: {why}", path.to_string_lossy()),
                cure: "Name the libnccl.so.2 of NVIDIA, or leave it out to have it looked for".into(),
            }),
        });
    }
    // Who has named an NCCL to an engine wants that one behind the shim.
    for name in PATH_VARIABLES {
        let Some(path) = env::var_os(name).map(PathBuf::from) else { continue };
        if path.as_os_str().is_empty() || is_same(&path, shim) {
            continue;
        }
        let refused = |why: &str| Refusal {
            reason: format!("{name}={} {why}", path.display()),
            cure: format!("Unset {name}, or name the libnccl.so.2 of NVIDIA there"),
        };
        if is_flashcomm(&path) {
            return Ok(Err(refused("is another flashcomm")));
        }
        return Ok(match machine::real_nccl(Some(&path))? {
            Ok(nccl) => Ok((nccl, true)),
            Err(why) => Err(refused(&format!("cannot be used: {why}"))),
        });
    }
    if let Some(nccl) = preloaded_nccl(shim) {
        return Ok(Ok((nccl, false)));
    }
    if let Some(path) = of_python
        && let Ok(nccl) = machine::real_nccl(Some(path))?
    {
        // Of a Python that was only guessed the job's own may be another; it has its NCCL loaded when it is looked for.
        return Ok(Ok((nccl, is_certain)));
    }
    Ok(match machine::real_nccl(None)? {
        Ok(nccl) => Ok((nccl, false)),
        Err(why) => Err(Refusal {
            reason: format!("no real NCCL was found ({why})"),
            cure: "Install one for the Python of the command (pip install nvidia-nccl-cu13), or name it by --nccl-lib \
                   /path/to/libnccl.so.2, or start anyway with --force if the command finds one by itself"
                .into(),
        }),
    })
}

fn built_in(torch: &Path) -> Refusal {
    Refusal {
        reason: format!(
            "the PyTorch at {} does not load libnccl.so.2: NCCL is linked into it, or it has none, so nothing can stand \
             in front",
            torch.display()
        ),
        cure: "Use a PyTorch that loads it, as the packages on PyPI do (pip install torch); or --force if the job's \
               all-reduces are not PyTorch's"
            .into(),
    }
}

fn without_cuda(torch: &Path, python: &Path) -> Refusal {
    Refusal {
        reason: format!("the PyTorch at {} is built without CUDA", torch.display()),
        cure: format!("Install one with CUDA for {}, or name the Python that has it", python.display()),
    }
}

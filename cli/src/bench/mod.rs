//! `flashcomm bench`: sum all-reduces through the shim beside those of the real NCCL, in one run.
//!
//! Every way of doing it (the real NCCL at a cap of thread blocks; the shim at a width over an exchange) is a job of its
//! own, since both libraries read their settings once per process. The jobs of a world size stay up together and take
//! turns, size by size and round by round, so that all of them meet the same clock rates; one that waits for its turn
//! has nothing on the GPU. Results are checked before they are timed, and again after the last batch.

mod bandwidth;
pub mod kernels;
pub mod measure;
mod plot;
pub mod report;
mod sizes;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use flashcomm::tooling::settings::Config;
use serde::{Deserialize, Serialize};

use self::measure::{Check, Measured, Task};
use self::plot::Plotted;
use self::report::{BenchReport, Measurement};
use self::sizes::Sizes;
use super::client::job::{Job, Start};
use super::client::machine::{LibraryPaths, Machine, Wanted};
use super::client::party::Role;
use super::client::rank::Dtype;
use super::client::values;
use super::plot::check_name;
use super::{Bytes, progress};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Numbers of ranks [default: 2,4,8; with --quick 2]
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u64).range(2..=16))]
    worlds: Option<Vec<u64>>,
    /// Widths, or reduce:gather as in 4:8; with a code as in 4-plain; exact: uncompressed [default: 8,4; with --quick 4]
    #[arg(long, value_delimiter = ',')]
    bits: Option<Vec<String>>,
    /// Bytes that each rank sums; A..B doubles from A to B [default: 256K..64M; with --quick 1M,16M,64M]
    #[arg(long, value_delimiter = ',')]
    sizes: Option<Vec<Sizes>>,
    /// What carries the payloads: values of FLASHCOMM_EXCHANGE, or peer-read, host-copy: with FLASHCOMM_P2P_READ=1, FLASHCOMM_HOST_COPY=1
    #[arg(long, value_delimiter = ',', default_value = "peer,host")]
    exchanges: Vec<String>,
    /// Element types
    #[arg(long, value_enum, value_delimiter = ',', default_value = "fp16")]
    dtypes: Vec<Dtype>,
    /// FLASHCOMM_MIN_BYTES of the shim: a number, or auto: it decides what becomes of a size, as in a job
    #[arg(long, default_value = "0")]
    min_bytes: String,
    /// FLASHCOMM_MAX_CTAS of the shim: thread blocks of a rank, as many at most as fit beside the other ranks'; 0: its default
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=1024))]
    max_ctas: u32,
    /// Values of NCCL_MAX_CTAS for the real NCCL, whose best counts [default: by number of ranks where they share a GPU]
    #[arg(long, value_delimiter = ',')]
    nccl_ctas: Option<Vec<u32>>,
    /// Time captured graphs, too
    #[arg(long)]
    graph: bool,
    /// How often everything is measured, in turn [default: 3; with --quick 1]
    #[arg(long)]
    rounds: Option<usize>,
    /// Batches of a measurement, whose median counts
    #[arg(long, default_value_t = 15)]
    batches: usize,
    /// Milliseconds of a batch, at least
    #[arg(long, default_value_t = 2.0)]
    batch_ms: f64,
    /// Results up to this size are compared with the specification, larger ones between the ranks only
    #[arg(long, default_value = "16M")]
    check_up_to: Bytes,
    /// A first look: fewer ranks, widths, sizes and rounds
    #[arg(long)]
    quick: bool,
    /// Say from which size on the shim is never slower
    #[arg(long)]
    crossover: bool,
    /// Measure the quantize and dequantize kernels, too, or only them
    #[arg(long, value_enum, num_args = 0..=1, require_equals = true, default_missing_value = "also")]
    kernels: Option<KernelsToo>,
    /// Write every median, and what it was measured on, to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw time and speed-up over size to this file, an SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Measure nothing, and plot what --json wrote to this file
    #[arg(long, value_name = "FILE", requires = "plot")]
    from: Option<PathBuf>,
    /// Ranks are processes; otherwise threads of one, where NCCL takes that
    #[arg(long)]
    processes: bool,
    /// Seconds that a measurement may take before it is given up
    #[arg(long, default_value_t = 60)]
    timeout: u64,
    /// Try the command out on the simulator; the times mean nothing
    #[arg(long, hide = true)]
    simulator: bool,
    #[command(flatten)]
    paths: LibraryPaths,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
enum KernelsToo {
    Also,
    Only,
}

/// In the place of a width: summed exactly.
const EXACT: &str = "exact";

/// A way to do an all-reduce.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// The real NCCL.
    Nccl {
        /// `NCCL_MAX_CTAS`, if set.
        max_ctas: Option<u32>,
    },
    /// The shim.
    Flashcomm {
        /// `FLASHCOMM_BITS`.
        bits: String,
        /// `FLASHCOMM_EXCHANGE`, or that with one of [`CARRIERS`].
        exchange: String,
    },
}

/// What may stand behind an exchange, with the setting that it means.
const CARRIERS: [(&str, &str); 2] = [("-read", "FLASHCOMM_P2P_READ"), ("-copy", "FLASHCOMM_HOST_COPY")];

/// An exchange, and the setting of what stands behind it.
fn carrier_of(exchange: &str) -> (&str, Option<&'static str>) {
    let found = CARRIERS.iter().find_map(|(end, setting)| Some((exchange.strip_suffix(end)?, Some(*setting))));
    found.unwrap_or((exchange, None))
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Way::Nccl { max_ctas: None } => f.write_str("NCCL"),
            Way::Nccl { max_ctas: Some(ctas) } => write!(f, "NCCL with {ctas} CTAs"),
            Way::Flashcomm { bits, exchange } if bits == EXACT => write!(f, "{EXACT} {exchange}"),
            Way::Flashcomm { bits, exchange } => write!(f, "{bits} bits {exchange}"),
        }
    }
}

/// The arguments with their defaults.
struct BenchPlan<'a> {
    args: &'a Args,
    worlds: Vec<usize>,
    bits: Vec<String>,
    /// Ascending.
    sizes: Vec<usize>,
    rounds: usize,
    batches: usize,
}

impl<'a> BenchPlan<'a> {
    fn new(args: &'a Args) -> Result<Self> {
        let small = args.quick || args.simulator;
        let texts = |texts: &[&str]| texts.iter().map(|text| text.to_string()).collect();
        let sizes = if args.simulator {
            "4K,64K"
        } else if args.quick {
            "1M,16M,64M"
        } else {
            "256K..64M"
        };
        let default_sizes = || sizes.split(',').map(|text| text.parse().expect("a size")).collect();
        let sizes: Vec<Sizes> = args.sizes.clone().unwrap_or_else(default_sizes);
        let sizes: BTreeSet<usize> = sizes.iter().flat_map(|sizes| &sizes.0).map(|n_bytes| n_bytes.0).collect();
        ensure!(sizes.iter().all(|n_bytes| *n_bytes >= 2), "a size holds at least one element");
        let worlds = args.worlds.clone().unwrap_or_else(|| if small { vec![2] } else { vec![2, 4, 8] });
        let plan = BenchPlan {
            args,
            worlds: worlds.into_iter().map(|world| world as usize).collect(),
            bits: args.bits.clone().unwrap_or_else(|| texts(if small { &["4"] } else { &["8", "4"] })),
            sizes: sizes.into_iter().collect(),
            rounds: args.rounds.unwrap_or(if small { 1 } else { 3 }).max(1),
            batches: if args.simulator { 2 } else { args.batches.max(1) },
        };
        plan.check()?;
        Ok(plan)
    }

    /// The shim would take a malformed value for its default, and another thing would be measured.
    fn check(&self) -> Result<()> {
        for way in self.ways_of_the_shim() {
            let settings = self.settings_of(&way);
            let value = |name: &str| settings.iter().find(|(known, _)| known == name).map(|(_, value)| value.into());
            let (_, malformed) = Config::parse(value);
            let malformed: Vec<String> = malformed.iter().map(ToString::to_string).collect();
            ensure!(malformed.is_empty(), "this flashcomm cannot do {way}: {}", malformed.join("; "));
        }
        Ok(())
    }

    fn ways_of_the_shim(&self) -> Vec<Way> {
        let of = |bits: &String| {
            let bits = bits.clone();
            self.args.exchanges.iter().map(move |to| Way::Flashcomm { bits: bits.clone(), exchange: to.clone() })
        };
        self.bits.iter().flat_map(of).collect()
    }

    /// Caps of NCCL's thread blocks. Where ranks share a GPU its kernels must fit on it together, and no cap is best for
    /// all sizes.
    fn caps(&self, machine: &Machine, world: usize) -> Vec<Option<u32>> {
        if let Some(given) = &self.args.nccl_ctas {
            return given.iter().copied().map(Some).collect();
        }
        if !machine.shares(world) || !machine.takes_threads(world) {
            return vec![None];
        }
        let caps = match world.div_ceil(machine.gpus.len()) {
            2 => [32, 64],
            3..=4 => [24, 32],
            5..=8 => [12, 16],
            _ => [8, 16],
        };
        caps.map(Some).to_vec()
    }

    fn settings_of(&self, way: &Way) -> Vec<(String, String)> {
        let settings = match way {
            Way::Nccl { .. } => vec![],
            Way::Flashcomm { bits, exchange } if bits == EXACT => vec![
                ("FLASHCOMM_ENABLE", "1".into()),
                ("FLASHCOMM_EXCHANGE", carrier_of(exchange).0.into()),
                ("FLASHCOMM_MIN_BYTES", "1024G".into()),
                ("FLASHCOMM_EXACT_MAX_BYTES", "1G".into()),
                // As many of those as there is room for: 8 MiB of two ranks.
                ("FLASHCOMM_BUFFER_MIB", "256".into()),
                ("FLASHCOMM_MAX_CTAS", self.args.max_ctas.to_string()),
            ],
            Way::Flashcomm { bits, exchange } => vec![
                ("FLASHCOMM_ENABLE", "1".into()),
                ("FLASHCOMM_BITS", values::bits_and_code(bits).0.into()),
                ("FLASHCOMM_CODE", values::bits_and_code(bits).1.into()),
                ("FLASHCOMM_GROUP", values::GROUP.to_string()),
                ("FLASHCOMM_DTYPES", "fp16,bf16".into()),
                ("FLASHCOMM_EXCHANGE", carrier_of(exchange).0.into()),
                ("FLASHCOMM_MIN_BYTES", self.args.min_bytes.clone()),
                ("FLASHCOMM_MAX_CTAS", self.args.max_ctas.to_string()),
            ],
        };
        let carrier = if let Way::Flashcomm { exchange, .. } = way { carrier_of(exchange).1 } else { None };
        // What becomes of a size is given, and nothing to be found out.
        let is_given = matches!(way, Way::Flashcomm { .. }) && self.args.min_bytes != "auto";
        let tune = is_given.then(|| ("FLASHCOMM_TUNE", "off".into()));
        let settings = settings.into_iter().chain(carrier.map(|setting| (setting, "1".into()))).chain(tune);
        settings.map(|(name, value)| (name.into(), value)).collect()
    }

    /// Measurements of all worlds.
    fn steps(&self, machine: &Machine) -> usize {
        let ways = |world: &usize| self.caps(machine, *world).len() + self.ways_of_the_shim().len();
        let modes = 1 + usize::from(self.args.graph);
        self.worlds.iter().map(ways).sum::<usize>() * self.rounds * self.args.dtypes.len() * modes * self.sizes.len()
    }
}

/// Runs it; whether everything was as it must be.
pub fn run(args: &Args) -> Result<bool> {
    args.plot.as_deref().map(check_name).transpose()?; // before it takes minutes
    if let (Some(from), Some(to)) = (&args.from, &args.plot) {
        Plotted::read(from)?.write(to)?;
        return Ok(true);
    }
    let machine = Machine::find(&args.paths, if args.simulator { Wanted::Simulator } else { Wanted::Gpu })?;
    let plan = BenchPlan::new(args)?;
    println!("Measuring on {}.", machine.describe());
    let mut report = BenchReport::new(&machine, args.processes, plan.rounds);
    if args.kernels != Some(KernelsToo::Only) {
        for &world in &plan.worlds {
            ensure!(
                args.processes || machine.takes_threads(world),
                "ranks that are threads cannot share a GPU with this NCCL; use 2.30.3 or newer (pip install \
                 nvidia-nccl-cu13, --nccl-lib FILE), or --processes"
            );
        }
        let bar = progress(plan.steps(&machine));
        for &world in &plan.worlds {
            plan.measure(&machine, world, &mut report, &bar);
        }
        bar.finish_and_clear();
    }
    if args.kernels.is_some() {
        match kernels::measure(&machine) {
            Ok(speeds) => report.kernels = Some(speeds),
            Err(error) => report.problems.push(format!("kernels: {error:#}")),
        }
    }
    report.finish();
    print!("{}", report.in_words(args.crossover));
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report.summarized())?;
        std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &args.plot {
        Plotted::from(report.summarized()).write(path)?;
    }
    report.problems.iter().for_each(|problem| println!("! {problem}"));
    Ok(report.problems.is_empty())
}

impl BenchPlan<'_> {
    /// All jobs of a number of ranks. One that goes wrong is left out from there on.
    fn measure(&self, machine: &Machine, world: usize, report: &mut BenchReport, bar: &indicatif::ProgressBar) {
        let limit = Duration::from_secs(self.args.timeout);
        let caps = self.caps(machine, world);
        let ways: Vec<Way> =
            caps.iter().map(|max_ctas| Way::Nccl { max_ctas: *max_ctas }).chain(self.ways_of_the_shim()).collect();
        bar.set_message(format!("{world} ranks: start"));
        // One after the other: ranks may measure the machine when they start, which must be theirs alone.
        let mut jobs: Vec<(Way, Job)> = Vec::new();
        for way in ways {
            let mut settings = self.settings_of(&way);
            let cap = if let Way::Nccl { max_ctas } = &way { *max_ctas } else { caps.iter().copied().flatten().max() };
            settings.extend(cap.map(|cap| ("NCCL_MAX_CTAS".to_string(), cap.to_string())));
            let shim = matches!(way, Way::Flashcomm { .. });
            let start = Start { role: Role::Bench, world, processes: self.args.processes, shim, settings, limit };
            let job = Job::start(machine, &start);
            let ready = job.and_then(|mut job| job.answers::<Option<()>>(limit).map(|_| job));
            match ready {
                Ok(job) => jobs.push((way, job)),
                Err(error) => report.problems.push(format!("{world} ranks, {way}: {error:#}")),
            }
        }

        for round in 0..self.rounds {
            for &dtype in &self.args.dtypes {
                for graph in [false, true].into_iter().take(1 + usize::from(self.args.graph)) {
                    for &n_bytes in &self.sizes {
                        jobs.retain_mut(|(way, job)| {
                            bar.set_message(format!("{world} ranks, {}, {way}", Bytes(n_bytes)));
                            let task = self.task(way, round, dtype, graph, n_bytes);
                            let kept = match job.ask::<Option<Measured>>(&task, limit) {
                                Ok(answers) => {
                                    let answers: Vec<Measured> = answers.into_iter().flatten().collect();
                                    let record = Measurement::of(world, way, round, &task, &answers);
                                    let must_compress = self.args.min_bytes == "0";
                                    report.take(record, &answers, &task, must_compress);
                                    true
                                }
                                Err(error) => {
                                    let at = Bytes(n_bytes);
                                    report.problems.push(format!("{world} ranks, {way}, {dtype} {at}: {error:#}"));
                                    false
                                }
                            };
                            bar.inc(1);
                            kept
                        });
                    }
                }
            }
        }
        bar.set_message(format!("{world} ranks: end"));
        for (way, job) in jobs {
            match job.end(limit) {
                Ok(lines) => report.notes.extend(lines.into_iter().map(|line| format!("{world} ranks, {way}: {line}"))),
                Err(error) => report.problems.push(format!("{world} ranks, {way}: {error:#}")),
            }
        }
    }

    fn task(&self, way: &Way, round: usize, dtype: Dtype, graph: bool, n_bytes: usize) -> Task {
        let check = match way {
            _ if round > 0 => Check::No,
            Way::Flashcomm { bits, .. } if n_bytes <= self.args.check_up_to.0 => Check::Reference(bits.clone()),
            _ => Check::SameBits,
        };
        let max_bytes = *self.sizes.last().expect("there are sizes");
        let batch_us = self.args.batch_ms * 1e3;
        Task { n_bytes, max_bytes, dtype, graph, batches: self.batches, batch_us, check }
    }
}

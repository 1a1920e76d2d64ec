//! `flashcomm tune`: measures how sums of each size go best on this machine, shows it, and keeps it for later starts.
//!
//! A job of ranks, each a process on a GPU of its own, makes a communicator through the shim with FLASHCOMM_TUNE=always.
//! The shim measures and decides; the command only asks it.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::client::job::{Job, Start};
use super::client::machine::{LibraryPaths, Machine, Wanted};
use super::client::party::{Assignment, Party, Role};
use super::client::rank::{Dtype, Rank};
use super::provenance::Provenance;
use super::{Bytes, table};

/// Arguments.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "What it finds holds for jobs of as many ranks on the same GPUs, with the same settings and versions, \
                        that have FLASHCOMM_TUNE=cache."
)]
pub struct Args {
    /// Ranks, each a process; one for each GPU if not given
    #[arg(long, value_parser = clap::value_parser!(u64).range(2..=16))]
    ranks: Option<u64>,
    /// Widths, or reduce:gather as in 4:8
    #[arg(long, default_value = "8")]
    bits: String,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
    /// Try the command out on the simulator
    #[arg(long, hide = true)]
    simulator: bool,
    #[command(flatten)]
    paths: LibraryPaths,
}

/// How long it may take.
const LIMIT: Duration = Duration::from_secs(60);

/// The sizes that are shown.
const SIZES: std::ops::RangeInclusive<u32> = 10..=28;

/// What was measured and decided.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    exchange: String,
    sizes: Vec<Size>,
}

/// A size.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Size {
    bytes: u64,
    way: String,
    /// Of the real NCCL, of exact sums in one hop and in two, of compressed ones whose payloads are written to peers, and of
    /// those whose payloads are read from them, and of those that copy engines carry; absent: not measured.
    microseconds: [Option<f64>; 6],
    /// Why that way.
    because: String,
}

#[derive(Serialize)]
struct Found<'a> {
    #[serde(flatten)]
    provenance: Provenance,
    simulated: bool,
    machine: String,
    ranks: usize,
    bits: &'a str,
    #[serde(flatten)]
    answer: &'a Answer,
}

/// The ways, as they are shown.
const WAYS: [&str; 6] =
    ["NCCL", "exact, one hop", "exact, two hops", "compressed", "compressed, pulled", "compressed, copied"];

/// What a gain less than this is taken for noise.
const WORTH_IT: f64 = 1.03;

/// Why a size goes a way, by what the ways were measured to take.
fn because(way: usize, microseconds: &[Option<f64>; 6]) -> String {
    let (Some(nccl), Some(taken)) = (microseconds[0], microseconds[way]) else {
        return "default, not measured".into();
    };
    let fastest = microseconds.iter().flatten().copied().fold(f64::INFINITY, f64::min);
    let gain = (taken / fastest - 1.0) * 100.0;
    match way {
        _ if fastest == taken => "fastest".into(),
        0 if nccl < fastest * WORTH_IT => format!("the best gains {gain:.0}%, not 3%"),
        1 | 2 if taken < fastest * WORTH_IT => format!("compressing gains {gain:.0}%, not 3%"),
        3.. if taken < fastest * WORTH_IT => format!("another gains {gain:.0}%, not 3%"),
        _ => "fastest within limits".into(),
    }
}

/// Runs it; whether anything is to be had from the shim here.
pub fn run(args: &Args) -> Result<bool> {
    let machine = Machine::find(&args.paths, if args.simulator { Wanted::Simulator } else { Wanted::Gpu })?;
    let world = args.ranks.map_or(machine.gpus.len().clamp(2, 16), |ranks| ranks as usize);
    let (answer, stderr) = decided(&machine, world, &[("FLASHCOMM_TUNE", "always"), ("FLASHCOMM_BITS", &args.bits)])?;
    let is_measured = answer.sizes.iter().any(|size| size.microseconds[0].is_some());
    if args.json {
        let provenance = Provenance::at(SystemTime::now());
        let (simulated, machine) = (machine.is_simulated(), machine.describe());
        let found = Found { provenance, simulated, machine, ranks: world, bits: &args.bits, answer: &answer };
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else {
        println!("{world} ranks, {} bits, on {}; exchange {}.\n", args.bits, machine.describe(), answer.exchange);
        println!("{}", answer.in_words());
        if is_measured {
            println!("Kept: jobs of {world} ranks on these GPUs with FLASHCOMM_TUNE=cache take sums this way.");
        }
    }
    stderr.iter().for_each(|line| eprintln!("! {line}"));
    ensure!(is_measured, "nothing could be measured; FLASHCOMM_LOG=info says why");
    Ok(true)
}

/// What a job of ranks, each a process, decides with these settings, and what it wrote to standard error.
pub fn decided(machine: &Machine, world: usize, settings: &[(&str, &str)]) -> Result<(Answer, Vec<String>)> {
    let settings = settings.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    let start = Start { role: Role::Tune, world, processes: true, shim: true, settings, limit: LIMIT };
    let mut job = Job::start(machine, &start)?;
    let mut answers: Vec<Answer> = job.answers(LIMIT)?;
    let stderr = job.end(LIMIT)?;
    let first = answers.pop().context("no rank answers")?;
    ensure!(answers.iter().all(|answer| *answer == first), "the ranks do not agree; this is a bug");
    Ok((first, stderr))
}

impl Answer {
    /// The table, as people read it.
    pub fn in_words(&self) -> String {
        format!(
            "{}\n\nMicroseconds of a sum of fp16, of the slowest rank; between the sizes measured on a straight line.\n\
             Limits are those of settings and of memory. Gains of less than 3% are taken for noise.",
            shown(self)
        )
    }
}

fn shown(answer: &Answer) -> String {
    let mut table =
        table(&["bytes", WAYS[0], WAYS[1], WAYS[2], WAYS[3], WAYS[4], WAYS[5], "taken", "faster", "because"]);
    for Size { bytes, way, microseconds, because } in &answer.sizes {
        let cell = |us: &Option<f64>| us.map_or("-".into(), |us| format!("{us:.1}"));
        let taken = WAYS.iter().position(|name| name == way).and_then(|way| microseconds[way]);
        let faster = match (microseconds[0], taken) {
            (Some(nccl), Some(taken)) => format!("{:.2}x", nccl / taken),
            _ => "-".into(),
        };
        let mut row = vec![Bytes(*bytes as usize).to_string()];
        row.extend(microseconds.iter().map(cell));
        row.extend([way.clone(), faster, because.clone()]);
        table.add_row(row);
    }
    table.trim_fmt()
}

/// In a child: the rank.
pub fn child(told: Assignment) -> Result<()> {
    let party = Party::new(told)?;
    party.run(|rank| Ok(((), ask(rank)?)), |rank, (), ()| ask(rank));
    Ok(())
}

/// Asks the shim how sums go.
fn ask(rank: &Rank) -> Result<Answer> {
    let size = |octave: u32| {
        let bytes = 1u64 << octave;
        let way = rank.way(Dtype::Fp16, bytes)?;
        let us = |ns: u64| Some(ns as f64 / 1e3).filter(|us| *us > 0.0);
        let name = WAYS.get(way.way as usize).context("a way of a later shim")?;
        let microseconds = way.nanoseconds.map(us);
        Ok(Size { bytes, way: (*name).into(), microseconds, because: because(way.way as usize, &microseconds) })
    };
    Ok(Answer { exchange: rank.exchange()?, sizes: SIZES.map(size).collect::<Result<_>>()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_choice_has_its_reason() {
        let us = |times: [u32; 6]| times.map(|us| Some(f64::from(us)).filter(|us| *us > 0.0));
        for (way, times, reason) in [
            (0, [0, 0, 0, 0, 0, 0], "default, not measured"),
            (3, [0, 0, 0, 90, 0, 0], "default, not measured"),
            (0, [100, 120, 0, 130, 0, 0], "fastest"),
            (0, [100, 99, 0, 130, 0, 0], "the best gains 1%, not 3%"),
            (1, [100, 50, 0, 49, 0, 0], "compressing gains 2%, not 3%"),
            (3, [100, 0, 0, 50, 49, 0], "another gains 2%, not 3%"),
            (3, [100, 40, 0, 50, 60, 0], "fastest within limits"),
            (0, [100, 40, 0, 50, 60, 0], "fastest within limits"),
            (4, [100, 60, 0, 50, 40, 0], "fastest"),
        ] {
            assert_eq!(because(way, &us(times)), reason, "{way} {times:?}");
        }
    }
}

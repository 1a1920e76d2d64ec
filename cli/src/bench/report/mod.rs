//! What came out: every median, what is wrong, and the file that says so.
//!
//! [`compare`] makes of it what NCCL and the shim take beside each other, [`tables`] what is shown.

mod compare;
mod tables;

use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use self::compare::crossovers;
pub use self::compare::{Comparison, Crossover, median};
pub use self::tables::name;
use super::Way;
use super::bandwidth::Bandwidth;
use super::kernels::Speeds;
use super::measure::{Check, Measured, Route, Task};
use crate::Bytes;
use crate::client::machine::Machine;
use crate::client::rank::Dtype;
use crate::provenance::Provenance;

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    #[serde(flatten)]
    case: Case,
    n_bytes: usize,
    way: Way,
    round: usize,
    /// Median of the batches.
    us: f64,
    #[serde(flatten)]
    bandwidth: Bandwidth,
    /// Microseconds of one all-reduce by batch, of the slowest rank.
    batches_us: Vec<f64>,
    per_batch: usize,
    /// What the results were compared with.
    checked: &'static str,
    /// Whether the shim compressed, or summed exactly; false also for the real NCCL.
    compressed: bool,
    /// Which of it, or that it forwarded.
    route: Option<Route>,
}

/// What a table is about.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Case {
    world: usize,
    dtype: Dtype,
    graph: bool,
}

/// The whole run.
#[derive(Debug, Serialize)]
pub struct BenchReport {
    command: Vec<String>,
    #[serde(flatten)]
    provenance: Provenance,
    /// Whether the times mean nothing.
    pub(super) simulated: bool,
    pub(super) gpus: Vec<String>,
    cuda_driver: u32,
    pub(super) nccl: u32,
    /// Whether ranks were processes; otherwise threads.
    pub(super) processes: bool,
    pub(super) rounds: usize,
    started_unix_s: u64,
    finished_unix_s: u64,
    measurements: Vec<Measurement>,
    /// Of the kernels alone.
    pub kernels: Option<Speeds>,
    /// What is wrong.
    pub problems: Vec<String>,
    /// What the libraries wrote.
    pub notes: Vec<String>,
}

/// A report with what follows from it.
#[derive(Serialize)]
pub struct Summarized<'a> {
    #[serde(flatten)]
    pub(super) report: &'a BenchReport,
    pub(super) comparisons: Vec<Comparison>,
    crossovers: Vec<Crossover>,
}

/// What another run found out, as far as it is of use later.
#[derive(Debug, Serialize, Deserialize)]
pub struct Earlier {
    simulated: bool,
    gpus: Vec<String>,
    crossovers: Vec<Crossover>,
}

/// Reads a file that a run has written.
pub fn earlier(path: &Path) -> Result<Earlier> {
    let json = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&json)
        .with_context(|| format!("{} is not what flashcomm bench --json writes", path.display()))
}

impl Measurement {
    /// Of the ranks' answers.
    pub fn of(world: usize, way: &Way, round: usize, task: &Task, answers: &[Measured]) -> Self {
        let slowest = |batch: usize| answers.iter().map(|answer| answer.us[batch]).fold(0.0, f64::max);
        let batches_us: Vec<f64> = (0..task.batches).map(slowest).collect();
        let us = median(&batches_us);
        let route = answers[0].route.filter(|route| answers.iter().all(|answer| answer.route == Some(*route)));
        Measurement {
            case: Case { world, dtype: task.dtype, graph: task.graph },
            n_bytes: task.n_bytes,
            way: way.clone(),
            round,
            us,
            bandwidth: Bandwidth::of(world, task.n_bytes, us),
            batches_us,
            per_batch: answers[0].per_batch,
            checked: match task.check {
                Check::No => "no",
                Check::SameBits => "same bits",
                Check::Reference(_) if answers.iter().all(|answer| answer.reference.is_none()) => "same bits",
                Check::Reference(_) => "reference",
            },
            compressed: matches!(route, Some(Route::Exact | Route::Compressed)),
            route,
        }
    }
}

/// What is wrong with the ranks' results.
fn wrong(answers: &[Measured], way: &Way, must_compress: bool) -> Option<&'static str> {
    let first = answers[0].hashes;
    if let Some([before, after]) = first {
        if before != after {
            return Some("the result after the measurement is another than before it");
        }
        if answers.iter().any(|answer| answer.hashes != first) {
            return Some("the ranks hold different results");
        }
        if answers.iter().filter_map(|answer| answer.reference).any(|reference| reference != before) {
            return Some("the result is not that of the specification");
        }
    }
    let forwarded = matches!(way, Way::Flashcomm { .. }) && answers.iter().any(|answer| answer.forwarded > 0);
    (forwarded && must_compress).then_some("the shim forwarded it; FLASHCOMM_LOG=info says why")
}

impl BenchReport {
    /// An empty one.
    pub fn new(machine: &Machine, processes: bool, rounds: usize) -> Self {
        let now = SystemTime::now();
        BenchReport {
            command: std::env::args().collect(),
            provenance: Provenance::at(now),
            simulated: machine.is_simulated(),
            gpus: machine.gpus.clone(),
            cuda_driver: machine.driver,
            nccl: machine.nccl_version,
            processes,
            rounds,
            started_unix_s: unix_s(now),
            finished_unix_s: 0,
            measurements: vec![],
            kernels: None,
            problems: vec![],
            notes: vec![],
        }
    }

    /// Takes a measurement; one with a wrong result counts as a problem and not as a time.
    pub fn take(&mut self, measurement: Measurement, answers: &[Measured], task: &Task, must_compress: bool) {
        match wrong(answers, &measurement.way, must_compress) {
            None => self.measurements.push(measurement),
            Some(what) => {
                let (way, dtype, at) = (&measurement.way, task.dtype, Bytes(task.n_bytes));
                self.problems.push(format!("{} ranks, {way}, {dtype} {at}: {what}", measurement.case.world));
            }
        }
    }

    /// Nothing more is measured.
    pub fn finish(&mut self) {
        self.finished_unix_s = unix_s(SystemTime::now());
    }

    /// The report and its conclusions, to be written as JSON.
    pub fn summarized(&self) -> Summarized<'_> {
        let comparisons = self.comparisons();
        Summarized { report: self, crossovers: crossovers(&comparisons), comparisons }
    }
}

/// Seconds since 1970.
fn unix_s(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_result_is_a_problem_and_no_time() {
        let way = Way::Flashcomm { bits: "4".into(), exchange: "peer".into() };
        let good = || Measured {
            us: vec![1.0],
            per_batch: 1,
            hashes: Some([5, 5]),
            reference: None,
            route: Some(Route::Compressed),
            forwarded: 0,
        };
        let with = |change: fn(&mut Measured)| {
            let mut changed = good();
            change(&mut changed);
            wrong(&[good(), changed], &way, true)
        };
        assert_eq!(with(|_| ()), None);
        assert_eq!(with(|m| m.reference = Some(5)), None);
        assert!(with(|m| m.reference = Some(6)).unwrap().contains("specification"));
        assert!(with(|m| m.hashes = Some([6, 6])).unwrap().contains("different"));
        assert!(with(|m| m.forwarded = 1).unwrap().contains("forwarded"));
        let changing = Measured { hashes: Some([5, 6]), ..good() };
        assert!(wrong(&[changing], &way, true).unwrap().contains("after"));
    }
}

//! What came out: every median, the comparison, and the tables.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::kernels::Speeds;
use super::measure::{Check, Measured, Task};
use super::{Way, unix_s};
use crate::client::machine::Machine;
use crate::client::rank::Dtype;
use crate::{Bytes, table};

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Record {
    #[serde(flatten)]
    case: Case,
    n_bytes: usize,
    way: Way,
    round: usize,
    /// Median of the batches.
    us: f64,
    /// Microseconds of one all-reduce by batch, of the slowest rank.
    batches_us: Vec<f64>,
    per_batch: usize,
    /// What the results were compared with.
    checked: &'static str,
    /// Whether the shim compressed; false also for the real NCCL.
    compressed: bool,
}

/// What a table is about.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub(super) struct Case {
    world: usize,
    dtype: Dtype,
    graph: bool,
}

/// A size of a case, over all rounds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Comparison {
    #[serde(flatten)]
    pub case: Case,
    pub n_bytes: usize,
    /// Median of the rounds at the best cap.
    pub nccl_us: Option<f64>,
    nccl_max_ctas: Option<u32>,
    /// By the shim's ways.
    pub flashcomm: Vec<Compared>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Compared {
    pub way: Way,
    pub us: f64,
    /// NCCL's time over ours: above 1 the shim is faster.
    pub ratio: Option<f64>,
    compressed: bool,
}

/// From where on a way is never slower.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Crossover {
    #[serde(flatten)]
    case: Case,
    way: Way,
    /// `None`: it is slower at the largest size.
    from_bytes: Option<usize>,
}

/// The whole run.
#[derive(Debug, Serialize)]
pub struct Report {
    command: Vec<String>,
    flashcomm: &'static str,
    /// Whether the times mean nothing.
    pub(super) simulated: bool,
    pub(super) gpus: Vec<String>,
    cuda_driver: u32,
    pub(super) nccl: u32,
    /// Whether ranks were processes; otherwise threads.
    pub(super) processes: bool,
    pub(super) rounds: usize,
    started_unix_s: u64,
    /// Set at the end.
    pub finished_unix_s: u64,
    measurements: Vec<Record>,
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
    pub(super) report: &'a Report,
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

impl Earlier {
    /// From where on each way was never slower.
    pub fn in_words(&self, file: &Path) -> String {
        let on = if self.simulated { "the simulator: the times mean nothing".into() } else { self.gpus.join(", ") };
        format!("measured ({}, on {on}):\n{}", file.display(), in_table(&self.crossovers).trim_fmt())
    }
}

/// The middle one, or the mean of the two in the middle.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

impl Record {
    /// Of the ranks' answers.
    pub fn of(world: usize, way: &Way, round: usize, task: &Task, answers: &[Measured]) -> Self {
        let slowest = |batch: usize| answers.iter().map(|answer| answer.us[batch]).fold(0.0, f64::max);
        let batches_us: Vec<f64> = (0..task.batches).map(slowest).collect();
        Record {
            case: Case { world, dtype: task.dtype, graph: task.graph },
            n_bytes: task.n_bytes,
            way: way.clone(),
            round,
            us: median(&batches_us),
            batches_us,
            per_batch: answers[0].per_batch,
            checked: match task.check {
                Check::No => "no",
                Check::SameBits => "same bits",
                Check::Reference(_) => "reference",
            },
            compressed: answers.iter().all(|answer| answer.compressed > 0 && answer.forwarded == 0),
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

impl Report {
    /// An empty one.
    pub fn new(machine: &Machine, processes: bool, rounds: usize) -> Self {
        Report {
            command: std::env::args().collect(),
            flashcomm: env!("CARGO_PKG_VERSION"),
            simulated: machine.is_simulated(),
            gpus: machine.gpus.clone(),
            cuda_driver: machine.driver,
            nccl: machine.nccl_version,
            processes,
            rounds,
            started_unix_s: unix_s(),
            finished_unix_s: 0,
            measurements: vec![],
            kernels: None,
            problems: vec![],
            notes: vec![],
        }
    }

    /// Takes a measurement; one with a wrong result counts as a problem and not as a time.
    pub fn take(&mut self, record: Record, answers: &[Measured], task: &Task, must_compress: bool) {
        match wrong(answers, &record.way, must_compress) {
            None => self.measurements.push(record),
            Some(what) => {
                let (way, dtype, at) = (&record.way, task.dtype, Bytes(task.n_bytes));
                self.problems.push(format!("{} ranks, {way}, {dtype} {at}: {what}", record.case.world));
            }
        }
    }

    /// The report and its conclusions, to be written as JSON.
    pub fn summarized(&self) -> Summarized<'_> {
        let comparisons = self.comparisons();
        Summarized { report: self, crossovers: crossovers(&comparisons), comparisons }
    }

    fn comparisons(&self) -> Vec<Comparison> {
        // Order of first appearance is that of the arguments.
        let mut ways: Vec<&Way> = Vec::new();
        let mut rounds: BTreeMap<(Case, usize), BTreeMap<&Way, Vec<&Record>>> = BTreeMap::new();
        for record in &self.measurements {
            if !ways.contains(&&record.way) {
                ways.push(&record.way);
            }
            rounds.entry((record.case, record.n_bytes)).or_default().entry(&record.way).or_default().push(record);
        }
        let compare = |((case, n_bytes), by_way): (&(Case, usize), &BTreeMap<&Way, Vec<&Record>>)| {
            let us = |way: &Way| {
                let records = by_way.get(way)?;
                Some(median(&records.iter().map(|record| record.us).collect::<Vec<_>>()))
            };
            let best = ways.iter().filter_map(|way| match way {
                Way::Nccl { max_ctas } => Some((us(way)?, *max_ctas)),
                Way::Flashcomm { .. } => None,
            });
            let best = best.min_by(|a, b| a.0.total_cmp(&b.0));
            let flashcomm = ways.iter().filter(|way| matches!(way, Way::Flashcomm { .. })).filter_map(|way| {
                let us = us(way)?;
                let compressed = by_way[way].iter().all(|record| record.compressed);
                Some(Compared { way: (*way).clone(), us, ratio: best.map(|(nccl, _)| nccl / us), compressed })
            });
            Comparison {
                case: *case,
                n_bytes: *n_bytes,
                nccl_us: best.map(|(us, _)| us),
                nccl_max_ctas: best.and_then(|(_, ctas)| ctas),
                flashcomm: flashcomm.collect(),
            }
        };
        rounds.iter().map(compare).collect()
    }

    /// The tables.
    pub fn in_words(&self, with_crossovers: bool) -> String {
        let comparisons = self.comparisons();
        let mut text = String::new();
        let cases: BTreeSet<Case> = comparisons.iter().map(|comparison| comparison.case).collect();
        for case in cases {
            let rows: Vec<&Comparison> = comparisons.iter().filter(|comparison| comparison.case == case).collect();
            let _ = writeln!(text, "\n{}\n{}", self.title(case), in_rows(&rows).trim_fmt());
        }
        if with_crossovers && !comparisons.is_empty() {
            let _ = writeln!(text, "\n{}", in_table(&crossovers(&comparisons)).trim_fmt());
        }
        if let Some(speeds) = &self.kernels {
            let _ = writeln!(
                text,
                "\nKernels alone, {} of fp16 or bf16, bytes read and written; device copy {:.3} TB/s. Pinned host \
                 memory, both directions at once, together: copies {:.1} GB/s, a kernel {:.1} GB/s\n{}",
                Bytes(speeds.n_bytes),
                speeds.copy_tb_s,
                speeds.host_link.copies_gb_s,
                speeds.host_link.kernel_gb_s,
                of_kernels(speeds).trim_fmt()
            );
        }
        if self.simulated {
            text.push_str("\nSimulated: these times are those of a CPU and mean nothing.\n");
        }
        self.notes.iter().for_each(|note| _ = writeln!(text, "note: {note}"));
        text
    }

    fn title(&self, case: Case) -> String {
        let kind = if self.processes { "processes" } else { "threads" };
        format!(
            "{} ({kind}): microseconds of an all-reduce, median of {} round(s); x: NCCL / flashcomm",
            name(case),
            self.rounds
        )
    }
}

/// A case in words.
pub(super) fn name(Case { world, dtype, graph }: Case) -> String {
    format!("{world} ranks, {dtype}{}", if graph { ", in a graph" } else { "" })
}

fn in_rows(rows: &[&Comparison]) -> comfy_table::Table {
    let mut ways: Vec<&Way> = Vec::new();
    for compared in rows.iter().flat_map(|row| &row.flashcomm) {
        if !ways.contains(&&compared.way) {
            ways.push(&compared.way);
        }
    }
    let mut header = vec!["size".to_string(), "NCCL".into(), "CTAs".into()];
    header.extend(ways.iter().flat_map(|way| [way.to_string(), "x".into()]));
    let mut table = table(&header);
    for row in rows {
        let number = |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{value:.digits$}"));
        let mut cells = vec![Bytes(row.n_bytes).to_string(), number(row.nccl_us, 1)];
        cells.push(row.nccl_max_ctas.map_or("-".into(), |ctas| ctas.to_string()));
        for way in &ways {
            let compared = row.flashcomm.iter().find(|compared| compared.way == **way);
            let forwarded = if compared.is_some_and(|compared| !compared.compressed) { " (forwarded)" } else { "" };
            cells.push(number(compared.map(|compared| compared.us), 1) + forwarded);
            cells.push(number(compared.and_then(|compared| compared.ratio), 2));
        }
        table.add_row(cells);
    }
    table
}

fn of_kernels(speeds: &Speeds) -> comfy_table::Table {
    let mut table = table(&["kernel", "dtype", "bits", "code", "us", "TB/s", "of copy"]);
    for speed in &speeds.kernels {
        table.add_row([
            speed.kernel.clone(),
            speed.dtype.clone(),
            speed.bits.to_string(),
            speed.code.clone(),
            format!("{:.1}", speed.us),
            format!("{:.3}", speed.tb_s),
            format!("{:.3}", speed.of_copy),
        ]);
    }
    table
}

/// For every case and way: the smallest measured size from which on no ratio is below 1.
fn in_table(crossovers: &[Crossover]) -> comfy_table::Table {
    let mut table = table(&["", "never slower from"]);
    for Crossover { case, way, from_bytes } in crossovers {
        let from = from_bytes.map_or("-".into(), |n_bytes| Bytes(n_bytes).to_string());
        table.add_row([format!("{}: {way}", name(*case)), from]);
    }
    table
}

fn crossovers(comparisons: &[Comparison]) -> Vec<Crossover> {
    let mut found: Vec<Crossover> = Vec::new();
    // By case, and by size within it.
    for Comparison { case, n_bytes, flashcomm, .. } in comparisons {
        for Compared { way, ratio, .. } in flashcomm {
            let at = found.iter().position(|crossover| crossover.case == *case && crossover.way == *way);
            let at = at.unwrap_or_else(|| {
                found.push(Crossover { case: *case, way: way.clone(), from_bytes: None });
                found.len() - 1
            });
            let from_bytes = &mut found[at].from_bytes;
            *from_bytes = match ratio {
                Some(ratio) if *ratio >= 1.0 => from_bytes.or(Some(*n_bytes)),
                _ => None,
            };
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const CASE: Case = Case { world: 2, dtype: Dtype::Fp16, graph: false };

    fn flashcomm() -> Way {
        Way::Flashcomm { bits: "4".into(), exchange: "peer".into() }
    }

    fn report(records: Vec<(Way, usize, usize, f64)>) -> Report {
        let record = |(way, n_bytes, round, us)| Record {
            case: CASE,
            n_bytes,
            way,
            round,
            us,
            batches_us: vec![us],
            per_batch: 1,
            checked: "no",
            compressed: true,
        };
        Report {
            command: vec![],
            flashcomm: "",
            simulated: true,
            gpus: vec![],
            cuda_driver: 0,
            nccl: 0,
            processes: false,
            rounds: 1,
            started_unix_s: 0,
            finished_unix_s: 0,
            measurements: records.into_iter().map(record).collect(),
            kernels: None,
            problems: vec![],
            notes: vec![],
        }
    }

    #[test]
    fn nccl_counts_at_its_best_cap_by_the_median_of_rounds() {
        let cap = |ctas| Way::Nccl { max_ctas: Some(ctas) };
        let mut records: Vec<_> = [9.0, 1.0, 8.0].into_iter().enumerate().map(|(i, us)| (cap(16), 64, i, us)).collect();
        records.extend([7.0, 6.0, 100.0].into_iter().enumerate().map(|(i, us)| (cap(32), 64, i, us)));
        records.extend([3.5, 3.5, 3.5].into_iter().enumerate().map(|(i, us)| (flashcomm(), 64, i, us)));
        let comparison = &report(records).comparisons()[0];
        assert_eq!((comparison.nccl_us, comparison.nccl_max_ctas), (Some(7.0), Some(32)));
        assert_eq!(comparison.flashcomm[0].ratio, Some(2.0));
    }

    #[test]
    fn the_crossover_is_where_it_stays_faster() {
        let nccl = || Way::Nccl { max_ctas: None };
        let times = |ours: [f64; 4]| {
            let of = |(i, us): (usize, f64)| [(nccl(), 1 << i, 0, 10.0), (flashcomm(), 1 << i, 0, us)];
            let report = report(ours.into_iter().enumerate().flat_map(of).collect());
            crossovers(&report.comparisons())[0].from_bytes
        };
        assert_eq!(times([9.0, 11.0, 10.0, 5.0]), Some(4));
        assert_eq!(times([9.0, 9.0, 9.0, 9.0]), Some(1));
        assert_eq!(times([9.0, 9.0, 9.0, 11.0]), None);
    }

    #[test]
    fn a_wrong_result_is_a_problem_and_no_time() {
        let good = || Measured {
            us: vec![1.0],
            per_batch: 1,
            hashes: Some([5, 5]),
            reference: None,
            compressed: 1,
            forwarded: 0,
        };
        let with = |change: fn(&mut Measured)| {
            let mut changed = good();
            change(&mut changed);
            wrong(&[good(), changed], &flashcomm(), true)
        };
        assert_eq!(with(|_| ()), None);
        assert_eq!(with(|m| m.reference = Some(5)), None);
        assert!(with(|m| m.reference = Some(6)).unwrap().contains("specification"));
        assert!(with(|m| m.hashes = Some([6, 6])).unwrap().contains("different"));
        assert!(with(|m| m.forwarded = 1).unwrap().contains("forwarded"));
        let changing = Measured { hashes: Some([5, 6]), ..good() };
        assert!(wrong(&[changing], &flashcomm(), true).unwrap().contains("after"));
    }

    #[test]
    fn medians() {
        assert_eq!((median(&[3.0, 1.0, 2.0]), median(&[4.0, 1.0])), (2.0, 2.5));
    }
}

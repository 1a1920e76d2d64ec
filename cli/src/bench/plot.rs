//! The picture of a run, of this one or of one whose JSON is at hand: time and speed-up over size, NCCL beside it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::Way;
use super::report::{Case, Comparison, Summarized, name};
use crate::Bytes;
use crate::client::machine::version;
use crate::plot::{Axis, BLACK, COLORS, Line, Look, Mark, Panel, Picture, decades, span};

/// What is plotted of a report.
#[derive(Deserialize)]
pub struct Plotted {
    simulated: bool,
    gpus: Vec<String>,
    nccl: u32,
    processes: bool,
    rounds: usize,
    comparisons: Vec<Comparison>,
}

impl From<Summarized<'_>> for Plotted {
    fn from(Summarized { report, comparisons, .. }: Summarized<'_>) -> Self {
        Plotted {
            simulated: report.simulated,
            gpus: report.gpus.clone(),
            nccl: report.nccl,
            processes: report.processes,
            rounds: report.rounds,
            comparisons,
        }
    }
}

impl Plotted {
    /// From the file of `--json`.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is not what flashcomm bench --json writes", path.display()))
    }

    /// Draws it: a row for each number of ranks, type and way of issuing.
    pub fn write(&self, path: &Path) -> Result<()> {
        let looks = Looks::of(&self.comparisons);
        let cases: BTreeSet<Case> = self.comparisons.iter().map(|comparison| comparison.case).collect();
        let panels = cases.into_iter().flat_map(|case| {
            let of_case: Vec<&Comparison> = self.comparisons.iter().filter(|other| other.case == case).collect();
            [times(case, &of_case, &looks), ratios(case, &of_case, &looks)]
        });
        let kind = if self.processes { "processes" } else { "threads" };
        let place = match (self.simulated, self.gpus.as_slice()) {
            (true, _) => "the simulator: the times mean nothing".into(),
            (_, []) => "no GPU".into(),
            (_, [one]) => one.clone(),
            (_, [first, ..]) => format!("{} x {first}", self.gpus.len()),
        };
        let picture = Picture {
            title: "Sum all-reduce: flashcomm beside NCCL".into(),
            subtitle: format!(
                "{place}; NCCL {}; ranks are {kind}; medians of {} round(s)",
                version(self.nccl),
                self.rounds
            ),
            panels: panels.collect(),
            columns: 2,
            panel_px: (520, 340),
        };
        picture.write(path)
    }
}

/// A color for each width, a mark for each exchange.
struct Looks(BTreeMap<Way, Look>);

impl Looks {
    fn of(comparisons: &[Comparison]) -> Self {
        let (mut widths, mut exchanges): (Vec<&str>, Vec<&str>) = (Vec::new(), Vec::new());
        let mut looks = BTreeMap::new();
        for compared in comparisons.iter().flat_map(|comparison| &comparison.flashcomm) {
            let Way::Flashcomm { bits, exchange } = &compared.way else { continue };
            let color = COLORS[place(&mut widths, bits) % COLORS.len()];
            let mark = [Mark::Circle, Mark::Triangle, Mark::Square][place(&mut exchanges, exchange) % 3];
            looks.insert(compared.way.clone(), Look { color, mark });
        }
        Looks(looks)
    }
}

/// Where `item` stands among those seen so far.
fn place<'a>(seen: &mut Vec<&'a str>, item: &'a str) -> usize {
    seen.iter().position(|other| *other == item).unwrap_or_else(|| {
        seen.push(item);
        seen.len() - 1
    })
}

fn lines(of_case: &[&Comparison], looks: &Looks, value: fn(&Comparison, usize) -> Option<f64>) -> Vec<Line> {
    let mut lines: Vec<(&Way, Line)> = Vec::new();
    for comparison in of_case {
        for (i, compared) in comparison.flashcomm.iter().enumerate() {
            let Some(value) = value(comparison, i) else { continue };
            let at = lines.iter().position(|(way, _)| **way == compared.way).unwrap_or_else(|| {
                let (name, look) = (format!("flashcomm {}", compared.way), looks.0[&compared.way]);
                lines.push((&compared.way, Line { name, look, points: vec![], labels: vec![] }));
                lines.len() - 1
            });
            lines[at].1.points.push((comparison.n_bytes as f64, value));
        }
    }
    lines.into_iter().map(|(_, line)| line).collect()
}

fn sizes(of_case: &[&Comparison]) -> Axis {
    let all: Vec<f64> = of_case.iter().map(|comparison| comparison.n_bytes as f64).collect();
    let step = all.len().div_ceil(10).max(1);
    // The largest one always has a label.
    let ticks = all.iter().rev().step_by(step).rev().copied().collect();
    Axis {
        label: "bytes that each rank sums".into(),
        ticks,
        text: |n_bytes| in_units(n_bytes.round() as usize),
        log: true,
    }
}

/// Written as on the command line, rounded where that is long.
fn in_units(n_bytes: usize) -> String {
    let exact = Bytes(n_bytes).to_string();
    match n_bytes {
        _ if exact.len() <= 5 => exact,
        0..0x10_0000 => format!("{:.0}K", n_bytes as f64 / 1024.0),
        _ => format!("{:.0}M", n_bytes as f64 / f64::from(1 << 20)),
    }
}

fn times(case: Case, of_case: &[&Comparison], looks: &Looks) -> Panel {
    let nccl = of_case.iter().filter_map(|comparison| Some((comparison.n_bytes as f64, comparison.nccl_us?)));
    let look = Look { color: BLACK, mark: Mark::Cross };
    let mut all = vec![Line { name: "NCCL, its best".into(), look, points: nccl.collect(), labels: vec![] }];
    all.retain(|line| !line.points.is_empty());
    all.extend(lines(of_case, looks, |comparison, i| Some(comparison.flashcomm[i].us)));
    let us = || all.iter().flat_map(|line| &line.points).map(|(_, us)| *us);
    let (min, max) = span(us());
    let y = Axis {
        label: "microseconds".into(),
        ticks: decades(us(), max / min < 500.0),
        text: |us| us.to_string(),
        log: true,
    };
    Panel { title: format!("{}: time", name(case)), x: sizes(of_case), y, level: None, lines: all }
}

fn ratios(case: Case, of_case: &[&Comparison], looks: &Looks) -> Panel {
    let all = lines(of_case, looks, |comparison, i| comparison.flashcomm[i].ratio);
    let ratios = all.iter().flat_map(|line| &line.points).map(|(_, ratio)| *ratio);
    let (min, max) = span(ratios.chain([1.0]));
    const TICKS: [f64; 16] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0];
    let first = TICKS.iter().rposition(|tick| *tick <= min).unwrap_or(0);
    let last = TICKS.iter().position(|tick| *tick >= max).unwrap_or(TICKS.len() - 1);
    // One beyond 1 on each side, so that it is seen on which side a line lies.
    let ticks = TICKS[first.min(7)..=last.max(9)].to_vec();
    let y = Axis { label: "NCCL's time / flashcomm's".into(), ticks, text: |ratio| format!("{ratio}x"), log: true };
    Panel { title: format!("{}: speed-up", name(case)), x: sizes(of_case), y, level: Some(1.0), lines: all }
}

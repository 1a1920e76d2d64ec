//! What is shown of a run: for each case a table by size, then crossovers and the kernels alone.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use super::compare::{Compared, Comparison, Crossover, crossovers};
use super::{BenchReport, Case, Earlier};
use crate::bench::kernels::Speeds;
use crate::bench::measure::Route;
use crate::bench::{EXACT, Way};
use crate::{Bytes, table};

impl BenchReport {
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
            let _ = writeln!(text, "\n{}", of_crossovers(&crossovers(&comparisons)).trim_fmt());
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
            "{} ({kind}): microseconds of an all-reduce, median of {} round(s); x: NCCL / flashcomm\n\
             below: algorithm/bus bandwidth in GB/s as nccl-tests counts them, of the bytes before compression",
            name(case),
            self.rounds
        )
    }
}

impl Earlier {
    /// From where on each way was never slower.
    pub fn in_words(&self, file: &Path) -> String {
        let on = if self.simulated { "the simulator: the times mean nothing".into() } else { self.gpus.join(", ") };
        format!("measured ({}, on {on}):\n{}", file.display(), of_crossovers(&self.crossovers).trim_fmt())
    }
}

/// A case in words.
pub fn name(Case { world, dtype, graph }: Case) -> String {
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
        let mut cells = vec![Bytes(row.n_bytes).to_string()];
        cells.push(time(row.nccl_us, row.nccl_algbw_gb_s.zip(row.nccl_busbw_gb_s)));
        cells.push(row.nccl_max_ctas.map_or("-".into(), |ctas| ctas.to_string()));
        for way in &ways {
            let compared = row.flashcomm.iter().find(|compared| compared.way == **way);
            let bandwidth = compared.and_then(|compared| compared.bandwidth);
            let of_way = time(
                compared.map(|compared| compared.us),
                bandwidth.map(|bandwidth| (bandwidth.algbw_gb_s, bandwidth.busbw_gb_s)),
            );
            let mark = match compared {
                Some(Compared { compressed: false, .. }) => " (forwarded)",
                Some(Compared { route: Some(Route::Exact), way: Way::Flashcomm { bits, .. }, .. }) if bits != EXACT => {
                    " (exact)"
                }
                _ => "",
            };
            cells.push(of_way.replacen('\n', &format!("{mark}\n"), 1));
            cells.push(number(compared.and_then(|compared| compared.ratio), 2));
        }
        table.add_row(cells);
    }
    table
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".into(), |value| format!("{value:.digits$}"))
}

/// Microseconds, and algorithm and bus bandwidth below.
fn time(us: Option<f64>, bandwidth: Option<(f64, f64)>) -> String {
    let bandwidth = bandwidth.map_or(String::new(), |(algbw, busbw)| format!("{algbw:.2}/{busbw:.2}"));
    format!("{}\n{bandwidth}", number(us, 1))
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

fn of_crossovers(crossovers: &[Crossover]) -> comfy_table::Table {
    let mut table = table(&["", "never slower from"]);
    for Crossover { case, way, from_bytes } in crossovers {
        let from = from_bytes.map_or("-".into(), |n_bytes| Bytes(n_bytes).to_string());
        table.add_row([format!("{}: {way}", name(*case)), from]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::compare::tests::{flashcomm, report};

    #[test]
    fn bandwidths_are_below_the_times() {
        let nccl = Way::Nccl { max_ctas: Some(32) };
        let text = report(vec![(nccl, 1_000_000, 0, 20.0), (flashcomm(), 1_000_000, 0, 12.5)]).in_words(false);
        let mut lines = text.lines().skip_while(|line| !line.trim().starts_with("1000000"));
        let mut cells = || lines.next().unwrap().split_whitespace().collect::<Vec<_>>();
        assert_eq!(cells(), ["1000000", "20.0", "32", "12.5", "1.60"], "{text}");
        assert_eq!(cells(), ["50.00/75.00", "80.00/120.00"], "{text}"); // 4 ranks: 1.5 times as much on the bus
    }
}

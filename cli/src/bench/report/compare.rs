//! NCCL and the shim beside each other: by size the medians of the rounds, and from where on the
//! shim is never slower.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{BenchReport, Case, Measurement};
use crate::bench::Way;
use crate::bench::bandwidth::Bandwidth;
use crate::bench::measure::Route;

/// A size of a case, over all rounds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Comparison {
    #[serde(flatten)]
    pub case: Case,
    pub n_bytes: usize,
    /// Median of the rounds at the best cap.
    pub nccl_us: Option<f64>,
    /// As [`Bandwidth`] has it; files of before November 2026 have none.
    pub nccl_algbw_gb_s: Option<f64>,
    pub nccl_busbw_gb_s: Option<f64>,
    pub nccl_max_ctas: Option<u32>,
    /// By the shim's ways.
    pub flashcomm: Vec<Compared>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Compared {
    pub way: Way,
    pub us: f64,
    /// As for NCCL.
    #[serde(flatten)]
    pub bandwidth: Option<Bandwidth>,
    /// NCCL's time over ours: above 1 the shim is faster.
    pub ratio: Option<f64>,
    pub compressed: bool,
    /// What the shim did; files of before December 2026 do not say it.
    #[serde(default)]
    pub route: Option<Route>,
}

/// From where on a way is never slower.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Crossover {
    #[serde(flatten)]
    pub(super) case: Case,
    pub(super) way: Way,
    /// `None`: it is slower at the largest size.
    pub(super) from_bytes: Option<usize>,
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

impl BenchReport {
    /// Of all that was measured.
    pub(super) fn comparisons(&self) -> Vec<Comparison> {
        // Order of first appearance is that of the arguments.
        let mut ways: Vec<&Way> = Vec::new();
        let mut rounds: BTreeMap<(Case, usize), BTreeMap<&Way, Vec<&Measurement>>> = BTreeMap::new();
        for record in &self.measurements {
            if !ways.contains(&&record.way) {
                ways.push(&record.way);
            }
            rounds.entry((record.case, record.n_bytes)).or_default().entry(&record.way).or_default().push(record);
        }
        let compare = |((case, n_bytes), by_way): (&(Case, usize), &BTreeMap<&Way, Vec<&Measurement>>)| {
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
                let bandwidth = Some(Bandwidth::of(case.world, *n_bytes, us));
                let ratio = best.map(|(nccl, _)| nccl / us);
                let route = by_way[way][0].route.filter(|route| by_way[way].iter().all(|of| of.route == Some(*route)));
                Some(Compared { way: (*way).clone(), us, bandwidth, ratio, compressed, route })
            });
            let of_nccl = best.map(|(us, _)| Bandwidth::of(case.world, *n_bytes, us));
            Comparison {
                case: *case,
                n_bytes: *n_bytes,
                nccl_us: best.map(|(us, _)| us),
                nccl_algbw_gb_s: of_nccl.map(|of_nccl| of_nccl.algbw_gb_s),
                nccl_busbw_gb_s: of_nccl.map(|of_nccl| of_nccl.busbw_gb_s),
                nccl_max_ctas: best.and_then(|(_, ctas)| ctas),
                flashcomm: flashcomm.collect(),
            }
        };
        rounds.iter().map(compare).collect()
    }
}

/// For every case and way: the smallest measured size from which on no ratio is below 1.
pub fn crossovers(comparisons: &[Comparison]) -> Vec<Crossover> {
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
pub(super) mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::client::rank::Dtype;
    use crate::provenance::Provenance;

    const CASE: Case = Case { world: 4, dtype: Dtype::Fp16, graph: false };

    pub fn flashcomm() -> Way {
        Way::Flashcomm { bits: "4".into(), exchange: "peer".into() }
    }

    /// Of ways, sizes, rounds and microseconds.
    pub fn report(records: Vec<(Way, usize, usize, f64)>) -> BenchReport {
        let measurement = |(way, n_bytes, round, us)| Measurement {
            case: CASE,
            n_bytes,
            way,
            round,
            us,
            bandwidth: Bandwidth::of(CASE.world, n_bytes, us),
            batches_us: vec![us],
            per_batch: 1,
            checked: "no",
            compressed: true,
            route: None,
        };
        BenchReport {
            command: vec![],
            provenance: Provenance::at(SystemTime::UNIX_EPOCH),
            simulated: true,
            gpus: vec![],
            cuda_driver: 0,
            nccl: 0,
            processes: false,
            rounds: 1,
            started_unix_s: 0,
            finished_unix_s: 0,
            measurements: records.into_iter().map(measurement).collect(),
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
    fn medians() {
        assert_eq!((median(&[3.0, 1.0, 2.0]), median(&[4.0, 1.0])), (2.0, 2.5));
    }
}

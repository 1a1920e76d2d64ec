//! Pure: what was measured, and how sums go by it.

use std::fmt::Write;

use crate::config::ExchangeKind;
use crate::verdict::{Table, Way, Ways};

/// Bytes of the sums that are measured.
pub(crate) const SIZES: [u64; 7] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20];

/// What is measured at each size, in the order of its figures.
pub(crate) const WAYS: [Way; 6] = Way::ALL;

/// Nanoseconds of one sum at one size, by [`WAYS`]; 0 where that was not measured.
pub(crate) type Row = [u32; WAYS.len()];

/// What is ours must take so many hundredths of the time of the real NCCL at most, and what loses
/// something the same of what loses nothing: a smaller gain may be noise.
const WORTH_IT: u64 = 97;

/// What was measured of an exchange, the slowest rank's: a row for each of the first of [`SIZES`].
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Figures(pub Vec<Row>);

/// What bounds a choice, whatever was measured.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Bounds {
    /// `FLASHCOMM_MIN_BYTES`.
    pub compress_min: Option<u64>,
    /// `FLASHCOMM_EXACT_MAX_BYTES`.
    pub exact_max: Option<u64>,
    /// Bytes for which there are mailboxes.
    pub exact_room: u64,
}

impl Figures {
    /// Nanoseconds of a sum of so many bytes: on straight lines between the sizes measured, and on from
    /// the first two and the last two. `None` where that is not known: a way that was not measured at
    /// the last sizes, as exact sums are not, is not known to go there.
    pub(crate) fn nanoseconds(&self, way: Way, n_bytes: u64) -> Option<u64> {
        let i = WAYS.iter().position(|other| *other == way)?;
        let measured = SIZES.iter().zip(&self.0).filter(|(_, row)| row[i] != 0);
        let points: Vec<(i128, i128)> = measured.map(|(size, row)| ((*size).into(), row[i].into())).collect();
        let end = self.0.iter().rposition(|row| row[i] != 0).filter(|end| end + 1 < self.0.len());
        if end.is_some_and(|end| n_bytes >= SIZES[end + 1]) {
            return None;
        }
        let n_bytes = &i128::from(n_bytes);
        let above = points.iter().position(|(size, _)| *size >= *n_bytes).unwrap_or(points.len());
        let last = above.clamp(1, points.len().max(2) - 1);
        let ((from, start), (to, end)) = (points.get(last - 1)?, points.get(last)?);
        // Beyond what was measured, times that fall would fall below nothing.
        let least = if (*from..=*to).contains(n_bytes) { i128::MIN } else { 0 };
        let rise = (end - start).max(least) * (n_bytes - from) / (to - from);
        Some(u64::try_from((start + rise).max(1)).unwrap_or(u64::MAX))
    }

    /// Nanoseconds of a sum of so many bytes the slowest way, as far as that can be told; 0: nothing is known.
    pub(crate) fn slowest(&self, n_bytes: u64) -> u64 {
        let last = self.0.last().and_then(|row| row.iter().max()).map_or(0, |ns| u64::from(*ns));
        WAYS.iter().filter_map(|way| self.nanoseconds(*way, n_bytes)).max().unwrap_or(last)
    }

    /// How a sum goes, and what that takes.
    fn best(&self, n_bytes: u64, is_coded: bool, bounds: &Bounds) -> (Way, Option<u64>) {
        let within = |way: &Way| match way {
            Way::Forward => true,
            Way::Compressed | Way::Pulled | Way::Copied => {
                is_coded && bounds.compress_min.is_none_or(|min| n_bytes >= min)
            }
            _ => n_bytes <= bounds.exact_max.unwrap_or(u64::MAX).min(bounds.exact_room),
        };
        let is_set = |way: Way| match way {
            Way::Compressed => bounds.compress_min.is_some(),
            Way::Forward | Way::Pulled | Way::Copied => false,
            _ => bounds.exact_max.is_some(),
        };
        let mut best = (Way::Forward, self.nanoseconds(Way::Forward, n_bytes));
        // Those that lose nothing first: of one another they need not be better by more than nothing.
        for way in WAYS.into_iter().filter(within).skip(1) {
            let (last, fastest) = best;
            let ns = self.nanoseconds(way, n_bytes);
            let share = if last.is_exact() && way.is_exact() { 100 } else { WORTH_IT };
            let is_faster = matches!((ns, fastest), (Some(ns), Some(fastest)) if ns < fastest * share / 100);
            // What somebody has set holds, however fast it is.
            let outdoes = is_set(way) && !(last.is_exact() && way.is_exact());
            if is_faster || outdoes {
                best = (way, ns.or(fastest));
            }
        }
        best
    }

    /// How all sums go.
    pub(crate) fn ways(&self, bounds: &Bounds) -> Ways {
        let table = |is_coded| Table::new(starts(bounds), |n_bytes| self.best(n_bytes, is_coded, bounds).0);
        Ways { coded: table(true), plain: table(false) }
    }

    /// How long the sums of all sizes measured take, each in thousandths of what they take over the
    /// real NCCL: what compares exchanges.
    fn total(&self, bounds: &Bounds) -> u64 {
        let share = |size: &u64| match (self.best(*size, true, bounds).1, self.nanoseconds(Way::Forward, *size)) {
            (Some(ns), Some(nccl)) => ns * 1000 / nccl,
            _ => 1000,
        };
        SIZES.iter().map(share).sum()
    }

    /// The size at which something of ours comes nearest to the real NCCL, with the nanoseconds of both.
    pub(crate) fn nearest(&self) -> Option<(u64, u32, u32)> {
        let rows = SIZES.iter().zip(&self.0).filter_map(|(size, row)| {
            let ours = row[1..].iter().copied().filter(|ns| *ns != 0).min()?;
            Some((*size, ours, row[0])).filter(|_| row[0] != 0)
        });
        rows.min_by_key(|(_, ours, nccl)| u64::from(*ours) * 1000 / u64::from(*nccl))
    }

    /// Each size with its microseconds, for the log.
    pub(crate) fn in_words(&self) -> String {
        let mut text =
            String::from("microseconds over NCCL / exact, one hop / two hops / compressed / pulled / copied:");
        for (size, row) in SIZES.iter().zip(&self.0) {
            let _ = write!(text, " {size} bytes");
            for (i, ns) in row.iter().enumerate() {
                let separator = if i == 0 { ' ' } else { '/' };
                let _ = match ns {
                    0 => write!(text, "{separator}-"),
                    ns => write!(text, "{separator}{}.{}", ns / 1000, ns / 100 % 10),
                };
            }
            text.push(';');
        }
        text
    }
}

/// Where a way may begin: an eighth of an octave apart, and where somebody has set that it does.
fn starts(bounds: &Bounds) -> Vec<u64> {
    let octaves = (8..34).flat_map(|octave| (8..16).map(move |eighth| (eighth << octave) >> 3));
    let ends = [bounds.exact_max, Some(bounds.exact_room)].into_iter().flatten().map(|end| end.saturating_add(1));
    let mut starts: Vec<u64> = octaves.chain(bounds.compress_min).chain(ends).collect();
    starts.sort_unstable();
    starts
}

/// What was measured of every exchange that was tried.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Measured(pub Vec<(ExchangeKind, Figures)>);

impl Measured {
    /// The least of each figure of both.
    pub(crate) fn least(mut self, other: &Self) -> Self {
        for (kind, Figures(theirs)) in &other.0 {
            let Some((_, Figures(ours))) = self.0.iter_mut().find(|(known, _)| known == kind) else {
                self.0.push((*kind, Figures(theirs.clone())));
                continue;
            };
            for (ours, theirs) in ours.iter_mut().zip(theirs) {
                for (ours, theirs) in ours.iter_mut().zip(theirs) {
                    *ours = if *ours == 0 { *theirs } else { (*ours).min(if *theirs == 0 { *ours } else { *theirs }) };
                }
            }
            if let Some(further) = theirs.get(ours.len()..) {
                ours.extend(further);
            }
        }
        self
    }

    /// Of an exchange.
    pub(crate) fn of(&self, kind: ExchangeKind) -> Option<&Figures> {
        self.0.iter().find(|(measured, _)| *measured == kind).map(|(_, figures)| figures)
    }

    /// The exchange with which all sizes together go fastest; of equal ones the one that was tried first.
    /// `bounds`: of an exchange.
    pub(crate) fn best(&self, bounds: impl Fn(ExchangeKind) -> Bounds) -> Option<ExchangeKind> {
        let total = |(kind, figures): &&(ExchangeKind, Figures)| figures.total(&bounds(*kind));
        self.0.iter().min_by_key(total).map(|(kind, _)| *kind)
    }
}

#[cfg(test)]
mod tests {
    use Way::{Compressed, ExactOneHop, ExactTwoHops, Forward, Pulled};

    use super::*;

    const FREE: Bounds = Bounds { compress_min: None, exact_max: None, exact_room: 2 << 20 };

    /// Microseconds at each size, by way: what it takes at least, and bytes a microsecond.
    fn figures(rows: usize, ways: [(u64, u64); 6]) -> Figures {
        let time = |size: u64| {
            ways.map(|(least, rate)| (size * 1000).checked_div(rate).map_or(0, |ns| (least * 1000 + ns) as u32))
        };
        Figures(SIZES.iter().take(rows).map(|size| time(*size)).collect())
    }

    #[test]
    fn each_size_goes_the_fastest_way() {
        // NCCL 10 us and 20 GB/s; one hop 3 us and 15 GB/s; two hops 6 us and 30; compressed 12 us and 60.
        let measured = figures(7, [(10, 20_000), (3, 15_000), (6, 30_000), (12, 60_000), (0, 0), (0, 0)]);
        let ways = measured.ways(&FREE);
        let entries: Vec<Way> = ways.coded.entries().iter().map(|(_, way)| *way).collect();
        assert_eq!(entries, [ExactOneHop, ExactTwoHops, Compressed]);
        // 3 + n / 15000 = 6 + n / 30000 at 90000 bytes; 6 + n / 30000 = 12 + n / 60000 at 360000.
        let starts: Vec<u64> = ways.coded.entries().iter().map(|(start, _)| *start).collect();
        assert!((80_000..100_000).contains(&starts[1]), "{starts:?}");
        assert!((340_000..430_000).contains(&starts[2]), "{starts:?}");
        assert_eq!(ways.coded.way(1 << 40), Compressed, "as far as nobody has measured");
        let mut small = measured.clone();
        small.0[5..].iter_mut().for_each(|row| row[1] = 0);
        let exact = |n_bytes| small.nanoseconds(ExactOneHop, n_bytes).map(|ns| ns / 1000);
        assert_eq!([exact(1 << 20), exact(2 << 20), exact(4 << 20)], [Some(72), Some(142), None]);
        // What is not to be compressed is exact as far as there is room.
        assert_eq!(ways.plain.exact_max(), 2 << 20);
        assert_eq!(ways.plain.compress_min(), u64::MAX);
    }

    #[test]
    fn what_gains_less_than_noise_is_not_taken() {
        let same = figures(7, [(10, 20_000), (10, 20_000), (10, 20_000), (10, 20_000), (0, 0), (0, 0)]);
        assert_eq!(same.ways(&FREE), Ways { coded: Table::new([], |_| Forward), plain: Table::new([], |_| Forward) });
        assert_eq!(same.nearest(), Some((SIZES[0], 10_204, 10_204)));
        // Compressed 1 in 50 faster than exact sums, and those much faster than NCCL.
        let close = Figures(vec![[100_000, 50_000, 0, 49_000, 0, 0]; 7]);
        assert_eq!(close.ways(&FREE).coded.way(4096), ExactOneHop, "it loses nothing");
        assert_eq!(close.ways(&FREE).coded.way(4 << 20), Compressed, "there is no room for exact ones");
        let clear = Figures(vec![[100_000, 50_000, 0, 48_000, 0, 0]; 7]);
        assert_eq!(clear.ways(&FREE).coded.way(4096), Compressed);
    }

    #[test]
    fn payloads_are_read_where_that_is_clearly_faster_than_writing_them() {
        let with = |pulled| Figures(vec![[100_000, 0, 0, 50_000, pulled, 0]; 7]).ways(&FREE).coded.way(8 << 20);
        assert_eq!([with(49_000), with(48_000), with(0)], [Compressed, Pulled, Compressed]);
        let only = Figures(vec![[100_000, 0, 0, 0, 50_000, 0]; 7]).ways(&FREE);
        assert_eq!((only.coded.way(8 << 20), only.plain.way(8 << 20)), (Pulled, Forward));
        assert_eq!(only.coded.compress_min(), 0);
        let copied = |us| Figures(vec![[100_000, 0, 0, 50_000, 0, us]; 7]).ways(&FREE).coded.way(8 << 20);
        assert_eq!([copied(49_000), copied(48_000)], [Compressed, Way::Copied]);
    }

    #[test]
    fn sizes_that_took_too_long_go_on_as_the_last_two_did() {
        let measured = figures(3, [(10, 1000), (3, 500), (0, 0), (20, 4000), (0, 0), (0, 0)]);
        assert_eq!(measured.nanoseconds(Way::Compressed, 1 << 20), Some(20_000 + (1 << 20) * 1000 / 4000));
        assert_eq!(measured.nanoseconds(Way::ExactTwoHops, 1 << 20), None);
        assert_eq!(measured.ways(&FREE).coded.way(1 << 30), Compressed);
        assert_eq!(Figures::default().ways(&FREE).coded.entries(), [(0, Forward)], "nothing was measured");
        let one = figures(1, [(10, 1000), (3, 500), (0, 0), (20, 4000), (0, 0), (0, 0)]);
        assert_eq!(one.ways(&FREE).coded.way(1 << 30), Forward, "one size tells of no other");
    }

    #[test]
    fn times_that_fall_do_so_only_where_they_were_measured() {
        let mut measured = Figures(vec![[1000; 6]; 7]);
        measured.0[3] = [9000; 6];
        let at = |n_bytes| measured.nanoseconds(Forward, n_bytes).unwrap();
        assert_eq!([at(64 << 10), at(256 << 10), at(1 << 20), at(1 << 30)], [1000, 9000, 1000, 1000]);
        assert_eq!(at(640 << 10), 5000, "half way down");
        let falling = Figures(vec![[9000; 6], [1000; 6]]);
        assert_eq!(falling.nanoseconds(Forward, 256), Some(9000));
        assert_eq!(falling.nanoseconds(Forward, 1 << 30), Some(9000), "as if it did not");
        let rising = Figures(vec![[2000; 6], [3200; 6]]);
        assert_eq!(rising.nanoseconds(Forward, 1 << 10), Some(1700), "an even rise");
    }

    #[test]
    fn what_is_set_holds_whatever_was_measured() {
        let slow = Figures(vec![[1000, 9000, 8000, 7000, 0, 0]; 7]);
        let set = Bounds { compress_min: Some(1 << 20), exact_max: Some(1000), ..FREE };
        let ways = slow.ways(&set);
        assert_eq!(ways.coded.entries(), [(0, ExactTwoHops), (1001, Forward), (1 << 20, Compressed)]);
        assert_eq!(ways.plain.entries(), [(0, ExactTwoHops), (1001, Forward)]);
        let none = Bounds { exact_max: Some(0), ..FREE };
        let fast = Figures(vec![[9000, 1000, 8000, 7000, 0, 0]; 7]);
        assert_eq!(fast.ways(&none).plain.way(4096), Forward);
    }

    #[test]
    fn what_disturbs_a_measurement_makes_it_slower_and_so_the_least_counts() {
        let of = |rows: &[Row]| Measured(vec![(ExchangeKind::Peer, Figures(rows.to_vec()))]);
        let first = of(&[[100, 20, 0, 7, 0, 0], [900, 800, 0, 700, 0, 0]]);
        let second = of(&[[90, 30, 5, 8, 0, 0]]);
        let both = of(&[[90, 20, 5, 7, 0, 0], [900, 800, 0, 700, 0, 0]]);
        assert_eq!(first.clone().least(&second), both);
        assert_eq!(second.clone().least(&first), both, "also where the first went less far");
        let host = Measured(vec![(ExchangeKind::Host, Figures(vec![[1; 6]]))]);
        assert_eq!(first.clone().least(&host).0, [first.0, host.0].concat());
    }

    #[test]
    fn the_exchange_that_is_faster_in_all_is_the_better_one() {
        let (peer, host) = (
            figures(7, [(10, 20_000), (3, 2_000), (0, 0), (9, 3_000), (0, 0), (0, 0)]),
            figures(7, [(10, 20_000), (5, 5_000), (0, 0), (15, 40_000), (0, 0), (0, 0)]),
        );
        let measured = Measured(vec![(ExchangeKind::Peer, peer.clone()), (ExchangeKind::Host, host.clone())]);
        assert_eq!(measured.best(|_| FREE), Some(ExchangeKind::Host));
        let measured = Measured(vec![(ExchangeKind::Peer, host), (ExchangeKind::Host, peer)]);
        assert_eq!(measured.best(|_| FREE), Some(ExchangeKind::Peer));
        let equal = Measured(vec![(ExchangeKind::Host, Figures::default()), (ExchangeKind::Peer, Figures::default())]);
        assert_eq!(equal.best(|_| FREE), Some(ExchangeKind::Host), "the first");
    }
}

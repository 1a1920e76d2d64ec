//! What the ranks of a communicator have agreed on: the same on every one of them.

/// How a sum goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    /// To the real NCCL.
    Forward,
    /// Uncompressed; every rank's whole input to every other.
    ExactOneHop,
    /// Uncompressed; to the owner of a chunk, and from there to all.
    ExactTwoHops,
    /// At the agreed widths.
    Compressed,
    /// The same, over `peer`: ranks do not write payloads to their peers, but read them from there. The same bits.
    Pulled,
    /// The same, over `host`: copy engines carry payloads, not kernels. The same bits.
    Copied,
}

/// What carries the payloads of a compressed sum.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Carrier {
    /// Kernels write them to peers.
    Writes,
    /// Kernels read them from peers.
    Reads,
    /// Copy engines.
    Copies,
}

impl Way {
    /// Every one.
    pub(crate) const ALL: [Way; 6] =
        [Way::Forward, Way::ExactOneHop, Way::ExactTwoHops, Way::Compressed, Way::Pulled, Way::Copied];

    /// Whether it is ours, and loses nothing.
    pub(crate) const fn is_exact(self) -> bool {
        matches!(self, Way::ExactOneHop | Way::ExactTwoHops)
    }

    /// Whether it goes at the agreed widths.
    pub(crate) const fn is_compressed(self) -> bool {
        matches!(self, Way::Compressed | Way::Pulled | Way::Copied)
    }
}

/// The way of each size: of several, which all begin somewhere and end where the next one begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Table {
    /// Each with the bytes that it begins at, ascending; the first at 0.
    entries: [(u64, Way); Table::MAX_ENTRIES],
    n_entries: usize,
}

impl Table {
    /// Entries at most.
    pub(crate) const MAX_ENTRIES: usize = 12;

    /// The one in which `way` says how a sum of so many bytes goes, where it changes at no other size than `starts`,
    /// which ascend. Of more changes than there is room for the last ones are left out.
    pub(crate) fn new(starts: impl IntoIterator<Item = u64>, way: impl Fn(u64) -> Way) -> Self {
        let mut table = Self { entries: [(0, way(0)); Self::MAX_ENTRIES], n_entries: 1 };
        for start in starts {
            let (_, last) = table.entries[table.n_entries - 1];
            if way(start) != last && start > 0 && table.n_entries < Self::MAX_ENTRIES {
                table.entries[table.n_entries] = (start, way(start));
                table.n_entries += 1;
            }
        }
        table
    }

    /// Each way with the bytes that it begins at.
    pub(crate) fn entries(&self) -> &[(u64, Way)] {
        &self.entries[..self.n_entries]
    }

    /// How a sum of so many bytes goes.
    #[inline]
    pub(crate) fn way(&self, n_bytes: u64) -> Way {
        let mut way = self.entries[0].1;
        for (start, later) in &self.entries()[1..] {
            if n_bytes >= *start {
                way = *later;
            }
        }
        way
    }

    /// From how many bytes on some are compressed; `u64::MAX`: none is.
    pub(crate) fn compress_min(&self) -> u64 {
        let compressed = self.entries().iter().find(|(_, way)| way.is_compressed());
        compressed.map_or(u64::MAX, |(start, _)| *start)
    }

    /// Up to how many bytes some are exact; 0: none is.
    pub(crate) fn exact_max(&self) -> u64 {
        let Some(last) = self.entries().iter().rposition(|(_, way)| way.is_exact()) else { return 0 };
        self.entries().get(last + 1).map_or(u64::MAX, |(end, _)| end - 1)
    }
}

/// How the sums of a communicator go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ways {
    /// Those of element types that are to be compressed.
    pub coded: Table,
    /// All others.
    pub plain: Table,
}

/// Whether sums of a communicator are ours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict<'a> {
    /// The ranks have not met.
    Open,
    /// Every rank takes sums these ways.
    On(&'a Ways),
    /// Every rank forwards.
    Off,
    /// Every rank forwards until an engine switches it on again.
    SwitchedOff,
}

#[cfg(test)]
mod tests {
    use Way::{Compressed, ExactOneHop, ExactTwoHops, Forward};

    use super::*;

    #[test]
    fn a_way_ends_where_the_next_one_begins() {
        let way = |n_bytes| match n_bytes {
            ..=100 => ExactOneHop,
            101..200 => ExactTwoHops,
            200..300 => Forward,
            _ => Compressed,
        };
        let table = Table::new([50, 101, 150, 200, 300, 400], way);
        assert_eq!(table.entries(), [(0, ExactOneHop), (101, ExactTwoHops), (200, Forward), (300, Compressed)]);
        for n_bytes in [0, 100, 101, 199, 200, 299, 300, u64::MAX] {
            assert_eq!(table.way(n_bytes), way(n_bytes), "{n_bytes}");
        }
        assert_eq!((table.exact_max(), table.compress_min()), (199, 300));
    }

    #[test]
    fn what_never_happens_has_no_range() {
        let forwards = Table::new([], |_| Forward);
        assert_eq!((forwards.exact_max(), forwards.compress_min()), (0, u64::MAX));
        let exact = Table::new([], |_| ExactOneHop);
        assert_eq!((exact.exact_max(), exact.compress_min()), (u64::MAX, u64::MAX));
        let compressed = Table::new([0], |_| Compressed);
        assert_eq!((compressed.exact_max(), compressed.compress_min()), (0, 0));
    }

    #[test]
    fn what_changes_too_often_ends_with_the_last_that_has_room() {
        let way = |n_bytes: u64| if n_bytes.is_multiple_of(2) { Forward } else { Compressed };
        let table = Table::new(0..100, way);
        assert_eq!(table.entries().len(), Table::MAX_ENTRIES);
        assert_eq!(table.way(1000), table.entries()[Table::MAX_ENTRIES - 1].1);
    }
}

//! Pure: how the sums of a communicator go, by their bytes: the small ones exactly, the large ones compressed.

use flashcomm_wire::TILE_ELEMS;

use super::facts::{Blob, sharing};
use crate::config::{ExchangeKind, Tune};
use crate::verdict::{Table, Way, Ways};

/// What the ranks have set, or what was measured on other machines (docs/tuning.md).
pub(crate) fn ways(facts: &[Blob], kind: ExchangeKind) -> Ways {
    let (exact_max, compress_min) = (exact_max_bytes(facts, kind), min_bytes(facts, kind));
    let one_hop_max = one_hop_max_bytes(kind, facts.len());
    let agreement = &facts[0].agreement;
    let compressed = match kind {
        ExchangeKind::Peer if agreement.p2p_read == Some(true) => Way::Pulled,
        ExchangeKind::Host if agreement.host_copy == Some(true) => Way::Copied,
        _ => Way::Compressed,
    };
    let plain = |n_bytes| match n_bytes {
        n_bytes if n_bytes > exact_max => Way::Forward,
        n_bytes if n_bytes > one_hop_max => Way::ExactTwoHops,
        // Nothing is exact where the limit is 0, and nobody sums 0 bytes.
        0 if exact_max == 0 => Way::Forward,
        _ => Way::ExactOneHop,
    };
    let coded = |n_bytes| match n_bytes {
        n_bytes if n_bytes >= compress_min && compress_min != u64::MAX => compressed,
        n_bytes => plain(n_bytes),
    };
    let mut starts = [exact_max.saturating_add(1), one_hop_max.saturating_add(1), compress_min];
    starts.sort_unstable();
    Ways { coded: Table::new(starts, coded), plain: Table::new(starts, plain) }
}

/// Up to how many bytes a sum is exact and ours; 0: none is.
///
/// Mailboxes take two turns, and 4/3 of the bytes of each peer; all of them get a quarter of the memory that is set.
pub(super) fn exact_max_bytes(facts: &[Blob], kind: ExchangeKind) -> u64 {
    let (world, agreement) = (facts.len(), &facts[0].agreement);
    let room = agreement.buffer_bytes / 4 * 3 / (8 * (world - 1).max(1));
    let default = || if sharing(facts) > 1 { 0 } else { default_exact_max_bytes(kind, world) };
    if kind == ExchangeKind::Nccl { 0 } else { agreement.exact_max.unwrap_or_else(default).min(room as u64) }
}

/// Up to how many bytes there are mailboxes for exact sums.
///
/// Mailboxes take two turns, and 4/3 of the bytes of each peer; all of them get a quarter of the memory that is set.
pub(super) fn exact_room(facts: &[Blob], kind: ExchangeKind) -> u64 {
    let (world, agreement) = (facts.len(), &facts[0].agreement);
    let room = (agreement.buffer_bytes / 4 * 3 / (8 * (world - 1).max(1))) as u64;
    match (agreement.tune, agreement.exact_max, kind) {
        (Tune::Off, ..) | (_, Some(_), _) => exact_max_bytes(facts, kind),
        // To find out up to where they are the best. Beyond, nobody has seen them be it.
        (_, None, ExchangeKind::Peer) => room.min(2 << 20),
        (_, None, ExchangeKind::Host) => room.min(512 << 10),
        (_, None, ExchangeKind::Nccl) => 0,
    }
}

/// The same by default, of ranks with a GPU each: none where that has not been measured.
pub const fn default_exact_max_bytes(kind: ExchangeKind, world: usize) -> u64 {
    match (kind, world) {
        (ExchangeKind::Peer | ExchangeKind::Host, 2..=4) => crossover(kind, world),
        _ => 0,
    }
}

/// From how many bytes on 8 bits are faster than an exact sum, of two to four ranks with a GPU each.
const fn crossover(kind: ExchangeKind, world: usize) -> u64 {
    match (kind, world) {
        (ExchangeKind::Host, 2) => 160 << 10,
        (ExchangeKind::Host, _) => 288 << 10,
        _ => 1280 << 10,
    }
}

/// Exact sums of so many bytes and less go in one hop, larger ones in two. The results are the same.
///
/// Of two ranks both send as much. Of three and four: where two hops become faster, as measured. Of more: by the bytes that one
/// hop sends, not measured.
const fn one_hop_max_bytes(kind: ExchangeKind, world: usize) -> u64 {
    match (kind, world) {
        (_, ..3) => u64::MAX,
        (ExchangeKind::Host, 3) => 48 << 10,
        (ExchangeKind::Host, 4) => 24 << 10,
        (ExchangeKind::Host, _) => 16 << 10,
        (_, ..5) => 128 << 10,
        (_, _) => 32 << 10,
    }
}

/// Whether the real NCCL goes over the network between some two ranks: those of two hosts, as it takes them, and those that
/// share no memory of any kind.
fn is_over_network(facts: &[Blob]) -> bool {
    let reaches = |one: &Blob, other: u32| other < u16::BITS && (one.reaches & !one.forbids) >> other & 1 != 0;
    let share = |one: &Blob, other: &Blob| {
        one.location.shared_memory != 0 && one.location.shared_memory == other.location.shared_memory
    };
    let apart = |one: &Blob, other: &Blob| {
        one.location.nccl_host != other.location.nccl_host
            || !(share(one, other) || reaches(one, other.rank) && reaches(other, one.rank))
    };
    facts.iter().any(|one| facts.iter().any(|other| one.rank != other.rank && apart(one, other)))
}

/// Whether the exchange over the real NCCL puts more on the network than NCCL's own all-reduce would.
///
/// In units of the operation over the world size, out of a host of g of w ranks: hop 1 sends the ranks of other hosts their
/// payloads, g (w - g); hop 2 is an all-gather, whose rings pass a host once, w - 1; uncompressed NCCL's ring all-reduce
/// sends 2 (w - 1). The host that sends most is the slowest.
fn sends_more_than_nccl(facts: &[Blob]) -> bool {
    let world = facts.len();
    let on_host =
        |rank: &Blob| facts.iter().filter(|other| other.location.nccl_host == rank.location.nccl_host).count();
    let legs = facts[0].agreement.legs;
    let sent = |g: usize| legs.reduce.tile_bytes() * g * (world - g) + legs.gather.tile_bytes() * (world - 1);
    let most = facts.iter().map(on_host).filter(|g| *g < world).map(sent).max();
    most.is_some_and(|sent| sent > 2 * (world - 1) * TILE_ELEMS * 2)
}

/// From how many bytes on an all-reduce is compressed: what the ranks have set, or what was measured (docs/tuning.md).
pub(super) fn min_bytes(facts: &[Blob], kind: ExchangeKind) -> u64 {
    let agreement = &facts[0].agreement;
    let default = || match kind {
        _ if agreement.legs.batch_invariant => 0, // a row must not go another way because its batch is small
        ExchangeKind::Nccl if sends_more_than_nccl(facts) => u64::MAX,
        _ => default_min_bytes(kind, facts.len(), sharing(facts), !is_over_network(facts)),
    };
    agreement.min_bytes.unwrap_or_else(default)
}

/// From how many bytes on an all-reduce is compressed by default, where at most `sharing` ranks share a GPU; `u64::MAX`: never.
///
/// Over the real NCCL the bytes decide between hosts. Between ranks of one host NCCL's own all-reduce is faster than three
/// kernels with two of its calls between, so there it takes an explicit `FLASHCOMM_MIN_BYTES`.
pub const fn default_min_bytes(kind: ExchangeKind, world: usize, sharing: usize, one_host: bool) -> u64 {
    match kind {
        ExchangeKind::Nccl if one_host => u64::MAX,
        ExchangeKind::Nccl => 1 << 20,
        _ if world == 2 || world <= 4 && sharing == 1 => crossover(kind, world),
        // Between more GPUs it has not been measured, hence a reserve.
        ExchangeKind::Peer => 4 << 20,
        ExchangeKind::Host => 256 << 10,
    }
}

#[cfg(test)]
mod tests {
    use ExchangeKind::{Host, Nccl, Peer};

    use super::*;
    use crate::negotiation::samples::{on_hosts, ranks};

    #[test]
    fn a_threshold_that_is_set_holds_whatever_the_exchange() {
        let mut facts = ranks(2, "auto");
        assert_eq!(ExchangeKind::ALL.map(|kind| min_bytes(&facts, kind)), [1280 << 10, 160 << 10, u64::MAX]);
        (facts[1].location.host, facts[1].location.nccl_host) = (8, 8);
        assert_eq!(min_bytes(&facts, Nccl), 1 << 20);
        let default = facts[0].agreement.legs;
        facts[0].agreement.legs = default.with_batch_invariant(true);
        assert_eq!(ExchangeKind::ALL.map(|kind| min_bytes(&facts, kind)), [0; 3], "else size would matter");
        facts[0].agreement.legs = default;
        facts.iter_mut().for_each(|rank| rank.agreement.min_bytes = Some(77));
        assert_eq!(ExchangeKind::ALL.map(|kind| min_bytes(&facts, kind)), [77; 3]);
    }

    #[test]
    fn over_nccl_it_compresses_where_nccl_goes_over_the_network() {
        let nccl = |facts: &[Blob]| min_bytes(facts, Nccl);
        assert_eq!(nccl(&ranks(2, "auto")), u64::MAX);
        // Pods of one host: another name, another /dev/shm, no P2P between them.
        let mut pods = ranks(2, "auto");
        pods[1].location.nccl_host = 8;
        assert_eq!(nccl(&pods), 1 << 20);
        // The same name, but no memory in common.
        let mut apart = ranks(2, "auto");
        apart.iter_mut().for_each(|rank| rank.forbids = 3);
        assert_eq!(nccl(&apart), u64::MAX, "NCCL goes over shared memory");
        apart[0].location.shared_memory = 0;
        assert_eq!(nccl(&apart), 1 << 20);
    }

    #[test]
    fn by_default_nothing_is_sent_that_nccl_would_not_send() {
        for (n_hosts, each, bits, compresses) in [
            (2, 1, "8", true),
            (16, 1, "8", true),
            (2, 2, "8", true),
            (2, 8, "8", false), // 2.66 tensors out of a host instead of 1.88
            (4, 8, "8", false), // 3.76 instead of 1.94
            (2, 8, "4", true),  // 1.43
            (4, 8, "4", false), // 2.01
            (2, 4, "8", true),
        ] {
            let facts = on_hosts(n_hosts, each, bits);
            let expected = if compresses { 1 << 20 } else { u64::MAX };
            assert_eq!(min_bytes(&facts, Nccl), expected, "{n_hosts} hosts of {each}, {bits} bits");
        }
        // A host with more ranks than the others is the one that counts.
        let mut uneven = on_hosts(3, 6, "8");
        uneven.truncate(13);
        uneven.iter_mut().for_each(|rank| rank.reaches = 0);
        assert_eq!(min_bytes(&uneven, Nccl), u64::MAX);
    }

    #[test]
    fn the_exact_range_is_what_is_set_and_has_room() {
        let mut facts = ranks(4, "auto");
        let exact_max = |facts: &[Blob]| [Peer, Host, Nccl].map(|kind| exact_max_bytes(facts, kind));
        facts.iter_mut().for_each(|rank| rank.agreement.exact_max = Some(64 << 10));
        assert_eq!(exact_max(&facts), [64 << 10, 64 << 10, 0], "over the real NCCL there is no memory for it");
        facts.iter_mut().for_each(|rank| rank.agreement.exact_max = Some(u64::MAX));
        assert_eq!(exact_max(&facts)[0], 2 << 20, "an eighth of 16 MiB");
        facts.iter_mut().for_each(|rank| rank.agreement.exact_max = Some(0));
        assert_eq!(exact_max(&facts), [0; 3]);
    }

    #[test]
    fn by_default_sums_are_exact_up_to_where_compressed_ones_are_faster_as_measured() {
        let ranges = |facts: &[Blob]| {
            [Peer, Host].map(|kind| ways(facts, kind)).map(|ways| (ways.plain.exact_max(), ways.coded.compress_min()))
        };
        for world in 2..=4 {
            let over_host = if world == 2 { 160 << 10 } else { 288 << 10 };
            let each = [1280 << 10, over_host].map(|n_bytes| (n_bytes, n_bytes));
            assert_eq!(ranges(&ranks(world, "auto")), each, "{world} ranks");
        }
        assert_eq!(ranges(&ranks(5, "auto")), [(0, 4 << 20), (0, 256 << 10)], "not measured");
        for (world, peer, host) in [(2, 1280 << 10, 160 << 10), (4, 4 << 20, 256 << 10)] {
            let mut facts = ranks(world, "auto");
            facts[1].location.device_uuid = facts[0].location.device_uuid;
            assert_eq!(ranges(&facts), [(0, peer), (0, host)], "two of {world} ranks on a GPU");
        }
    }
}

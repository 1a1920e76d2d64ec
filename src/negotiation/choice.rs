//! Pure: which exchange a communicator gets, and from how many bytes on it compresses.
//!
//! Everything follows from the facts of all ranks, which all have, so every rank comes to the same
//! end. What was tried and failed on some rank is such a fact, too: all know of it.

use std::fmt;

use flashcomm_wire::TILE_ELEMS;

use super::disagreement::Disagreement;
use super::facts::Blob;
use super::sizes::rings;
use crate::config::ExchangeKind;

/// What the ranks take, and why not something better.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Choice {
    /// The exchange; `None` where all ranks forward.
    pub takes: Option<ExchangeKind>,
    /// What comes before it, each with what is against it.
    pub passed_over: Vec<(ExchangeKind, Against)>,
}

/// Why an exchange is not taken.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Against {
    /// The setting names another one.
    Setting(ExchangeKind),
    /// The facts of the ranks, or what came of trying it, rule it out.
    Impossible(Disagreement),
    /// The real NCCL is faster.
    Slower,
}

impl fmt::Display for Against {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Against::Setting(kind) => write!(f, "FLASHCOMM_EXCHANGE={} says so", kind.name()),
            Against::Impossible(disagreement) => disagreement.fmt(f),
            Against::Slower => f.write_str(
                "the GPUs reach each other's memory, over which the real NCCL is faster (FLASHCOMM_EXCHANGE=host takes \
                 it anyway)",
            ),
        }
    }
}

/// The exchange of ranks with these facts, in rank order, of which `failed` were tried in vain.
pub fn choose(facts: &[Blob], failed: &[(ExchangeKind, Disagreement)]) -> Choice {
    let mut passed_over = Vec::new();
    for kind in ExchangeKind::ALL {
        match against(kind, facts, failed) {
            None => return Choice { takes: Some(kind), passed_over },
            Some(against) => passed_over.push((kind, against)),
        }
    }
    Choice { takes: None, passed_over }
}

impl Choice {
    /// Why all ranks forward, where they do: the last that was impossible.
    pub fn refusal(self) -> Option<Disagreement> {
        let impossible = |(_, against)| match against {
            Against::Impossible(disagreement) => Some(disagreement),
            Against::Setting(_) | Against::Slower => None,
        };
        self.passed_over.into_iter().rev().find_map(impossible).filter(|_| self.takes.is_none())
    }
}

fn against(kind: ExchangeKind, facts: &[Blob], failed: &[(ExchangeKind, Disagreement)]) -> Option<Against> {
    let setting = facts[0].agreement.exchange;
    if let Some(other) = setting.filter(|setting| *setting != kind) {
        return Some(Against::Setting(other));
    }
    if let Some((_, disagreement)) = failed.iter().find(|(failed, _)| *failed == kind) {
        return Some(Against::Impossible(disagreement.clone()));
    }
    if kind != ExchangeKind::Nccl && rings(facts).is_none() {
        return Some(Against::Impossible(Disagreement::NoSharedMemory));
    }
    if let Some(forbidden) = forbidden(kind, facts) {
        return Some(Against::Impossible(forbidden));
    }
    // NCCL has the memory of the GPUs there: it can map that in ways that are not ours (CUDA IPC), where containers forbid
    // those.
    if kind == ExchangeKind::Host && setting.is_none() && has_gpu_memory(facts) {
        return Some(Against::Slower);
    }
    None
}

/// What NCCL's variables, or containers, have against an exchange.
fn forbidden(kind: ExchangeKind, facts: &[Blob]) -> Option<Disagreement> {
    let first = facts[0].location.shared_memory;
    match kind {
        ExchangeKind::Peer => {
            let rank = facts.iter().position(|rank| rank.forbids != 0)?;
            Some(Disagreement::PeerForbidden { rank })
        }
        ExchangeKind::Host => {
            let differs = |rank: &Blob| rank.location.shared_memory == 0 || rank.location.shared_memory != first;
            Some(Disagreement::HostForbidden { rank: facts.iter().position(differs)? })
        }
        ExchangeKind::Nccl => None,
    }
}

/// Whether the real NCCL has the memory of the GPUs, as far as a rank can tell: one that sees only its own GPU cannot.
fn has_gpu_memory(facts: &[Blob]) -> bool {
    let reaches_all = |rank: &Blob| u32::from(rank.reaches).trailing_ones() as usize >= facts.len();
    facts.iter().all(|rank| rank.forbids == 0) && facts.iter().any(reaches_all)
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
pub(crate) fn min_bytes(facts: &[Blob], kind: ExchangeKind) -> u64 {
    let agreement = &facts[0].agreement;
    let default = || match kind {
        _ if agreement.legs.batch_invariant => 0, // a row must not go another way because its batch is small
        ExchangeKind::Nccl if sends_more_than_nccl(facts) => u64::MAX,
        _ => default_min_bytes(kind, facts.len(), !is_over_network(facts)),
    };
    agreement.min_bytes.unwrap_or_else(default)
}

/// From how many bytes on an all-reduce is compressed by default; `u64::MAX`: never.
///
/// Over the real NCCL the bytes decide between hosts. Between ranks of one host NCCL's own all-reduce is faster than three
/// kernels with two of its calls between, so there it takes an explicit `FLASHCOMM_MIN_BYTES`.
pub const fn default_min_bytes(kind: ExchangeKind, world: usize, one_host: bool) -> u64 {
    match kind {
        ExchangeKind::Nccl if one_host => u64::MAX,
        ExchangeKind::Nccl => 1 << 20,
        // Peer memory is never slower from half of that on, whether ranks share a GPU or two have one each, but for graphs of
        // 2 ranks that share one; between more GPUs it has not been measured, hence a reserve.
        ExchangeKind::Peer if world == 2 => 2 << 20,
        ExchangeKind::Peer => 4 << 20,
        // Between two GPUs, where NCCL goes over host memory, too.
        ExchangeKind::Host => 256 << 10,
    }
}

#[cfg(test)]
mod tests {
    use ExchangeKind::{Host, Nccl, Peer};

    use super::*;
    use crate::config::Config;
    use crate::negotiation::facts::{Agreement, Location};

    /// Ranks of one host with a GPU each, all of which reach each other.
    fn ranks(world: usize, setting: &str) -> Vec<Blob> {
        let (config, _) = Config::parse(|asked| (asked == "FLASHCOMM_EXCHANGE").then(|| setting.into()));
        let location = Location {
            boot: 7,
            host: 7,
            nccl_host: 7,
            shared_memory: 3,
            process: 0,
            device: 0,
            device_uuid: [0; 16],
            multiprocessors: 132,
            block_channels: 7,
            family: crate::exchange::residency::ANY_FAMILY,
        };
        let rank = |rank: usize| Blob {
            rank: rank as u32,
            agreement: Agreement::from(&config),
            location: Location { process: rank as u64, device_uuid: [rank as u8; 16], ..location },
            reaches: ((1u32 << world.min(16)) - 1) as u16,
            forbids: 0,
            attach: 1,
            ready: true,
            offer: [0; crate::exchange::area::OFFER_BYTES],
        };
        (0..world).map(rank).collect()
    }

    /// As many ranks on each of as many hosts.
    fn on_hosts(n_hosts: usize, each: usize, bits: &str) -> Vec<Blob> {
        let (config, _) = Config::parse(|asked| (asked == "FLASHCOMM_BITS").then(|| bits.into()));
        let mut ranks = ranks(n_hosts * each, "auto");
        for (rank, blob) in ranks.iter_mut().enumerate() {
            let host = (rank / each) as u64;
            blob.agreement = Agreement::from(&config);
            (blob.location.host, blob.location.nccl_host, blob.location.shared_memory) = (host, host, host + 1);
        }
        ranks
    }

    fn not_ready(kind: ExchangeKind) -> (ExchangeKind, Disagreement) {
        (kind, Disagreement::NotReady { rank: 1 })
    }

    #[test]
    fn the_table() {
        let apart = |setting: &str| {
            let mut ranks = ranks(2, setting);
            (ranks[1].location.host, ranks[1].location.boot) = (8, 8);
            ranks
        };
        let renamed = |setting: &str| {
            let mut ranks = ranks(2, setting);
            ranks[1].location.host = 8; // NCCL_HOSTID
            ranks
        };
        let unreachable = |setting: &str| {
            let mut ranks = ranks(2, setting);
            ranks.iter_mut().enumerate().for_each(|(rank, blob)| blob.reaches = 1 << rank);
            ranks
        };
        for (facts, failed, expected) in [
            (ranks(2, "auto"), vec![], Some(Peer)),
            (ranks(16, "auto"), vec![], Some(Peer)),
            (ranks(17, "auto"), vec![], Some(Nccl)),
            (apart("auto"), vec![], Some(Nccl)),
            (apart("peer"), vec![], None),
            (apart("host"), vec![], None),
            (renamed("auto"), vec![], Some(Nccl)),
            (renamed("host"), vec![], Some(Host)),
            // IPC is refused: NCCL still has the GPUs' memory where they reach each other.
            (ranks(2, "auto"), vec![not_ready(Peer)], Some(Nccl)),
            (unreachable("auto"), vec![not_ready(Peer)], Some(Host)),
            (unreachable("auto"), vec![not_ready(Peer), not_ready(Host)], Some(Nccl)),
            (unreachable("auto"), ExchangeKind::ALL.map(not_ready).to_vec(), None),
            (ranks(2, "peer"), vec![not_ready(Peer)], None),
            (ranks(2, "host"), vec![], Some(Host)),
            (ranks(2, "host"), vec![not_ready(Host)], None),
            (ranks(2, "nccl"), vec![], Some(Nccl)),
            (apart("nccl"), vec![], Some(Nccl)),
        ] {
            let choice = choose(&facts, &failed);
            let setting = facts[0].agreement.exchange;
            assert_eq!(choice.takes, expected, "{} ranks, {setting:?}, {failed:?}: {choice:?}", facts.len());
            assert_eq!(choice.refusal().is_some(), expected.is_none(), "all forward for a reason, or for none");
        }
    }

    #[test]
    fn what_is_passed_over_says_why() {
        let why = |choice: Choice, kind| {
            let (_, against) = choice.passed_over.into_iter().find(|(other, _)| *other == kind).unwrap();
            against.to_string()
        };
        let choice = choose(&ranks(2, "auto"), &[not_ready(Peer)]);
        assert!(why(choice.clone(), Peer).contains("rank 1 could not"));
        assert!(why(choice, Host).contains("the real NCCL is faster"));
        assert!(why(choose(&ranks(2, "nccl"), &[]), Peer).contains("FLASHCOMM_EXCHANGE=nccl"));
        assert!(why(choose(&ranks(17, "auto"), &[]), Peer).contains("16 at most"));
    }

    #[test]
    fn ranks_that_share_a_gpu_or_have_fewer_multiprocessors_get_fewer_channels() {
        let channels = |facts: &[Blob]| rings(facts).map_or(0, |rings| rings.channels);
        let each = ranks(2, "auto");
        let mut shared = each.clone();
        shared[1].location.device_uuid = shared[0].location.device_uuid;
        let mut small = each.clone();
        small[1].location.multiprocessors = 28;
        assert!(channels(&shared) < channels(&each) && channels(&small) < channels(&each));
        let mut without_kernels = each;
        without_kernels[1].location.block_channels = 0;
        assert_eq!(rings(&without_kernels), None);
    }

    #[test]
    fn a_threshold_that_is_set_holds_whatever_the_exchange() {
        let mut facts = ranks(2, "auto");
        assert_eq!(ExchangeKind::ALL.map(|kind| min_bytes(&facts, kind)), [2 << 20, 256 << 10, u64::MAX]);
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
    fn nccls_variables_and_containers_of_their_own_are_heard() {
        let mut p2p_off = ranks(2, "auto");
        p2p_off[1].forbids = 1;
        let choice = choose(&p2p_off, &[]);
        // And NCCL has not got the GPUs' memory then, either.
        assert_eq!(choice.takes, Some(Host));
        assert!(choice.passed_over[0].1.to_string().contains("NCCL_P2P_DISABLE"), "{choice:?}");
        let mut no_shm = p2p_off.clone();
        no_shm[1].location.shared_memory = 0;
        let choice = choose(&no_shm, &[]);
        assert_eq!(choice.takes, Some(Nccl));
        assert!(choice.passed_over[1].1.to_string().contains("rank 1 has another /dev/shm"), "{choice:?}");
        // A setting of ours does not outvote them.
        for (setting, facts) in [("peer", &p2p_off), ("host", &no_shm)] {
            let (config, _) = Config::parse(|asked| (asked == "FLASHCOMM_EXCHANGE").then(|| setting.into()));
            let mut facts = facts.clone();
            facts.iter_mut().for_each(|rank| rank.agreement = Agreement::from(&config));
            assert_eq!(choose(&facts, &[]).takes, None, "{setting}");
        }
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
}

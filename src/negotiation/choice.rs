//! Pure: which exchange a communicator gets.
//!
//! Everything follows from the facts of all ranks, which all have, so every rank comes to the same
//! end. What was tried and failed on some rank is such a fact, too: all know of it.

use std::fmt;

use super::disagreement::Disagreement;
use super::facts::Blob;
use super::sizes::layout;
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
    /// Another one was measured to be faster.
    Measured,
}

impl fmt::Display for Against {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Against::Setting(kind) => write!(f, "FLASHCOMM_EXCHANGE={} says so", kind.name()),
            Against::Impossible(disagreement) => disagreement.fmt(f),
            Against::Measured => f.write_str("it was measured to be slower here"),
            Against::Slower => f.write_str(
                "the GPUs reach each other's memory, over which the real NCCL is faster (FLASHCOMM_EXCHANGE=host takes \
                 it anyway)",
            ),
        }
    }
}

/// The exchange that the ranks have measured to be the fastest here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Preference(pub ExchangeKind);

/// The exchange of ranks with these facts, in rank order, of which `failed` were tried in vain: the one that was measured to be
/// the best, where that is possible.
pub fn choose(facts: &[Blob], failed: &[(ExchangeKind, Disagreement)], measured: Option<Preference>) -> Choice {
    let mut passed_over = Vec::new();
    let measured = measured.filter(|Preference(best)| against(*best, facts, failed, measured).is_none());
    for kind in ExchangeKind::ALL {
        match against(kind, facts, failed, measured) {
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
            Against::Setting(_) | Against::Slower | Against::Measured => None,
        };
        self.passed_over.into_iter().rev().find_map(impossible).filter(|_| self.takes.is_none())
    }
}

/// What is against an exchange, whatever comes before it.
pub(super) fn against(
    kind: ExchangeKind,
    facts: &[Blob],
    failed: &[(ExchangeKind, Disagreement)],
    measured: Option<Preference>,
) -> Option<Against> {
    let setting = facts[0].agreement.exchange;
    if let Some(other) = setting.filter(|setting| *setting != kind) {
        return Some(Against::Setting(other));
    }
    if let Some((_, disagreement)) = failed.iter().find(|(failed, _)| *failed == kind) {
        return Some(Against::Impossible(disagreement.clone()));
    }
    if kind != ExchangeKind::Nccl && layout(facts, kind).is_none() {
        return Some(Against::Impossible(Disagreement::NoSharedMemory));
    }
    if let Some(forbidden) = forbidden(kind, facts) {
        return Some(Against::Impossible(forbidden));
    }
    // NCCL has the memory of the GPUs there: it can map that in ways that are not ours (CUDA IPC), where containers forbid
    // those.
    let is_assumed = setting.is_none() && measured.is_none();
    if kind == ExchangeKind::Host && is_assumed && has_gpu_memory(facts) {
        return Some(Against::Slower);
    }
    measured.filter(|Preference(best)| *best != kind).map(|_| Against::Measured)
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

#[cfg(test)]
mod tests {
    use ExchangeKind::{Host, Nccl, Peer};

    use super::*;
    use crate::config::Config;
    use crate::negotiation::agreement::Agreement;
    use crate::negotiation::samples::ranks;

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
            let choice = choose(&facts, &failed, None);
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
        let choice = choose(&ranks(2, "auto"), &[not_ready(Peer)], None);
        assert!(why(choice.clone(), Peer).contains("rank 1 could not"));
        assert!(why(choice, Host).contains("the real NCCL is faster"));
        assert!(why(choose(&ranks(2, "nccl"), &[], None), Peer).contains("FLASHCOMM_EXCHANGE=nccl"));
        assert!(why(choose(&ranks(17, "auto"), &[], None), Peer).contains("16 at most"));
    }

    #[test]
    fn ranks_that_share_a_gpu_or_have_fewer_multiprocessors_get_fewer_channels() {
        let channels = |facts: &[Blob]| layout(facts, Peer).map_or(0, |layout| layout.rings.channels);
        let each = ranks(2, "auto");
        let mut shared = each.clone();
        shared[1].location.device_uuid = shared[0].location.device_uuid;
        let mut small = each.clone();
        small[1].location.multiprocessors = 28;
        assert!(channels(&shared) < channels(&each) && channels(&small) < channels(&each));
        let mut without_kernels = each;
        without_kernels[1].location.block_channels = 0;
        assert_eq!(layout(&without_kernels, Peer), None);
    }

    #[test]
    fn nccls_variables_and_containers_of_their_own_are_heard() {
        let mut p2p_off = ranks(2, "auto");
        p2p_off[1].forbids = 1;
        let choice = choose(&p2p_off, &[], None);
        // And NCCL has not got the GPUs' memory then, either.
        assert_eq!(choice.takes, Some(Host));
        assert!(choice.passed_over[0].1.to_string().contains("NCCL_P2P_DISABLE"), "{choice:?}");
        let mut no_shm = p2p_off.clone();
        no_shm[1].location.shared_memory = 0;
        let choice = choose(&no_shm, &[], None);
        assert_eq!(choice.takes, Some(Nccl));
        assert!(choice.passed_over[1].1.to_string().contains("rank 1 has another /dev/shm"), "{choice:?}");
        // A setting of ours does not outvote them.
        for (setting, facts) in [("peer", &p2p_off), ("host", &no_shm)] {
            let (config, _) = Config::parse(|asked| (asked == "FLASHCOMM_EXCHANGE").then(|| setting.into()));
            let mut facts = facts.clone();
            facts.iter_mut().for_each(|rank| rank.agreement = Agreement::from(&config));
            assert_eq!(choose(&facts, &[], None).takes, None, "{setting}");
        }
    }
}

//! Pure: how large the areas and the grids of a fused exchange are, and whether a communicator may have the large share.

use flashcomm_wire::rings::MAX_WORLD;
use flashcomm_wire::{Mailboxes, Rings};

use super::facts::{Blob, sharing};
use super::identity;
use super::ranges::exact_room;
use crate::config::ExchangeKind;
use crate::exchange::copies::CopyRoom;
use crate::exchange::fused::Layout;
use crate::exchange::residency::{self, Blocks};
use crate::kernels::Areas;

/// Blocks of more than two ranks whose areas are in host memory. All of them write there and read it at once: what is under
/// way should stay in the host's caches. (Of 66 and 22 blocks on four GPUs, 64 MiB at 8 bits took 1967 and 1450 us.)
const HOST_BLOCKS: usize = 22;

/// Channels that a block of the fused kernel has on every rank.
pub(crate) fn block_channels(facts: &[Blob], kind: ExchangeKind) -> usize {
    let channels = facts.iter().map(|rank| rank.location.block_channels).min().unwrap_or(0);
    match kind {
        ExchangeKind::Host => Areas::InHostMemory.block_channels(channels),
        _ => Areas::InGpuMemory.block_channels(channels),
    }
}

/// The receive areas that all ranks can have alike for an exchange of this kind, with room for the largest grid that a kernel
/// may get; `None` where no fused exchange is possible.
pub fn layout(facts: &[Blob], kind: ExchangeKind) -> Option<Layout> {
    let agreement = facts[0].agreement;
    if !is_one_host(facts) || facts.len() > MAX_WORLD {
        return None;
    }
    let Blocks { usual, large } = blocks(facts, kind);
    let exact_max = exact_room(facts, kind) as usize; // bounded by the buffer
    let mailboxes = (exact_max > 0).then(|| Mailboxes::for_bytes(facts.len(), usual, exact_max));
    let left = agreement.buffer_bytes - mailboxes.map_or(0, |mailboxes| mailboxes.area_bytes());
    let n_blocks = if family(facts).is_some() { large } else { usual };
    let rings = Rings::within(facts.len(), agreement.legs, n_blocks * block_channels(facts, kind), left)?;
    let may_copy = kind == ExchangeKind::Host && agreement.may(agreement.host_copy);
    let copies =
        may_copy.then_some(CopyRoom { world: facts.len(), legs: agreement.legs, buffer_bytes: agreement.buffer_bytes });
    Some(Layout { rings, mailboxes, copies })
}

/// Blocks that a kernel may have on every rank.
pub(crate) fn blocks(facts: &[Blob], kind: ExchangeKind) -> Blocks {
    let multiprocessors = facts.iter().map(|rank| rank.location.multiprocessors).min().unwrap_or(0);
    let max_ctas = facts[0].agreement.max_ctas;
    let Blocks { usual, large } = residency::blocks(multiprocessors, sharing(facts), max_ctas);
    match kind {
        ExchangeKind::Host if facts.len() > 2 && max_ctas == 0 => {
            Blocks { usual: usual.min(HOST_BLOCKS), large: large.min(HOST_BLOCKS) }
        }
        _ => Blocks { usual, large },
    }
}

/// A number of the communicators that have these very ranks, if all their devices may keep the large share for them.
pub(crate) fn family(facts: &[Blob]) -> Option<u64> {
    let member = |Blob { location, .. }: &Blob| {
        [&location.process.to_le_bytes()[..], &location.device.to_le_bytes(), &location.device_uuid].concat()
    };
    let mut members: Vec<Vec<u8>> = facts.iter().map(member).collect();
    members.sort_unstable();
    let family = identity::hash(&members.concat()) | 1 << 63; // no number that means something else
    let may_keep = |rank: &Blob| [residency::ANY_FAMILY, family].contains(&rank.location.family);
    facts.iter().all(may_keep).then_some(family)
}

/// Whether no device of theirs has another communicator, so that one which has the large share has it now.
pub(crate) fn are_alone(facts: &[Blob]) -> bool {
    family(facts).is_some() && facts.iter().all(|rank| rank.location.family == residency::ANY_FAMILY)
}

/// The rank that leases the large share for all: the same process and device for all communicators of a family.
pub(crate) fn leader(facts: &[Blob]) -> usize {
    let place = |rank: &usize| (facts[*rank].location.process, facts[*rank].location.device);
    (0..facts.len()).min_by_key(place).unwrap_or(0)
}

/// Whether all ranks run on one host. Who names an exchange that needs one means the machine, whatever `NCCL_HOSTID` tells
/// NCCL of it.
fn is_one_host(facts: &[Blob]) -> bool {
    let host = |rank: &Blob| match rank.agreement.exchange {
        Some(ExchangeKind::Peer | ExchangeKind::Host) => rank.location.boot,
        _ => rank.location.host,
    };
    facts.iter().all(|rank| host(rank) == host(&facts[0]))
}

//! Facts of ranks, for tests.

use super::agreement::Agreement;
use super::facts::{Blob, Location};
use crate::config::Config;

/// Ranks of one host with a GPU each, all of which reach each other.
pub(super) fn ranks(world: usize, setting: &str) -> Vec<Blob> {
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
        nvlinks: ((1u32 << world.min(16)) - 1) as u16,
        attach: 1,
        ready: true,
        offer: [0; crate::exchange::area::OFFER_BYTES],
    };
    (0..world).map(rank).collect()
}

/// As many ranks on each of as many hosts.
pub(super) fn on_hosts(n_hosts: usize, each: usize, bits: &str) -> Vec<Blob> {
    let (config, _) = Config::parse(|asked| (asked == "FLASHCOMM_BITS").then(|| bits.into()));
    let mut ranks = ranks(n_hosts * each, "auto");
    for (rank, blob) in ranks.iter_mut().enumerate() {
        let host = (rank / each) as u64;
        blob.agreement = Agreement::from(&config);
        (blob.location.host, blob.location.nccl_host, blob.location.shared_memory) = (host, host, host + 1);
    }
    ranks
}

//! What NCCL's own variables say of the machine holds for the shim, too.

use flashcomm_test_support::*;
use half::f16;

/// What ranks of one host end with under variables of NCCL's: the exchange, and from how many bytes on it compresses.
fn ends_with(
    variables: &'static [(&'static str, &'static str)],
    by_rank: bool,
    exchange: &str,
    min_bytes: u64,
    says: &str,
) {
    let settings = |rank: usize| {
        let mut settings = vec![("FLASHCOMM_MIN_BYTES", "auto".to_string()), ("FLASHCOMM_LOG", "info".into())];
        let value = |value: &str| if by_rank { format!("{value}{rank}") } else { value.into() };
        settings.extend(variables.iter().map(|(name, of_it)| (*name, value(of_it))));
        settings.extend([("WORLD_EXCHANGE", exchange.to_string()), ("WORLD_MIN_BYTES", min_bytes.to_string())]);
        settings
    };
    let ends = processes(2, settings, |process| {
        use_device(process.rank);
        let (comm, stream) = (init(2, process.unique_id(0), process.rank), Stream::new());
        let info = Info::of(comm);
        let expected = (std::env::var("WORLD_EXCHANGE").unwrap(), std::env::var("WORLD_MIN_BYTES").unwrap());
        assert_eq!((info.exchange().to_string(), info.min_bytes.to_string()), expected);
        let count = 1 << 20; // 2 MiB
        let inputs: Vec<_> = (0..2).map(|rank| whole_numbers(count, 3, rank)).collect();
        let memory = Memory::of(&inputs[process.rank], &stream);
        ok!(ncclAllReduce(memory.at, memory.at, count, dtype::FP16, SUM, comm, stream.0));
        let sum: Vec<f16> = match info.min_bytes {
            u64::MAX => exact_sum(&inputs),
            _ => reference(&inputs, legs(8, 8)),
        };
        same_bits(&memory.read(count, &stream), &sum, "the sum");
        let not_faster = Stats::of(comm).because("not_faster");
        assert_eq!(not_faster, u64::from(info.min_bytes == u64::MAX));
        ok!(ncclCommDestroy(comm));
    });
    let Some(ends) = ends else { return };
    assert!(ends.iter().any(|(_, log)| log.contains(says)), "{variables:?}\n{}", ends[0].1);
    all_succeed(Some(ends));
}

#[test]
fn without_them_ranks_whose_gpus_reach_each_other_use_gpu_memory() {
    ends_with(&[], false, "peer", 1280 << 10, "exchange peer");
}

#[test]
fn p2p_that_is_disabled_is_not_used_and_host_memory_is() {
    ends_with(&[("NCCL_P2P_DISABLE", "1")], false, "host", 160 << 10, "NCCL_P2P_DISABLE or NCCL_P2P_LEVEL of rank");
}

#[test]
fn p2p_beyond_the_level_is_not_used() {
    ends_with(&[("NCCL_P2P_LEVEL", "LOC")], false, "host", 160 << 10, "NCCL_P2P_LEVEL of rank");
}

#[test]
fn a_level_that_the_link_is_within_changes_nothing() {
    ends_with(&[("NCCL_P2P_LEVEL", "NVL")], false, "peer", 1280 << 10, "exchange peer");
}

#[test]
fn pcie_is_beyond_the_level_of_nvlink() {
    let variables = &[("NCCL_P2P_LEVEL", "NVL"), ("FLASHCOMM_SIM_NVLINK", "0")];
    ends_with(variables, false, "host", 160 << 10, "NCCL_P2P_LEVEL of rank");
}

#[test]
fn shared_memory_that_is_disabled_is_not_used_and_the_network_compresses() {
    let variables = &[("NCCL_P2P_DISABLE", "1"), ("NCCL_SHM_DISABLE", "1")];
    ends_with(variables, false, "nccl", 1 << 20, "NCCL_SHM_DISABLE says");
}

#[test]
fn hosts_that_nccl_tells_apart_are_apart_and_the_network_compresses() {
    ends_with(&[("NCCL_HOSTID", "host")], true, "nccl", 1 << 20, "exchange nccl");
}

#[test]
fn a_communicator_that_compresses_nothing_says_so() {
    ends_with(
        &[("FLASHCOMM_EXCHANGE", "nccl")],
        false,
        "nccl",
        u64::MAX,
        "a communicator of 2 ranks compresses nothing",
    );
}

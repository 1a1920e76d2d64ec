//! Sums that take much longer than when the machine was measured are told of.

use flashcomm_test_support::*;
use std::time::Duration;

const LATE: Duration = Duration::from_millis(20);
/// Of three sums each, more than a minute in all.
const N_ROUNDS: usize = 1080;

/// A minute of sums for which the other rank comes late.
#[test]
fn a_rank_that_always_waits_for_another_is_told_once_and_in_the_statistics() {
    let dir = tempfile::tempdir().unwrap();
    let fabric = root().join("sim/fabric/fabrics/two_without_p2p.json");
    let stats = dir.path().join("%r").to_str().unwrap().to_string();
    let settings = |_| {
        [
            ("FLASHCOMM_SIM_FABRIC", fabric.to_str().unwrap()),
            ("XDG_CACHE_HOME", dir.path().to_str().unwrap()),
            ("FLASHCOMM_TUNE", "always"),
            ("FLASHCOMM_SIM_SLOW", "0:30"), // so that small sums only are measured
            ("FLASHCOMM_MIN_BYTES", "auto"),
            ("FLASHCOMM_BUFFER_MIB", "16"),
            ("FLASHCOMM_STATS_FILE", &stats),
        ]
        .map(|(name, value)| (name, value.to_string()))
        .to_vec()
    };
    let ends = processes(2, settings, |process| {
        use_device(process.rank);
        let comm = init(2, process.unique_id(0), process.rank);
        let (stream, memory) = (Stream::new(), Memory::new(1 << 20));
        for _ in 0..N_ROUNDS {
            for count in [1000, 40_000, 100_000] {
                if process.rank == 1 {
                    std::thread::sleep(LATE);
                }
                ok!(ncclAllReduce(memory.at, memory.at, count, dtype::FP16, SUM, comm, stream.0));
                stream.wait();
            }
        }
    });
    let Some(ends) = ends else { return };
    let log = ends[0].1.clone();
    assert_eq!(log.matches("for a minute ").count(), 1, "{log}");
    all_succeed(Some(ends));
    let json = std::fs::read(dir.path().join("0")).unwrap();
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let slow = json["communicators"][0]["slower_than_measured"].as_array().unwrap();
    let bytes: Vec<u64> = slow.iter().map(|slow| slow["bytes"].as_u64().unwrap()).collect();
    assert!(bytes.contains(&(64 << 10)), "20 ms before each sum: {json:#}");
    assert!(bytes.iter().all(|bytes| *bytes >= 64 << 10), "none is so small: {json:#}");
    for slow in slow {
        assert!(slow["us"].as_u64() > slow["measured_us"].as_u64().map(|us| 3 * us), "{slow}");
    }
}

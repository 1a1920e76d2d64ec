//! Statistics: what is counted is what was called, for each communicator and in each of the places where it can be read.

use flashcomm_test_support::*;
use flashcomm_wire::Plan;
use serde_json::{Value, json};

const WORLD: usize = 2;
const SETTINGS: [(&str, &str); 3] = [("FLASHCOMM_BITS", "4"), ("FLASHCOMM_MIN_BYTES", "2K"), NONE_EXACT];

/// What is not compressed is forwarded.
const NONE_EXACT: (&str, &str) = ("FLASHCOMM_EXACT_MAX_BYTES", "0");

/// Elements of what the job compresses, how often, and their size class: from 2, 4 and 128 KiB on.
const COMPRESSED: [(usize, u64, usize); 3] = [(2000, 3, 2), (2048, 2, 3), (100_000, 1, 8)];

/// An all-reduce in place on memory whose values do not matter.
fn reduce(comm: usize, stream: &Stream, memory: &Memory, count: usize, datatype: i32) {
    ok!(ncclAllReduce(memory.at, memory.at, count, datatype, SUM, comm, stream.0));
    stream.wait();
}

/// One rank's calls on a communicator: fp16 of 2 KiB and more are compressed.
fn job(comm: usize) {
    let (stream, memory) = (Stream::new(), Memory::new(400_000));
    memory.write_bytes(&vec![0; 400_000], &stream);
    for (count, times, _) in COMPRESSED {
        (0..times).for_each(|_| reduce(comm, &stream, &memory, count, dtype::FP16));
    }
    (0..4).for_each(|_| reduce(comm, &stream, &memory, 100, dtype::FP16)); // too small
    (0..5).for_each(|_| reduce(comm, &stream, &memory, 1000, dtype::FP32));
    (0..6).for_each(|_| ok!(ncclBroadcast(memory.at, memory.at, 10, dtype::UINT8, 0, comm, stream.0)));
    stream.wait();
}

/// What a rank sends for one of so many elements.
fn on_the_wire(count: usize) -> u64 {
    Plan::new(count, WORLD, legs(4, 4), 1 << 20).unwrap().wire_bytes() as u64
}

#[test]
fn a_communicators_counts_are_its_calls() {
    in_process(&SETTINGS, || {
        let ids = [unique_id(), unique_id()];
        threads(WORLD, |rank| {
            let [comm, other] = ids.map(|id| init(WORLD, id, rank));
            assert_eq!(Stats::of(comm), Stats::NONE);
            job(comm);
            reduce(other, &Stream::new(), &Memory::new(8), 4, dtype::FP16);

            let stats = Stats::of(comm);
            assert_eq!((stats.compressed, stats.forwarded, stats.others), (6, 9, 6));
            assert_eq!((stats.bytes_in, stats.bytes_forwarded), (12_000 + 8192 + 200_000, 800 + 20_000));
            assert_eq!(
                stats.bytes_wire,
                COMPRESSED.iter().map(|(count, times, _)| times * on_the_wire(*count)).sum::<u64>()
            );
            assert_eq!((stats.because("small"), stats.because("datatype")), (4, 5));
            assert_eq!(stats.because.iter().sum::<u64>(), 9);
            let mut sizes = [[0; 5]; 24];
            for (count, times, class) in COMPRESSED {
                sizes[class][..3].copy_from_slice(&[times, times * 2 * count as u64, times * on_the_wire(count)]);
            }
            sizes[0][3..].copy_from_slice(&[4, 800]);
            sizes[2][3..].copy_from_slice(&[5, 20_000]);
            assert_eq!(stats.sizes, sizes);

            let stats = Stats::of(other);
            assert_eq!((stats.compressed, stats.forwarded, stats.because("small")), (0, 1, 1));
            ok!(ncclCommDestroy(comm));
            ok!(ncclCommDestroy(other));
        });
        // The structure of the first version, which ended before the reasons.
        let mut total = [48, 0, 0, 0, 0, 0];
        ok!(flashcommGetStats(&mut total));
        assert_eq!(total[1..4], [12, 20, 12], "the total keeps what has ended");
        assert_eq!(call!(flashcommGetStats(&mut [40, 0, 0, 0, 0, 0])), 4, "no version has this size");
        let mut stats = Stats::NONE;
        assert_eq!(call!(flashcommGetCommStats(0, &mut stats)), 4);
    });
}

fn read_json(path: &std::path::Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))).unwrap()
}

/// Checks a communicator of a file against [`job`].
fn check_communicator(communicator: &Value, rank: usize, ended: bool) {
    let expected = [
        ("rank", json!(rank)),
        ("world", json!(WORLD)),
        ("bits", json!("4")),
        ("code", json!("blocks")),
        ("exchange", json!("peer")),
        ("ended", json!(ended)),
        ("all_reduces_compressed", json!(6)),
        ("bytes_in", json!(220_192)),
        ("all_reduces_forwarded", json!(9)),
        ("forwarded_because", json!({"small": {"calls": 4, "bytes": 800}, "datatype": {"calls": 5, "bytes": 20_000}})),
        ("others_forwarded", json!({"broadcast": 6})),
    ];
    for (key, value) in expected {
        assert_eq!(communicator[key], value, "{key} of {communicator:#}");
    }
    let sizes = communicator["sizes"].as_array().unwrap();
    assert_eq!(
        sizes.iter().map(|size| size["from_bytes"].as_u64().unwrap()).collect::<Vec<_>>(),
        [0, 2048, 4096, 131_072]
    );
    assert_eq!(sizes[1]["to_bytes"], 4096);
    assert_eq!(sizes[1]["forwarded"], json!({"datatype": {"calls": 5, "bytes": 20_000}}));
    let compressed = json!({"calls": 3, "bytes_in": 12_000, "bytes_wire": 3 * on_the_wire(2000)});
    assert_eq!(sizes[1]["compressed"], compressed);
}

#[test]
fn every_process_leaves_a_file_named_by_its_rank() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stats.%r.json").to_str().unwrap().to_string();
    let settings = |rank: usize| {
        let file = ("FLASHCOMM_STATS_FILE", path.clone());
        let bits = SETTINGS.map(|(name, value)| (name, value.to_string()));
        [bits.to_vec(), vec![file, ("FLASHCOMM_LOG", if rank == 0 { "info" } else { "warn" }.into())]].concat()
    };
    let ends = processes(WORLD, settings, |process| {
        use_device(process.rank);
        let [first, second] = [0, 1].map(|n| init(WORLD, process.unique_id(n), process.rank));
        job(first);
        job(second);
        ok!(ncclCommDestroy(first));
    });
    let Some(ends) = ends else { return };
    for line in [
        "communicator 1, rank 0 of 2 (4 bits, blocks, peer) ended: 6 all-reduces compressed",
        "process ends: 12 all-reduces",
    ] {
        assert_eq!(ends[0].1.matches(line).count(), 1, "{}", ends[0].1);
    }
    assert_eq!(ends[1].1, "", "nothing is said uninvited");
    all_succeed(Some(ends));
    for rank in 0..WORLD {
        let json = read_json(&dir.path().join(format!("stats.{rank}.json")));
        assert_eq!((&json["format"], &json["rank"]), (&json!(1), &json!(rank)));
        assert_eq!(json["process"]["all_reduces_compressed"], 12);
        assert_eq!(json["communicators"].as_array().unwrap().len(), 2);
        check_communicator(&json["communicators"][0], rank, true);
        check_communicator(&json["communicators"][1], rank, false);
    }
}

#[test]
fn the_rank_of_a_process_is_its_lowest_in_the_largest_communicator_also_where_nothing_is_compressed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("%r").to_str().unwrap().to_string();
    in_process(&[("FLASHCOMM_STATS_FILE", &path), ("FLASHCOMM_ENABLE", "0")], || {
        let ids = [unique_id(), unique_id()];
        threads(3, |thread| {
            // Ranks 2, 1, 0 of three; and two of them are 0 and 1 of a smaller one.
            let large = init(3, ids[0], 2 - thread);
            let (stream, memory) = (Stream::new(), Memory::new(2000));
            reduce(large, &stream, &memory, 1000, dtype::FP16);
            if thread < 2 {
                reduce(init(2, ids[1], thread), &stream, &memory, 1000, dtype::FP16);
            }
        });
    });
    if std::env::var_os("WORLD_INNER").is_none() {
        let json = read_json(&dir.path().join("0"));
        assert_eq!(json["process"]["forwarded_because"], json!({"disabled": {"calls": 5, "bytes": 10_000}}));
        assert_eq!(json["communicators"].as_array().unwrap().len(), 5);
    }
}

#[test]
fn communicators_without_end_do_not_make_the_file_grow_and_are_all_in_the_total() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file").to_str().unwrap().to_string();
    in_process(&[("FLASHCOMM_STATS_FILE", &path), NONE_EXACT], || {
        let ids: Vec<_> = (0..100).map(|_| unique_id()).collect();
        threads(WORLD, |rank| {
            let (stream, memory) = (Stream::new(), Memory::new(4000));
            for id in &ids {
                let comm = init(WORLD, *id, rank);
                reduce(comm, &stream, &memory, 1000, dtype::FP32);
                ok!(ncclCommDestroy(comm));
            }
        });
    });
    if std::env::var_os("WORLD_INNER").is_none() {
        let json = read_json(&dir.path().join("file"));
        assert_eq!(json["process"]["all_reduces_forwarded"], 200);
        assert_eq!(json["communicators"].as_array().unwrap().len(), 64);
        let earlier = &json["ended_earlier"];
        assert_eq!((&earlier["communicators"], &earlier["all_reduces_forwarded"]), (&json!(136), &json!(136)));
    }
}

/// What the tool in tests/c heard from a job of one all-reduce that is compressed and one that is not, by each of two ranks.
fn heard(nvtx: &str, exchange: &str) -> Option<String> {
    let dir = tempfile::tempdir().unwrap();
    let (tool, file) = (dir.path().join("tool.so"), dir.path().join("heard"));
    let settings = [
        ("FLASHCOMM_BITS", "4:8"),
        NONE_EXACT,
        ("FLASHCOMM_NVTX", nvtx),
        ("FLASHCOMM_EXCHANGE", exchange),
        ("NVTX_INJECTION64_PATH", tool.to_str().unwrap()),
        ("NVTX_TOOL_FILE", file.to_str().unwrap()),
    ];
    if std::env::var_os("WORLD_INNER").is_none() {
        let source = root().join("tests/c/nvtx_tool.c");
        let mut cc = std::process::Command::new("cc");
        let built = cc.args(["-Wall", "-Werror", "-shared", "-fPIC"]).arg(source).arg("-o").arg(&tool).status();
        assert!(built.expect("cc").success());
    }
    in_process(&settings, || {
        let id = unique_id();
        threads(WORLD, |rank| {
            let (comm, stream, memory) = (init(WORLD, id, rank), Stream::new(), Memory::new(4000));
            reduce(comm, &stream, &memory, 2000, dtype::FP16);
            reduce(comm, &stream, &memory, 1000, dtype::FP32);
            ok!(ncclCommDestroy(comm));
        });
    });
    std::env::var_os("WORLD_INNER").is_none().then(|| std::fs::read_to_string(file).unwrap_or_default())
}

#[test]
fn a_profiler_hears_of_compressed_calls_where_it_is_asked_for() {
    for exchange in ["peer", "nccl"] {
        let Some(heard) = heard("1", exchange) else { return };
        let mut lines: Vec<&str> = heard.lines().collect();
        assert_eq!(lines[0], "domain flashcomm", "{heard}");
        lines.sort_unstable();
        let push = format!("push all-reduce fp16, 4:8 bits, {exchange}: 4000");
        assert_eq!(lines, ["domain flashcomm", "pop", "pop", &push, &push], "{heard}");
    }
    assert_eq!(heard("0", "peer").unwrap_or_default(), "", "off: the tool is not even loaded");
}

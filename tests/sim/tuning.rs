//! The tuner decides right where the machine is as a fabric says, and alike on every rank whatever happens to one of them.
//! That proves decisions, and no speed.

use std::path::{Path, PathBuf};

use flashcomm_sim_fabric as model;
use flashcomm_sim_fabric::{Carrier, Fabric, Hops, Memory as Over, Sum};
use flashcomm_test_support::*;

const FORWARDED: usize = 0;
const ONE_HOP: usize = 1;
const TWO_HOPS: usize = 2;
const COMPRESSED: usize = 3;
const PULLED: usize = 4;
const COPIED: usize = 5;

/// What must be worth it to be taken, twice over: beside NCCL, and beside what loses nothing.
const WORTH_IT: f64 = 0.97 * 0.97;

fn file(name: &str) -> PathBuf {
    root().join("sim/fabric/fabrics").join(name).with_extension("json")
}

fn settings<'a>(fabric: &'a Path, cache: &'a Path, tune: &'a str) -> Vec<(&'static str, &'a str)> {
    vec![
        ("FLASHCOMM_SIM_FABRIC", fabric.to_str().unwrap()),
        ("XDG_CACHE_HOME", cache.to_str().unwrap()),
        ("FLASHCOMM_TUNE", tune),
        ("FLASHCOMM_MIN_BYTES", "auto"),
        ("FLASHCOMM_BUFFER_MIB", "16"),
    ]
}

/// Every size that a rank is asked for: four of each octave.
fn sizes() -> impl Iterator<Item = u64> {
    (8..28).flat_map(|octave| (4..8).map(move |quarter| (quarter << octave) >> 2))
}

/// How sums of all sizes go.
fn ways(comm: usize) -> Vec<Way> {
    sizes().map(|n_bytes| Way::of(comm, dtype::FP16, n_bytes)).collect()
}

/// Nanoseconds of each way on a fabric, over an exchange.
fn modelled(fabric: &Fabric, world: usize, bits: f64, over: Over, n_bytes: u64) -> [u64; 6] {
    let hops = if world == 2 { Hops::One } else { Hops::Two };
    let carrier = if over == Over::Peer { Carrier::PeerPush } else { Carrier::HostKernels };
    let by = |carrier| model::Way::Compressed { hops, bits, carrier };
    let exact = [model::Way::ExactOneHop(over), model::Way::ExactTwoHops(over)];
    let (pulled, copied) = (by(Carrier::PeerPull), by(Carrier::HostCopies));
    let ways = [model::Way::Nccl, exact[0], exact[1], by(carrier), pulled, copied];
    ways.map(|way| fabric.nanoseconds(&Sum { world, n_bytes, way }))
}

/// Whether what is taken is the fastest of what there is, but for what is not worth it.
fn is_right(way: &Way, times: [u64; 6], n_bytes: u64, over: Over) -> Result<(), String> {
    let room = if over == Over::Peer { 2 << 20 } else { 512 << 10 };
    let there = |way: &usize| match *way {
        ONE_HOP | TWO_HOPS => n_bytes <= room,
        PULLED => over == Over::Peer,
        COPIED => over == Over::Host,
        _ => true,
    };
    let (taken, fastest) = (times[way.way as usize], (0..6).filter(there).map(|way| times[way]).min().unwrap());
    match taken as f64 * WORTH_IT <= fastest as f64 {
        true => Ok(()),
        false => Err(format!(
            "{n_bytes} bytes take {taken} ns as way {}, and could take {fastest}: {times:?}, measured {:?}",
            way.way, way.nanoseconds
        )),
    }
}

/// Tunes on a fabric, with a rank on each of its GPUs, and looks at all sizes.
fn decides_right(name: &str, bits: u8) {
    if is_real() {
        return;
    }
    let (fabric, cache) = (file(name), tempfile::tempdir().unwrap());
    let width = bits.to_string();
    let settings = [&settings(&fabric, cache.path(), "always")[..], &[("FLASHCOMM_BITS", &width)]].concat();
    in_process(&settings, || {
        let fabric = Fabric::load(&fabric).unwrap();
        let (world, id) = (fabric.n_gpus(), unique_id());
        let of_ranks = threads(world, |rank| {
            let comm = init(world, id, rank);
            let (exchange, ways) = (Info::of(comm).exchange().to_string(), ways(comm));
            ok!(ncclCommDestroy(comm));
            (exchange, ways)
        });
        let (exchange, ways) = &of_ranks[0];
        assert!(of_ranks.iter().all(|rank| rank == &of_ranks[0]), "every rank the same");
        let payload = legs(bits, bits).reduce.bits_per_element();
        let over = if exchange == "host" { Over::Host } else { Over::Peer };
        for (n_bytes, way) in sizes().zip(ways) {
            let times = modelled(&fabric, world, payload, over, n_bytes);
            if let Err(wrong) = is_right(way, times, n_bytes, over) {
                panic!("{name}, {bits} bits, over {exchange}: {wrong}");
            }
        }
    });
}

#[test]
fn two_without_p2p() {
    decides_right("two_without_p2p", 8);
}

#[test]
fn two_without_p2p_at_4_bits() {
    decides_right("two_without_p2p", 4);
}

#[test]
fn two_with_nvlink() {
    decides_right("two_with_nvlink", 8);
}

#[test]
fn four_on_one_root() {
    decides_right("four_on_one_root", 4);
}

#[test]
fn eight_behind_two_switches_where_writes_collapse() {
    decides_right("eight_behind_two_switches", 8);
}

#[test]
fn eight_on_two_sockets() {
    decides_right("eight_on_two_sockets", 8);
}

#[test]
fn eight_with_nvlink() {
    decides_right("eight_with_nvlink", 8);
}

/// A start of a job of two processes on two cards without P2P, of which one is so slow that only small sums are measured;
/// with settings of each rank's own. Both come to the same ways, which are measured, if `expects` says so. What each
/// wrote to its standard error.
fn start(
    caches: [&Path; 2],
    tune: &'static str,
    own: impl Fn(usize) -> Vec<(&'static str, String)>,
    expects: &'static str,
) -> Option<Vec<String>> {
    let fabric = file("two_without_p2p");
    let settings = |rank: usize| {
        let of_test = settings(&fabric, caches[rank], tune);
        let mut all: Vec<_> = of_test.into_iter().map(|(name, value)| (name, value.to_string())).collect();
        all.extend(
            [("FLASHCOMM_LOG", "info"), ("FLASHCOMM_SIM_SLOW", "0:30"), ("WORLD_EXPECTS", expects)]
                .map(|(name, value)| (name, value.to_string())),
        );
        all.extend(own(rank));
        all
    };
    let ends = processes(2, settings, |process| {
        use_device(process.rank);
        let comm = init(2, process.unique_id(0), process.rank);
        let ways = ways(comm);
        let text = format!("{} {ways:?}", Info::of(comm).exchange());
        process.tell(&format!("ways{}", process.rank), text.as_bytes());
        let other = process.hear(&format!("ways{}", 1 - process.rank));
        assert_eq!(text, String::from_utf8(other).unwrap(), "rank {} is not alone", process.rank);
        match std::env::var("WORLD_EXPECTS").unwrap().as_str() {
            "measured" => is_measured(&ways),
            _ if ways[0].nanoseconds[FORWARDED] > 0 => is_measured(&ways),
            // What one rank lacked has ruled the other exchanges out, for all of them.
            _ if Info::of(comm).exchange() == "nccl" => assert!(ways.iter().all(|way| way.way as usize == FORWARDED)),
            _ => is_not_measured(&ways),
        }
        // And sums go as they say.
        let stream = Stream::new();
        for count in [100, 100_000] {
            let memory = Memory::of(&vec![half::f16::ONE; count], &stream);
            ok!(ncclAllReduce(memory.at, memory.at, count, dtype::FP16, SUM, comm, stream.0));
            assert_eq!(memory.read::<half::f16>(count, &stream), vec![half::f16::from_f32(2.0); count]);
        }
        ok!(ncclCommDestroy(comm));
    })?;
    let errors = ends.into_iter().enumerate().map(|(rank, (status, stderr))| {
        assert!(status.success(), "rank {rank}: {status:?}\n{stderr}");
        stderr
    });
    Some(errors.collect())
}

fn is_measured(ways: &[Way]) {
    assert!(ways.iter().all(|way| way.nanoseconds[FORWARDED] > 0 && way.nanoseconds[COMPRESSED] > 0), "{ways:?}");
}

/// As constants have it.
fn is_not_measured(ways: &[Way]) {
    assert!(ways.iter().all(|way| way.nanoseconds == [0; 6]), "{ways:?}");
    let of_size = |n_bytes: u64| sizes().zip(ways).find(|(size, _)| *size >= n_bytes).unwrap().1.way as usize;
    assert_eq!([of_size(4 << 10), of_size(4 << 20)], [ONE_HOP, COMPRESSED]);
}

const MEASURES: &str = "measured over host";
const KNOWS: &str = "what was measured here before holds";

fn alike(_: usize) -> Vec<(&'static str, String)> {
    vec![]
}

/// Wants a start to measure, and every rank to keep the same.
fn measures(starts: &[String]) {
    assert!(starts[0].contains(MEASURES), "{}", starts[0]);
    assert!(starts.iter().all(|stderr| !stderr.contains(KNOWS)), "{starts:?}");
}

fn kept(cache: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(cache.join("flashcomm")).into_iter().flatten();
    files.map(|file| file.unwrap().path()).collect()
}

#[test]
fn what_one_start_has_measured_the_next_ones_know_if_all_ranks_do() {
    if is_real() {
        return;
    }
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let both = [one.path(), one.path()];
    let Some(first) = start(both, "cache", alike, "measured") else { return };
    measures(&first);
    let files = kept(one.path());
    assert_eq!(files.len(), 1, "{files:?}");
    let measure = |caches, times: usize| {
        (0..times).for_each(|_| measures(&start(caches, "cache", alike, "measured").unwrap()));
    };
    let knows = |starts: Option<Vec<String>>| {
        let starts = starts.unwrap();
        assert!(starts.iter().all(|stderr| stderr.contains(KNOWS) && !stderr.contains(MEASURES)), "{starts:?}");
    };
    measure(both, 2); // three starts in all
    knows(start(both, "cache", alike, "measured"));
    // One that is told to measure anyway, after which no other does.
    measures(&start(both, "always", alike, "measured").unwrap());
    knows(start(both, "cache", alike, "measured"));
    // One of whose ranks has no cache; and then both have one.
    let apart = [one.path(), other.path()];
    measure(apart, 3);
    knows(start(apart, "cache", alike, "measured"));
    // Other widths and other variables of NCCL's are another matter, and have files of their own.
    let wider = |_| vec![("FLASHCOMM_BITS", "5".to_string())];
    measures(&start(both, "cache", wider, "measured").unwrap());
    let algorithm = |_| vec![("NCCL_ALGO", "Tree".to_string())];
    measures(&start(both, "cache", algorithm, "measured").unwrap());
    assert_eq!(kept(one.path()).len(), 3);
    // What is damaged on one rank is nothing, and is mended.
    let [file] = &kept(other.path())[..] else { panic!("one file") };
    std::fs::write(file, &std::fs::read(file).unwrap()[1..]).unwrap();
    measure(apart, 3);
    knows(start(apart, "cache", alike, "measured"));
}

#[test]
fn where_one_rank_cannot_measure_all_take_what_was_measured_elsewhere() {
    if is_real() {
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    let mut has_failed = false;
    for n in 1..10 {
        let fails = |rank| if rank == 1 { vec![("FLASHCOMM_SIM_FAIL", format!("alloc:{n}"))] } else { vec![] };
        // Which allocation is the one is not known: others rule out an exchange.
        let Some(starts) = start([cache.path(), cache.path()], "always", fails, "either") else { return };
        has_failed = starts[1].contains("rank 1 cannot measure: allocating for measurements");
        if has_failed {
            assert!(starts[0].contains("nothing could be measured"), "{}", starts[0]);
            break;
        }
    }
    assert!(has_failed, "no allocation was the one");
}

#[test]
fn a_rank_that_is_ten_times_slower_is_the_one_that_counts() {
    if is_real() {
        return;
    }
    let (fabric, cache) = (file("two_with_nvlink"), tempfile::tempdir().unwrap());
    let slow = [&settings(&fabric, cache.path(), "always")[..], &[("FLASHCOMM_SIM_SLOW", "1:10")]].concat();
    in_process(&slow, || {
        let (fabric, id) = (Fabric::load(&fabric).unwrap(), unique_id());
        let of_ranks = threads(2, |rank| {
            let comm = init(2, id, rank);
            let ways = ways(comm);
            ok!(ncclCommDestroy(comm));
            ways
        });
        assert_eq!(of_ranks[0], of_ranks[1]);
        let bits = legs(8, 8).reduce.bits_per_element();
        for (n_bytes, way) in sizes().zip(&of_ranks[0]).filter(|(n_bytes, _)| n_bytes.is_power_of_two()) {
            let times = modelled(&fabric, 2, bits, Over::Peer, n_bytes).map(|ns| 10 * ns);
            let [told, expected] = [way.nanoseconds[FORWARDED], times[FORWARDED]];
            assert!(told.abs_diff(expected) * 50 < expected, "{n_bytes} bytes: {told} and not {expected} ns over NCCL");
            is_right(way, times, n_bytes, Over::Peer).unwrap();
        }
    });
}

#[test]
fn communicators_that_do_not_block_are_not_measured_and_go_as_they_would_without() {
    if is_real() {
        return;
    }
    let (fabric, cache) = (file("two_without_p2p"), tempfile::tempdir().unwrap());
    in_process(&settings(&fabric, cache.path(), "always"), || {
        let id = unique_id();
        let settled = |comm: usize, first: i32| {
            let mut state = first;
            while state == 7 {
                ok!(ncclCommGetAsyncError(comm, &mut state));
                std::thread::sleep(std::time::Duration::from_micros(50));
            }
            assert_eq!(state, 0);
        };
        threads(2, |rank| {
            let (mut comm, config) = (0, Config::non_blocking());
            let first = call!(ncclCommInitRankConfig(&mut comm, 2, id, rank as i32, &config));
            settled(comm, first);
            is_not_measured(&ways(comm));
            let first = call!(ncclCommFinalize(comm));
            settled(comm, first);
            ok!(ncclCommDestroy(comm));
        });
        assert_eq!(kept(cache.path()).len(), 0);
    });
}

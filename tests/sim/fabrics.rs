//! Virtual time: on a fabric events tell what it says, whatever the wall clock does.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use flashcomm_sim_fabric::{Carrier, Fabric, Hops, Memory as Over, Sum, Way};
use flashcomm_test_support::*;
use half::f16;

fn file(name: &str) -> PathBuf {
    root().join("sim/fabric/fabrics").join(name).with_extension("json")
}

/// Runs ranks that are threads on a fabric, unless there is a real driver.
fn on(fabric: &str, world: usize, settings: Settings<'_>, body: impl Fn(&Fabric, usize, usize, &Stream) + Sync) {
    if is_real() {
        return;
    }
    let path = file(fabric);
    let mut all = vec![("FLASHCOMM_SIM_FABRIC", path.to_str().unwrap()), ("FLASHCOMM_BUFFER_MIB", "16")];
    all.extend(settings);
    in_process(&all, || {
        // A test of several jobs comes here once for each, in every one of their processes.
        let path = std::env::var_os("FLASHCOMM_SIM_FABRIC").unwrap();
        let (fabric, id) = (Fabric::load(path.as_ref()).unwrap(), unique_id());
        threads(world, |rank| {
            let (comm, stream) = (init(world, id, rank), Stream::new());
            body(&fabric, comm, rank, &stream);
            ok!(ncclCommDestroy(comm));
        });
    });
}

/// Nothing is compressed and nothing is exact: NCCL's.
const PLAIN: [(&str, &str); 2] = [("FLASHCOMM_MIN_BYTES", "1G"), ("FLASHCOMM_EXACT_MAX_BYTES", "0")];

const BITS: [(&str, &str); 2] = [("FLASHCOMM_BITS", "4"), ("FLASHCOMM_EXACT_MAX_BYTES", "0")];

/// Milliseconds of nanoseconds, as the driver tells them.
fn ms(ns: u64) -> f32 {
    (ns as f64 / 1e6) as f32
}

fn bits() -> f64 {
    legs(4, 4).reduce.bits_per_element()
}

/// Milliseconds of `body` by events.
fn timed(stream: &Stream, body: impl FnOnce()) -> f32 {
    let start = Event::of(stream);
    body();
    Event::of(stream).ms_since(&start)
}

/// Milliseconds of an all-reduce in place.
fn all_reduce_ms(comm: usize, stream: &Stream, count: usize) -> f32 {
    let memory = Memory::of(&vec![f16::ONE; count], stream);
    let ms = timed(stream, || all_reduce(comm, stream, &memory));
    stream.wait();
    ms
}

fn all_reduce(comm: usize, stream: &Stream, memory: &Memory) {
    ok!(ncclAllReduce(memory.at, memory.at, memory.n_bytes / 2, dtype::FP16, SUM, comm, stream.0));
}

/// Wants all-reduces of some sizes to take what the fabric says.
fn takes(fabric: &Fabric, comm: usize, stream: &Stream, world: usize, way: Way) {
    for count in [5, 4096, 300_000] {
        let expected = fabric.nanoseconds(&Sum { world, n_bytes: 2 * count as u64, way });
        assert_eq!(all_reduce_ms(comm, stream, count), ms(expected), "{way:?}, {count} elements");
    }
}

#[test]
fn nccl_takes_what_its_ring_does_whatever_the_wall_clock_says() {
    let settings = [&PLAIN[..], &[("FLASHCOMM_SIM_SEED", "7")]].concat();
    on("four_on_one_root", 4, &settings, |fabric, comm, rank, stream| {
        std::thread::sleep(Duration::from_millis(30 * rank as u64));
        takes(fabric, comm, stream, 4, Way::Nccl);
        assert_eq!(n_compressed() + n_exact(), 0);
    });
}

#[test]
fn nccl_goes_over_host_memory_where_cards_do_not_reach_each_other() {
    on("two_without_p2p", 2, &PLAIN, |fabric, comm, _, stream| {
        takes(fabric, comm, stream, 2, Way::Nccl);
        assert!(all_reduce_ms(comm, stream, 1 << 20) > 1.0, "2 MiB are read at 1.9 GB/s");
    });
}

#[test]
fn other_collectives_take_what_their_steps_do() {
    on("four_on_one_root", 4, &PLAIN, |fabric, comm, rank, stream| {
        let (world, block) = (4, 10_000);
        let (one, all) = (Memory::new(block), Memory::new(world * block));
        let (one_at, all_at, u8s) = (one.at, all.at, dtype::UINT8);
        let ring = |n_steps| ms(fabric.nccl_ring(world, n_steps, block as u64));
        let gathers = || ok!(ncclAllGather(one_at, all_at, block, u8s, comm, stream.0));
        assert_eq!(timed(stream, gathers), ring(3));
        let scatters = || ok!(ncclReduceScatter(all_at, one_at, block, u8s, SUM, comm, stream.0));
        assert_eq!(timed(stream, scatters), ring(3));
        assert_eq!(timed(stream, || ok!(ncclBroadcast(one_at, one_at, block, u8s, 1, comm, stream.0))), ring(1));
        assert_eq!(timed(stream, || ok!(ncclReduce(one_at, one_at, block, u8s, SUM, 1, comm, stream.0))), ring(1));
        // Twice 100 bytes to the next rank, 300 to the one behind that.
        let sends = || {
            ok!(ncclGroupStart());
            for (ahead, n_bytes) in [(1, 100), (1, 100), (2, 300)] {
                ok!(ncclSend(all_at, n_bytes, u8s, ((rank + ahead) % world) as i32, comm, stream.0));
                ok!(ncclRecv(one_at, n_bytes, u8s, ((rank + world - ahead) % world) as i32, comm, stream.0));
            }
            ok!(ncclGroupEnd());
        };
        assert_eq!(timed(stream, sends), ms(fabric.nccl_sends(world, &[(1, 200), (2, 300)])));
        stream.wait();
    });
}

#[test]
fn two_hops_over_peers_take_what_the_fabric_says() {
    on("four_on_one_root", 4, &BITS, |fabric, comm, _, stream| {
        assert_eq!(Info::of(comm).exchange(), "peer");
        takes(fabric, comm, stream, 4, Way::Compressed { hops: Hops::Two, bits: bits(), carrier: Carrier::PeerPush });
        assert!(n_compressed() > 0);
    });
}

#[test]
fn ranks_that_are_processes_take_as_long() {
    if is_real() {
        return;
    }
    let settings = |_| {
        let mut settings = vec![("FLASHCOMM_SIM_FABRIC", file("two_with_nvlink").to_str().unwrap().to_string())];
        settings.extend(BITS.map(|(name, value)| (name, value.to_string())));
        settings
    };
    all_succeed(processes(2, settings, |process| {
        use_device(process.rank);
        let fabric = Fabric::load(&file("two_with_nvlink")).unwrap();
        let (comm, stream) = (init(2, process.unique_id(0), process.rank), Stream::new());
        assert_eq!(Info::of(comm).exchange(), "peer");
        let way = Way::Compressed { hops: Hops::One, bits: bits(), carrier: Carrier::PeerPush };
        takes(&fabric, comm, &stream, 2, way);
        ok!(ncclCommDestroy(comm));
    }));
}

#[test]
fn one_hop_over_nvlink_takes_what_the_fabric_says() {
    on("two_with_nvlink", 2, &BITS, |fabric, comm, _, stream| {
        assert_eq!(Info::of(comm).exchange(), "peer");
        takes(fabric, comm, stream, 2, Way::Compressed { hops: Hops::One, bits: bits(), carrier: Carrier::PeerPush });
    });
}

#[test]
fn a_fabric_without_peer_access_leads_to_host_memory_and_its_times() {
    on("two_without_p2p", 2, &BITS, |fabric, comm, _, stream| {
        assert_eq!(Info::of(comm).exchange(), "host");
        let carrier = Carrier::HostKernels;
        takes(fabric, comm, stream, 2, Way::Compressed { hops: Hops::One, bits: bits(), carrier });
    });
}

#[test]
fn exact_sums_take_what_the_fabric_says() {
    let settings = [("FLASHCOMM_MIN_BYTES", "1G"), ("FLASHCOMM_EXACT_MAX_BYTES", "1M")];
    on("four_on_one_root", 4, &settings, |fabric, comm, _, stream| {
        for (count, way) in [(100, Way::ExactOneHop(Over::Peer)), (100_000, Way::ExactTwoHops(Over::Peer))] {
            let expected = fabric.nanoseconds(&Sum { world: 4, n_bytes: 2 * count, way });
            assert_eq!(all_reduce_ms(comm, stream, count as usize), ms(expected), "{way:?}");
        }
        assert!(n_exact() > 0);
    });
}

#[test]
fn the_exchange_over_nccl_takes_as_long_on_every_rank_and_again() {
    let settings = [("FLASHCOMM_BITS", "4"), ("FLASHCOMM_EXACT_MAX_BYTES", "0"), ("FLASHCOMM_EXCHANGE", "nccl")];
    let of_ranks = Mutex::new(Vec::new());
    on("four_on_one_root", 4, &settings, |fabric, comm, _, stream| {
        let count = 300_000;
        let times = [0; 3].map(|_| all_reduce_ms(comm, stream, count));
        of_ranks.lock().unwrap().extend(times);
        let first = of_ranks.lock().unwrap()[0];
        assert_eq!(times, [first; 3]);
        // Three kernels, and two launches of NCCL's between them.
        let payload = 2.0 * count as f64 * bits() / 16.0 / 4.0;
        let least = fabric.nccl_sends(4, &[1, 2, 3].map(|ahead| (ahead, payload as u64)));
        let least = least + fabric.nccl_ring(4, 3, payload as u64) + fabric.codec_ns(2.0 * count as f64) as u64;
        assert!(times[0] > ms(least) && times[0] < 1.5 * ms(least), "{} ms, {} at least", times[0], ms(least));
    });
}

#[test]
fn a_replayed_graph_takes_what_its_nodes_take() {
    on("four_on_one_root", 4, &BITS, |_, comm, _, stream| {
        let memory = Memory::of(&vec![f16::ONE; 50_000], stream);
        let once = timed(stream, || all_reduce(comm, stream, &memory));
        let graph = stream.capture(|| (0..3).for_each(|_| all_reduce(comm, stream, &memory)));
        for _ in 0..2 {
            let replayed = timed(stream, || graph.launch(stream));
            assert!((replayed - 3.0 * once).abs() < 1e-5 * once, "{replayed} ms, {once} each");
        }
        stream.wait();
    });
}

#[test]
fn a_slow_device_takes_so_many_times_as_long() {
    let settings = [&BITS[..], &[("FLASHCOMM_SIM_SLOW", "1:3")]].concat();
    on("four_on_one_root", 4, &settings, |fabric, comm, rank, stream| {
        let way = Way::Compressed { hops: Hops::Two, bits: bits(), carrier: Carrier::PeerPush };
        let expected = fabric.nanoseconds(&Sum { world: 4, n_bytes: 200_000, way });
        let factor = if rank == 1 { 3 } else { 1 };
        assert_eq!(all_reduce_ms(comm, stream, 100_000), ms(factor * expected), "rank {rank}");
    });
}

#[test]
fn streams_go_on_from_the_events_that_they_wait_for() {
    on("two_with_nvlink", 1, &[], |fabric, _, _, stream| {
        let (other, memory) = (Stream::new(), Memory::new(1 << 20));
        let fill = |stream: &Stream, n_bytes: usize| ok!(cuMemsetD8Async(memory.at, 0, n_bytes, stream.0));
        let takes = |n_bytes: usize| fabric.gpu.launch_ns + n_bytes as f64 / fabric.gpu.memory_gb_s;
        let start = Event::of(stream);
        fill(stream, 1 << 20);
        let filled = Event::of(stream);
        assert_eq!(Event::of(&other).ms_since(&start), 0.0, "it has waited for nothing");
        filled.hold(&other);
        fill(&other, 1 << 10);
        let both = Event::of(&other).ms_since(&start);
        assert_eq!(both, ms(takes(1 << 20).round() as u64 + takes(1 << 10).round() as u64));
        assert!(start.ms_since(&filled) < 0.0);
        // Also where the event is complete when it is waited for, and where that is later already.
        filled.hold(&other);
        assert_eq!(Event::of(&other).ms_since(&start), both);
        let third = Stream::new();
        filled.hold(&third);
        assert_eq!(Event::of(&third).ms_since(&filled), 0.0);
        // A graph takes what the longer of its branches does.
        let graph = stream.capture(|| {
            order(stream, &other);
            fill(&other, 1 << 20);
            fill(stream, 1 << 10);
            order(&other, stream);
            fill(stream, 1 << 10);
        });
        let replayed = timed(stream, || graph.launch(stream));
        assert_eq!(replayed, both);
        // Launches of the same one run one after the other, on whatever streams.
        let start = Event::of(stream);
        graph.launch(stream);
        stream.wait();
        graph.launch(&third);
        third.wait();
        assert_eq!(Event::of(&third).ms_since(&start), 2.0 * both);
    });
}

#[test]
fn the_legacy_stream_and_blocking_ones_go_on_from_each_other() {
    on("two_with_nvlink", 1, &[], |fabric, _, _, stream| {
        let (memory, per_thread, legacy) = (Memory::new(1 << 20), Stream(2), Stream(0));
        let fill = |stream: &Stream| ok!(cuMemsetD8Async(memory.at, 0, 1 << 20, stream.0));
        let each = (fabric.gpu.launch_ns + f64::from(1 << 20) / fabric.gpu.memory_gb_s).round() as u64;
        let start = Event::of(stream);
        for n in 0..3 {
            fill(&per_thread);
            assert_eq!(Event::of(&per_thread).ms_since(&start), ms((2 * n + 1) * each));
            fill(&legacy);
            assert_eq!(Event::of(&legacy).ms_since(&start), ms((2 * n + 2) * each));
        }
        assert_eq!(Event::of(stream).ms_since(&start), 0.0, "one that does not block");
    });
}

#[test]
fn copies_take_what_copy_engines_do() {
    on("two_without_p2p", 1, &[], |fabric, _, _, stream| {
        let (memory, bytes) = (Memory::new(1 << 20), vec![1; 1 << 20]);
        let to_device = timed(stream, || memory.write_bytes(&bytes, stream));
        let over_host = fabric.host_memory.copy_launch_ns + f64::from(1 << 20) / fabric.host_memory.copy_gb_s;
        // The way over two links, by reads.
        assert_eq!(to_device, ms((over_host + 1200.0).round() as u64));
        assert_eq!(timed(stream, || drop(memory.read_bytes(1 << 20, stream))), ms((over_host + 700.0).round() as u64));
    });
}

#[test]
fn a_fabric_says_how_many_devices_there_are() {
    for fabric in ["two_without_p2p", "four_on_one_root", "eight_with_nvlink"] {
        on(fabric, 1, &[], |fabric, _, _, _| {
            let mut count = 0;
            ok!(cuDeviceGetCount(&mut count));
            assert_eq!(count as usize, fabric.n_gpus());
        });
    }
}

#[test]
fn a_setting_is_stronger_than_the_fabric() {
    on("four_on_one_root", 1, &[("FLASHCOMM_SIM_DEVICES", "3")], |_, _, _, _| {
        let mut count = 0;
        ok!(cuDeviceGetCount(&mut count));
        assert_eq!(count, 3);
    });
}

/// Wants a process with this setting to abort, with one message.
fn aborts(variable: &'static str, value: &str, says: &str) {
    let fabric = file("four_on_one_root").to_str().unwrap().to_string();
    let settings = |_| vec![("FLASHCOMM_SIM_FABRIC", fabric.clone()), (variable, value.to_string())];
    let ends = processes(1, settings, |_| {
        let devices: Vec<_> = (0..4).map(|_| std::thread::spawn(|| use_device(0))).collect();
        devices.into_iter().for_each(|device| device.join().unwrap());
        use_device(0);
        let (memory, stream) = (Memory::new(8), Stream::new());
        ok!(cuMemsetD8Async(memory.at, 0, 8, stream.0));
        stream.wait();
    });
    let Some(ends) = ends else { return };
    let (status, stderr) = &ends[0];
    assert_eq!(status.signal(), Some(6), "{status:?}: {stderr}");
    assert_eq!(stderr.matches(&format!("{variable}: ")).count(), 1, "{stderr}");
    assert!(stderr.contains(says), "{stderr}");
}

#[test]
fn a_fabric_that_is_not_good_ends_the_process() {
    if !is_real() {
        aborts("FLASHCOMM_SIM_FABRIC", "no/such/file", "no/such/file");
    }
}

#[test]
fn a_slow_device_that_is_none_ends_the_process() {
    if !is_real() {
        aborts("FLASHCOMM_SIM_SLOW", "1", "1 is not device:factor");
    }
}

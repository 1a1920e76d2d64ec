//! Times by hand, and which way is faster where.

use flashcomm_sim_fabric::{Carrier, Fabric, Flow, Hops, Memory, Mover, Place, Sum, Way};

/// Two pairs of GPUs, each behind a switch; between the switches a root. Of round numbers.
const PAIRS: &str = r#"{
    "about": "two pairs of GPUs", "peer_access": true, "nvlink": false,
    "gpu": { "launch_ns": 1000, "codec_gb_s": 1000, "memory_gb_s": 1000 },
    "nccl": { "share": 0.5, "step_ns": 50 },
    "host_memory": {
        "kernel_write_gb_s": 5, "kernel_read_gb_s": 1, "copy_gb_s": 8, "copy_launch_ns": 3000
    },
    "collapse": { "at": "root", "more_than": 2, "pair_gb_s": 0.5 },
    "gpus": ["a", "b", "c", "d"], "switches": ["left", "right"], "roots": ["root"], "memories": ["memory"],
    "links": [
        {
            "each": ["a", "b"], "to": "left",
            "write": { "gb_s": 10, "latency_ns": 100 }, "read": { "gb_s": 8, "latency_ns": 200 }
        },
        {
            "each": ["c", "d"], "to": "right",
            "write": { "gb_s": 10, "latency_ns": 100 }, "read": { "gb_s": 8, "latency_ns": 200 }
        },
        {
            "each": ["left", "right", "memory"], "to": "root",
            "write": { "gb_s": 10, "latency_ns": 300 }, "read": { "gb_s": 8, "latency_ns": 500 }
        }
    ]
}"#;

fn pairs() -> Fabric {
    Fabric::parse(PAIRS).unwrap()
}

fn uncollapsed() -> Fabric {
    Fabric { collapse: None, ..pairs() }
}

fn flow(from: Place, to: Place, mover: Mover) -> Flow {
    Flow { from, to, n_bytes: 1000.0, mover }
}

fn peers(from: usize, to: usize) -> Flow {
    flow(Place::Gpu(from), Place::Gpu(to), Mover::Stores)
}

fn read(from: usize, to: usize) -> Flow {
    flow(Place::Gpu(from), Place::Gpu(to), Mover::Loads)
}

/// Busy, latency.
fn traffic(fabric: &Fabric, flows: &[Flow]) -> (f64, f64) {
    let traffic = fabric.traffic(flows);
    (traffic.busy_ns, traffic.latency_ns)
}

fn compressed(carrier: Carrier) -> Way {
    Way::Compressed { hops: Hops::Two, bits: 4.0, carrier }
}

#[test]
fn a_flow_takes_its_bytes_over_the_slowest_link_and_the_latency_of_its_path() {
    assert_eq!(traffic(&pairs(), &[]), (0.0, 0.0));
    assert_eq!(traffic(&pairs(), &[peers(0, 1)]), (100.0, 200.0));
    assert_eq!(traffic(&pairs(), &[read(0, 1)]), (125.0, 400.0));
    assert_eq!(traffic(&pairs(), &[peers(0, 2)]), (100.0, 800.0));
    assert_eq!(traffic(&pairs(), &[peers(1, 1)]), (0.0, 0.0), "on one GPU");
    assert_eq!(pairs().signal_ns(0, 2), 800.0);
    assert_eq!(pairs().signal_ns(0, 5), 200.0, "rank 5 is on the second GPU");
}

#[test]
fn flows_share_a_direction_of_a_link_and_the_other_one_is_free() {
    let fabric = uncollapsed();
    assert_eq!(traffic(&fabric, &[peers(0, 1), peers(1, 0)]), (100.0, 200.0));
    assert_eq!(traffic(&fabric, &[peers(0, 2), peers(1, 3)]), (200.0, 800.0), "from left to right");
    assert_eq!(traffic(&fabric, &[peers(0, 2), peers(3, 1)]), (100.0, 800.0), "and back");
    assert_eq!(traffic(&fabric, &[peers(0, 1), read(2, 1)]), (225.0, 1400.0), "writes and reads of one link");
}

#[test]
fn writes_collapse_where_more_than_so_many_reach_a_root() {
    let crossing = [peers(0, 2), peers(1, 3), peers(0, 3)];
    assert_eq!(traffic(&pairs(), &crossing[..2]).0, 200.0, "two do not");
    assert_eq!(traffic(&pairs(), &crossing).0, 2000.0, "three do: 1000 bytes at 0.5 GB/s");
    assert_eq!(traffic(&uncollapsed(), &crossing).0, 300.0);
    let within = [peers(0, 1), peers(1, 0), peers(2, 3), peers(3, 2)];
    assert_eq!(traffic(&pairs(), &within).0, 100.0, "they do not reach it");
    let reads = crossing.map(|flow| Flow { mover: Mover::Loads, ..flow });
    assert_eq!(traffic(&pairs(), &reads).0, 375.0, "reads keep their speed");
}

#[test]
fn host_memory_is_as_fast_as_what_moves_the_bytes() {
    let (out, back) = ((Place::Gpu(0), Place::HostOf(2)), (Place::HostOf(0), Place::Gpu(0)));
    assert_eq!(traffic(&pairs(), &[flow(out.0, out.1, Mover::Stores)]), (200.0, 700.0));
    assert_eq!(traffic(&pairs(), &[flow(back.0, back.1, Mover::Loads)]), (1000.0, 1200.0));
    assert_eq!(traffic(&pairs(), &[flow(out.0, out.1, Mover::CopyEngine)]), (125.0, 3700.0));
    assert_eq!(traffic(&pairs(), &[flow(back.0, back.1, Mover::CopyEngine)]), (125.0, 4200.0));
}

#[test]
fn sums_take_what_their_steps_take() {
    let (fabric, n_bytes) = (uncollapsed(), 120_000);
    let time = |world, way| fabric.nanoseconds(&Sum { world, n_bytes, way });
    assert_eq!(time(1, Way::Nccl), 1000, "a launch");
    // Two steps of half at half of 10 GB/s, 200 ns and 50 ns each.
    assert_eq!(time(2, Way::Nccl), 1000 + 2 * (12_000 + 250));
    // Six steps of a quarter; two of the four hops cross, one in each direction.
    assert_eq!(time(4, Way::Nccl), 1000 + 6 * (6_000 + 850));
    assert_eq!(fabric.nccl_ring(4, 6, 30_000), time(4, Way::Nccl));
    assert_eq!(fabric.nccl_sends(4, &[(1, 30_000)]), 1000 + 6_000 + 850);
    // Its own link takes all of a GPU's flows: four from left to right, 8000 bytes each.
    assert_eq!(fabric.nccl_sends(4, &[(1, 8_000), (2, 8_000), (3, 8_000)]), 1000 + 2 * 3_200 + 850);
    assert_eq!(time(2, Way::ExactOneHop(Memory::Peer)), 1000 + 16_000 + 200);
    assert_eq!(time(2, Way::ExactTwoHops(Memory::Peer)), 1000 + 2 * (8_000 + 200));
    assert_eq!(time(2, Way::ExactOneHop(Memory::Host)), 1000 + 160_000 + 700 + 1200);
    // A quarter of a quarter to each: four such flows share the link between the switches.
    assert_eq!(time(4, compressed(Carrier::PeerPush)), 1000 + 2 * (3_000 + 800));
    // In rounds one, two and one of them.
    assert_eq!(time(4, compressed(Carrier::PeerStaged)), 1000 + 2 * ((750 + 1500 + 750) + 3 * 800));
    assert_eq!(time(4, compressed(Carrier::PeerPull)), 1000 + 2 * (3_750 + 800 + 1400));
    let one_hop = Way::Compressed { hops: Hops::One, bits: 4.0, carrier: Carrier::PeerPush };
    assert_eq!(time(2, one_hop), 1000 + 3_000 + 200);
    let slow = Fabric { gpu: flashcomm_sim_fabric::Gpu { codec_gb_s: 2.0, ..fabric.gpu }, ..uncollapsed() };
    assert_eq!(slow.nanoseconds(&Sum { world: 2, n_bytes, way: one_hop }), 1000 + 60_000 + 200, "the codec is slower");
}

#[test]
fn without_peer_access_nccl_goes_over_host_memory_and_peers_are_out_of_reach() {
    let (with, without) = (uncollapsed(), Fabric { peer_access: false, ..uncollapsed() });
    let time = |fabric: &Fabric, way| fabric.nanoseconds(&Sum { world: 2, n_bytes: 120_000, way });
    // Two steps of half: read at half of 1 GB/s.
    assert_eq!(time(&without, Way::Nccl), 1000 + 2 * (120_000 + 700 + 1200 + 50));
    for way in [compressed(Carrier::PeerPull), Way::ExactOneHop(Memory::Peer)] {
        assert_eq!(time(&without, way), u64::MAX);
    }
    let over_host = Way::ExactTwoHops(Memory::Host);
    assert_eq!(time(&without, over_host), time(&with, over_host));
}

#[test]
fn where_writes_collapse_staged_ones_and_reads_are_faster_than_pushed_ones() {
    let fabric = Fabric::parse(include_str!("../fabrics/eight_behind_two_switches.json")).unwrap();
    let time = |way, n_bytes| fabric.nanoseconds(&Sum { world: 8, n_bytes, way });
    for log in 22..28 {
        let [push, staged, pull] = [Carrier::PeerPush, Carrier::PeerStaged, Carrier::PeerPull]
            .map(|carrier| time(compressed(carrier), 1 << log));
        assert!(staged < push && pull < push, "2^{log} bytes: {push} pushed, {staged} staged, {pull} pulled");
    }
    // As reported: 32 MiB take NCCL 2.7 ms, and what pushes is slower.
    let nccl = time(Way::Nccl, 32 << 20);
    assert!((2_600_000..2_800_000).contains(&nccl), "{nccl}");
    assert!(time(Way::ExactTwoHops(Memory::Peer), 32 << 20) > nccl);
    assert!(time(compressed(Carrier::PeerStaged), 32 << 20) < nccl);
    // Within a switch nothing collapses, and pushing is the fastest.
    let of_four = |carrier| fabric.nanoseconds(&Sum { world: 4, n_bytes: 1 << 22, way: compressed(carrier) });
    assert!(of_four(Carrier::PeerPush) < of_four(Carrier::PeerStaged).min(of_four(Carrier::PeerPull)));
}

#[test]
fn on_consumer_boards_copies_are_faster_than_kernels_but_for_small_sums() {
    let fabric = Fabric::parse(include_str!("../fabrics/two_without_p2p.json")).unwrap();
    let time = |n_bytes, way| fabric.nanoseconds(&Sum { world: 2, n_bytes, way });
    let [kernels, copies] = [Carrier::HostKernels, Carrier::HostCopies].map(|carrier| Way::Compressed {
        hops: Hops::One,
        bits: 4.0,
        carrier,
    });
    assert!(time(20 << 20, copies) * 9 / 2 < time(20 << 20, kernels));
    assert!(time(8 << 10, copies) > time(8 << 10, kernels));
    // As reported: 20 MB take NCCL 10.9 ms.
    let nccl = time(20_000_000, Way::Nccl);
    assert!((10_700_000..11_100_000).contains(&nccl), "{nccl}");
}

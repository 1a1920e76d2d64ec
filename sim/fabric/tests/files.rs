//! What files may say; what is so on each of the fabrics that are here.

use flashcomm_sim_fabric::{Carrier, Fabric, Hops, Memory, Sum, Way};

const FILES: [(&str, &str); 6] = [
    ("two_without_p2p", include_str!("../fabrics/two_without_p2p.json")),
    ("four_on_one_root", include_str!("../fabrics/four_on_one_root.json")),
    ("eight_behind_two_switches", include_str!("../fabrics/eight_behind_two_switches.json")),
    ("eight_on_two_sockets", include_str!("../fabrics/eight_on_two_sockets.json")),
    ("two_with_nvlink", include_str!("../fabrics/two_with_nvlink.json")),
    ("eight_with_nvlink", include_str!("../fabrics/eight_with_nvlink.json")),
];

fn all() -> impl Iterator<Item = (&'static str, Fabric)> {
    FILES.into_iter().map(|(name, text)| (name, Fabric::parse(text).unwrap_or_else(|error| panic!("{name}: {error}"))))
}

fn ways() -> Vec<Way> {
    let memories = [Memory::Peer, Memory::Host];
    let carriers =
        [Carrier::PeerPush, Carrier::PeerStaged, Carrier::PeerPull, Carrier::HostKernels, Carrier::HostCopies];
    let mut ways = vec![Way::Nccl];
    ways.extend(memories.into_iter().flat_map(|memory| [Way::ExactOneHop(memory), Way::ExactTwoHops(memory)]));
    for (hops, carrier) in [Hops::One, Hops::Two].into_iter().flat_map(|hops| carriers.map(|carrier| (hops, carrier))) {
        ways.push(Way::Compressed { hops, bits: 4.625, carrier });
    }
    ways
}

fn needs_peers(way: Way) -> bool {
    match way {
        Way::Nccl => false,
        Way::ExactOneHop(memory) | Way::ExactTwoHops(memory) => memory == Memory::Peer,
        Way::Compressed { carrier, .. } => carrier.memory() == Memory::Peer,
    }
}

#[test]
fn each_parses_and_says_what_it_is() {
    let peers = ["eight_behind_two_switches", "eight_on_two_sockets", "four_on_one_root"];
    let nvlink = ["two_with_nvlink", "eight_with_nvlink"];
    for (name, fabric) in all() {
        assert!(fabric.about.len() > 100, "{name}");
        let n_gpus = ["two", "four", "eight"].iter().position(|number| name.starts_with(number)).unwrap();
        assert_eq!(fabric.n_gpus(), [2, 4, 8][n_gpus], "{name}");
        assert_eq!(fabric.nvlink, nvlink.contains(&name), "{name}");
        assert_eq!(fabric.peer_access, fabric.nvlink || peers.contains(&name), "{name}");
        assert_eq!(fabric.collapse.is_some(), name == "eight_behind_two_switches", "{name}");
    }
}

#[test]
fn more_bytes_never_take_less_and_a_lot_takes_more() {
    for (name, fabric) in all() {
        for way in ways() {
            for world in [1, 2, 3, fabric.n_gpus(), 2 * fabric.n_gpus()] {
                let times = (0..31).map(|log| fabric.nanoseconds(&Sum { world, n_bytes: 1 << log, way }));
                let times: Vec<u64> = times.collect();
                let about = format!("{name}, {way:?}, {world} ranks: {times:?}");
                assert!(times.is_sorted(), "{about}");
                let impossible = needs_peers(way) && !fabric.peer_access && world > 1;
                assert_eq!(times[0] == u64::MAX, impossible, "{about}");
                assert!(times[0] >= fabric.gpu.launch_ns as u64, "{about}");
                assert!(impossible || world == 1 || times[30] > 10 * times[0], "{about}");
            }
        }
    }
}

#[test]
fn nothing_compressed_is_faster_than_the_floor() {
    for (name, fabric) in all() {
        for world in 2..=fabric.n_gpus() {
            for log in 10..31 {
                let floor = fabric.floor(world, 1 << log, 4.625);
                for way in ways().into_iter().filter(|way| matches!(way, Way::Compressed { .. })) {
                    let ns = fabric.nanoseconds(&Sum { world, n_bytes: 1 << log, way });
                    assert!(floor > 0 && ns > floor, "{name}, {world} ranks, {way:?}, 2^{log} bytes: {ns}, {floor}");
                }
            }
        }
        assert_eq!(fabric.floor(1, 1 << 20, 4.625), 0, "{name}");
    }
}

#[test]
fn the_floor_of_four_cards_is_that_of_their_links() {
    let (_, four) = all().find(|(name, _)| *name == "four_on_one_root").unwrap();
    // 2 x 3/4 of a payload over 25.5 GB/s.
    let expected = 1.5 * f64::from(32 << 20) * 4.625 / 16.0 / 25.5;
    assert_eq!(four.floor(4, 32 << 20, 4.625), expected.round() as u64);
    // Two sockets: each direction of the link between them takes one payload.
    let (_, eight) = all().find(|(name, _)| *name == "eight_on_two_sockets").unwrap();
    let payload = f64::from(32 << 20) * 4.625 / 16.0;
    let expected = (payload / 39.0).max(1.75 * payload / 52.0);
    assert_eq!(eight.floor(8, 32 << 20, 4.625), expected.round() as u64);
}

/// A file with `text` of it replaced.
fn changed(from: &str, to: &str) -> String {
    let text = FILES[1].1;
    assert!(text.contains(from), "{from}");
    text.replace(from, to)
}

#[test]
fn what_is_wrong_with_a_file_is_said() {
    for (text, says) in [
        (String::new(), "EOF"),
        ("{".into(), "EOF"),
        (changed("\"peer_access\": true,", ""), "peer_access"),
        (changed("\"nvlink\": false", "\"nvlink\": false, \"speed\": 1"), "speed"),
        (changed("\"gb_s\": 25.5", "\"gb_s\": 0"), "links.write.gb_s: 0 is not above 0"),
        (changed("\"latency_ns\": 400", "\"latency_ns\": -1"), "links.write.latency_ns: -1 is below 0"),
        (changed("\"share\": 0.71", "\"share\": 1.5"), "nccl.share: 1.5 is above 1"),
        (changed("\"to\": \"root\"", "\"to\": \"rot\""), "no node rot"),
        (changed("\"each\": [\"memory\"]", "\"each\": [\"root\"]"), "root is linked to itself"),
        (changed("\"each\": [\"memory\"]", "\"each\": []"), "gpu0 reaches no host memory"),
        (changed("\"memories\": [\"memory\"]", "\"memories\": [\"memory\", \"root\"]"), "two nodes have this name"),
        (changed("\"each\": [\"gpu0\", ", "\"each\": ["), "gpu0 reaches no host memory"),
    ] {
        let error = Fabric::parse(&text).err().unwrap_or_else(|| panic!("parses, without {says}"));
        assert!(error.contains(says), "{error}");
    }
    let error = Fabric::load("no/such/file".as_ref()).unwrap_err();
    assert!(error.starts_with("no/such/file: "), "{error}");
}

//! docs/simulated-machines.md has how each way goes on each fabric, as the model says.
//!
//! `FLASHCOMM_UPDATE_DOCS=1 cargo test -p flashcomm-sim-fabric` writes it anew.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use flashcomm_sim_fabric::{Carrier, Fabric, Hops, Memory, Sum, Way};

const FABRICS: [&str; 6] = [
    "two_without_p2p",
    "four_on_one_root",
    "eight_behind_two_switches",
    "eight_on_two_sockets",
    "two_with_nvlink",
    "eight_with_nvlink",
];

const SIZES: [(&str, u64); 4] =
    [("64 KiB", 64 << 10), ("1 MiB", 1 << 20), ("16 MiB", 16 << 20), ("256 MiB", 256 << 20)];

/// On the wire, of 8 bits.
const BITS: f64 = 8.75;

/// What stands before and behind what is written anew.
const MARKS: [&str; 2] = ["<!-- tables -->\n", "<!-- end of tables -->\n"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Each with its heading.
fn ways(world: usize) -> [(&'static str, Vec<Way>); 7] {
    let hops = if world == 2 { Hops::One } else { Hops::Two };
    let compressed = |carrier| vec![Way::Compressed { hops, bits: BITS, carrier }];
    let exact = [Memory::Peer, Memory::Host].map(|memory| [Way::ExactOneHop(memory), Way::ExactTwoHops(memory)]);
    [
        ("NCCL", vec![Way::Nccl]),
        ("exact", exact.concat()),
        ("written", compressed(Carrier::PeerPush)),
        ("staged", compressed(Carrier::PeerStaged)),
        ("read", compressed(Carrier::PeerPull)),
        ("host, kernels", compressed(Carrier::HostKernels)),
        ("host, copies", compressed(Carrier::HostCopies)),
    ]
}

fn table(fabric: &Fabric) -> String {
    let world = fabric.n_gpus();
    let heads = ways(world).map(|(head, _)| head).join(" | ");
    let mut text = format!("| | {heads} | least |\n|{}\n", "---|".repeat(ways(world).len() + 2));
    for (name, n_bytes) in SIZES {
        let best = |ways: Vec<Way>| ways.into_iter().map(|way| fabric.nanoseconds(&Sum { world, n_bytes, way })).min();
        let times = ways(world).map(|(_, ways)| best(ways).unwrap());
        let fastest = times.iter().min().unwrap();
        write!(text, "| {name}").unwrap();
        for ns in &times {
            match microseconds(*ns) {
                us if ns == fastest => write!(text, " | **{us}**").unwrap(),
                us => write!(text, " | {us}").unwrap(),
            }
        }
        writeln!(text, " | {} |", microseconds(fabric.floor(world, n_bytes, BITS))).unwrap();
    }
    text
}

fn microseconds(ns: u64) -> String {
    match ns {
        u64::MAX => "-".into(),
        ns if ns < 100_000 => format!("{:.1}", ns as f64 / 1e3),
        ns => (ns / 1000).to_string(),
    }
}

/// Lines of at most 100 columns.
fn wrapped(text: &str) -> String {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().unwrap();
        match line.len() + word.len() < 100 {
            _ if line.is_empty() => line.push_str(word),
            true => line.extend([" ", word]),
            false => lines.push(word.into()),
        }
    }
    lines.join("\n")
}

#[test]
fn the_documentation_has_the_models_times() {
    let mut tables = String::new();
    for name in FABRICS {
        let fabric = Fabric::load(&root().join("sim/fabric/fabrics").join(name).with_extension("json")).unwrap();
        write!(tables, "\n## `{name}`\n\n{}\n\n{}", wrapped(&fabric.about), table(&fabric)).unwrap();
    }
    tables.push('\n');
    let path = root().join("docs/simulated-machines.md");
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(MARKS[0]).unwrap();
    let (there, behind) = rest.split_once(MARKS[1]).unwrap();
    if std::env::var_os("FLASHCOMM_UPDATE_DOCS").is_some() {
        fs::write(&path, [before, MARKS[0], &tables, MARKS[1], behind].concat()).unwrap();
    } else {
        assert!(
            there == tables,
            "docs/simulated-machines.md is not what the model says: FLASHCOMM_UPDATE_DOCS=1 writes it"
        );
    }
}

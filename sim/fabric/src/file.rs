//! What a file may say. JSON; a name that is not known is an error, and so is a number that cannot
//! be.
//!
//! ```json
//! {
//!     "about": "what machine it stands for, and where its numbers come from",
//!     "peer_access": true,
//!     "nvlink": false,
//!     "gpu": { "launch_ns": 3000, "codec_gb_s": 300, "memory_gb_s": 1500 },
//!     "nccl": { "share": 0.7, "step_ns": 1500 },
//!     "host_memory": {
//!         "kernel_write_gb_s": 12, "kernel_read_gb_s": 1.9,
//!         "copy_gb_s": 12.5, "copy_launch_ns": 5000
//!     },
//!     "collapse": { "at": "root", "more_than": 4, "pair_gb_s": 0.83 },
//!     "gpus": ["gpu0", "gpu1"],
//!     "switches": [],
//!     "roots": ["root"],
//!     "sockets": [],
//!     "memories": ["memory"],
//!     "links": [{
//!         "each": ["gpu0", "gpu1"], "to": "root",
//!         "write": { "gb_s": 25, "latency_ns": 500 },
//!         "read": { "gb_s": 22, "latency_ns": 1000 }
//!     }]
//! }
//! ```
//!
//! A link of `each` is a link of its own for each of these nodes. `collapse` may be left out, and
//! so may a list of nodes that is empty.

use serde::Deserialize;

use crate::Fabric;
use crate::topology::{Link, Node, NodeKind, Rate, Topology};

/// What every GPU is like.
#[derive(Clone, Copy, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gpu {
    /// Nanoseconds from one kernel to the next.
    pub launch_ns: f64,
    /// How fast it codes an all-reduce: GB/s of the uncompressed tensor, all kernels together.
    pub codec_gb_s: f64,
    /// How fast it copies within its memory: GB/s.
    pub memory_gb_s: f64,
}

/// What NCCL makes of the links.
#[derive(Clone, Copy, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nccl {
    /// The share of a link's bandwidth that it reaches, above 0, at most 1.
    pub share: f64,
    /// Nanoseconds that it adds to the latency of each step.
    pub step_ns: f64,
}

/// How each GPU reaches pinned host memory; its links may be slower.
#[derive(Clone, Copy, PartialEq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostMemory {
    /// GB/s that its kernels write.
    pub kernel_write_gb_s: f64,
    /// GB/s that its kernels read.
    pub kernel_read_gb_s: f64,
    /// GB/s of its copy engines, in each direction.
    pub copy_gb_s: f64,
    /// Nanoseconds until a copy begins.
    pub copy_launch_ns: f64,
}

/// Where simultaneous writes collapse: where more than `more_than` writes from GPU to GPU have the
/// same first node of this kind on their way, none of them is faster than `pair_gb_s`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Collapse {
    /// Switches or root complexes.
    pub at: NodeKind,
    /// Writes that do not collapse yet.
    pub more_than: usize,
    /// GB/s from one GPU to another.
    pub pair_gb_s: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    about: String,
    peer_access: bool,
    nvlink: bool,
    gpu: Gpu,
    nccl: Nccl,
    host_memory: HostMemory,
    collapse: Option<CollapseEntry>,
    gpus: Vec<String>,
    #[serde(default)]
    switches: Vec<String>,
    #[serde(default)]
    roots: Vec<String>,
    #[serde(default)]
    sockets: Vec<String>,
    memories: Vec<String>,
    links: Vec<LinkEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CollapseEntry {
    at: Gate,
    more_than: usize,
    pair_gb_s: f64,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Gate {
    Switch,
    Root,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LinkEntry {
    each: Vec<String>,
    to: String,
    write: RateEntry,
    read: RateEntry,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RateEntry {
    gb_s: f64,
    latency_ns: f64,
}

/// The fabric of a file's text.
///
/// # Errors
/// What is wrong with it.
pub fn parse(text: &str) -> Result<Fabric, String> {
    let file: File = serde_json::from_str(text).map_err(|error| error.to_string())?;
    check_numbers(&file)?;
    if file.gpus.is_empty() {
        return Err("gpus: there is none".into());
    }
    let nodes = nodes(&file)?;
    let links = file.links.iter().map(|entry| links(entry, &nodes)).collect::<Result<Vec<_>, _>>()?.concat();
    let collapse = file.collapse.map(|CollapseEntry { at, more_than, pair_gb_s }| {
        let at = match at {
            Gate::Switch => NodeKind::Switch,
            Gate::Root => NodeKind::Root,
        };
        Collapse { at, more_than, pair_gb_s }
    });
    Ok(Fabric {
        about: file.about,
        peer_access: file.peer_access,
        nvlink: file.nvlink,
        gpu: file.gpu,
        nccl: file.nccl,
        host_memory: file.host_memory,
        collapse,
        topology: Topology::new(nodes, links)?,
    })
}

fn nodes(file: &File) -> Result<Vec<Node>, String> {
    let lists = [
        (NodeKind::Gpu, &file.gpus),
        (NodeKind::Switch, &file.switches),
        (NodeKind::Root, &file.roots),
        (NodeKind::Socket, &file.sockets),
        (NodeKind::Memory, &file.memories),
    ];
    let mut nodes: Vec<Node> = Vec::new();
    for (kind, name) in lists.into_iter().flat_map(|(kind, names)| names.iter().map(move |name| (kind, name))) {
        if nodes.iter().any(|node| node.name == *name) {
            return Err(format!("{name}: two nodes have this name"));
        }
        nodes.push(Node { name: name.clone(), kind });
    }
    Ok(nodes)
}

fn links(entry: &LinkEntry, nodes: &[Node]) -> Result<Vec<Link>, String> {
    let find = |name: &str| {
        let found = nodes.iter().position(|node| node.name == name);
        found.ok_or_else(|| format!("links: there is no node {name}"))
    };
    let rate = |entry: &RateEntry| Rate { gb_s: entry.gb_s, latency_ns: entry.latency_ns };
    let to = find(&entry.to)?;
    let link = |from: &String| {
        let from = find(from)?;
        if from == to {
            return Err(format!("links: {} is linked to itself", entry.to));
        }
        Ok(Link { ends: [from, to], write: rate(&entry.write), read: rate(&entry.read) })
    };
    entry.each.iter().map(link).collect()
}

/// Bandwidths are above 0, times are not below, and all of them are numbers.
fn check_numbers(file: &File) -> Result<(), String> {
    let (gpu, nccl, host) = (&file.gpu, &file.nccl, &file.host_memory);
    let mut bandwidths = vec![
        ("gpu.codec_gb_s", gpu.codec_gb_s),
        ("gpu.memory_gb_s", gpu.memory_gb_s),
        ("nccl.share", nccl.share),
        ("host_memory.kernel_write_gb_s", host.kernel_write_gb_s),
        ("host_memory.kernel_read_gb_s", host.kernel_read_gb_s),
        ("host_memory.copy_gb_s", host.copy_gb_s),
    ];
    let mut times = vec![
        ("gpu.launch_ns", gpu.launch_ns),
        ("nccl.step_ns", nccl.step_ns),
        ("host_memory.copy_launch_ns", host.copy_launch_ns),
    ];
    bandwidths.extend(file.collapse.iter().map(|collapse| ("collapse.pair_gb_s", collapse.pair_gb_s)));
    for LinkEntry { write, read, .. } in &file.links {
        bandwidths.extend([("links.write.gb_s", write.gb_s), ("links.read.gb_s", read.gb_s)]);
        times.extend([("links.write.latency_ns", write.latency_ns), ("links.read.latency_ns", read.latency_ns)]);
    }
    let bad_bandwidth = bandwidths.iter().find(|(_, value)| !(value.is_finite() && *value > 0.0));
    let bad_time = times.iter().find(|(_, value)| !(value.is_finite() && *value >= 0.0));
    match (bad_bandwidth, bad_time) {
        _ if nccl.share > 1.0 => Err(format!("nccl.share: {} is above 1", nccl.share)),
        (Some((name, value)), _) => Err(format!("{name}: {value} is not above 0")),
        (None, Some((name, value))) => Err(format!("{name}: {value} is below 0")),
        (None, None) => Ok(()),
    }
}

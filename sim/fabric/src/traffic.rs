//! How long flows take that are under way at once.
//!
//! Each direction of a link is busy for the bytes over it by their bandwidth, reads and writes one
//! after the other; so is a GPU with what it moves from or to host memory. The slowest of them is
//! the time, and a collapse may make it longer. The longest latency of a path comes on top.

use std::collections::BTreeMap;
use std::ops::{Add, Mul};

use crate::Fabric;
use crate::file::Collapse;
use crate::topology::{Link, Place, Rate, Step};

/// What moves the bytes of a flow.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Mover {
    /// A kernel of the GPU that the bytes come from writes them.
    Stores,
    /// A kernel of the GPU that the bytes go to reads them.
    Loads,
    /// A copy engine writes them, or reads them where they come from host memory.
    CopyEngine,
}

/// Bytes on their way from one place to another.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Flow {
    /// Where they come from.
    pub from: Place,
    /// Where they go.
    pub to: Place,
    /// How many.
    pub n_bytes: f64,
    /// What moves them.
    pub mover: Mover,
}

/// How long something takes, in nanoseconds.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Traffic {
    /// The links move bytes. Other work may hide it.
    pub busy_ns: f64,
    /// Nothing but waiting.
    pub latency_ns: f64,
}

impl Traffic {
    /// Both.
    pub fn total_ns(self) -> f64 {
        self.busy_ns + self.latency_ns
    }
}

impl Add for Traffic {
    type Output = Traffic;

    /// One after the other.
    fn add(self, other: Traffic) -> Traffic {
        Traffic { busy_ns: self.busy_ns + other.busy_ns, latency_ns: self.latency_ns + other.latency_ns }
    }
}

impl Mul<f64> for Traffic {
    type Output = Traffic;

    /// So many times.
    fn mul(self, n: f64) -> Traffic {
        Traffic { busy_ns: self.busy_ns * n, latency_ns: self.latency_ns * n }
    }
}

/// What is busy with bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Resource {
    /// A direction of a link.
    Link(Step),
    /// A GPU that writes to host memory, by its kernels or its copy engine.
    ToHost(usize, Mover),
    /// A GPU that reads from host memory.
    FromHost(usize, Mover),
}

impl Flow {
    /// Whether the bytes are read, which makes them take the bandwidths and latencies of reads.
    fn is_read(&self) -> bool {
        match self.mover {
            Mover::Stores => false,
            Mover::Loads => true,
            Mover::CopyEngine => matches!(self.from, Place::HostOf(_)),
        }
    }

    fn rate(&self, link: &Link) -> Rate {
        if self.is_read() { link.read } else { link.write }
    }
}

impl Fabric {
    /// How long these flows take if all begin at once.
    pub fn traffic(&self, flows: &[Flow]) -> Traffic {
        let mut busy: BTreeMap<Resource, f64> = BTreeMap::new();
        for flow in flows {
            for step in self.topology.route(flow.from, flow.to) {
                let rate = flow.rate(&self.topology.links()[step.link]);
                *busy.entry(Resource::Link(*step)).or_default() += flow.n_bytes / rate.gb_s;
            }
            if let Some((resource, gb_s)) = self.at_host(flow) {
                *busy.entry(resource).or_default() += flow.n_bytes / gb_s;
            }
        }
        let busy_ns = busy.into_values().fold(self.collapsed_ns(flows), f64::max);
        let latency_ns = flows.iter().map(|flow| self.latency_ns(flow)).fold(0.0, f64::max);
        Traffic { busy_ns, latency_ns }
    }

    /// How long flows take that go in stages, each of which begins with the first bytes of the one
    /// before: all of them at once, and the latency of every stage.
    pub(crate) fn piped(&self, stages: &[Vec<Flow>]) -> Traffic {
        let latency_ns = stages.iter().map(|stage| self.traffic(stage).latency_ns).sum();
        Traffic { latency_ns, ..self.traffic(&stages.concat()) }
    }

    /// Nanoseconds from the first byte of a flow sent to the first received.
    pub fn latency_ns(&self, flow: &Flow) -> f64 {
        let route = self.topology.route(flow.from, flow.to);
        let links: f64 = route.iter().map(|step| flow.rate(&self.topology.links()[step.link]).latency_ns).sum();
        let is_copy = flow.mover == Mover::CopyEngine && !route.is_empty();
        links + if is_copy { self.host_memory.copy_launch_ns } else { 0.0 }
    }

    /// Nanoseconds until a rank sees the signal of another, in its GPU's memory.
    pub fn signal_ns(&self, from: usize, to: usize) -> f64 {
        let (from, to) = (Place::Gpu(self.gpu_of(from)), Place::Gpu(self.gpu_of(to)));
        self.latency_ns(&Flow { from, to, n_bytes: 0.0, mover: Mover::Stores })
    }

    /// The GPU that moves a flow from or to host memory, and its bandwidth there.
    fn at_host(&self, flow: &Flow) -> Option<(Resource, f64)> {
        let host = self.host_memory;
        match (flow.from, flow.to, flow.mover) {
            (Place::Gpu(gpu), Place::HostOf(_), Mover::CopyEngine) => {
                Some((Resource::ToHost(gpu, flow.mover), host.copy_gb_s))
            }
            (Place::HostOf(_), Place::Gpu(gpu), Mover::CopyEngine) => {
                Some((Resource::FromHost(gpu, flow.mover), host.copy_gb_s))
            }
            (Place::Gpu(gpu), Place::HostOf(_), _) => Some((Resource::ToHost(gpu, flow.mover), host.kernel_write_gb_s)),
            (Place::HostOf(_), Place::Gpu(gpu), _) => {
                Some((Resource::FromHost(gpu, flow.mover), host.kernel_read_gb_s))
            }
            _ => None,
        }
    }

    /// Nanoseconds that the slowest pair of GPUs takes where writes collapse; 0 where none do.
    fn collapsed_ns(&self, flows: &[Flow]) -> f64 {
        let Some(Collapse { at, more_than, pair_gb_s }) = self.collapse else { return 0.0 };
        // The pairs of a gate: bytes, and how many flows there are.
        let mut gates: BTreeMap<usize, (usize, BTreeMap<(Place, Place), f64>)> = BTreeMap::new();
        for flow in flows.iter().filter(|flow| !flow.is_read()) {
            let is_peer = matches!((flow.from, flow.to), (Place::Gpu(_), Place::Gpu(_)));
            let route = self.topology.route(flow.from, flow.to);
            if let Some(gate) = self.topology.first_on(route, at).filter(|_| is_peer) {
                let (n_flows, pairs) = gates.entry(gate).or_default();
                *n_flows += 1;
                *pairs.entry((flow.from, flow.to)).or_default() += flow.n_bytes;
            }
        }
        let collapsed = gates.into_values().filter(|(n_flows, _)| *n_flows > more_than);
        let slowest = collapsed.flat_map(|(_, pairs)| pairs.into_values()).fold(0.0, f64::max);
        slowest / pair_gb_s
    }
}

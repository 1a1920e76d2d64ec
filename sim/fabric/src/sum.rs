//! How long an all-reduce takes, by NCCL or by one of the shim's ways, and how long it takes at
//! least.
//!
//! What ranks on the same GPU tell each other takes no time. Coding goes on while bytes are under
//! way: the longer of the two counts.

use crate::Fabric;
use crate::topology::{Link, Place};
use crate::traffic::{Flow, Mover, Traffic};

/// An all-reduce.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sum {
    /// Ranks.
    pub world: usize,
    /// Bytes of the uncompressed tensor at one rank.
    pub n_bytes: u64,
    /// How.
    pub way: Way,
}

/// How an all-reduce is done.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Way {
    /// NCCL's ring: 2 (N - 1) steps of an N-th to the next rank, over host memory where GPUs do not
    /// reach each other.
    Nccl,
    /// Every rank writes its whole input to every other one, uncompressed. A flag with each 12
    /// bytes makes them 16.
    ExactOneHop(Memory),
    /// An N-th to its owner and back, the same otherwise.
    ExactTwoHops(Memory),
    /// Compressed.
    Compressed {
        /// To every rank, or to the owner of a chunk and back.
        hops: Hops,
        /// Bits of payload for an element of 16, parameters included; the mean of both hops.
        bits: f64,
        /// What carries it.
        carrier: Carrier,
    },
}

/// How often payloads travel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hops {
    /// Every rank sends all it has to every other one.
    One,
    /// An N-th to its owner, and its sum from there to every other rank.
    Two,
}

/// Through what memory ranks exchange.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Memory {
    /// That of each other's GPUs.
    Peer,
    /// Pinned host memory.
    Host,
}

/// What carries payloads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Carrier {
    /// Kernels write to all peers at once.
    PeerPush,
    /// The same in N - 1 rounds: in each, every rank writes to one peer, and one writes to it.
    PeerStaged,
    /// Kernels read from all peers at once.
    PeerPull,
    /// Kernels write to host memory and read from there.
    HostKernels,
    /// Copy engines do.
    HostCopies,
}

impl Carrier {
    /// Through what memory it goes.
    pub fn memory(self) -> Memory {
        match self {
            Carrier::PeerPush | Carrier::PeerStaged | Carrier::PeerPull => Memory::Peer,
            Carrier::HostKernels | Carrier::HostCopies => Memory::Host,
        }
    }
}

/// What a flag beside each 12 bytes makes of them.
const FLAGGED: f64 = 4.0 / 3.0;

/// Of bytes that copy engines carry there are slices of as many as the geometric mean of them and this.
const SLICE_UNIT: f64 = 262_144.0;

/// Bits of an uncompressed element.
const ELEMENT_BITS: f64 = 16.0;

impl Fabric {
    /// How long an all-reduce takes. `u64::MAX`: the GPUs do not reach each other as it needs.
    pub fn nanoseconds(&self, sum: &Sum) -> u64 {
        let (world, n_bytes) = (sum.world, sum.n_bytes as f64);
        let chunk = n_bytes / world.max(1) as f64;
        let ns = match sum.way {
            Way::Nccl => self.ring_ns(world, 2 * world.saturating_sub(1), chunk),
            Way::ExactOneHop(memory) => self.exact(world, memory, n_bytes).total_ns(),
            Way::ExactTwoHops(memory) => (self.exact(world, memory, chunk) * 2.0).total_ns(),
            Way::Compressed { hops, bits, carrier } => {
                let payload = match hops {
                    Hops::One => self.carry(world, carrier, n_bytes * bits / ELEMENT_BITS),
                    Hops::Two => self.carry(world, carrier, chunk * bits / ELEMENT_BITS) * 2.0,
                };
                payload.busy_ns.max(self.codec_ns(n_bytes)) + payload.latency_ns
            }
        };
        let memory = match sum.way {
            Way::Nccl => Memory::Host, // takes whichever there is
            Way::ExactOneHop(memory) | Way::ExactTwoHops(memory) => memory,
            Way::Compressed { carrier, .. } => carrier.memory(),
        };
        if memory == Memory::Peer && !self.peer_access && self.gpus_of(world) > 1 {
            return u64::MAX;
        }
        whole(ns + self.gpu.launch_ns)
    }

    /// How long a launch of NCCL's takes in which data goes `n_steps` times to the next rank,
    /// `step_bytes` of each rank in a step.
    pub fn nccl_ring(&self, world: usize, n_steps: usize, step_bytes: u64) -> u64 {
        whole(self.ring_ns(world, n_steps, step_bytes as f64) + self.gpu.launch_ns)
    }

    /// How long a launch of NCCL's takes in which every rank sends to others: `n_bytes` to the one
    /// that is `ahead` ranks after it, for each of these.
    pub fn nccl_sends(&self, world: usize, sends: &[(usize, u64)]) -> u64 {
        let stages = sends.iter().map(|(ahead, n_bytes)| self.to_the_next(world, *ahead, *n_bytes as f64));
        // All at once: what is written first, then what is read of it.
        let stages = stages.reduce(|all, stages| all.into_iter().zip(stages).map(|(a, b)| [a, b].concat()).collect());
        whole(self.nccl(self.piped(&stages.unwrap_or_default())).total_ns() + self.gpu.launch_ns)
    }

    /// Nanoseconds of coding for an all-reduce of so many bytes, all kernels together.
    pub fn codec_ns(&self, n_bytes: f64) -> f64 {
        n_bytes / self.gpu.codec_gb_s
    }

    /// The least time in which the fabric lets the bytes of a compressed all-reduce pass: no
    /// latency, no launch, no collapse, all links at their best.
    ///
    /// Each element takes N - 1 payloads to its sum and as many from there, so each of N GPUs sends
    /// and receives 2 (N - 1) / N of a payload on average. Through host memory a sum is written
    /// once. And over a link without which some GPUs do not reach the others, a payload passes in
    /// each direction.
    pub fn floor(&self, world: usize, n_bytes: u64, bits: f64) -> u64 {
        let n_gpus = self.gpus_of(world);
        if n_gpus < 2 {
            return 0;
        }
        let payload = n_bytes as f64 * bits / ELEMENT_BITS;
        let best = |link: &Link| link.write.gb_s.max(link.read.gb_s);
        let host = self.host_memory;
        let (mut sent_gb_s, mut received_gb_s) = (0.0, 0.0);
        for gpu in 0..n_gpus {
            let links: f64 = self.topology.links_of(gpu).map(best).sum();
            let at_most = |host_gb_s: f64| if self.peer_access { links } else { links.min(host_gb_s) };
            sent_gb_s += at_most(host.kernel_write_gb_s.max(host.copy_gb_s));
            received_gb_s += at_most(host.kernel_read_gb_s.max(host.copy_gb_s));
        }
        let n_received = 2.0 * (n_gpus - 1) as f64;
        let n_sent = if self.peer_access { n_received } else { n_gpus as f64 };
        let of_gpus = (n_sent * payload / sent_gb_s).max(n_received * payload / received_gb_s);
        let parts = |link: &usize| {
            let beyond = &self.topology.beyond(*link)[..n_gpus];
            beyond.contains(&true) && beyond.contains(&false)
        };
        let links = self.topology.links();
        let of_cuts = (0..links.len()).filter(parts).map(|link| payload / best(&links[link]));
        whole(of_cuts.fold(of_gpus, f64::max))
    }

    /// GPUs that so many ranks are on.
    fn gpus_of(&self, world: usize) -> usize {
        world.min(self.n_gpus())
    }

    /// What a rank's bytes take to another's memory, in stages.
    fn over(&self, memory: Memory, engine: Engine, from: usize, to: usize, n_bytes: f64) -> Vec<Flow> {
        let (from, to) = (self.gpu_of(from), self.gpu_of(to));
        let flow = |from, to, mover| Flow { from, to, n_bytes, mover };
        let (writes, reads) = match engine {
            Engine::Kernels => (Mover::Stores, Mover::Loads),
            Engine::Copies => (Mover::CopyEngine, Mover::CopyEngine),
        };
        match memory {
            _ if from == to => Vec::new(),
            Memory::Peer => vec![flow(Place::Gpu(from), Place::Gpu(to), writes)],
            Memory::Host => {
                vec![flow(Place::Gpu(from), Place::HostOf(to), writes), flow(Place::HostOf(to), Place::Gpu(to), reads)]
            }
        }
    }

    /// From each rank to the one that is `ahead` ranks after it, in stages, as NCCL does.
    fn to_the_next(&self, world: usize, ahead: usize, n_bytes: f64) -> Vec<Vec<Flow>> {
        let memory = if self.peer_access { Memory::Peer } else { Memory::Host };
        let pairs = (0..world).map(|rank| (rank, (rank + ahead) % world));
        self.stages(memory, Engine::Kernels, pairs, n_bytes)
    }

    /// The flows of these pairs of ranks, all first ones, then all second ones.
    fn stages(
        &self,
        memory: Memory,
        engine: Engine,
        pairs: impl Iterator<Item = (usize, usize)>,
        n_bytes: f64,
    ) -> Vec<Vec<Flow>> {
        let mut stages = match memory {
            Memory::Peer => vec![Vec::new()],
            Memory::Host => vec![Vec::new(), Vec::new()],
        };
        for (from, to) in pairs {
            let flows = self.over(memory, engine, from, to, n_bytes);
            stages.iter_mut().zip(flows).for_each(|(stage, flow)| stage.push(flow));
        }
        stages
    }

    fn ring_ns(&self, world: usize, n_steps: usize, step_bytes: f64) -> f64 {
        let step = self.nccl(self.piped(&self.to_the_next(world, 1, step_bytes)));
        (step * n_steps as f64).total_ns()
    }

    /// What NCCL makes of traffic.
    fn nccl(&self, traffic: Traffic) -> Traffic {
        Traffic { busy_ns: traffic.busy_ns / self.nccl.share, latency_ns: traffic.latency_ns + self.nccl.step_ns }
    }

    /// Every rank writes so many bytes to each other one, with flags.
    fn exact(&self, world: usize, memory: Memory, n_bytes: f64) -> Traffic {
        self.piped(&self.stages(memory, Engine::Kernels, pairs(world), n_bytes * FLAGGED))
    }

    /// Every rank sends each other one so many bytes.
    fn carry(&self, world: usize, carrier: Carrier, n_bytes: f64) -> Traffic {
        let engine = if carrier == Carrier::HostCopies { Engine::Copies } else { Engine::Kernels };
        let stages = |pairs: Vec<(usize, usize)>| self.stages(carrier.memory(), engine, pairs.into_iter(), n_bytes);
        match carrier {
            Carrier::PeerStaged => {
                let round = |ahead: usize| stages((0..world).map(|rank| (rank, (rank + ahead) % world)).collect());
                (1..world).map(|ahead| self.piped(&round(ahead))).fold(Traffic::default(), |all, round| all + round)
            }
            Carrier::PeerPull => {
                // The signal that there is something to read, then the reads.
                let signal_ns = pairs(world).map(|(from, to)| self.signal_ns(from, to)).fold(0.0, f64::max);
                let as_reads = |flow: Flow| Flow { mover: Mover::Loads, ..flow };
                let flows: Vec<Flow> = stages(pairs(world).collect()).concat().into_iter().map(as_reads).collect();
                self.traffic(&flows) + Traffic { busy_ns: 0.0, latency_ns: signal_ns }
            }
            Carrier::HostCopies => {
                // In slices: the last one comes in when nothing goes out any more. Kernels stand around the copies: one that
                // codes, and on each side one that waits and one that signals.
                let stages = stages(pairs(world).collect());
                let n_slices = (n_bytes * (world - 1) as f64 / SLICE_UNIT).sqrt().max(1.0);
                let slowest = stages.iter().map(|stage| self.traffic(stage).busy_ns).fold(0.0, f64::max);
                let around = 2.0 * self.gpu.launch_ns + self.host_memory.copy_launch_ns;
                let latency_ns = 5.0 * self.gpu.launch_ns + (n_slices - 1.0) * around;
                self.piped(&stages) + Traffic { busy_ns: slowest / n_slices, latency_ns }
            }
            Carrier::PeerPush | Carrier::HostKernels => self.piped(&stages(pairs(world).collect())),
        }
    }
}

/// What of a GPU moves bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Engine {
    Kernels,
    Copies,
}

/// All pairs of two ranks.
fn pairs(world: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..world).flat_map(move |from| (0..world).filter(move |to| *to != from).map(move |to| (from, to)))
}

/// Whole nanoseconds; never less for more.
fn whole(ns: f64) -> u64 {
    ns.round() as u64
}

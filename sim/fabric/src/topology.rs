//! Nodes, links, and the route between two places.
//!
//! A route is a shortest one, by the number of links; of several that are as short, the one whose
//! links the file names first. It does not pass through a GPU or through host memory. In a tree it
//! is the only one there is.

use std::collections::{BTreeMap, VecDeque};

/// What a node is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum NodeKind {
    /// A GPU.
    Gpu,
    /// A PCIe switch, or an NVSwitch.
    Switch,
    /// A root complex.
    Root,
    /// A socket.
    Socket,
    /// Host memory.
    Memory,
}

/// A node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: NodeKind,
}

/// What a link gives one kind of access, in each direction.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rate {
    /// GB/s.
    pub gb_s: f64,
    /// Nanoseconds. That of reads includes the way of the request.
    pub latency_ns: f64,
}

/// A link between two nodes.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Link {
    /// The nodes, by number.
    pub ends: [usize; 2],
    /// What it gives to writes.
    pub write: Rate,
    /// What it gives to reads.
    pub read: Rate,
}

/// A link as a route takes it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Step {
    /// Which link.
    pub link: usize,
    /// From its first end to its second.
    pub is_forward: bool,
}

/// Where data is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Place {
    /// In the memory of a GPU.
    Gpu(usize),
    /// In the host memory that is nearest to a GPU.
    HostOf(usize),
}

/// The nodes and links of a machine.
#[derive(Clone, Debug)]
pub struct Topology {
    nodes: Vec<Node>,
    links: Vec<Link>,
    /// GPU by number: its node.
    gpus: Vec<usize>,
    /// GPU by number: the node of the memory nearest to it.
    memories: Vec<usize>,
    /// Between GPUs and memories, by their nodes.
    routes: BTreeMap<(usize, usize), Vec<Step>>,
}

impl Topology {
    /// Of these nodes and links; GPUs have the numbers in which they come.
    ///
    /// # Errors
    /// What cannot be reached.
    pub fn new(nodes: Vec<Node>, links: Vec<Link>) -> Result<Self, String> {
        let of_kind = |kind: NodeKind| (0..nodes.len()).filter(|node| nodes[*node].kind == kind).collect::<Vec<_>>();
        let (gpus, all_memories) = (of_kind(NodeKind::Gpu), of_kind(NodeKind::Memory));
        let mut topology = Topology { nodes, links, gpus, memories: Vec::new(), routes: BTreeMap::new() };
        let ends: Vec<usize> = topology.gpus.iter().chain(&all_memories).copied().collect();
        for from in &ends {
            let routes = topology.routes_from(*from);
            topology.routes.extend(ends.iter().filter_map(|to| Some(((*from, *to), routes.get(to)?.clone()))));
        }
        for gpu in &topology.gpus {
            let length = |memory: &&usize| topology.routes.get(&(*gpu, **memory)).map(Vec::len);
            let reached = all_memories.iter().filter(|memory| length(memory).is_some());
            let nearest = reached.min_by_key(length);
            let name = &topology.nodes[*gpu].name;
            topology.memories.push(*nearest.ok_or_else(|| format!("{name} reaches no host memory"))?);
        }
        for (from, to) in topology.gpus.iter().flat_map(|from| topology.gpus.iter().map(move |to| (*from, *to))) {
            if !topology.routes.contains_key(&(from, to)) {
                return Err(format!("{} does not reach {}", topology.nodes[from].name, topology.nodes[to].name));
            }
        }
        Ok(topology)
    }

    /// Number of GPUs.
    pub fn n_gpus(&self) -> usize {
        self.gpus.len()
    }

    /// The links.
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// The links of a GPU.
    pub fn links_of(&self, gpu: usize) -> impl Iterator<Item = &Link> {
        let node = self.gpus[gpu];
        self.links.iter().filter(move |link| link.ends.contains(&node))
    }

    /// The route from one place to another; empty where they are the same.
    pub fn route(&self, from: Place, to: Place) -> &[Step] {
        let key = (self.node(from), self.node(to));
        self.routes.get(&key).map_or(&[], Vec::as_slice)
    }

    /// The first node of a kind on a route.
    pub fn first_on(&self, route: &[Step], kind: NodeKind) -> Option<usize> {
        let passed = route.iter().flat_map(|step| {
            let [first, second] = self.links[step.link].ends;
            if step.is_forward { [first, second] } else { [second, first] }
        });
        passed.into_iter().find(|node| self.nodes[*node].kind == kind)
    }

    /// Which GPUs the first end of a link still reaches without it.
    pub fn beyond(&self, link: usize) -> Vec<bool> {
        let mut is_reached = vec![false; self.nodes.len()];
        let mut open = vec![self.links[link].ends[0]];
        while let Some(node) = open.pop() {
            if !std::mem::replace(&mut is_reached[node], true) {
                let others = self.links.iter().enumerate().filter(|(other, _)| *other != link);
                open.extend(others.filter_map(|(_, other)| other_end(other, node)));
            }
        }
        self.gpus.iter().map(|gpu| is_reached[*gpu]).collect()
    }

    fn node(&self, place: Place) -> usize {
        match place {
            Place::Gpu(gpu) => self.gpus[gpu],
            Place::HostOf(gpu) => self.memories[gpu],
        }
    }

    /// Shortest routes from a node to all others that it reaches.
    fn routes_from(&self, start: usize) -> BTreeMap<usize, Vec<Step>> {
        let mut routes = BTreeMap::from([(start, Vec::new())]);
        let mut open = VecDeque::from([start]);
        while let Some(node) = open.pop_front() {
            let passes = !matches!(self.nodes[node].kind, NodeKind::Gpu | NodeKind::Memory);
            if node != start && !passes {
                continue;
            }
            for (number, link) in self.links.iter().enumerate() {
                let Some(next) = other_end(link, node).filter(|next| !routes.contains_key(next)) else { continue };
                let step = Step { link: number, is_forward: link.ends[0] == node };
                let route = [routes[&node].as_slice(), &[step]].concat();
                routes.insert(next, route);
                open.push_back(next);
            }
        }
        routes
    }
}

fn other_end(link: &Link, node: usize) -> Option<usize> {
    let [first, second] = link.ends;
    match node {
        _ if node == first => Some(second),
        _ if node == second => Some(first),
        _ => None,
    }
}

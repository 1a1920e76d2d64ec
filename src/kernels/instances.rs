//! Which kernels there are: one list for the compiler, which defines them, and for the host, which
//! looks them up by name.
//!
//! A kernel is an instance of a template for an element type, a code and one width or two.
//! `build.rs` includes this file and writes the list into `shared.cuh`; the host can name only what
//! [`Instance::new`] gives, and so can the simulator. Hence no kernel is looked up that was not
//! compiled. The group size is no part of it: kernels take it as an argument.

use flashcomm_wire::{Code, GroupSize, Legs, Width};

use crate::element::ElementType;

/// What a kernel does: the template.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verb {
    /// Elements to hop 1's payloads.
    Quantize,
    /// Hop 1's payloads to hop 2's.
    Reduce,
    /// Hop 2's payloads to elements.
    Dequantize,
    /// Both ranks' payloads of one hop to elements.
    Combine,
    /// The whole all-reduce in two hops, over areas in GPU memory.
    AllReduce,
    /// The same over areas in host memory.
    HostAllReduce,
    /// The whole all-reduce of two ranks in one hop, over areas in GPU memory.
    OneHop,
    /// The same over areas in host memory.
    HostOneHop,
    /// The whole all-reduce, uncompressed.
    Exact,
    /// Tells other ranks of copies.
    Signal,
    /// Waits for copies of other ranks.
    Wait,
}

impl Verb {
    /// All of them.
    pub const ALL: [Verb; 11] = [
        Verb::Quantize,
        Verb::Reduce,
        Verb::Dequantize,
        Verb::Combine,
        Verb::AllReduce,
        Verb::HostAllReduce,
        Verb::OneHop,
        Verb::HostOneHop,
        Verb::Exact,
        Verb::Signal,
        Verb::Wait,
    ];

    /// As in kernel names.
    pub const fn name(self) -> &'static str {
        match self {
            Verb::Quantize => "quantize",
            Verb::Reduce => "reduce",
            Verb::Dequantize => "dequantize",
            Verb::Combine => "combine",
            Verb::AllReduce => "allreduce",
            Verb::HostAllReduce => "hostallreduce",
            Verb::OneHop => "onehop",
            Verb::HostOneHop => "hostonehop",
            Verb::Exact => "exact",
            Verb::Signal => "signal",
            Verb::Wait => "wait",
        }
    }
}

/// A kernel of the fatbin.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Instance {
    /// `flashcomm_<verb>`, `_<dtype>` where there are elements, and `_<code><bits>` for each hop that it handles.
    name: String,
    verb: Verb,
    element: ElementType,
    /// Code and width of those hops, in order.
    codings: Vec<(Code, Width)>,
}

impl Instance {
    /// The kernel for these legs, if there is one: there are kernels for what [`Legs::choose`]
    /// gives. In host memory they are of the likely pairs of widths only; the other pairs take the
    /// one for GPU memory there, too. The exact one is the same for all legs.
    pub fn new(verb: Verb, element: ElementType, legs: Legs) -> Option<Self> {
        match verb {
            Verb::Exact => return Some(Self::exact(element)),
            Verb::Signal | Verb::Wait => return Some(Self::without_elements(verb)),
            _ => {}
        }
        let (code, pair) = (legs.code(), (legs.reduce.width, legs.gather.width));
        Legs::choose(Some(code), pair, legs.reduce.group)
            .filter(|chosen| chosen.with_batch_invariant(legs.batch_invariant) == legs)?;
        let (reduce, gather) = pair;
        let widths = match verb {
            _ if !element.is_coded() => return None,
            Verb::Quantize => vec![reduce],
            Verb::Dequantize => vec![gather],
            Verb::Reduce | Verb::AllReduce => vec![reduce, gather],
            Verb::HostAllReduce if reduce == gather && !reduce.is_uncompressed() => vec![reduce, gather],
            Verb::HostAllReduce if (reduce.bits(), gather.bits()) == (4, 8) => vec![reduce, gather],
            Verb::Combine | Verb::OneHop | Verb::HostOneHop if legs.one_hop(2).is_some() => vec![reduce],
            Verb::HostAllReduce | Verb::Combine | Verb::OneHop | Verb::HostOneHop => return None,
            Verb::Exact | Verb::Signal | Verb::Wait => unreachable!("answered above"),
        };
        Some(Self::named(verb, element, widths.into_iter().map(|width| (code, width)).collect()))
    }

    /// The exact one.
    pub fn exact(element: ElementType) -> Self {
        Self::named(Verb::Exact, element, Vec::new())
    }

    /// One that touches none, so which type it is of says nothing.
    pub fn without_elements(verb: Verb) -> Self {
        let name = format!("flashcomm_{}", verb.name());
        Self { name, verb, element: ElementType::Fp16, codings: Vec::new() }
    }

    fn named(verb: Verb, element: ElementType, codings: Vec<(Code, Width)>) -> Self {
        let coding = |(code, width): &(Code, Width)| format!("_{}{}", code.name(), width.bits());
        let codings_text: String = codings.iter().map(coding).collect();
        Self { name: format!("flashcomm_{}_{}{codings_text}", verb.name(), element.name()), verb, element, codings }
    }

    /// Every kernel there is, each once.
    pub fn all() -> Vec<Self> {
        let widths: Vec<Width> = (0..=16).filter_map(Width::new).collect();
        let group = GroupSize::new(128).expect("a group size");
        let mut all: Vec<Self> = Vec::new();
        for (verb, element) in Verb::ALL.into_iter().flat_map(|verb| ElementType::ALL.map(|element| (verb, element))) {
            for code in Code::ALL {
                for pair in widths.iter().flat_map(|reduce| widths.iter().map(|gather| (*reduce, *gather))) {
                    let legs = Legs::choose(Some(code), pair, group);
                    let new = legs.and_then(|legs| Self::new(verb, element, legs));
                    all.extend(new.filter(|new| !all.contains(new)));
                }
            }
        }
        all
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it does.
    pub fn verb(&self) -> Verb {
        self.verb
    }

    /// Of which elements.
    pub fn element(&self) -> ElementType {
        self.element
    }

    /// Code and width of the hops that it handles, in order.
    pub fn codings(&self) -> &[(Code, Width)] {
        &self.codings
    }
}

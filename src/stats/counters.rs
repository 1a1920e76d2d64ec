//! What is counted: the counters of one communicator as they run, and their sums.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use serde_json::{Map, Value, json};

use crate::route::Reason;

/// The collective and point-to-point calls that are counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs, reason = "each is the NCCL function of that name, its Config form included")]
pub enum Call {
    Broadcast,
    Reduce,
    AllGather,
    ReduceScatter,
    AlltoAll,
    Gather,
    Scatter,
    Send,
    Recv,
}

impl Call {
    /// Every call but the all-reduce, in the order of the counters.
    pub const ALL: [(Call, &str); 9] = [
        (Call::Broadcast, "broadcast"),
        (Call::Reduce, "reduce"),
        (Call::AllGather, "all_gather"),
        (Call::ReduceScatter, "reduce_scatter"),
        (Call::AlltoAll, "all_to_all"),
        (Call::Gather, "gather"),
        (Call::Scatter, "scatter"),
        (Call::Send, "send"),
        (Call::Recv, "recv"),
    ];
}

pub(super) const N_CALLS: usize = Call::ALL.len();
pub(super) const N_REASONS: usize = Reason::ALL.len();

/// Size classes of all-reduces: below 1 KiB, then one for each power of two, the last from 4 GiB on.
pub(crate) const SIZE_CLASSES: usize = 24;

/// The class of an all-reduce of so many bytes.
pub(super) const fn size_class(n_bytes: u64) -> usize {
    let class = (u64::BITS - n_bytes.leading_zeros()).saturating_sub(10) as usize;
    if class < SIZE_CLASSES { class } else { SIZE_CLASSES - 1 }
}

/// The fewest bytes of a class.
pub(super) const fn class_start(class: usize) -> u64 {
    if class == 0 { 0 } else { 512 << class }
}

/// Owner of a block that is nobody's.
pub(super) const FREE: usize = usize::MAX;

/// The counters of one communicator, on cache lines of their own; what every counted call touches comes first.
#[repr(C, align(128))]
pub struct Counters {
    /// The communicator's handle, or [`FREE`].
    pub(super) owner: AtomicUsize,
    calls: [AtomicU64; N_CALLS],
    /// Calls, bytes of the caller's, bytes sent by this rank.
    compressed: [[AtomicU64; 3]; SIZE_CLASSES],
    /// Calls, bytes of the caller's.
    exact: [[AtomicU64; 2]; SIZE_CLASSES],
    /// The same.
    forwarded: [[[AtomicU64; 2]; N_REASONS]; SIZE_CLASSES],
}

impl Counters {
    pub(super) const fn new() -> Self {
        Self {
            owner: AtomicUsize::new(FREE),
            calls: [const { AtomicU64::new(0) }; N_CALLS],
            compressed: [const { [const { AtomicU64::new(0) }; 3] }; SIZE_CLASSES],
            exact: [const { [const { AtomicU64::new(0) }; 2] }; SIZE_CLASSES],
            forwarded: [const { [const { [const { AtomicU64::new(0) }; 2] }; N_REASONS] }; SIZE_CLASSES],
        }
    }

    /// Counts a call, no all-reduce, that goes to the real NCCL.
    #[inline]
    pub fn count(&self, call: Call) {
        add(&self.calls[call as usize], 1);
    }

    /// Counts an all-reduce that goes to the real NCCL, and why.
    pub fn count_forwarded(&self, reason: Reason, n_bytes: u64) {
        let [calls, bytes] = &self.forwarded[size_class(n_bytes)][reason as usize];
        add(calls, 1);
        add(bytes, n_bytes);
    }

    /// Counts a compressed all-reduce: `n_bytes` of the caller's, `n_bytes_wire` sent by this rank.
    pub fn count_compressed(&self, n_bytes: u64, n_bytes_wire: u64) {
        let [calls, bytes_in, bytes_wire] = &self.compressed[size_class(n_bytes)];
        add(calls, 1);
        add(bytes_in, n_bytes);
        add(bytes_wire, n_bytes_wire);
    }

    /// Counts an exact all-reduce of ours.
    pub fn count_exact(&self, n_bytes: u64) {
        let [calls, bytes] = &self.exact[size_class(n_bytes)];
        add(calls, 1);
        add(bytes, n_bytes);
    }

    pub(super) fn clear(&self) {
        let compressed = self.compressed.iter().flatten();
        let exact = self.exact.iter().flatten();
        let forwarded = self.forwarded.iter().flatten().flatten();
        self.calls.iter().chain(compressed).chain(exact).chain(forwarded).for_each(|counter| counter.store(0, Relaxed));
    }
}

fn add(counter: &AtomicU64, n: u64) {
    // The only writer is this thread.
    counter.store(counter.load(Relaxed) + n, Relaxed);
}

/// The counts of one communicator, or of several.
#[derive(Clone, Default)]
pub(crate) struct Counts {
    /// Calls that are no all-reduce, by [`Call`].
    pub calls: [u64; N_CALLS],
    /// By size class: calls, bytes of the caller's, bytes sent.
    pub compressed: [[u64; 3]; SIZE_CLASSES],
    /// By size class: calls, bytes of the caller's.
    pub exact: [[u64; 2]; SIZE_CLASSES],
    /// By size class and reason: calls, bytes of the caller's.
    pub forwarded: [[[u64; 2]; N_REASONS]; SIZE_CLASSES],
}

impl Counts {
    pub(super) fn add_counters(&mut self, counters: &Counters) {
        let load = |to: &mut u64, from: &std::sync::atomic::AtomicU64| *to += from.load(Relaxed);
        self.calls.iter_mut().zip(&counters.calls).for_each(|(to, from)| load(to, from));
        let to = self.compressed.as_flattened_mut().iter_mut();
        to.zip(counters.compressed.as_flattened()).for_each(|(to, from)| load(to, from));
        let to = self.exact.as_flattened_mut().iter_mut();
        to.zip(counters.exact.as_flattened()).for_each(|(to, from)| load(to, from));
        let to = self.forwarded.as_flattened_mut().as_flattened_mut().iter_mut();
        to.zip(counters.forwarded.as_flattened().as_flattened()).for_each(|(to, from)| load(to, from));
    }

    pub(super) fn add(&mut self, other: &Counts) {
        self.calls.iter_mut().zip(other.calls).for_each(|(to, from)| *to += from);
        let to = self.compressed.as_flattened_mut().iter_mut();
        to.zip(other.compressed.as_flattened()).for_each(|(to, from)| *to += from);
        let to = self.exact.as_flattened_mut().iter_mut();
        to.zip(other.exact.as_flattened()).for_each(|(to, from)| *to += from);
        let to = self.forwarded.as_flattened_mut().as_flattened_mut().iter_mut();
        to.zip(other.forwarded.as_flattened().as_flattened()).for_each(|(to, from)| *to += from);
    }

    /// All-reduces compressed.
    pub(crate) fn n_compressed(&self) -> u64 {
        self.compressed.iter().map(|[calls, ..]| calls).sum()
    }

    /// Bytes of those, as the caller sees them.
    pub(crate) fn bytes_in(&self) -> u64 {
        self.compressed.iter().map(|[_, bytes, _]| bytes).sum()
    }

    /// Bytes that this process's ranks put on the wire for them.
    pub(crate) fn bytes_wire(&self) -> u64 {
        self.compressed.iter().map(|[.., bytes]| bytes).sum()
    }

    /// Exact all-reduces of ours.
    pub(crate) fn n_exact(&self) -> u64 {
        self.exact.iter().map(|[calls, _]| calls).sum()
    }

    /// Bytes of those.
    pub(crate) fn bytes_exact(&self) -> u64 {
        self.exact.iter().map(|[_, bytes]| bytes).sum()
    }

    /// All-reduces that went to the real NCCL.
    pub(crate) fn forwarded(&self) -> u64 {
        self.because().iter().map(|[calls, _]| calls).sum()
    }

    /// Bytes of those.
    pub(crate) fn bytes_forwarded(&self) -> u64 {
        self.because().iter().map(|[_, bytes]| bytes).sum()
    }

    /// All-reduces forwarded, by reason: calls and bytes.
    pub(crate) fn because(&self) -> [[u64; 2]; N_REASONS] {
        let mut sums = [[0; 2]; N_REASONS];
        for class in &self.forwarded {
            let to = sums.as_flattened_mut().iter_mut();
            to.zip(class.as_flattened()).for_each(|(to, from)| *to += from);
        }
        sums
    }

    /// Calls that are no all-reduce.
    pub(crate) fn others(&self) -> u64 {
        self.calls.iter().sum()
    }

    /// In one line.
    pub(crate) fn summary(&self) -> String {
        let mut text = format!("{} all-reduces compressed", self.n_compressed());
        if self.n_compressed() > 0 {
            let (bytes_in, bytes_wire) = (self.bytes_in(), self.bytes_wire());
            text += &format!(" ({} as {} on the wire)", mib(bytes_in), mib(bytes_wire));
        }
        if self.n_exact() > 0 {
            text += &format!(", {} exact ({})", self.n_exact(), mib(self.bytes_exact()));
        }
        text += &format!(", {} forwarded", self.forwarded());
        let because = Reason::ALL.iter().zip(self.because()).filter(|(_, [calls, _])| *calls > 0);
        let because: Vec<String> = because.map(|(reason, [calls, _])| format!("{} {calls}", reason.name())).collect();
        if !because.is_empty() {
            text += &format!(" ({}; {})", because.join(", "), mib(self.bytes_forwarded()));
        }
        text + &format!(", {} other calls", self.others())
    }

    /// As JSON; what was not counted is left out.
    pub(super) fn to_json(&self) -> Map<String, Value> {
        let by_reason = |reasons: &[[u64; 2]; N_REASONS]| -> Value {
            let counted = Reason::ALL.iter().zip(reasons).filter(|(_, [calls, _])| *calls > 0);
            counted.map(|(reason, [calls, bytes])| (reason.name(), json!({"calls": calls, "bytes": bytes}))).collect()
        };
        let is_used = |class: &usize| {
            self.compressed[*class][0] + self.exact[*class][0] > 0
                || self.forwarded[*class].iter().any(|[calls, _]| *calls > 0)
        };
        let size = |class: usize| {
            let [calls, bytes_in, bytes_wire] = self.compressed[class];
            let [exact_calls, exact_bytes] = self.exact[class];
            let to_bytes = (class + 1 < SIZE_CLASSES).then(|| class_start(class + 1));
            json!({
                "from_bytes": class_start(class),
                "to_bytes": to_bytes,
                "compressed": {"calls": calls, "bytes_in": bytes_in, "bytes_wire": bytes_wire},
                "exact": {"calls": exact_calls, "bytes": exact_bytes},
                "forwarded": by_reason(&self.forwarded[class]),
            })
        };
        let others = Call::ALL.iter().zip(self.calls).filter(|(_, calls)| *calls > 0);
        let Value::Object(object) = json!({
            "all_reduces_compressed": self.n_compressed(),
            "bytes_in": self.bytes_in(),
            "bytes_wire": self.bytes_wire(),
            "all_reduces_exact": self.n_exact(),
            "bytes_exact": self.bytes_exact(),
            "all_reduces_forwarded": self.forwarded(),
            "bytes_forwarded": self.bytes_forwarded(),
            "forwarded_because": by_reason(&self.because()),
            "others_forwarded": others.map(|((_, name), calls)| (*name, calls)).collect::<std::collections::BTreeMap<_, _>>(),
            "sizes": (0..SIZE_CLASSES).filter(is_used).map(size).collect::<Vec<_>>(),
        }) else {
            unreachable!("an object")
        };
        object
    }
}

fn mib(n_bytes: u64) -> String {
    format!("{:.1} MiB", n_bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_powers_of_two() {
        assert_eq!([0, 1, 1023].map(size_class), [0; 3]);
        for class in 1..SIZE_CLASSES {
            assert_eq!(size_class(class_start(class)), class);
            assert_eq!(size_class(class_start(class) - 1), class - 1);
        }
        assert_eq!((class_start(1), class_start(SIZE_CLASSES - 1)), (1024, 4 << 30));
        assert_eq!(size_class(u64::MAX), SIZE_CLASSES - 1);
    }

    #[test]
    fn a_summary_says_what_was_sent_and_why_the_rest_was_not() {
        let mut counts = Counts::default();
        counts.compressed[13] = [2, 16 << 20, 4 << 20];
        counts.exact[1] = [4, 5 << 20];
        counts.forwarded[0][Reason::Small as usize] = [3, 300];
        counts.forwarded[11][Reason::DataType as usize] = [1, 1 << 20];
        counts.calls[Call::Send as usize] = 7;
        let expected = "2 all-reduces compressed (16.0 MiB as 4.0 MiB on the wire), 4 exact (5.0 MiB), 4 forwarded \
            (datatype 1, small 3; 1.0 MiB), 7 other calls";
        assert_eq!(counts.summary(), expected);
        let json = counts.to_json();
        assert_eq!(json["sizes"].as_array().unwrap().len(), 4);
        assert_eq!(
            (&json["all_reduces_exact"], &json["sizes"][1]["exact"]),
            (&json!(4), &json!({"calls": 4, "bytes": 5 << 20}))
        );
        assert_eq!(json["forwarded_because"]["small"], json!({"calls": 3, "bytes": 300}));
        assert_eq!(json["others_forwarded"], json!({"send": 7}));
    }
}

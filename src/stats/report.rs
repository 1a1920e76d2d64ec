//! What was counted, added up: for `flashcommGetStats`, for the log, and as JSON at exit.
//!
//! Of communicators that have ended the last [`MAX_ENDED`] are kept one by one; older ones are merged, so that a process
//! that makes communicators without end does not grow. The total of the process is exact for calls that have returned.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use parking_lot::Once;
use serde_json::{Map, Value, json};

use super::{About, Attached, Call, Counters, N_CALLS, N_REASONS, REGISTRY, SIZE_CLASSES, class_start};
use crate::config::Config;
use crate::nccl::CommPtr;
use crate::route::Reason;

/// Ended communicators that the report tells one by one.
const MAX_ENDED: usize = 64;

/// Version of the file's form.
const FORMAT: u32 = 1;

/// The counts of one communicator, or of several.
#[derive(Clone, Default)]
pub struct Counts {
    /// Calls that are no all-reduce, by [`Call`].
    pub calls: [u64; N_CALLS],
    /// By size class: calls, bytes of the caller's, bytes sent.
    pub compressed: [[u64; 3]; SIZE_CLASSES],
    /// By size class and reason: calls, bytes of the caller's.
    pub forwarded: [[[u64; 2]; N_REASONS]; SIZE_CLASSES],
}

impl Counts {
    /// Of a communicator; nothing for one that has not been used.
    pub fn of(comm: CommPtr) -> Box<Self> {
        let mut counts = Box::new(Counts::default());
        if let Some(entry) = REGISTRY.lock().live.get(&(comm as usize)) {
            counts.add_counters(entry.counters);
        }
        counts
    }

    /// Of the process.
    pub fn of_process() -> Box<Self> {
        let registry = REGISTRY.lock();
        let mut counts = Box::new(Counts::default());
        registry.live.values().for_each(|entry| counts.add_counters(entry.counters));
        registry.ended.all().for_each(|ended| counts.add(ended));
        counts
    }

    pub(super) fn add_counters(&mut self, counters: &Counters) {
        let load = |to: &mut u64, from: &std::sync::atomic::AtomicU64| *to += from.load(Relaxed);
        self.calls.iter_mut().zip(&counters.calls).for_each(|(to, from)| load(to, from));
        let to = self.compressed.as_flattened_mut().iter_mut();
        to.zip(counters.compressed.as_flattened()).for_each(|(to, from)| load(to, from));
        let to = self.forwarded.as_flattened_mut().as_flattened_mut().iter_mut();
        to.zip(counters.forwarded.as_flattened().as_flattened()).for_each(|(to, from)| load(to, from));
    }

    fn add(&mut self, other: &Counts) {
        self.calls.iter_mut().zip(other.calls).for_each(|(to, from)| *to += from);
        let to = self.compressed.as_flattened_mut().iter_mut();
        to.zip(other.compressed.as_flattened()).for_each(|(to, from)| *to += from);
        let to = self.forwarded.as_flattened_mut().as_flattened_mut().iter_mut();
        to.zip(other.forwarded.as_flattened().as_flattened()).for_each(|(to, from)| *to += from);
    }

    /// All-reduces compressed.
    pub fn n_compressed(&self) -> u64 {
        self.compressed.iter().map(|[calls, ..]| calls).sum()
    }

    /// Bytes of those, as the caller sees them.
    pub fn bytes_in(&self) -> u64 {
        self.compressed.iter().map(|[_, bytes, _]| bytes).sum()
    }

    /// Bytes that this process's ranks put on the wire for them.
    pub fn bytes_wire(&self) -> u64 {
        self.compressed.iter().map(|[.., bytes]| bytes).sum()
    }

    /// All-reduces that went to the real NCCL.
    pub fn forwarded(&self) -> u64 {
        self.because().iter().map(|[calls, _]| calls).sum()
    }

    /// Bytes of those.
    pub fn bytes_forwarded(&self) -> u64 {
        self.because().iter().map(|[_, bytes]| bytes).sum()
    }

    /// All-reduces forwarded, by reason: calls and bytes.
    pub fn because(&self) -> [[u64; 2]; N_REASONS] {
        let mut sums = [[0; 2]; N_REASONS];
        for class in &self.forwarded {
            let to = sums.as_flattened_mut().iter_mut();
            to.zip(class.as_flattened()).for_each(|(to, from)| *to += from);
        }
        sums
    }

    /// Calls that are no all-reduce.
    pub fn others(&self) -> u64 {
        self.calls.iter().sum()
    }

    /// In one line.
    pub fn summary(&self) -> String {
        let mut text = format!("{} all-reduces compressed", self.n_compressed());
        if self.n_compressed() > 0 {
            let (bytes_in, bytes_wire) = (self.bytes_in(), self.bytes_wire());
            text += &format!(" ({} as {} on the wire)", mib(bytes_in), mib(bytes_wire));
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
    fn to_json(&self) -> Map<String, Value> {
        let by_reason = |reasons: &[[u64; 2]; N_REASONS]| -> Value {
            let counted = Reason::ALL.iter().zip(reasons).filter(|(_, [calls, _])| *calls > 0);
            counted.map(|(reason, [calls, bytes])| (reason.name(), json!({"calls": calls, "bytes": bytes}))).collect()
        };
        let is_used = |class: &usize| {
            self.compressed[*class][0] > 0 || self.forwarded[*class].iter().any(|[calls, _]| *calls > 0)
        };
        let size = |class: usize| {
            let [calls, bytes_in, bytes_wire] = self.compressed[class];
            let to_bytes = (class + 1 < SIZE_CLASSES).then(|| class_start(class + 1));
            json!({
                "from_bytes": class_start(class),
                "to_bytes": to_bytes,
                "compressed": {"calls": calls, "bytes_in": bytes_in, "bytes_wire": bytes_wire},
                "forwarded": by_reason(&self.forwarded[class]),
            })
        };
        let others = Call::ALL.iter().zip(self.calls).filter(|(_, calls)| *calls > 0);
        let Value::Object(object) = json!({
            "all_reduces_compressed": self.n_compressed(),
            "bytes_in": self.bytes_in(),
            "bytes_wire": self.bytes_wire(),
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

/// What ended communicators have counted.
pub struct Ended {
    last: VecDeque<(About, Box<Counts>)>,
    merged: Option<(u64, Box<Counts>)>,
}

impl Ended {
    pub(super) const fn new() -> Self {
        Self { last: VecDeque::new(), merged: None }
    }

    pub(super) fn push(&mut self, about: About, counts: Box<Counts>) {
        self.last.push_back((about, counts));
        if self.last.len() > MAX_ENDED {
            let (_, oldest) = self.last.pop_front().expect("more than one");
            let (n_merged, merged) = self.merged.get_or_insert_with(Default::default);
            *n_merged += 1;
            merged.add(&oldest);
        }
    }

    fn all(&self) -> impl Iterator<Item = &Counts> {
        let merged = self.merged.iter().map(|(_, counts)| &**counts);
        self.last.iter().map(|(_, counts)| &**counts).chain(merged)
    }
}

/// A communicator, in words.
pub(super) fn name(about: &About) -> String {
    let mut text = format!("communicator {}", about.number);
    if let Some((rank, world)) = about.identity {
        text += &format!(", rank {rank} of {world}");
    }
    match &about.attached {
        Some(Attached { bits, code, exchange }) => text + &format!(" ({bits} bits, {code}, {exchange})"),
        None => text,
    }
}

fn communicator_json(about: &About, counts: &Counts, ended: bool) -> Value {
    let (rank, world) = about.identity.unzip();
    let attached = about.attached.as_ref();
    let Value::Object(mut object) = json!({
        "number": about.number,
        "rank": rank,
        "world": world,
        "bits": attached.map(|on| &on.bits),
        "code": attached.map(|on| on.code),
        "exchange": attached.map(|on| on.exchange),
        "ended": ended,
    }) else {
        unreachable!("an object")
    };
    object.append(&mut counts.to_json());
    Value::Object(object)
}

/// Everything, as it is written at exit.
pub fn to_json() -> Value {
    let total = Counts::of_process();
    let registry = REGISTRY.lock();
    let mut communicators: Vec<(u64, Value)> = Vec::new();
    for entry in registry.live.values() {
        let mut counts = Box::new(Counts::default());
        counts.add_counters(entry.counters);
        communicators.push((entry.about.number, communicator_json(&entry.about, &counts, false)));
    }
    for (about, counts) in &registry.ended.last {
        communicators.push((about.number, communicator_json(about, counts, true)));
    }
    communicators.sort_by_key(|(number, _)| *number);
    let merged = registry.ended.merged.as_ref().map(|(n_merged, counts)| {
        let mut object = Map::new();
        object.insert("communicators".into(), (*n_merged).into());
        object.append(&mut counts.to_json());
        object
    });
    drop(registry);
    json!({
        "flashcomm": env!("CARGO_PKG_VERSION"),
        "format": FORMAT,
        "pid": std::process::id(),
        "rank": rank(),
        "process": total.to_json(),
        "communicators": communicators.into_iter().map(|(_, value)| value).collect::<Vec<_>>(),
        "ended_earlier": merged,
    })
}

/// The rank of this process: in the largest communicator that it has used, and its lowest one there where it holds several.
fn rank() -> Option<usize> {
    let registry = REGISTRY.lock();
    let ended = registry.ended.last.iter().map(|(about, _)| about);
    let abouts = registry.live.values().map(|entry| &entry.about).chain(ended);
    let best = abouts.filter_map(|about| about.identity).max_by_key(|(rank, world)| (*world, std::cmp::Reverse(*rank)));
    best.map(|(rank, _)| rank)
}

/// The process that is to report: the one that set itself up, or a fork of it that has used a communicator since.
static REPORTER: AtomicU32 = AtomicU32::new(0);

/// Arranges for the report when the process exits; later calls do nothing.
pub fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        if Config::global().stats_file.is_some() || log::log_enabled!(log::Level::Info) {
            become_reporter();
            // SAFETY: the function lives as long as this library, which the process keeps loaded (RTLD_NODELETE is
            // not needed: atexit handlers of a library run when it is unloaded).
            unsafe { libc::atexit(at_exit) };
        }
    });
}

pub(super) fn become_reporter() {
    REPORTER.store(std::process::id(), Relaxed);
}

extern "C" fn at_exit() {
    // Nothing may unwind into libc.
    let _ = std::panic::catch_unwind(|| {
        // A fork that only inherited the counts must not write over its parent's file.
        if REPORTER.load(Relaxed) != std::process::id() {
            return;
        }
        if log::log_enabled!(log::Level::Info) {
            log::info!("process ends: {}", Counts::of_process().summary());
        }
        if let Some(path) = &Config::global().stats_file {
            write(&expand(path));
        }
    });
}

/// Replaces `%p` by the process id and `%r` by the rank, `none` where no communicator has been used.
fn expand(path: &Path) -> PathBuf {
    let Some(text) = path.to_str() else { return path.to_owned() };
    let rank = rank().map_or("none".into(), |rank| rank.to_string());
    text.replace("%p", &std::process::id().to_string()).replace("%r", &rank).into()
}

fn write(path: &Path) {
    let written = serde_json::to_vec_pretty(&to_json())
        .map_err(std::io::Error::other)
        .and_then(|json| std::fs::write(path, json));
    if let Err(error) = written {
        log::error!("FLASHCOMM_STATS_FILE={}: {error}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ended_communicators_beyond_the_last_are_merged_and_lose_nothing() {
        let mut ended = Ended::new();
        for number in 0..MAX_ENDED as u64 + 10 {
            let mut counts = Box::new(Counts::default());
            counts.compressed[3] = [1, 10, number];
            ended.push(About { number, ..About::default() }, counts);
        }
        let mut total = Counts::default();
        ended.all().for_each(|counts| total.add(counts));
        let n = MAX_ENDED as u64 + 10;
        assert_eq!(total.compressed[3], [n, 10 * n, n * (n - 1) / 2]);
        assert_eq!((ended.last.len(), ended.merged.as_ref().unwrap().0), (MAX_ENDED, 10));
    }

    #[test]
    fn a_summary_says_what_was_sent_and_why_the_rest_was_not() {
        let mut counts = Counts::default();
        counts.compressed[13] = [2, 16 << 20, 4 << 20];
        counts.forwarded[0][Reason::Small as usize] = [3, 300];
        counts.forwarded[11][Reason::DataType as usize] = [1, 1 << 20];
        counts.calls[Call::Send as usize] = 7;
        let expected = "2 all-reduces compressed (16.0 MiB as 4.0 MiB on the wire), 4 forwarded (datatype 1, small 3; \
            1.0 MiB), 7 other calls";
        assert_eq!(counts.summary(), expected);
        let json = counts.to_json();
        assert_eq!(json["sizes"].as_array().unwrap().len(), 3);
        assert_eq!(json["forwarded_because"]["small"], json!({"calls": 3, "bytes": 300}));
        assert_eq!(json["others_forwarded"], json!({"send": 7}));
    }
}

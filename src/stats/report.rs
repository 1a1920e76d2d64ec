//! What was counted, as JSON, while the process runs and at exit. The total of the process is exact for calls that have
//! returned.

use std::time::Duration;

use parking_lot::Once;
use serde_json::{Map, Value, json};

use super::counters::Counts;
use super::registry::{About, Process, Slow};
use crate::background;
use crate::config::Config;

/// Version of the file's form.
const FORMAT: u32 = 1;

fn communicator_json(about: &About, counts: &Counts, ended: bool) -> Value {
    let (rank, world) = about.identity.unzip();
    let attached = about.attached.as_ref();
    let slow = |slow: &Slow| {
        json!({
            "bytes": slow.n_bytes,
            "way": if slow.is_exact { "exact" } else { "compressed" },
            "us": slow.us,
            "measured_us": slow.measured_us,
        })
    };
    let Value::Object(mut object) = json!({
        "number": about.number,
        "rank": rank,
        "world": world,
        "bits": attached.map(|on| &on.bits),
        "code": attached.map(|on| on.code),
        "exchange": attached.map(|on| on.exchange),
        "ended": ended,
        "slower_than_measured": about.slow.iter().map(slow).collect::<Vec<_>>(),
    }) else {
        unreachable!("an object")
    };
    object.append(&mut counts.to_json());
    Value::Object(object)
}

/// Everything, as it is written.
fn to_json(process: &Process) -> Value {
    let total = Counts::of_process();
    let registry = process.registry.lock();
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
        "rank": rank(process),
        "process": total.to_json(),
        "communicators": communicators.into_iter().map(|(_, value)| value).collect::<Vec<_>>(),
        "ended_earlier": merged,
    })
}

/// The rank of this process: in the largest communicator that it has used, and its lowest one there where it holds several.
fn rank(process: &Process) -> Option<usize> {
    let registry = process.registry.lock();
    let ended = registry.ended.last.iter().map(|(about, _)| about);
    let abouts = registry.live.values().map(|entry| &entry.about).chain(ended);
    let best = abouts.filter_map(|about| about.identity).max_by_key(|(rank, world)| (*world, std::cmp::Reverse(*rank)));
    best.map(|(rank, _)| rank)
}

/// Arranges for the report while the process runs and when it exits; later calls do nothing.
pub(crate) fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        let has_file = Config::global().stats_file.is_some();
        if has_file {
            Process::at_first_use(keep_writing);
        }
        if has_file || log::log_enabled!(log::Level::Info) {
            Process::enter();
            // SAFETY: the function lives as long as this library: handlers of a library run when it is unloaded.
            unsafe { libc::atexit(at_exit) };
        }
    });
}

extern "C" fn at_exit() {
    // Nothing may unwind into libc.
    let _ = std::panic::catch_unwind(|| {
        // A fork that has used no communicator must not write over its parent's file.
        let Some(process) = Process::current() else { return };
        if log::log_enabled!(log::Level::Info) {
            log::info!("process ends: {}", Counts::of_process().summary());
        }
        let mut file = process.file.lock();
        file.close(format!("{:#}", to_json(process)), rank(process));
    });
}

/// How often the file is looked after.
const PERIOD: Duration = Duration::from_secs(1);

/// Writes the file as the process goes, since many end without an exit: by a signal, or by `_exit` as Python's forks do.
fn keep_writing(process: &'static Process) {
    let write = move || {
        loop {
            let mut file = process.file.lock();
            if file.is_closed() {
                return;
            }
            file.update(format!("{:#}", to_json(process)), rank(process));
            drop(file);
            if background::is_last_thread() {
                return;
            }
            std::thread::sleep(PERIOD);
        }
    };
    if let Err(error) = background::spawn("flashcomm-stats", write) {
        log::warn!("FLASHCOMM_STATS_FILE is written at exit only: no thread for it: {error}");
    }
}

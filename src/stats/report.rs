//! What was counted, as JSON at exit. The total of the process is exact for calls that have returned.

use std::path::{Path, PathBuf};

use parking_lot::Once;
use serde_json::{Map, Value, json};

use super::counters::Counts;
use super::registry::{About, REGISTRY, become_reporter, is_reporter};
use crate::config::Config;

/// Version of the file's form.
const FORMAT: u32 = 1;

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
pub(crate) fn to_json() -> Value {
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

/// Arranges for the report when the process exits; later calls do nothing.
pub(crate) fn init() {
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

extern "C" fn at_exit() {
    // Nothing may unwind into libc.
    let _ = std::panic::catch_unwind(|| {
        // A fork that only inherited the counts must not write over its parent's file.
        if !is_reporter() {
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

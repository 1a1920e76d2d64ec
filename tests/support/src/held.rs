//! What a process and a machine hold, to see whether it grows.

use crate::ok;

/// What this process holds, to see whether it grows.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    pub memory_kib: usize,
    pub files: usize,
    pub threads: usize,
    /// Of the current device; on a GPU, of everyone there.
    pub device_bytes: usize,
}

impl Held {
    pub fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let files = std::fs::read_dir("/proc/self/fd").unwrap().count();
        let (mut free, mut total) = (0, 0);
        ok!(cuMemGetInfo_v2(&mut free, &mut total));
        Held { memory_kib: field("VmRSS:"), files, threads: field("Threads:"), device_bytes: total - free }
    }
}

/// Names of the shim's shared memory on this machine, of whatever process.
pub fn shared_memory_names() -> Vec<String> {
    let names = std::fs::read_dir("/dev/shm").unwrap().map(|entry| entry.unwrap().file_name());
    names.filter_map(|name| name.into_string().ok()).filter(|name| name.starts_with("flashcomm-")).collect()
}

/// What this process has open.
pub fn open_files() -> Vec<std::path::PathBuf> {
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    open.filter_map(|entry| std::fs::read_link(entry.path()).ok()).collect()
}

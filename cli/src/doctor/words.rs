//! What the doctor found, in words.

use std::fmt::Write;
use std::path::Path;

use super::attempt::Gpu;
use super::{Exchanges, Findings, NumaNode, SharedMemory};
use crate::client::machine::RealNccl;
use crate::{Bytes, table};

/// Everything, as people read it. `bench` is the file that was measured in.
pub fn in_words(findings: &Findings, bench: Option<&Path>) -> String {
    let mut text = format!("flashcomm {} at {}\n", findings.provenance.flashcomm, findings.shim.display());
    if findings.simulated {
        text += "on the simulator: what follows is said of no real machine\n";
    }
    text += "\n";
    of_the_machine(findings, &mut text);
    if let Some(exchanges) = &findings.exchanges {
        of_exchanges(exchanges, &mut text);
    }
    if let Some(tuned) = &findings.tuned {
        let _ = writeln!(text, "\nas measured here (FLASHCOMM_TUNE):\n{}", tuned.in_words());
    }
    if let (Some(measured), Some(file)) = (&findings.measured, bench) {
        let _ = writeln!(text, "\n{}", measured.in_words(file).trim_end());
    }
    if findings.fit {
        text += "\nfit\n";
    } else {
        text += "\nnot fit:\n";
        findings.problems.iter().for_each(|problem| text += &format!("- {problem}\n"));
    }
    text
}

/// A line of a name and what is said of it; more lines below, without the name.
fn say(text: &mut String, name: &str, what: &str) {
    for (i, line) in what.lines().enumerate() {
        let _ = writeln!(text, "{:<12} {line}", if i == 0 { name } else { "" });
    }
}

/// NCCL, driver, GPUs and memory.
fn of_the_machine(findings: &Findings, text: &mut String) {
    match &findings.nccl {
        Some(RealNccl { path, version, lacks }) => {
            let mut what = format!("{version} at {}", path.display());
            if let Some((first, rest)) = lacks.split_first() {
                let more = if rest.is_empty() { String::new() } else { format!(" and {} more", rest.len()) };
                let _ = write!(
                    what,
                    "\nlacks {first}{more} (--json lists them); the shim has them by name, and they answer ncclInvalidUsage"
                );
            }
            say(text, "NCCL", &what);
        }
        None => say(text, "NCCL", "none found"),
    }
    let by_name = match &findings.soname {
        Some(_) => "who opens libnccl.so.2 by its name, as JAX does, is reached by flashcomm run",
        None => {
            "who opens libnccl.so.2 by its name, as JAX does, is NOT reached: no libflashcomm_soname.so beside the shim"
        }
    };
    say(text, "by name", &format!("{by_name}\nflashcomm run --check -- COMMAND says at its end whether its NCCL was"));
    say(text, "driver", &findings.driver.as_ref().map_or("none".into(), |driver| format!("CUDA {driver}")));
    for Gpu { ordinal, name, memory_bytes, capability, numa_node, .. } in &findings.gpus {
        let numa = numa_node.map_or(String::new(), |node| format!(", NUMA node {node}"));
        let gib = *memory_bytes as f64 / f64::from(1 << 30);
        say(text, &format!("GPU {ordinal}"), &format!("{name}, {gib:.1} GiB, compute capability {capability}{numa}"));
    }
    if findings.gpus.len() > 1 {
        let header = [String::new()].into_iter().chain(findings.gpus.iter().map(|gpu| gpu.ordinal.to_string()));
        let mut matrix = table(&header.collect::<Vec<_>>());
        for gpu in &findings.gpus {
            let cells = gpu.reaches.iter().enumerate().map(|(other, can)| match can {
                _ if other == gpu.ordinal => "-",
                true => "yes",
                false => "no",
            });
            matrix.add_row([gpu.ordinal.to_string()].into_iter().chain(cells.map(String::from)));
        }
        say(text, "peer access", &matrix.trim_fmt());
    }
    for NumaNode { node, cpus } in &findings.numa_nodes {
        say(text, &format!("NUMA node {node}"), &format!("CPUs {cpus}"));
    }
    if let Some(SharedMemory { total_bytes, free_bytes }) = findings.shared_memory {
        let mib = |n_bytes: u64| n_bytes >> 20;
        say(text, "/dev/shm", &format!("{} MiB, {} MiB free", mib(total_bytes), mib(free_bytes)));
    }
}

/// What may carry the payloads, and what would.
fn of_exchanges(exchanges: &Exchanges, text: &mut String) {
    let ipc = if exchanges.cuda_ipc { "allowed" } else { "refused" };
    say(text, "CUDA IPC", &format!("{ipc}, as {} processes tried", exchanges.ranks));
    text.push('\n');
    let mut rows = table(&["exchange", "possible", "exact up to", "compresses from", "between hosts from"]);
    let ways = [("peer", &exchanges.peer), ("host", &exchanges.host), ("nccl", &exchanges.nccl)];
    for (name, possible) in ways {
        let from = |n_bytes: Option<u64>| n_bytes.map_or("-".into(), |n_bytes| Bytes(n_bytes as usize).to_string());
        rows.add_row([
            name.to_string(),
            if possible.possible { "yes" } else { "no" }.into(),
            from(possible.exact_max_bytes),
            from(possible.min_bytes_on_one_host),
            from(possible.min_bytes_between_hosts),
        ]);
    }
    let _ = writeln!(text, "{}", rows.trim_fmt());
    for (name, possible) in ways {
        if let Some(why) = &possible.why_not {
            let _ = writeln!(text, "no {name}: {why}");
        }
    }
    let takes = exchanges.takes.unwrap_or("none");
    let _ = writeln!(text, "\nFLASHCOMM_EXCHANGE={} takes {takes}: {}", exchanges.setting, exchanges.because);
}

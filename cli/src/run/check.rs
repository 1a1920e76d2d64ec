//! `flashcomm run --check`: the command as a child, and at its end whether its NCCL was reached.
//!
//! The shim itself cannot say that it was never called: it does nothing before the first call. But
//! each process that has called it leaves statistics at its end, so the folder that they are to
//! come to says who has.

use std::fs;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use serde_json::Value;

/// Where the shim writes what a process has called.
pub const STATISTICS: &str = "FLASHCOMM_STATS_FILE";

/// Runs the command to its end, and says on standard error what came to the shim. The inner error:
/// it could not be started.
///
/// # Errors
/// Where there is no folder for the statistics, or the child is lost.
pub fn run(command: &mut Command) -> Result<io::Result<ExitCode>> {
    let folder = tempfile::tempdir().context("a folder for the statistics")?;
    command.env(STATISTICS, folder.path().join("%p.json"));
    // SAFETY: one call of the system, which may be made between fork and exec.
    unsafe {
        command.pre_exec(|| {
            // Where this process is ended, the command is asked to end, too.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
            Ok(())
        });
    }
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Ok(Err(error)),
    };
    // A terminal sends these to both. The command decides what they mean.
    for signal in [libc::SIGINT, libc::SIGQUIT] {
        // SAFETY: no handler of ours is taken off.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    let status = child.wait().context("the command")?;
    eprintln!("flashcomm run: {}", verdict(folder.path()));
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(Ok(ExitCode::from(code as u8)))
}

/// What the statistics of all processes say together.
fn verdict(folder: &Path) -> String {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let texts = files.filter_map(|file| fs::read_to_string(file.path()).ok());
    let processes: Vec<Value> = texts.filter_map(|text| serde_json::from_str(&text).ok()).collect();
    if processes.is_empty() {
        return "NCCL was NOT reached: no process of the command has called it through flashcomm. Either none has called \
                it on this host, or theirs is linked into a program or was opened by its path"
            .into();
    }
    let sum = |name: &str| -> u64 { processes.iter().filter_map(|stats| stats["process"][name].as_u64()).sum() };
    let others = processes.iter().filter_map(|stats| stats["process"]["others_forwarded"].as_object());
    let others: u64 = others.flat_map(|others| others.values()).filter_map(Value::as_u64).sum();
    format!(
        "NCCL was reached by {}: all-reduces: {} compressed, {} exact, {} forwarded; other collectives: {others}",
        if processes.len() == 1 { "1 process".into() } else { format!("{} processes", processes.len()) },
        sum("all_reduces_compressed"),
        sum("all_reduces_exact"),
        sum("all_reduces_forwarded"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_adds_up_what_all_processes_have_called() {
        let dir = tempfile::tempdir().unwrap();
        assert!(verdict(dir.path()).starts_with("NCCL was NOT reached"));
        for name in ["1.json", "2.json"] {
            let counts = serde_json::json!({"all_reduces_compressed": 3, "all_reduces_exact": 1, "all_reduces_forwarded": 2,
                "others_forwarded": {"broadcast": 4, "send": 1}});
            fs::write(dir.path().join(name), serde_json::json!({"process": counts}).to_string()).unwrap();
        }
        let said =
            "NCCL was reached by 2 processes: all-reduces: 6 compressed, 2 exact, 4 forwarded; other collectives: 10";
        assert_eq!(verdict(dir.path()), said);
    }
}

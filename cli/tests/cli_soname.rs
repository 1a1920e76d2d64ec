//! `flashcomm run` for those that open NCCL by its name, and what it says of whether NCCL was reached.

#[allow(dead_code, reason = "a part is used")]
mod command;

use std::path::{Path, PathBuf};
use std::process::Command;

use command::{COMMAND, built, preloads, run};

/// Opens NCCL as XLA does, and wants the shim.
const BY_NAME: &str = "import ctypes
nccl, version, ours = ctypes.CDLL('libnccl.so.2'), ctypes.c_int(), ctypes.c_int()
assert nccl.flashcommGetVersion(ctypes.byref(ours)) == 0
assert nccl.ncclGetVersion(ctypes.byref(version)) == 0
print(version.value)";

/// The command in a clean environment, with the simulated NCCL as the real one.
fn flashcomm(arguments: &[&str]) -> Command {
    let mut command = Command::new(COMMAND);
    command.args(arguments).env_clear().env("FLASHCOMM_TUNE", "off").env("PATH", std::env::var_os("PATH").unwrap());
    command.env("FLASHCOMM_NCCL_LIB", built("libflashcomm_sim_nccl.so"));
    command
}

/// The shim in a directory of its own, without its other name.
fn shim_alone(dir: &Path) -> PathBuf {
    let shim = dir.canonicalize().unwrap().join("libflashcomm.so");
    std::fs::copy(built("libflashcomm.so"), &shim).unwrap();
    shim
}

#[test]
fn a_command_that_opens_nccl_by_its_name_is_reached_and_one_that_does_not_is_told() {
    let (stdout, stderr, code) = run(&mut flashcomm(&["run", "--quiet", "--", "python3", "-c", BY_NAME]));
    assert_eq!((stdout.as_str(), stderr.as_str(), code), ("22807\n", "", 0));
    let (stdout, stderr, code) = run(&mut flashcomm(&["run", "-q", "--check", "--", "python3", "-c", BY_NAME]));
    let said = "flashcomm run: NCCL was reached by 1 process: all-reduces: 0 compressed, 0 exact, 0 forwarded; \
                other collectives: 0\n";
    assert_eq!((stdout.as_str(), stderr.as_str(), code), ("22807\n", said, 0));
    let (_, stderr, code) = run(&mut flashcomm(&["run", "-q", "--check", "--", "sh", "-c", "exit 3"]));
    assert!(code == 3 && stderr.contains("NCCL was NOT reached: no process of the command"), "{stderr}");
    let (_, _, code) = run(&mut flashcomm(&["run", "-q", "--check", "--", "sh", "-c", "kill -TERM $$"]));
    assert_eq!(code, 128 + libc::SIGTERM);
    let (_, stderr, code) = run(&mut flashcomm(&["run", "--check", "--stats-file", "x", "true"]));
    assert!(code == 125 && stderr.contains("leave FLASHCOMM_STATS_FILE out"), "{stderr}");
}

#[test]
fn a_command_ends_with_the_launcher_that_waits_for_it() {
    let mut job = flashcomm(&["run", "-q", "--check", "--", "sh", "-c", "echo $$; exec sleep 60"]);
    let mut job = job.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(job.stdout.take().unwrap()), &mut line).unwrap();
    // SAFETY: a signal to a process of ours that has not been waited for.
    unsafe { libc::kill(job.id() as i32, libc::SIGTERM) };
    job.wait().unwrap();
    let ended =
        || std::fs::read_to_string(format!("/proc/{}/stat", line.trim())).map_or(true, |stat| stat.contains(") Z "));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !ended() {
        assert!(std::time::Instant::now() < deadline, "the command goes on");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn without_the_file_beside_the_shim_the_job_starts_and_is_told_what_it_lacks() {
    let dir = tempfile::tempdir().unwrap();
    let shim = shim_alone(dir.path());
    let arguments = ["run", "--shim", shim.to_str().unwrap(), "--", "sh", "-c", "echo $LD_PRELOAD"];
    let (stdout, stderr, code) = run(&mut flashcomm(&arguments));
    assert_eq!((stdout, code), (format!("{}\n", shim.display()), 0), "{stderr}");
    assert!(stderr.contains("no libflashcomm_soname.so beside the shim. Who opens NCCL by its name"), "{stderr}");
}

#[test]
fn an_nccl_with_functions_that_the_shim_has_not_keeps_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let (source, nccl) = (dir.path().join("nccl.c"), dir.path().join("libnccl.so.2"));
    let text = "int ncclGetVersion(int* v) { *v = 99999; return 0; } int ncclOfTomorrow(void) { return 0; }";
    std::fs::write(&source, text).unwrap();
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&nccl).arg(&source).status().unwrap();
    assert!(built.success());
    let arguments = ["run", "--nccl-lib", nccl.to_str().unwrap(), "--", "sh", "-c", "echo $LD_PRELOAD"];
    let (stdout, stderr, code) = run(&mut flashcomm(&arguments));
    assert_eq!((stdout, code), (format!("{}\n", preloads()[0]), 0), "{stderr}");
    let said = "is newer than this flashcomm, which lacks ncclOfTomorrow: libflashcomm_soname.so is left out";
    assert!(stderr.contains(said), "{stderr}");
}

#[test]
fn the_other_name_is_preloaded_once_and_never_anothers() {
    let [shim, soname] = preloads();
    for preloaded in [soname.clone(), format!("{soname}:{shim}")] {
        let mut job = flashcomm(&["run", "-q", "sh", "-c", "echo $LD_PRELOAD"]);
        let (stdout, ..) = run(job.env("LD_PRELOAD", preloaded));
        assert_eq!(stdout, format!("{shim}:{soname}\n"));
    }
    let mut job = flashcomm(&["run", "true"]);
    let (_, stderr, code) = run(job.env("LD_PRELOAD", "/nowhere/libflashcomm_soname.so"));
    assert!(code == 125 && stderr.contains("another flashcomm is preloaded already: /nowhere/"), "{stderr}");
}

#[test]
fn doctor_says_whether_the_name_is_answered_for() {
    let doctor = |more: &[&str]| run(&mut flashcomm(&[&["doctor", "--simulator"], more].concat()));
    let (stdout, stderr, _) = doctor(&[]);
    assert!(
        stdout.contains("by name      who opens libnccl.so.2 by its name, as JAX does, is reached"),
        "{stdout}{stderr}"
    );
    assert!(stdout.contains("flashcomm run --check -- COMMAND"), "{stdout}");
    let dir = tempfile::tempdir().unwrap();
    let shim = shim_alone(dir.path());
    let (stdout, ..) = doctor(&["--shim", shim.to_str().unwrap()]);
    assert!(stdout.contains("is NOT reached: no libflashcomm_soname.so beside the shim"), "{stdout}");
    // Neither reaches the doctor's own children, which look at the real NCCL.
    let (stdout, stderr, code) = run(&mut flashcomm(&["run", "-q", "--", COMMAND, "doctor", "--simulator"]));
    assert!(code == 0 && stdout.contains("2.28.7 at "), "{stdout}{stderr}");
}

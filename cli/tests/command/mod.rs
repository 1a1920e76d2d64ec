//! What the tests of the `flashcomm` command share.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, SystemTime};

use serde_json::Value;

pub const COMMAND: &str = env!("CARGO_BIN_EXE_flashcomm");

/// Standard output, standard error and exit code.
pub fn run(command: &mut Command) -> (String, String, i32) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let [stdout, stderr] = [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    (stdout, stderr, status.code().unwrap_or_else(|| panic!("{status}")))
}

/// A library of this build.
pub fn built(name: &str) -> PathBuf {
    let library = Path::new(COMMAND).with_file_name(name);
    assert!(library.exists(), "{} is missing; run ./scripts/test.sh, or cargo build --workspace", library.display());
    library
}

/// What `run` preloads: the shim, and its other name behind it.
pub fn preloads() -> [String; 2] {
    let path = |name: &str| built(name).canonicalize().unwrap().to_str().unwrap().to_string();
    [path("libflashcomm.so"), path("libflashcomm_soname.so")]
}

/// That a file of results names the commit that this was built from, as git knows it, and the time of now.
pub fn is_of_this_commit_and_today(json: &Value) {
    let git = Command::new("git").args(["-C", env!("CARGO_MANIFEST_DIR"), "rev-parse", "HEAD"]).output();
    let head = git.ok().filter(|git| git.status.success()).map(|git| String::from_utf8(git.stdout).unwrap());
    let commit = json["commit"].as_str().unwrap();
    match head {
        Some(head) => {
            let hash = commit.strip_suffix("-dirty").unwrap_or(commit);
            assert!(hash.len() >= 7 && head.starts_with(hash), "{commit} is not {head}");
        }
        None => assert_eq!(commit, "unknown"),
    }
    let date = json["date"].as_str().unwrap();
    let age = SystemTime::now().duration_since(humantime::parse_rfc3339(date).unwrap());
    assert!(date.ends_with('Z') && age.is_ok_and(|age| age < Duration::from_secs(600)), "{date}");
}

/// A directory that holds the simulated driver, as if GPUs were there.
pub fn with_driver() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["libcuda.so.1", "libcuda.so"] {
        symlink(built("libflashcomm_sim_cuda.so"), dir.path().join(name)).unwrap();
    }
    dir
}

/// Of the workspace: what is fetched, and the Python programs of all tests, are there.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The published source of a package, which scripts/setup.sh --test fetches.
pub fn source(of: &str) -> PathBuf {
    let source = root().join(".toolkit").join(of);
    assert!(source.exists(), "{} is missing; run ./scripts/setup.sh --test", source.display());
    source
}

pub fn script(name: &str) -> PathBuf {
    root().join("tests/python").join(name)
}

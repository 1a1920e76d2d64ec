//! What the tests of the `flashcomm` command share.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

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

/// A directory that holds the simulated driver, as if GPUs were there.
pub fn with_driver() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["libcuda.so.1", "libcuda.so"] {
        symlink(built("libflashcomm_sim_cuda.so"), dir.path().join(name)).unwrap();
    }
    dir
}

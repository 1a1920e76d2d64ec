//! The libraries of this build, and the simulators under the names that programs look for.

use std::path::{Path, PathBuf};

/// The project's folder.
pub fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// A library of this build: the nearest one above the test program. (Beside it are cargo's intermediate ones.)
pub fn built(name: &str) -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let places = program.ancestors().skip(1).filter(|dir| !dir.ends_with("deps")).map(|dir| dir.join(name));
    let found = places.into_iter().find(|library| library.exists());
    found.unwrap_or_else(|| panic!("{name} is missing; run ./scripts/test.sh, or cargo build --workspace"))
}

/// A directory with the simulators under the names that programs look for.
pub fn simulators() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    if is_real() {
        return dir;
    }
    for (name, file) in [
        ("libcuda.so.1", "libflashcomm_sim_cuda.so"),
        ("libcuda.so", "libflashcomm_sim_cuda.so"),
        ("libnccl.so.2", "libflashcomm_sim_nccl.so"),
    ] {
        std::os::unix::fs::symlink(built(file), dir.path().join(name)).unwrap();
    }
    dir
}

pub fn is_real() -> bool {
    std::env::var_os("FLASHCOMM_TEST_REAL").is_some_and(|value| value == "1")
}

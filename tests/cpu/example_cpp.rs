//! The C++ example: it builds by its Makefile, links the shim through the header and nccl.h, and runs on the simulators.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use flashcomm_test_support::built;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

fn cuda_include() -> PathBuf {
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    homes
        .chain([Path::new(ROOT).join(".toolkit/cuda")])
        .map(|home| home.join("include"))
        .find(|include| include.join("cuda.h").exists())
        .expect("CUDA's headers; run ./scripts/setup.sh")
}

fn run(command: &mut Command) -> (String, String, Option<i32>) {
    let Output { status, stdout, stderr } = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap(), status.code())
}

#[test]
fn the_cpp_example_changes_widths_on_the_simulators() {
    let dir = tempfile::tempdir().unwrap();
    let libraries = [
        ("libflashcomm.so", "libflashcomm.so"),
        ("libcuda.so.1", "libflashcomm_sim_cuda.so"),
        ("libnccl.so.2", "libflashcomm_sim_nccl.so"),
    ];
    for (name, file) in libraries {
        symlink(built(file), dir.path().join(name)).unwrap();
    }
    let nccl = PathBuf::from(std::env::var_os("FLASHCOMM_TEST_NCCL").expect("run ./scripts/test.sh, which sets it"));
    let variable = |name: &str, path: &Path| format!("{name}={}", path.display());
    let (stdout, stderr, code) = run(Command::new("make").arg("-C").arg(Path::new(ROOT).join("examples/cpp")).args([
        variable("OUT", dir.path()),
        variable("NCCL_INCLUDE", &nccl.parent().unwrap().join("../include")),
        variable("CUDA_INCLUDE", &cuda_include()),
        variable("FLASHCOMM_LIB", dir.path()),
        variable("LDFLAGS", Path::new(&format!("-L{}", dir.path().display()))),
        "CXXFLAGS=-O2 -Wall -Wextra -Werror".into(),
    ]));
    assert_eq!(code, Some(0), "{stdout}{stderr}");

    let min_bytes = 1280 << 10;
    for ranks in ["2", "3"] {
        let mut example = Command::new(dir.path().join("control"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("FLASHCOMM_") {
                example.env_remove(name);
            }
        }
        let (stdout, stderr, code) =
            run(example.arg(ranks).env("LD_LIBRARY_PATH", dir.path()).env("FLASHCOMM_TUNE", "off"));
        assert_eq!((code, stderr.as_str()), (Some(0), ""), "{stdout}");
        for line in [
            "switched off                       relative error 0.00000",
            &format!("rank 0 of {ranks}: 4:8 bits (blocks) over peer, from {min_bytes} bytes up"),
            "4 all-reduces compressed, 32.0 MiB as ",
            "forwarded: switched_off 1",
            "as expected",
        ] {
            assert!(stdout.contains(line), "no {line:?} in:\n{stdout}");
        }
    }
}

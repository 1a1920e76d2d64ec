//! `flashcomm run` where the user has preloaded an NCCL, or a layer over one.

#[allow(dead_code, reason = "a part is used")]
mod command;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use command::{COMMAND, built, preloads, run};

/// A library of this name with a function that answers 1, as a layer over NCCL does where there is none under it.
fn library(dir: &Path, name: &str, function: &str) -> String {
    let (source, path) = (dir.join("source.c"), dir.join(name));
    std::fs::write(&source, format!("int {function}(int* x) {{ (void)x; return 1; }}")).unwrap();
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&path).arg(&source).status().unwrap();
    assert!(built.success());
    path.to_str().unwrap().into()
}

#[test]
fn a_preloaded_nccl_is_kept_in_its_place_and_is_the_one_whatever_the_python_has() {
    let dir = tempfile::tempdir().unwrap();
    let nccl = |name: &str| {
        let path = dir.path().join(name);
        std::fs::copy(built("libflashcomm_sim_nccl.so"), &path).unwrap();
        path.to_str().unwrap().to_string()
    };
    let (custom, of_python) = (nccl("libcustom.so"), nccl("libnccl.so.2"));
    let layer = library(dir.path(), "liblayer.so", "ncclGetVersion");
    let other = library(dir.path(), "libother.so", "malloc_trim_of_ours");
    let python = dir.path().join("python3");
    let json = serde_json::json!({"torch": null, "nccl": of_python});
    let job = format!("#!/bin/sh\n[ \"$1\" = -c ] && echo '{json}' || echo \"$LD_PRELOAD,$FLASHCOMM_NCCL_LIB\"\n");
    std::fs::write(&python, job).unwrap();
    std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();

    let [shim, soname] = preloads();
    let start = |given: String, named: Option<&str>| {
        let mut command = Command::new(COMMAND);
        command.args(["run", "--"]).arg(&python).arg("x.py").env_clear().env("PATH", "/usr/bin:/bin");
        command.env("LD_PRELOAD", given).env("LD_LIBRARY_PATH", dir.path());
        run(command.envs(named.map(|path| ("FLASHCOMM_NCCL_LIB", path))))
    };
    for (given, kept, found) in [
        (format!("{custom} {other}"), format!("{custom}:{other}"), format!("in front of NCCL 2.28.7 at {custom}")),
        (format!("{other}:{shim}:{custom}"), format!("{other}:{custom}"), format!("2.28.7 at {custom}")),
        ("libcustom.so".into(), "libcustom.so".into(), "in front of NCCL 2.28.7 at ".into()),
        (layer.clone(), layer, "in front of NCCL of LD_PRELOAD at ".into()),
    ] {
        let (stdout, stderr, code) = start(given, None);
        assert_eq!((stdout, code), (format!("{shim}:{soname}:{kept},\n"), 0), "{stderr}");
        assert!(stderr.contains(&found), "{stderr}");
    }
    // What is no NCCL changes nothing, and what is named comes first.
    let (stdout, ..) = start(other.clone(), None);
    assert_eq!(stdout, format!("{shim}:{soname}:{other},{of_python}\n"));
    let (stdout, ..) = start(custom.clone(), Some(&of_python));
    assert_eq!(stdout, format!("{shim}:{soname}:{custom},{of_python}\n"));
}

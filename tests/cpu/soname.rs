//! Clients that open NCCL by its name, or need it by that, meet the shim where `libflashcomm_soname.so` is preloaded behind
//! it; and the shim finds the real NCCL where they would have.

use std::path::{Path, PathBuf};
use std::process::Command;

use flashcomm_test_support::built;

use super::passthrough::{compile, new_nccl, program, run, shim, text};

const NAME: &str = "libnccl.so.2";

/// Packages as pip lays them out: `lib/` of a client, and NCCLs that say who they are.
struct Stage {
    dir: tempfile::TempDir,
}

impl Stage {
    fn new() -> Self {
        let stage = Stage { dir: tempfile::tempdir().unwrap() };
        for package in ["nvidia", "other", "custom"] {
            std::fs::create_dir_all(stage.path(package)).unwrap();
            let flags = ["-shared", "-fPIC", "-Wl,-soname,libnccl.so.2", &format!("-DNAME=\"{package}\"")];
            compile("whose.c", &stage.path(package).join(NAME), &flags);
        }
        std::fs::create_dir(stage.path("lib")).unwrap();
        stage.client("by_runpath.so", "$ORIGIN/../nvidia", "--enable-new-dtags");
        stage.client("by_rpath.so", "$ORIGIN/../nvidia", "--disable-new-dtags");
        let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
        compile("by_name.c", &stage.path("by_name"), &["-I", include.to_str().unwrap()]);
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A library that needs `libnccl.so.2` and says where that is.
    fn client(&self, name: &str, directory: &str, tags: &str) {
        let nccl = self.path("nvidia").join(NAME);
        let flags = [&format!("-Wl,-rpath,{directory},{tags}"), "-shared", "-fPIC", nccl.to_str().unwrap()];
        compile("client.c", &self.path("lib").join(name), &flags);
    }

    /// The program, with the shim and its other name preloaded, as `flashcomm run` does.
    fn ask(&self, opened: &[&str]) -> Command {
        let mut ask = program("timeout");
        let preloads = [shim(), built("libflashcomm_soname.so")].map(|path| path.to_str().unwrap().to_string());
        ask.arg("20").arg(self.path("by_name")).env("LD_PRELOAD", preloads.join(":"));
        ask.args(opened.iter().map(|name| {
            let (minus, path) = name.strip_prefix('-').map_or(("", *name), |path| ("-", path));
            let path = if path.contains('/') { self.path(path) } else { path.into() };
            format!("{minus}{}", path.display())
        }));
        ask
    }
}

/// What was said, and nothing beside it.
fn said(ask: &mut Command) -> String {
    let output = run(ask);
    assert!(output.stderr.is_empty(), "{output:?}");
    text(&output)
}

#[test]
fn whoever_opens_nccl_by_its_name_meets_the_shim() {
    let stage = Stage::new();
    // Without its other name the shim is not met.
    let mut plain = stage.ask(&[NAME]);
    plain.env("LD_PRELOAD", shim()).env("LD_LIBRARY_PATH", stage.path("custom"));
    assert_eq!(said(&mut plain), " custom, seen 0");
    assert_eq!(said(stage.ask(&[NAME]).env("LD_LIBRARY_PATH", stage.path("custom"))), " custom, seen 1");
    let named = stage.path("other").join(NAME);
    assert_eq!(said(stage.ask(&[NAME, NAME]).env("FLASHCOMM_NCCL_LIB", named)), " other other, seen 2");
    // Preloaded alone it brings the shim that is beside it.
    let mut alone = stage.ask(&[NAME]);
    alone.env("LD_PRELOAD", built("libflashcomm_soname.so")).env("LD_LIBRARY_PATH", stage.path("custom"));
    assert_eq!(said(&mut alone), " custom, seen 1");
}

#[test]
fn what_is_opened_by_its_path_is_the_real_one_and_its_name_is_the_shims() {
    let stage = Stage::new();
    // As JAX does: ctypes opens the package's, XLA opens the name.
    assert_eq!(said(&mut stage.ask(&["-nvidia/libnccl.so.2", NAME])), " nvidia, seen 1");
    // Before any that the loader would have found.
    let mut both = stage.ask(&["-nvidia/libnccl.so.2", NAME]);
    assert_eq!(said(both.env("LD_LIBRARY_PATH", stage.path("custom"))), " nvidia, seen 1");
    // Who asks the real library's own handle has asked for that one.
    assert_eq!(said(&mut stage.ask(&["nvidia/libnccl.so.2"])), " nvidia, seen 0");
}

#[test]
fn a_library_that_needs_nccl_gets_the_shim_and_the_shim_what_it_would_have_got() {
    let stage = Stage::new();
    for client in ["lib/by_runpath.so", "lib/by_rpath.so"] {
        assert_eq!(said(&mut stage.ask(&[client])), " nvidia, seen 1", "{client}");
        // Also for who comes by the name only: XLA has its NCCL's directory in itself.
        assert_eq!(said(&mut stage.ask(&[&format!("-{client}"), NAME])), " nvidia, seen 1", "{client}");
    }
    // The loader's order: DT_RPATH, LD_LIBRARY_PATH, DT_RUNPATH.
    let custom = stage.path("custom");
    assert_eq!(said(stage.ask(&["lib/by_runpath.so"]).env("LD_LIBRARY_PATH", &custom)), " custom, seen 1");
    assert_eq!(said(stage.ask(&["lib/by_rpath.so"]).env("LD_LIBRARY_PATH", &custom)), " nvidia, seen 1");
    // One that does not need it comes after those that do, though it is loaded first.
    let flags = ["-shared", "-fPIC", "-Wl,-rpath,$ORIGIN/../other,--enable-new-dtags", "-DNAME=\"no\""];
    compile("whose.c", &stage.path("lib/first.so"), &flags);
    assert_eq!(said(&mut stage.ask(&["-lib/first.so", "lib/by_runpath.so"])), " nvidia, seen 1");
    assert_eq!(said(&mut stage.ask(&["-lib/first.so", NAME])), " other, seen 1");
}

#[test]
fn a_directory_that_holds_the_shim_as_nccl_is_passed_over() {
    let stage = Stage::new();
    std::fs::create_dir(stage.path("shims")).unwrap();
    std::os::unix::fs::symlink(built("libflashcomm_soname.so"), stage.path("shims").join(NAME)).unwrap();
    let path = format!("{}:{}", stage.path("shims").display(), stage.path("custom").display());
    assert_eq!(said(stage.ask(&[NAME]).env("LD_LIBRARY_PATH", path)), " custom, seen 1");
}

#[test]
fn a_python_that_opens_the_name_gets_nvidias_nccl_through_the_shim() {
    let script = "import ctypes\n\
        nccl, version, ours = ctypes.CDLL('libnccl.so.2'), ctypes.c_int(), ctypes.c_int()\n\
        assert nccl.ncclGetVersion(ctypes.byref(version)) == 0\n\
        assert nccl.flashcommGetVersion(ctypes.byref(ours)) == 0\n\
        print(version.value)";
    let preloads = format!("{}:{}", shim().display(), built("libflashcomm_soname.so").display());
    for by_path in [false, true] {
        let mut python = program("python3");
        python.env("LD_PRELOAD", &preloads).arg("-c");
        if by_path {
            python.arg(format!("import ctypes\nctypes.CDLL({:?})\n{script}", new_nccl().to_str().unwrap()));
        } else {
            python.arg(script).env("LD_LIBRARY_PATH", new_nccl().parent().unwrap());
        }
        assert_eq!(said(&mut python), "23203\n");
    }
}

#[test]
fn the_other_name_has_no_code_and_loading_it_does_nothing() {
    let library = built("libflashcomm_soname.so");
    let dynamic = text(&run(Command::new("readelf").args(["-dW"]).arg(&library)));
    for entry in ["Library soname: [libnccl.so.2]", "Auxiliary library: [libflashcomm.so]", "runpath: [$ORIGIN]"] {
        assert!(dynamic.contains(entry), "{entry}: {dynamic}");
    }
    let defined = text(&run(Command::new("nm").args(["-D", "--defined-only"]).arg(&library)));
    assert!(!defined.contains("nccl") && !defined.contains("flashcomm"), "{defined}");
    let preloads = format!("{}:{}", shim().display(), library.display());
    let output = run(program("/bin/cat").arg("/proc/self/maps").env("LD_PRELOAD", preloads));
    let maps = text(&output);
    assert!(output.stderr.is_empty() && maps.contains("libflashcomm_soname.so") && !maps.contains(NAME), "{output:?}");
    let copies: std::collections::BTreeSet<_> = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .filter(|path| path.ends_with("libflashcomm.so"))
        .collect();
    assert_eq!(copies.len(), 1, "one shim, never two");
}

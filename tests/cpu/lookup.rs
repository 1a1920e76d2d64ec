//! Whose NCCL stands behind the shim where the user has preloaded libraries beside it, in whatever order.

use std::path::{Path, PathBuf};

use super::passthrough::{compile, program, run, shim, text};

/// Libraries that say who they are, and a program that asks.
struct Stage {
    dir: tempfile::TempDir,
}

impl Stage {
    fn new() -> Self {
        let stage = Stage { dir: tempfile::tempdir().unwrap() };
        for name in ["custom", "other", "libnccl.so.2"] {
            stage.library(name, &["-Wl,-soname,libnccl.so.2"][..usize::from(name == "libnccl.so.2")]);
        }
        stage.library("layer", &["-DFORWARDS"]);
        let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
        let flags = ["-I", include.to_str().unwrap(), "-Wl,--no-as-needed", &stage.named("libnccl.so.2")];
        compile("ask_whose.c", &stage.path("ask"), &flags);
        stage
    }

    fn library(&self, name: &str, flags: &[&str]) {
        let name_flag = format!("-DNAME=\"{name}\"");
        compile("whose.c", &self.path(name), &[&["-shared", "-fPIC", &name_flag], flags].concat());
    }

    fn path(&self, name: &str) -> PathBuf {
        match name {
            "shim" => shim(),
            name => self.dir.path().join(name),
        }
    }

    fn named(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().into()
    }

    /// Who was called, with these preloaded; and what was said beside.
    fn ask(&self, preloads: &[&str], separator: &str, named: Option<&str>) -> (String, String) {
        let preloads: Vec<String> = preloads.iter().map(|name| self.named(name)).collect();
        let mut ask = program("timeout");
        ask.arg("20").arg(self.path("ask")).arg(shim()).env("LD_LIBRARY_PATH", self.dir.path());
        ask.env("LD_PRELOAD", preloads.join(separator));
        ask.envs(named.map(|name| ("FLASHCOMM_NCCL_LIB", self.named(name))));
        let output = run(&mut ask);
        (text(&output), String::from_utf8_lossy(&output.stderr).into_owned())
    }
}

#[test]
fn a_preloaded_nccl_is_the_real_one_in_whatever_order_and_a_layer_is_not_called_in_a_circle() {
    let stage = Stage::new();
    for (preloads, expected) in [
        (&["shim"][..], "linked: libnccl.so.2, opened: libnccl.so.2, seen 2"),
        (&["shim", "custom"], "linked: custom, opened: custom, seen 2"),
        // The program's own calls do not meet the shim; what is opened by its path goes to the same NCCL.
        (&["custom", "shim"], "linked: custom, opened: custom, seen 1"),
        (&["custom"], "linked: custom, opened: custom, seen 1"),
        // A layer calls what comes behind it: the shim, which must not call the layer.
        (&["layer", "shim"], "linked: layer libnccl.so.2, opened: libnccl.so.2, seen 2"),
        (&["layer", "shim", "custom"], "linked: layer custom, opened: custom, seen 2"),
        (&["shim", "layer"], "linked: layer libnccl.so.2, opened: layer libnccl.so.2, seen 2"),
        (&["shim", "layer", "custom"], "linked: layer custom, opened: layer custom, seen 2"),
    ] {
        for separator in [":", " "] {
            let (said, log) = stage.ask(preloads, separator, None);
            assert_eq!((said.as_str(), log.as_str()), (expected, ""), "{preloads:?} by {separator:?}");
        }
    }
}

#[test]
fn the_nccl_that_is_named_comes_before_a_preloaded_one_unless_it_would_call_us() {
    let stage = Stage::new();
    let (said, _) = stage.ask(&["shim", "custom"], ":", Some("other"));
    assert_eq!(said, "linked: other, opened: other, seen 2");
    let (said, log) = stage.ask(&["layer", "shim"], ":", Some("layer"));
    assert_eq!(said, "linked: layer libnccl.so.2, opened: libnccl.so.2, seen 2");
    assert!(log.contains("layer calls flashcomm in its turn") && log.contains("Looking elsewhere"), "{log}");
}

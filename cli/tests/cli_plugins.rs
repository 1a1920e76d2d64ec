//! The plugins of vLLM and SGLang, loaded and called by the engines' published source, on the simulated driver: they route
//! by what the shim says, do nothing unless asked, and stay out of what they do not know.

#[allow(dead_code, reason = "a part is used")]
mod command;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use command::{built, root, run, script, source, with_driver};

/// What pip leaves of the wheel in an environment, as far as Python looks: package, entry points, where the library is.
fn site() -> TempDir {
    let site = tempfile::tempdir().unwrap();
    symlink(root().join("python/flashcomm_plugins"), site.path().join("flashcomm_plugins")).unwrap();
    let project = fs::read_to_string(root().join("pyproject.toml")).unwrap();
    let mut points = String::new();
    for part in project.split("\n[").filter_map(|part| part.strip_prefix("project.entry-points.")) {
        points += &format!("[{}\n", part.replace('"', ""));
    }
    let info = site.path().join("flashcomm-0.dist-info");
    fs::create_dir(&info).unwrap();
    fs::write(info.join("entry_points.txt"), points).unwrap();
    fs::write(info.join("METADATA"), "Metadata-Version: 2.1\nName: flashcomm\nVersion: 0\n").unwrap();
    fs::write(info.join("RECORD"), format!("{},,\n", built("libflashcomm.so").display())).unwrap();
    site
}

/// What a job of two ranks has seen, and what it has said on standard error.
fn job(engine: &str, arguments: &[&str], variables: &[(&str, &str)]) -> (Value, String) {
    let (site, driver) = (site(), with_driver());
    let package = if engine == "vllm" { "vllm-0.33.0" } else { "sglang-0.5.23" };
    let mut command = Command::new("python3");
    command.arg(script(&format!("{engine}_plugin.py"))).args([&source(package), site.path()]).args(arguments);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap()).env("LD_LIBRARY_PATH", driver.path());
    command
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("FLASHCOMM_TUNE", "off")
        .env("FLASHCOMM_NCCL_LIB", built("libflashcomm_sim_nccl.so"));
    let (stdout, stderr, code) = run(command.envs(variables.iter().copied()));
    assert_eq!(code, 0, "{stderr}");
    (serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}{stderr}")), stderr)
}

const ASKED: (&str, &str) = ("FLASHCOMM_PLUGIN", "1");

/// Of each sum: its result's place, and whether the shim has compressed it.
fn sums(rows: [(&str, bool); 7]) -> Value {
    let names = ["fp16 512K", "fp16 1M", "fp16 2M", "fp16 2M in strides", "bf16 4M", "fp32 4M", "fp16 16M"].into_iter();
    names.zip(rows).map(|(name, row)| (name.to_string(), json!(row))).collect::<serde_json::Map<_, _>>().into()
}

const OWN: (&str, bool) = ("own", false);
const OUT: (&str, bool) = ("out of place", true);
const IN: (&str, bool) = ("in place", true);
const TORCH: (&str, bool) = ("in place", false);

#[test]
fn vllm_gives_the_shim_what_it_compresses_and_keeps_the_rest() {
    // Two ranks over `peer`: from 1.25 MiB on. Its own kernel would take all up to 8 MiB.
    let (said, _) = job("vllm", &[], &[ASKED]);
    let shim = built("libflashcomm.so").canonicalize().unwrap();
    assert_eq!((&said["wraps"], &said["path"]), (&true.into(), &shim.to_str().unwrap().into()));
    assert_eq!(said["sums"], sums([OWN, OWN, OUT, OWN, OUT, OWN, OUT]));
    // The limit is the shim's, whatever it is.
    let (said, _) = job("vllm", &[], &[ASKED, ("FLASHCOMM_MIN_BYTES", "1M")]);
    assert_eq!(said["sums"], sums([OWN, OUT, OUT, OWN, OUT, OWN, OUT]));
    let (said, _) = job("vllm", &[], &[ASKED, ("FLASHCOMM_DTYPES", "bf16")]);
    assert_eq!(said["sums"], sums([OWN, OWN, OWN, OWN, OUT, OWN, ("out of place", false)]));
    // Over memory of the host a kernel of its own is faster at all that it takes.
    let (said, _) = job("vllm", &[], &[ASKED, ("FLASHCOMM_EXCHANGE", "host")]);
    assert_eq!(said["sums"], sums([OWN, OWN, OWN, OWN, OWN, OWN, OUT]));
    // What compresses nothing gets nothing.
    let (said, _) = job("vllm", &[], &[ASKED, ("FLASHCOMM_ENABLE", "0")]);
    assert_eq!(said["sums"], sums([OWN, OWN, OWN, OWN, OWN, OWN, ("out of place", false)]));
}

#[test]
fn sglang_gives_the_shim_what_it_compresses_and_keeps_the_rest_and_the_places() {
    let (said, _) = job("sglang", &[], &[ASKED]);
    let shim = built("libflashcomm.so").canonicalize().unwrap();
    assert_eq!((&said["wraps"], &said["path"]), (&true.into(), &shim.to_str().unwrap().into()));
    assert_eq!(said["sums"]["own"], sums([OWN, OWN, OUT, OWN, OUT, OWN, IN]));
    assert_eq!(said["sums"]["eager"], sums([TORCH, TORCH, IN, TORCH, IN, TORCH, IN]));
    assert_eq!(said["sums"]["compiled"], sums([OWN, OWN, OUT, OWN, OUT, OWN, OUT]));
    assert_eq!(said["sums"]["no pynccl"], json!(TORCH));
    let (said, _) = job("sglang", &[], &[ASKED, ("FLASHCOMM_EXCHANGE", "host")]);
    assert_eq!(said["sums"]["own"], sums([OWN, OWN, OWN, OWN, OWN, OWN, IN]));
    let (said, _) = job("sglang", &[], &[ASKED, ("FLASHCOMM_MIN_BYTES", "1M")]);
    assert_eq!(said["sums"]["own"], sums([OWN, OUT, OUT, OWN, OUT, OWN, IN]));
}

/// Whoever has not asked, or has with a wrong value, gets the engine as it is, and no import.
#[test]
fn a_plugin_that_is_not_asked_for_does_nothing() {
    for engine in ["vllm", "sglang"] {
        for (variables, variable) in [(&[][..], Value::Null), (&[("FLASHCOMM_PLUGIN", "0")], "0".into())] {
            let (said, stderr) = job(engine, &[], variables);
            let seen = (&said["wraps"], &said["path"], &said["variable"]);
            assert_eq!(seen, (&false.into(), &Value::Null, &variable));
            assert!(!stderr.contains("flashcomm"), "{stderr}");
        }
        // Not even looked for, as they are not installed here.
        let look = "
import importlib, sys
class Asked:
    names = set()
    def find_spec(self, name, *_):
        self.names.add(name.partition('.')[0])
sys.meta_path.insert(0, Asked())
importlib.import_module('flashcomm_plugins.' + sys.argv[1]).load()
print(*Asked.names & {'torch', 'vllm', 'sglang'}, 'flashcomm_plugins' in Asked.names)";
        let mut python = Command::new("python3");
        python.args(["-c", look, engine]).env("PYTHONPATH", root().join("python")).env("PYTHONDONTWRITEBYTECODE", "1");
        assert_eq!(run(&mut python), ("True\n".into(), String::new(), 0));
    }
    let (said, stderr) = job("vllm", &[], &[("FLASHCOMM_PLUGIN", "yes")]);
    assert_eq!(said["wraps"], false);
    assert!(stderr.contains("FLASHCOMM_PLUGIN='yes' is not allowed; it takes 0 or 1. 0 holds."), "{stderr}");
}

/// Asserts that the engine is as it was, and that this was said in one line.
fn stays_out(engine: &str, arguments: &[&str], variables: &[(&str, &str)], why: &str, cure: &str) -> Value {
    let variables = [&[ASKED], variables].concat();
    let (said, stderr) = job(engine, arguments, &variables);
    let lines: Vec<&str> = stderr.lines().filter(|line| line.contains("stays out")).collect();
    assert!(lines.len() == 1 && lines[0].contains(why) && lines[0].contains(cure), "{why}, {cure}: {stderr}");
    // So the shims of all ranks know, and the processes that it starts say no more.
    assert_eq!(said["variable"], "0");
    said
}

#[test]
fn an_engine_that_is_not_known_is_left_alone_with_the_cure_told() {
    for (engine, versions, known) in [
        ("vllm", ["0.34.0", "0.24.9", "dev"], "0.25 to 0.33"),
        ("sglang", ["0.5.24", "0.6.0", "0.5.9"], "0.5.16 to 0.5.23"),
    ] {
        let cure = format!("`flashcomm run --engine {engine}`");
        for version in versions {
            let said = stays_out(engine, &[version], &[], &format!("{known}, not {version}. "), &cure);
            assert_eq!((&said["wraps"], &said["path"]), (&false.into(), &Value::Null));
        }
        let said = stays_out(engine, &["other"], &[], "has ", &cure);
        assert_eq!((&said["wraps"], &said["path"]), (&false.into(), &Value::Null));
    }
    for engine in ["vllm", "sglang"] {
        let said = stays_out(engine, &["rocm"], &[], "not for CUDA", "Unset FLASHCOMM_PLUGIN");
        assert_eq!((&said["wraps"], &said["path"]), (&false.into(), &Value::Null));
    }
    // A version between those, of a build that is no release.
    assert_eq!(job("vllm", &["0.33.1.dev20+g752a3a504"], &[ASKED]).0["wraps"], true);
}

#[test]
fn sums_that_must_not_depend_on_the_batch_turn_the_plugins_off() {
    let (invariant, cure) = (("VLLM_BATCH_INVARIANT", "1"), "--batch-invariant 1");
    let said = stays_out("vllm", &[], &[invariant], "VLLM_BATCH_INVARIANT wants", cure);
    assert_eq!((&said["wraps"], &said["path"]), (&false.into(), &Value::Null));
    // Of SGLang by a variable, and by an option, which it knows when it makes its groups.
    let variable = [("SGLANG_ENABLE_DETERMINISTIC_INFERENCE", "1")];
    for (arguments, variables) in [(&["deterministic"][..], &[][..]), (&[], &variable)] {
        let said = stays_out("sglang", arguments, variables, "deterministic inference wants", cure);
        assert_eq!(said["path"], Value::Null);
        assert_eq!(said["sums"]["own"], sums([OWN, OWN, OWN, OWN, OWN, OWN, TORCH]));
        assert_eq!(said["sums"]["eager"], sums([TORCH; 7]));
    }
}

#[test]
fn an_nccl_that_the_user_has_named_stays_and_the_plugin_says_that_it_is_not_the_shim() {
    let nccl = built("libflashcomm_sim_nccl.so");
    let nccl = nccl.to_str().unwrap();
    for (engine, name) in [("vllm", "VLLM_NCCL_SO_PATH"), ("sglang", "SGLANG_NCCL_SO_PATH")] {
        let why = format!("its NCCL is {nccl}, not libflashcomm.so. Unset {name}");
        let said = stays_out(engine, &[], &[(name, nccl)], &why, "FLASHCOMM_NCCL_LIB");
        assert_eq!(said["path"], nccl);
        let own = if engine == "vllm" { &said["sums"] } else { &said["sums"]["own"] };
        assert!(own.as_object().unwrap().values().all(|sum| sum[1] == false), "{own}");
        assert_eq!(own["fp16 2M"], json!(OWN));
    }
    // The shim by another path is the shim.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nccl.so");
    symlink(built("libflashcomm.so"), &path).unwrap();
    let (said, _) = job("vllm", &[], &[ASKED, ("VLLM_NCCL_SO_PATH", path.to_str().unwrap())]);
    assert_eq!((&said["path"], &said["sums"]["fp16 2M"]), (&path.to_str().unwrap().into(), &json!(OUT)));
}

#[test]
fn the_plugins_are_python_of_the_oldest_version_that_the_wheel_allows() {
    let project = fs::read_to_string(root().join("pyproject.toml")).unwrap();
    assert!(project.contains("requires-python = \">=3.8\""));
    let parse = "import ast, sys; [ast.parse(open(path).read(), feature_version=(3, 8)) for path in sys.argv[1:]]";
    let files = fs::read_dir(root().join("python/flashcomm_plugins")).unwrap().map(|entry| entry.unwrap().path());
    let files: Vec<_> = files.filter(|path| path.extension() == Some(Path::new("py").as_os_str())).collect();
    assert!(files.len() >= 6, "{files:?}");
    assert_eq!(run(Command::new("python3").args(["-c", parse]).args(files)), (String::new(), String::new(), 0));
}

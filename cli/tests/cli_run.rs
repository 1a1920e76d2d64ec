//! `flashcomm run` and `flashcomm doctor` as users run them; and that engines take what is set, as their source says.

mod command;

use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use command::{COMMAND, built, is_of_this_commit_and_today, preloads, run, script, source, with_driver};

/// A clean environment, and the simulated NCCL as the real one.
fn flashcomm(arguments: &[&str]) -> Command {
    let mut command = bare(arguments);
    command.env("FLASHCOMM_NCCL_LIB", built("libflashcomm_sim_nccl.so"));
    command
}

/// The same without an NCCL.
fn bare(arguments: &[&str]) -> Command {
    let mut command = Command::new(COMMAND);
    command.args(arguments).env_clear().env("FLASHCOMM_TUNE", "off");
    // No Python of this machine, which may have an NCCL.
    command.env("PATH", without_python(&std::env::var("PATH").unwrap()));
    command
}

/// The system's programs, by links, without a Python.
fn without_python(path: &str) -> PathBuf {
    static PROGRAMS: std::sync::OnceLock<TempDir> = std::sync::OnceLock::new();
    let dir = PROGRAMS.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        for name in ["sh", "env", "true"] {
            let found = std::env::split_paths(path).map(|dir| dir.join(name)).find(|path| path.exists());
            symlink(found.unwrap_or_else(|| panic!("no {name}")), dir.path().join(name)).unwrap();
        }
        dir
    });
    dir.path().into()
}

fn program(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// A Python that says it has these: the directory of torch, and the libnccl.so.2 of nvidia-nccl.
fn python(dir: &Path, torch: Option<&Path>, nccl: Option<&Path>) -> PathBuf {
    let json = serde_json::json!({"torch": torch, "nccl": nccl});
    let path = dir.join("python3");
    program(&path, &format!("#!/bin/sh\n[ \"$1\" = -c ] && echo '{json}' || echo \"job $FLASHCOMM_NCCL_LIB\"\n"));
    path
}

/// A package torch whose libtorch_cuda.so needs libnccl.so.2, or does not.
fn torch(dir: &Path, needs_nccl: bool) -> PathBuf {
    let torch = dir.join("site-packages/torch");
    std::fs::create_dir_all(torch.join("lib")).unwrap();
    let nccl = dir.join("site-packages/nvidia/nccl/lib");
    std::fs::create_dir_all(&nccl).unwrap();
    symlink(built("libflashcomm_sim_nccl.so"), nccl.join("libnccl.so.2")).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-o"]).arg(torch.join("lib/libtorch_cuda.so")).arg("-Wl,--no-as-needed");
    if needs_nccl {
        cc.arg("-L").arg(&nccl).arg("-l:libnccl.so.2").arg("-Wl,-rpath,$ORIGIN/../../nvidia/nccl/lib");
        // The simulated library carries no name of its own.
        cc.current_dir(&nccl);
    }
    let status = cc.args(["-x", "c", "/dev/null"]).status().unwrap();
    assert!(status.success());
    torch
}

#[test]
fn a_job_gets_the_settings_and_the_command_is_the_process() {
    let [shim, soname] = preloads();
    let show =
        "echo $$; echo $LD_PRELOAD; echo $VLLM_NCCL_SO_PATH; echo $SGLANG_NCCL_SO_PATH; echo $FLASHCOMM_BITS; exit 7";
    let arguments = ["run", "--bits", "4:8", "--min-bytes=0", "--", "sh", "-c", show];
    let mut job = flashcomm(&arguments);
    job.env("LD_PRELOAD", "/nowhere/other.so").stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = job.spawn().unwrap();
    let pid = child.id();
    let output = child.wait_with_output().unwrap();
    let (stdout, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert_eq!(stdout, format!("{pid}\n{shim}:{soname}:/nowhere/other.so\n{shim}\n{shim}\n4:8\n"), "{stderr}");
    assert_eq!(output.status.code(), Some(7));
    for said in ["FLASHCOMM_BITS=4:8", "FLASHCOMM_MIN_BYTES=0", "in front of NCCL 2.28.7"] {
        assert!(stderr.contains(said), "{said}: {stderr}");
    }
    let (_, stderr, code) = run(&mut flashcomm(&["run", "--quiet", "true"]));
    assert_eq!((stderr.as_str(), code), ("", 0));
    let signal = flashcomm(&["run", "-q", "--", "sh", "-c", "kill -TERM $$"]).status().unwrap().signal();
    assert_eq!(signal, Some(15));
}

#[test]
fn every_setting_has_an_option_that_the_shims_parser_checks() {
    for setting in flashcomm::tooling::settings::SETTINGS {
        let option = format!("--{}", setting.name.trim_start_matches("FLASHCOMM_").to_lowercase().replace('_', "-"));
        let (help, ..) = run(&mut bare(&["run", "--help"]));
        assert!(help.contains(&option) && help.contains(setting.effect), "{option}\n{help}");
    }
    for (option, value, name) in
        [("--bits", "9", "BITS"), ("--exchange", "pigeon", "EXCHANGE"), ("--log", "loud", "LOG")]
    {
        let (stdout, stderr, code) = run(&mut flashcomm(&["run", option, value, "--", "sh", "-c", "echo started"]));
        assert_eq!((stdout.as_str(), code), ("", 125), "{stderr}");
        assert!(stderr.contains(&format!("FLASHCOMM_{name}={value:?} is not allowed; it takes ")), "{stderr}");
    }
    let (_, stderr, code) = run(flashcomm(&["run", "true"]).env("FLASHCOMM_GROUP", "100"));
    assert!(code == 125 && stderr.contains("FLASHCOMM_GROUP=\"100\""), "{stderr}");
}

#[test]
fn a_job_that_wants_batch_invariance_is_not_compressed_unless_that_is_batch_invariant() {
    for (invariant, enable) in [("0", "0\n"), ("1", "\n")] {
        let mut command = flashcomm(&["run", "--batch-invariant", invariant, "sh", "-c", "echo $FLASHCOMM_ENABLE"]);
        let (stdout, stderr, _) = run(command.env("VLLM_BATCH_INVARIANT", "1"));
        assert_eq!((stdout.as_str(), stderr.contains("VLLM_BATCH_INVARIANT=1 wants")), (enable, invariant == "0"));
    }
}

#[test]
fn a_job_without_a_real_nccl_is_refused_unless_forced() {
    let (stdout, stderr, code) = run(&mut bare(&["run", "--", "sh", "-c", "echo started"]));
    assert_eq!((stdout.as_str(), code), ("", 125), "{stderr}");
    assert!(stderr.contains("no real NCCL was found") && stderr.contains("pip install nvidia-nccl-cu13"), "{stderr}");
    let (stdout, ..) = run(&mut bare(&["run", "--force", "--", "sh", "-c", "echo started"]));
    assert_eq!(stdout, "started\n");

    let (_, stderr, code) = run(&mut bare(&["run", "--nccl-lib", "/nowhere/libnccl.so.2", "true"]));
    assert!(code == 125 && stderr.contains("FLASHCOMM_NCCL_LIB=/nowhere/libnccl.so.2 cannot be used"), "{stderr}");
    // The shim itself is no real NCCL, whatever names it.
    let shim = built("libflashcomm.so");
    let (_, stderr, code) = run(&mut bare(&["run", "--nccl-lib", shim.to_str().unwrap(), "true"]));
    assert!(code == 125 && stderr.contains("is flashcomm itself"), "{stderr}");
}

#[test]
fn the_nccl_of_the_commands_python_is_the_one() {
    let dir = tempfile::tempdir().unwrap();
    let sim = built("libflashcomm_sim_nccl.so").canonicalize().unwrap();
    let python = python(dir.path(), None, Some(&sim));
    // By its path, by a script's first line, and behind another program.
    let script = dir.path().join("serve");
    program(&script, &format!("#!{}\n", python.display()));
    for command in [vec![python.to_str().unwrap(), "job.py"], vec!["env", python.to_str().unwrap(), "job.py"]] {
        let (stdout, stderr, code) = run(bare(&["run", "--"]).args(command));
        assert_eq!((stdout, code), (format!("job {}\n", sim.display()), 0), "{stderr}");
    }
    let (printed, stderr, _) = run(bare(&["run", "--print-env", "--"]).arg(&script));
    assert!(printed.contains(&format!("export FLASHCOMM_NCCL_LIB='{}'\n", sim.display())), "{printed}{stderr}");
    // Whoever named an NCCL to an engine wants that one behind the shim.
    let (stdout, ..) = run(bare(&["run", "-q", "--", "sh", "-c", "echo $FLASHCOMM_NCCL_LIB $VLLM_NCCL_SO_PATH"])
        .env("VLLM_NCCL_SO_PATH", &sim));
    let shim = built("libflashcomm.so").canonicalize().unwrap();
    assert_eq!(stdout, format!("{} {}\n", sim.display(), shim.display()));
}

#[test]
fn a_pytorch_with_nccl_built_in_is_refused_but_for_vllm() {
    let dir = tempfile::tempdir().unwrap();
    let sim = built("libflashcomm_sim_nccl.so");
    let python = python(dir.path(), Some(&torch(dir.path(), false)), Some(&sim));
    let job = |more: &[&str]| run(bare(&["run"]).args(more).arg("--").arg(&python).arg("x.py"));
    let (stdout, stderr, code) = job(&[]);
    assert_eq!((stdout.as_str(), code), ("", 125), "{stderr}");
    assert!(stderr.contains("does not load libnccl.so.2") && stderr.contains("pip install torch"), "{stderr}");
    for more in [["--force"].as_slice(), &["--engine", "vllm"]] {
        let (stdout, stderr, code) = job(more);
        assert!(stdout.starts_with("job ") && code == 0 && stderr.contains("does not load libnccl.so.2"), "{stderr}");
    }

    let other = tempfile::tempdir().unwrap();
    let torch = torch(other.path(), true);
    let loads = self::python(other.path(), Some(&torch), None);
    let (stdout, stderr, code) = run(bare(&["run", "--engine", "torch", "--"]).arg(&loads).arg("x.py"));
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(stdout, format!("job {}\n", sim.canonicalize().unwrap().display()), "the one that its PyTorch loads");
    std::fs::remove_file(torch.join("lib/libtorch_cuda.so")).unwrap();
    let (_, stderr, code) = run(flashcomm(&["run", "--engine", "torch", "--"]).arg(&loads).arg("x.py"));
    assert!(code == 125 && stderr.contains("is built without CUDA"), "{stderr}");
}

#[test]
fn another_flashcomm_that_is_preloaded_already_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let other = dir.path().join("renamed.so");
    std::fs::copy(built("libflashcomm.so"), &other).unwrap();
    for path in [other.to_str().unwrap(), "/nowhere/libflashcomm.so"] {
        let preloads = format!("/nowhere/else.so:{path}");
        let (stdout, stderr, code) = run(flashcomm(&["run", "sh", "-c", "echo started"]).env("LD_PRELOAD", &preloads));
        assert_eq!((stdout.as_str(), code), ("", 125), "{stderr}");
        assert!(stderr.contains(&format!("another flashcomm is preloaded already: {path}")), "{stderr}");
        assert!(stderr.contains("Take it out of LD_PRELOAD"), "{stderr}");
    }
    let (_, stderr, code) = run(bare(&["run", "true"]).env("SGLANG_NCCL_SO_PATH", &other));
    assert!(code == 125 && stderr.contains("is another flashcomm"), "{stderr}");
    // This one twice is once.
    let (stdout, ..) = run(flashcomm(&["run", "-q", "sh", "-c", "echo $LD_PRELOAD"]).env("LD_PRELOAD", &preloads()[0]));
    assert_eq!(stdout.trim(), preloads().join(":"));
}

#[test]
fn a_command_that_is_missing_or_cannot_be_started_is_told() {
    let (_, stderr, code) = run(&mut flashcomm(&["run", "--", "no-such-command"]));
    assert!(code == 127 && stderr.contains("there is no command \"no-such-command\""), "{stderr}");
    let dir = tempfile::tempdir().unwrap();
    let broken = dir.path().join("broken");
    program(&broken, "#!/nowhere/interpreter\n");
    let (_, stderr, code) = run(flashcomm(&["run", "--"]).arg(&broken));
    assert!(code == 126 && stderr.contains("cannot start"), "{stderr}");
    let (_, stderr, code) = run(&mut flashcomm(&["run", "--bits", "4"]));
    assert!(code == 2 && stderr.contains("COMMAND"), "{stderr}");
}

#[test]
fn a_shim_where_a_preload_cannot_name_it_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let spaced = dir.path().join("a b");
    std::fs::create_dir(&spaced).unwrap();
    std::fs::copy(built("libflashcomm.so"), spaced.join("libflashcomm.so")).unwrap();
    let (_, stderr, code) = run(flashcomm(&["run", "--shim"]).arg(spaced.join("libflashcomm.so")).arg("true"));
    assert!(code == 125 && stderr.contains("a space or a colon"), "{stderr}");
}

#[test]
fn the_printed_environment_gives_the_same_job() {
    let arguments = ["run", "--engine", "vllm", "--bits", "4", "--log-file", "/tmp/it's $HOME/log.%p"];
    let names = "LD_PRELOAD VLLM_NCCL_SO_PATH SGLANG_NCCL_SO_PATH FLASHCOMM_BITS FLASHCOMM_LOG_FILE FLASHCOMM_NCCL_LIB \
                 VLLM_ALLREDUCE_USE_SYMM_MEM VLLM_ALLREDUCE_USE_FLASHINFER VLLM_USE_NCCL_SYMM_MEM";
    let show = format!("for name in {names}; do eval \"printf '%s=%s\\n' $name \\\"\\$$name\\\"\"; done");
    let (expected, stderr, code) = run(flashcomm(&arguments).args(["--", "sh", "-c", &show]));
    assert!(code == 0 && expected.contains("FLASHCOMM_LOG_FILE=/tmp/it's $HOME/log.%p\n"), "{expected}{stderr}");

    let (shell, stderr, _) = run(flashcomm(&arguments).arg("--print-env"));
    assert!(stderr.contains("--disable-custom-all-reduce -cc.pass_config.fuse_allreduce_rms=false"), "{stderr}");
    let sourced = Command::new("sh").arg("-c").arg(format!("{shell}{show}")).env_clear().output().unwrap();
    assert_eq!(String::from_utf8(sourced.stdout).unwrap(), expected);

    // Docker takes what is behind the first equals sign of a line; systemd takes off its quotes.
    let (docker, ..) = run(flashcomm(&arguments).arg("--print-env=docker"));
    let (systemd, ..) = run(flashcomm(&arguments).arg("--print-env=systemd"));
    for line in expected.lines() {
        assert!(docker.lines().any(|given| given == line), "{line}\n{docker}");
        let (name, value) = line.split_once('=').unwrap();
        assert!(systemd.lines().any(|given| given == format!("{name}=\"{value}\"")), "{line}\n{systemd}");
    }
}

#[test]
fn engines_mean_by_the_variables_and_options_what_they_are_set_for() {
    for (engine, package, serve) in [
        ("vllm", "vllm-0.33.0", ["vllm", "serve", "model"].as_slice()),
        ("sglang", "sglang-0.5.23", &["python3", "-m", "sglang.launch_server"]),
    ] {
        let mut job = flashcomm(&["run", "--engine", engine, "--print-env=docker", "--"]);
        job.args(serve).env("VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", "MINE_");
        let (variables, stderr, code) = run(&mut job);
        let added = stderr.lines().find_map(|line| line.strip_prefix("flashcomm run: added to the command: "));
        let options = added.unwrap_or_else(|| panic!("nothing added ({code}): {stderr}")).split(' ');
        let mut check = Command::new("python3");
        check.arg(script("engines.py")).arg(engine).arg(source(package)).args(variables.lines()).args(options);
        let (stdout, stderr, code) = run(&mut check);
        assert_eq!(code, 0, "{stderr}");
        assert!(stdout.contains("mean what they are set for"), "{stdout}");
    }
}

#[test]
fn vllms_own_wrapper_of_nccl_opens_the_shim_and_is_compressed() {
    let driver = with_driver();
    let (stdout, stderr, code) =
        run(flashcomm(&["run", "-q", "--bits", "4", "--code", "plain", "--min-bytes", "0", "--"])
            .args([Path::new("python3"), &script("vllm_pynccl.py"), &source("vllm-0.33.0")])
            .env("LD_LIBRARY_PATH", driver.path())
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("HOME", std::env::var_os("HOME").unwrap_or_default()));
    assert_eq!(code, 0, "{stderr}");
    let said: Value = serde_json::from_str(&stdout).unwrap();
    let shim = built("libflashcomm.so").canonicalize().unwrap();
    assert_eq!(said["path"], shim.to_str().unwrap());
    assert_eq!((&said["nccl"], &said["compressed"], &said["forwarded"]), (&"2.28.7".into(), &2.into(), &0.into()));
    assert_eq!(said["bytes_in"], 2 * 2 * (1 << 20));
}

#[test]
fn doctor_says_what_auto_takes_and_why() {
    let json = |devices: &str, more: &[(&str, &str)]| -> (Value, i32) {
        let (stdout, stderr, code) = run(bare(&["doctor", "--simulator", "--json"])
            .env("FLASHCOMM_SIM_DEVICES", devices)
            .envs(more.iter().copied()));
        (serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}{stderr}")), code)
    };
    let (report, code) = json("3", &[]);
    assert_eq!((code, &report["fit"], &report["simulated"]), (0, &true.into(), &true.into()), "{report}");
    assert_eq!(report["nccl"]["version"], "2.28.7");
    is_of_this_commit_and_today(&report);
    assert!(report["nccl"]["lacks"].as_array().unwrap().contains(&"ncclCommWindowRegister".into()), "{report}");
    assert_eq!(report["gpus"].as_array().unwrap().len(), 3);
    assert_eq!(report["gpus"][1]["reaches"], serde_json::json!([true, true, true]));
    assert!(report["shared_memory"]["free_bytes"].as_u64().unwrap() > 0 && !report["numa_nodes"][0].is_null());
    let exchanges = &report["exchanges"];
    assert_eq!((&exchanges["takes"], &exchanges["ranks"]), (&"peer".into(), &3.into()), "{exchanges}");
    assert_eq!(exchanges["nccl"]["min_bytes_on_one_host"], Value::Null);
    assert_eq!(exchanges["nccl"]["min_bytes_between_hosts"], 1 << 20);

    // CUDA IPC refused, as in some containers; GPUs that do not reach each other.
    let no_ipc = [("FLASHCOMM_SIM_FAIL", "ipc:1")];
    for (devices, more, takes, because) in [
        ("1", &no_ipc[..], "nccl", "reach each other's memory"),
        ("2", &no_ipc[..], "nccl", "CUDA IPC"),
        ("2", &[("FLASHCOMM_SIM_PEER_ACCESS", "0")][..], "host", "driver error 217"),
    ] {
        let (report, code) = json(devices, more);
        let exchanges = &report["exchanges"];
        assert_eq!((code, &exchanges["takes"], &exchanges["cuda_ipc"]), (0, &takes.into(), &false.into()), "{report}");
        assert!(exchanges["because"].as_str().unwrap().contains(because), "{exchanges}");
    }
    // And where only that is allowed.
    let (report, code) = json("1", &[("FLASHCOMM_SIM_FAIL", "ipc:1"), ("FLASHCOMM_EXCHANGE", "peer")]);
    assert_eq!((code, &report["fit"], &report["exchanges"]["takes"]), (1, &false.into(), &Value::Null), "{report}");
    // A driver that does not take the kernels.
    let (report, code) = json("1", &[("FLASHCOMM_SIM_FAIL", "module:1")]);
    assert_eq!((code, &report["fit"]), (1, &false.into()), "{report}");
    assert!(report["problems"][0].as_str().unwrap().contains("driver 580"), "{report}");
}

#[test]
fn doctor_says_that_there_is_no_gpu_or_no_nccl() {
    if Path::new("/dev/nvidia0").exists() {
        return eprintln!("NOT RUN: this machine has a GPU");
    }
    let (stdout, stderr, code) = run(&mut flashcomm(&["doctor"]));
    assert_eq!(code, 2, "{stdout}");
    assert!(
        stderr.contains("no GPU") && stdout.contains("- no GPU: ") && stdout.contains("2.28.7 at "),
        "{stdout}{stderr}"
    );
    assert!(!stdout.contains("no real NCCL"), "{stdout}");
    let driver = with_driver();
    let (stdout, _, code) = run(bare(&["doctor"]).env("LD_LIBRARY_PATH", driver.path()));
    assert_eq!(code, 1, "{stdout}");
    assert!(stdout.contains("- no real NCCL: ") && stdout.contains("takes peer"), "{stdout}");
}

#[test]
fn doctor_reads_the_crossover_that_bench_measured() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bench.json");
    let arguments =
        ["bench", "--simulator", "--worlds", "2", "--sizes", "4K..8K", "--exchanges", "peer", "--rounds", "1"];
    let (stdout, stderr, code) = run(bare(&arguments).arg("--json").arg(&path));
    assert_eq!(code, 0, "{stdout}{stderr}");
    let (stdout, _, code) = run(bare(&["doctor", "--simulator", "--bench"]).arg(&path));
    assert!(
        code == 0 && stdout.contains("2 ranks, fp16: 4 bits peer") && stdout.contains("never slower from"),
        "{stdout}"
    );
    std::fs::write(&path, "{}").unwrap();
    let (_, stderr, code) = run(bare(&["doctor", "--simulator", "--bench"]).arg(&path));
    assert!(code == 1 && stderr.contains("is not what flashcomm bench --json writes"), "{stderr}");
}

#[test]
fn manual_pages_and_completions_are_those_of_the_command() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(run(bare(&["pages", "--man"]).arg(dir.path())).2, 0);
    for page in ["flashcomm.1", "flashcomm-run.1", "flashcomm-doctor.1"] {
        assert!(dir.path().join(page).exists(), "{page}");
    }
    let run_page = std::fs::read_to_string(dir.path().join("flashcomm-run.1")).unwrap();
    assert!(run_page.contains(r"\-\-min\-bytes") && run_page.contains(r"\-\-print\-env"), "{run_page}");
    let (completions, ..) = run(&mut bare(&["pages", "--completions", "bash"]));
    assert!(completions.contains("--attach-timeout-s") && completions.contains("doctor"));
    let syntax = Command::new("bash").arg("-nc").arg(&completions).status().unwrap();
    assert!(syntax.success());
}

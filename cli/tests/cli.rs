//! The `flashcomm` command, run as users run it, on the simulators: what it shows, what it writes, and how it ends when
//! something is missing or goes wrong.

#[allow(dead_code, reason = "a part is used")]
mod command;

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use command::{COMMAND, built, is_of_this_commit_and_today, root, run, with_driver};

fn flashcomm(arguments: &[&str]) -> Command {
    let mut command = Command::new(COMMAND);
    command.args(arguments);
    for name in ["FLASHCOMM_NCCL_LIB", "FLASHCOMM_EXCHANGE", "LD_PRELOAD", "LD_LIBRARY_PATH"] {
        command.env_remove(name);
    }
    command.env("FLASHCOMM_TUNE", "off");
    command
}

/// The cells of a table's row, by its first.
fn row<'a>(table: &'a str, first: &str) -> Vec<&'a str> {
    let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.into_iter().find(|cells| cells.first() == Some(&first)).unwrap_or_else(|| panic!("no row {first}:\n{table}"))
}

#[test]
fn the_command_exports_no_nccl() {
    let output = Command::new("nm").args(["-D", "--defined-only", COMMAND]).output().expect("nm, of binutils");
    assert!(output.status.success());
    let symbols = String::from_utf8(output.stdout).unwrap();
    let ours = |line: &&str| line.contains("nccl") || line.contains("flashcomm");
    assert_eq!(symbols.lines().filter(ours).collect::<Vec<_>>(), Vec::<&str>::new());
}

#[test]
fn demo_shows_each_width_with_its_bytes_and_its_error() {
    let arguments = ["demo", "--simulator", "--ranks", "2", "--bits", "8,4,4-plain", "--size", "256K"];
    let (stdout, stderr, code) = run(&mut flashcomm(&arguments));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(stdout.contains("the simulator"), "{stdout}");
    // Of 16 bits an element: blocks carry 0.5 bits of levels and 2 bytes for each 64, the plain code 4 bytes for each 64.
    let rows = [("8", "1.83x", 46.0..48.0), ("4", "3.37x", 22.0..24.0), ("4-plain", "3.56x", 19.0..22.0)];
    for (bits, smaller, sqnr_db) in rows {
        let cells = row(&stdout, bits);
        // bits, number, MiB, smaller, relative L2, SQNR, max abs, same bits, reference, compressed, forwarded
        assert_eq!(cells[3], smaller, "{stdout}");
        assert!(sqnr_db.contains(&cells[5].parse::<f64>().unwrap()), "{stdout}");
        assert_eq!(cells[7..], ["yes", "yes", "1", "1"], "{stdout}");
    }
    let plain = row(&stdout, "16");
    assert_eq!(plain[plain.len() - 4..], ["yes", "-", "0", "2"], "{stdout}");
}

#[test]
fn demo_fails_and_says_so_when_the_shim_does_not_compress() {
    // Rank 0's kernels do not load, so the communicator stays with plain NCCL on all ranks.
    let arguments = ["demo", "--simulator", "--ranks", "2", "--bits", "4", "--size", "64K"];
    let (stdout, _, code) = run(flashcomm(&arguments).env("FLASHCOMM_SIM_FAIL", "module:1"));
    assert_eq!(code, 1, "{stdout}");
    assert_eq!(row(&stdout, "4")[9..], ["0", "2"], "{stdout}");
    assert!(stdout.contains("! 4: the shim compressed or forwarded something else"), "{stdout}");
}

#[test]
fn bench_writes_what_it_measured() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bench.json");
    let (stdout, stderr, code) = run(flashcomm(&["bench", "--simulator", "--worlds", "2,3", "--bits", "4:8"])
        .args(["--sizes", "4K..8K", "--exchanges", "peer,nccl", "--rounds", "2", "--graph", "--crossover", "--kernels"])
        .arg("--json")
        .arg(&path));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(stdout.contains("mean nothing"), "{stdout}");
    let json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!((&json["simulated"], &json["problems"]), (&true.into(), &Value::Array(vec![])));
    is_of_this_commit_and_today(&json);
    let started = humantime::parse_rfc3339(json["date"].as_str().unwrap()).unwrap();
    let started_unix_s = started.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert_eq!(json["started_unix_s"], started_unix_s);
    assert!(json["finished_unix_s"].as_u64().unwrap() >= started_unix_s);
    assert!(json["command"].as_array().unwrap().contains(&"--graph".into()) && json["nccl"].as_u64() > Some(20000));

    // 2 worlds, 2 rounds, eager and graph, 2 sizes, and NCCL beside 2 exchanges.
    let measurements = json["measurements"].as_array().unwrap();
    assert_eq!(measurements.len(), 2 * 2 * 2 * 2 * 3);
    for measurement in measurements {
        assert!(measurement["us"].as_f64().unwrap() > 0.0, "{measurement}");
        bandwidths_are_those_of_nccl_tests(measurement, &measurement["n_bytes"], measurement, "");
        let is_shim = measurement["way"]["flashcomm"].is_object();
        assert_eq!(measurement["compressed"], is_shim, "{measurement}");
        let checked = match (measurement["round"].as_u64(), is_shim) {
            (Some(0), true) => "reference",
            (Some(0), false) => "same bits",
            _ => "no",
        };
        assert_eq!(measurement["checked"], checked, "{measurement}");
    }
    let comparisons = json["comparisons"].as_array().unwrap();
    assert_eq!(comparisons.len(), 2 * 2 * 2);
    for comparison in comparisons {
        let (nccl, ours) = (comparison["nccl_us"].as_f64().unwrap(), &comparison["flashcomm"][0]);
        let ratio = ours["ratio"].as_f64().unwrap();
        assert!((ratio - nccl / ours["us"].as_f64().unwrap()).abs() < 1e-9 * ratio, "{comparison}");
        bandwidths_are_those_of_nccl_tests(comparison, &comparison["n_bytes"], comparison, "nccl_");
        bandwidths_are_those_of_nccl_tests(comparison, &comparison["n_bytes"], ours, "");
    }
    assert_eq!(json["crossovers"].as_array().unwrap().len(), 2 * 2 * 2);
    // Widths 2 to 8, two codes, two types, quantize and dequantize.
    assert_eq!(json["kernels"]["kernels"].as_array().unwrap().len(), 7 * 2 * 2 * 2);
}

#[test]
fn bench_measures_what_the_shim_decides() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bench.json");
    let arguments =
        ["bench", "--simulator", "--worlds", "2", "--bits", "8", "--exchanges", "auto", "--sizes", "4K..16K"];
    let (stdout, stderr, code) = run(flashcomm(&arguments)
        .args(["--min-bytes", "16K", "--json"])
        .arg(&path)
        .env("FLASHCOMM_EXACT_MAX_BYTES", "4K"));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    let json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let by_size = |name: &str| {
        let measurements = json["measurements"].as_array().unwrap();
        let ours = measurements.iter().filter(|measurement| measurement["way"]["flashcomm"].is_object());
        ours.map(|measurement| measurement[name].clone()).collect::<Vec<_>>()
    };
    assert_eq!(by_size("route"), ["exact", "forwarded", "compressed"]);
    assert_eq!(by_size("checked"), ["reference", "same bits", "reference"]);
    let compared = json["comparisons"].as_array().unwrap().iter().map(|row| row["flashcomm"][0]["route"].clone());
    assert_eq!(compared.collect::<Vec<_>>(), ["exact", "forwarded", "compressed"]);
    assert!(row(&stdout, "4K").contains(&"(exact)") && row(&stdout, "8K").contains(&"(forwarded)"), "{stdout}");
    assert!(json["measurements"][0]["route"].is_null(), "the real NCCL's");
}

/// 10^9 bytes a second of the ranks' bytes, and 2(n-1)/n of that.
fn bandwidths_are_those_of_nccl_tests(case: &Value, n_bytes: &Value, timed: &Value, prefix: &str) {
    let number = |name: &str| timed[format!("{prefix}{name}")].as_f64().unwrap_or_else(|| panic!("{name}: {timed}"));
    let world = case["world"].as_f64().unwrap();
    let algbw = n_bytes.as_f64().unwrap() / (number("us") / 1e6) / 1e9;
    assert!((number("algbw_gb_s") / algbw - 1.0).abs() < 1e-9, "{timed}");
    assert!((number("busbw_gb_s") / (algbw * 2.0 * (world - 1.0) / world) - 1.0).abs() < 1e-9, "{timed}");
}

#[test]
fn bench_and_doctor_read_what_earlier_versions_measured() {
    let dir = tempfile::tempdir().unwrap();
    let measured = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/measured");
    let files = std::fs::read_dir(measured).unwrap().map(|entry| entry.unwrap().path());
    let of_bench = |path: &std::path::PathBuf| {
        path.extension().is_some_and(|extension| extension == "json")
            && std::fs::read_to_string(path).unwrap().contains("\"comparisons\"")
    };
    let files: Vec<_> = files.filter(of_bench).collect();
    assert!(files.len() >= 9, "{files:?}");
    for file in &files {
        let svg = dir.path().join("again.svg");
        let (_, stderr, code) = run(flashcomm(&["bench", "--from"]).arg(file).arg("--plot").arg(&svg));
        assert_eq!((code, stderr.as_str()), (0, ""), "{}", file.display());
    }
    let (stdout, _, code) = run(flashcomm(&["doctor", "--simulator", "--bench"]).arg(&files[0]));
    assert!(code == 0 && stdout.contains("never slower from"), "{stdout}");
}

#[test]
fn bench_draws_what_it_measured_and_draws_it_again_from_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let [json, now, later] = ["bench.json", "now.svg", "later.svg"].map(|name| dir.path().join(name));
    let (stdout, stderr, code) = run(flashcomm(&["bench", "--simulator", "--worlds", "2,3", "--bits", "8,4"])
        .args(["--sizes", "4K..16K", "--exchanges", "peer,host", "--json"])
        .arg(&json)
        .arg("--plot")
        .arg(&now));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    let (stdout, stderr, code) = run(flashcomm(&["bench", "--from"]).arg(&json).arg("--plot").arg(&later));
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (0, "", ""), "without a GPU, and without measuring");
    let svg = std::fs::read_to_string(now).unwrap();
    assert!(svg == std::fs::read_to_string(later).unwrap(), "the two pictures differ");
    for text in [
        "the times mean nothing",
        "flashcomm 8 bits peer",
        "flashcomm 4 bits host",
        "NCCL, its best",
        "2 ranks, fp16: time",
        "3 ranks, fp16: speed-up",
        "16K",
    ] {
        assert!(svg.contains(text), "no {text:?} in the picture");
    }
    // 2 worlds: 5 lines of times and 4 of ratios.
    let lines = svg.matches("<polyline").count();
    assert!(lines >= 2 * (5 + 4), "{lines} lines");

    let (_, stderr, code) = run(flashcomm(&["bench", "--simulator", "--plot", "a.png"]).current_dir(dir.path()));
    assert!(code == 1 && stderr.contains("a plot is an SVG; name it so, for example a.svg"), "{stderr}");
    std::fs::write(&json, "{}").unwrap();
    let (_, stderr, code) = run(flashcomm(&["bench", "--from"]).arg(&json).args(["--plot", "a.svg"]));
    assert!(code == 1 && stderr.contains("is not what flashcomm bench --json writes"), "{stderr}");
}

#[test]
fn demo_draws_the_error_of_each_width() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("demo.svg");
    let arguments = ["demo", "--simulator", "--ranks", "2", "--bits", "4,8,2:8", "--size", "64K", "--plot"];
    let (stdout, stderr, code) = run(flashcomm(&arguments).arg(&path));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    let svg = std::fs::read_to_string(path).unwrap();
    for text in ["4 (3.37x smaller)", "8 (1.83x smaller)", "2:8 (", "NCCL, 16 bits", "relative L2 error"] {
        assert!(svg.contains(text), "no {text:?} in the picture");
    }
}

#[test]
fn bench_runs_ranks_that_are_processes() {
    let arguments = ["bench", "--simulator", "--processes", "--worlds", "3", "--sizes", "8K", "--exchanges", "host"];
    let (stdout, stderr, code) = run(&mut flashcomm(&arguments));
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(stdout.contains("3 ranks, fp16 (processes)") && row(&stdout, "8K").len() == 5, "{stdout}");
}

#[test]
fn bench_knows_which_nccl_lets_ranks_share_a_gpu() {
    // Simulators that pass for the real thing. The simulated NCCL calls itself 2.28.7, which does not. (It does not know
    // NCCL_HOSTID, the way around that, and goes by the setting of newer ones instead.)
    let dir = with_driver();
    let nccl = built("libflashcomm_sim_nccl.so");
    let bench = |more: &[&str]| {
        run(flashcomm(&["bench", "--worlds", "4", "--sizes", "4K", "--batches", "2", "--bits", "4", "--rounds", "1"])
            .args(["--nccl-lib", nccl.to_str().unwrap()])
            .args(more)
            .envs([("LD_LIBRARY_PATH", dir.path().to_str().unwrap()), ("FLASHCOMM_SIM_DEVICES", "1")])
            .env("NCCL_MULTI_RANK_GPU_ENABLE", "1"))
    };
    let (_, stderr, code) = bench(&[]);
    assert!(code == 1 && stderr.contains("use 2.30.3 or newer"), "{stderr}");
    let (stdout, stderr, code) = bench(&["--processes"]);
    assert_eq!((code, stderr.as_str()), (0, ""), "{stdout}");
    assert!(!stdout.contains("mean nothing") && row(&stdout, "4K").len() == 7, "{stdout}");
}

#[test]
fn bench_wants_a_gpu() {
    let (stdout, stderr, code) = run(flashcomm(&["bench"]).env("CUDA_VISIBLE_DEVICES", ""));
    if Path::new("/dev/nvidia0").exists() {
        return eprintln!("NOT RUN: this machine has a GPU");
    }
    assert_eq!((code, stdout.as_str()), (2, ""));
    assert!(stderr.contains("this needs a GPU"), "{stderr}");
}

#[test]
fn bench_survives_ranks_that_die_and_ranks_that_are_late() {
    let arguments = ["bench", "--simulator", "--sizes", "4K", "--exchanges", "peer"];
    let (stdout, _, code) = run(flashcomm(&arguments).env("FLASHCOMM_SIM_KILL", "20"));
    assert_eq!(code, 1, "{stdout}");
    assert!(
        stdout.contains("! 2 ranks, 4 bits peer") && stdout.contains("a child process ended: signal: 9"),
        "{stdout}"
    );

    let (stdout, _, code) = run(flashcomm(&arguments).args(["--timeout", "0"]));
    assert_eq!(code, 1, "{stdout}");
    // While they start, or at their first measurement.
    assert!(stdout.contains("! 2 ranks, NCCL") && stdout.contains("no answer within 0 s; stopped"), "{stdout}");
}

#[test]
fn a_value_that_the_shim_does_not_take_is_refused() {
    for (arguments, name) in [
        (["--exchanges", "pigeon"], "FLASHCOMM_EXCHANGE"),
        (["--bits", "9"], "FLASHCOMM_BITS"),
        (["--min-bytes", "some"], "FLASHCOMM_MIN_BYTES"),
    ] {
        let (_, stderr, code) = run(flashcomm(&["bench", "--simulator"]).args(arguments));
        assert!(code == 1 && stderr.contains(name) && stderr.contains("it takes"), "{stderr}");
    }
    let (_, stderr, code) = run(&mut flashcomm(&["demo", "--simulator", "--bits", "4,9"]));
    assert!(code == 1 && stderr.contains("\"9\" is no width"), "{stderr}");
}

#[test]
fn what_is_missing_is_named_with_its_cure() {
    let (_, stderr, code) = run(&mut flashcomm(&["demo", "--shim", "/nowhere/libflashcomm.so"]));
    assert!(code == 1 && stderr.contains("no shim at --shim /nowhere/libflashcomm.so"), "{stderr}");

    let dir = tempfile::tempdir().unwrap();
    let alone = dir.path().join("flashcomm");
    std::fs::copy(COMMAND, &alone).unwrap();
    let demo = || Command::new(&alone).args(["demo", "--simulator"]).output().unwrap();
    let (output, stderr) = (demo().status, String::from_utf8(demo().stderr).unwrap());
    assert!(output.code() == Some(1) && stderr.contains("no libflashcomm.so in"), "{stderr}");
    assert!(stderr.contains("build it with cargo build --lib"), "{stderr}");
    symlink(built("libflashcomm.so"), dir.path().join("libflashcomm.so")).unwrap();
    let stderr = String::from_utf8(demo().stderr).unwrap();
    assert!(stderr.contains("cargo build -p flashcomm-sim-cuda -p flashcomm-sim-nccl"), "{stderr}");

    // A GPU, and no NCCL: not the simulator's case.
    let driver = with_driver();
    let no_nccl = |arguments: &[&str]| run(flashcomm(arguments).env("LD_LIBRARY_PATH", driver.path()));
    let (_, stderr, code) = no_nccl(&["demo"]);
    assert!(code == 1 && stderr.contains("pip install nvidia-nccl-cu13"), "{stderr}");
    let (_, stderr, code) = no_nccl(&["demo", "--nccl-lib", "/nowhere/libnccl.so.2"]);
    assert!(code == 1 && stderr.contains("cannot open /nowhere/libnccl.so.2"), "{stderr}");
    let cuda = built("libflashcomm_sim_cuda.so");
    let (_, stderr, code) = no_nccl(&["demo", "--nccl-lib", cuda.to_str().unwrap()]);
    assert!(code == 1 && stderr.contains("is no NCCL"), "{stderr}");
}

#[test]
fn tune_measures_shows_and_keeps() {
    let (cache, fabric) = (tempfile::tempdir().unwrap(), "sim/fabric/fabrics/two_without_p2p.json");
    let tune = |settings: &[&str]| {
        let mut command = flashcomm(&["tune", "--simulator", "--ranks", "2"]);
        command.args(settings).env("XDG_CACHE_HOME", cache.path()).env("FLASHCOMM_SIM_SLOW", "0:30");
        run(command.env("FLASHCOMM_SIM_FABRIC", root().join(fabric)))
    };
    let (stdout, stderr, code) = tune(&[]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(stdout.contains("exchange host") && stdout.contains("FLASHCOMM_TUNE=cache"), "{stdout}");
    let row = |bytes: &str| stdout.lines().find(|line| line.trim_start().starts_with(bytes)).unwrap().to_string();
    assert!(row("16M").contains("compressed") && row("16M").contains(" - "), "{stdout}");
    assert_eq!(std::fs::read_dir(cache.path().join("flashcomm")).unwrap().count(), 1);

    let (stdout, stderr, code) = tune(&["--json", "--bits", "4"]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    let found: Value = serde_json::from_str(&stdout).unwrap();
    is_of_this_commit_and_today(&found);
    assert_eq!((&found["ranks"], &found["bits"], &found["exchange"]), (&2.into(), &"4".into(), &"host".into()));
    let sizes = found["sizes"].as_array().unwrap();
    assert_eq!((sizes.len(), &sizes[0]["bytes"]), (19, &1024.into()));
    let times = |size: &Value| size["microseconds"].as_array().unwrap().iter().map(Value::as_f64).collect::<Vec<_>>();
    // At no size does what is taken take longer than NCCL.
    for size in sizes {
        let of =
            ["NCCL", "exact, one hop", "exact, two hops", "compressed", "compressed, pulled", "compressed, copied"];
        let way = of.iter().position(|name| size["way"] == *name).unwrap();
        let (taken, nccl) = (times(size)[way].unwrap(), times(size)[0].unwrap());
        assert!(way == 0 || taken < nccl, "{size}");
        assert!(size["because"].as_str().is_some_and(|because| !because.is_empty()), "{size}");
    }
    assert_eq!(std::fs::read_dir(cache.path().join("flashcomm")).unwrap().count(), 2);

    // The doctor knows it from then on, where it is asked.
    let doctor = |tune: &str| {
        let mut command = flashcomm(&["doctor", "--simulator"]);
        command.env("XDG_CACHE_HOME", cache.path()).env("FLASHCOMM_SIM_SLOW", "0:30").env("FLASHCOMM_TUNE", tune);
        run(command.env("FLASHCOMM_SIM_FABRIC", root().join(fabric))).0
    };
    let (knows, asked) = ("as measured here", doctor("cache"));
    assert!(asked.contains(knows) && asked.contains("exact, one hop"), "{asked}");
    assert!(!doctor("off").contains(knows));
}

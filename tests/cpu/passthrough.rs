//! The shim over the real NCCL, in two versions, on a machine without a GPU: every export, every answer.
//!
//! `FLASHCOMM_TEST_NCCL` and `FLASHCOMM_TEST_NCCL_OLD` name the libraries (2.32.3 and 2.18.3); scripts/test.sh sets them.

use std::collections::BTreeSet;
use std::ffi::{c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use flashcomm::tooling::nccl::{SYMBOLS, Version};
use flashcomm_test_support::built;

fn required(variable: &str) -> PathBuf {
    std::env::var_os(variable)
        .unwrap_or_else(|| panic!("{variable} is unset; run ./scripts/test.sh, which sets it"))
        .into()
}

/// The real NCCL, the newer one.
pub(super) fn new_nccl() -> PathBuf {
    required("FLASHCOMM_TEST_NCCL")
}

fn old_nccl() -> PathBuf {
    required("FLASHCOMM_TEST_NCCL_OLD")
}

/// The library under test.
pub(super) fn shim() -> PathBuf {
    built("libflashcomm.so")
}

/// Compiles a C file of tests/c.
pub(super) fn compile(source: &str, target: &Path, flags: &[&str]) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c").join(source);
    let output =
        Command::new("cc").arg("-O1").arg(source).arg("-o").arg(target).args(flags).arg("-ldl").output().expect("cc");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn exports(library: &Path) -> BTreeSet<String> {
    let output = Command::new("nm").args(["-D", "--defined-only"]).arg(library).output().expect("nm");
    let text = String::from_utf8(output.stdout).unwrap();
    let names = text.lines().filter_map(|line| line.split_whitespace().nth(2));
    let is_nccl = |name: &&str| {
        name.trim_start_matches('p').strip_prefix("nccl").is_some_and(|rest| rest.starts_with(char::is_uppercase))
    };
    names.filter(is_nccl).map(String::from).collect()
}

/// A program with a clean environment.
pub(super) fn program(path: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(path);
    for (name, _) in std::env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("FLASHCOMM_") || name_text.starts_with("NCCL_") || name_text.starts_with("LD_") {
            command.env_remove(&name);
        }
    }
    command
}

pub(super) fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(super) fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    output
}

/// What the real library answers, asked by dlopen and dlsym.
fn real_answers(dir: &Path, library: &Path) -> String {
    let answers = dir.join("answers");
    compile("answers.c", &answers, &[]);
    text(&run(program(&answers).arg(library)))
}

#[test]
fn every_export_of_the_real_library_is_exported() {
    let missing: Vec<_> = exports(&new_nccl()).difference(&exports(&shim())).cloned().collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn the_symbol_list_equals_the_real_librarys_exports() {
    let listed: BTreeSet<String> = SYMBOLS.iter().map(|(name, ..)| name.to_string()).collect();
    let mut real = exports(&new_nccl());
    assert_eq!(real.iter().filter(|name| name.starts_with("nccl")).count(), 97);
    assert!(real.insert("pncclResetDebugInitInternal".into()), "the one function without a twin");
    assert_eq!(listed, real);
    assert_eq!(listed, exports(&shim()));
}

#[test]
fn an_old_library_has_what_the_list_says_of_its_version() {
    let old = exports(&old_nccl());
    for (name, _, since) in SYMBOLS.iter().filter(|(name, ..)| name.starts_with("nccl")) {
        assert_eq!(old.contains(*name), *since <= Version(2, 18, 3), "{name}");
    }
}

#[test]
fn answers_are_the_same_by_preload() {
    let dir = tempfile::tempdir().unwrap();
    for real in [new_nccl(), old_nccl()] {
        let expected = real_answers(dir.path(), &real);
        // Linked to the real library, which stands behind the preloaded shim in the order of lookup.
        let linked = dir.path().join("linked");
        compile("answers.c", &linked, &["-DLINKED", real.to_str().unwrap()]);
        let library_path = real.parent().unwrap();
        let plain = run(program(&linked).env("LD_LIBRARY_PATH", library_path));
        let shimmed = run(program(&linked).env("LD_LIBRARY_PATH", library_path).env("LD_PRELOAD", shim()));
        assert_eq!(text(&plain), expected);
        assert_eq!(text(&shimmed), expected);
        assert!(expected.lines().count() > 80, "{expected}");
    }
}

#[test]
fn answers_are_the_same_by_dlopen_and_dlsym() {
    let dir = tempfile::tempdir().unwrap();
    for real in [new_nccl(), old_nccl()] {
        let expected = real_answers(dir.path(), &real);
        let answers = dir.path().join("answers");
        let named = run(program(&answers).arg(shim()).env("FLASHCOMM_NCCL_LIB", &real));
        assert_eq!(text(&named), expected);
        let found = run(program(&answers).arg(shim()).env("LD_LIBRARY_PATH", real.parent().unwrap()));
        assert_eq!(text(&found), expected);
    }
}

#[test]
fn answers_are_the_same_with_the_shim_in_a_directory_as_libnccl_so_2() {
    let dir = tempfile::tempdir().unwrap();
    let real = new_nccl();
    let expected = real_answers(dir.path(), &real);
    let place = dir.path().join("libnccl.so.2");
    std::fs::copy(shim(), &place).unwrap();
    let linked = dir.path().join("linked");
    // The name to look for is libnccl.so.2, as a program built against NCCL has it.
    compile("answers.c", &linked, &["-DLINKED", real.to_str().unwrap()]);
    let first = dir.path().to_str().unwrap();
    let named = run(program(&linked).env("LD_LIBRARY_PATH", first).env("FLASHCOMM_NCCL_LIB", &real));
    assert_eq!(text(&named), expected);
    let both = format!("{first}:{}", real.parent().unwrap().display());
    let found = run(program(&linked).env("LD_LIBRARY_PATH", both));
    assert_eq!(text(&found), expected, "the real one stands in a later directory");
}

#[test]
fn a_missing_symbol_answers_invalid_usage_and_names_both_versions() {
    with_shim(&old_nccl(), "ncclCommShrink", |shrink, log| {
        // SAFETY: the shim's function takes whatever registers hold; nothing is dereferenced.
        let shrink: extern "C" fn(*mut c_void) -> c_int = unsafe { std::mem::transmute(shrink) };
        assert_eq!(shrink(std::ptr::null_mut()), 5);
        let log = log();
        assert!(log.contains("ncclCommShrink") && log.contains("2.27.3") && log.contains("2.18.3"), "{log}");
    });
}

/// Runs `check` on a symbol of the shim over `real`, in a process of its own (this one, started again for one test).
fn with_shim(real: &Path, symbol: &str, check: impl FnOnce(*mut c_void, &dyn Fn() -> String)) {
    const INNER: &str = "PASSTHROUGH_TEST_LOG";
    if let Some(log) = std::env::var_os(INNER) {
        let path = std::ffi::CString::new(shim().to_str().unwrap()).unwrap();
        // SAFETY: a NUL-terminated path.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
        assert!(!handle.is_null());
        let symbol = std::ffi::CString::new(symbol).unwrap();
        // SAFETY: an open handle and a NUL-terminated name.
        let address = unsafe { libc::dlsym(handle, symbol.as_ptr()) };
        assert!(!address.is_null());
        check(address, &|| std::fs::read_to_string(&log).unwrap_or_default());
        return;
    }
    let log = tempfile::NamedTempFile::new().unwrap();
    let test = std::thread::current().name().expect("tests are named").to_string();
    let mut again = program(std::env::current_exe().unwrap());
    again.args(["--exact", &test, "--nocapture"]).env(INNER, log.path()).env("FLASHCOMM_LOG_FILE", log.path());
    let output = again.env("FLASHCOMM_NCCL_LIB", real).env("FLASHCOMM_TEST_NCCL_OLD", real).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

fn stub(dir: &Path) -> PathBuf {
    let stub = dir.join("libstub.so");
    compile("stub.c", &stub, &["-shared", "-fPIC"]);
    stub
}

#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

#[test]
fn a_unique_id_by_value_arrives_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    with_shim(&stub(dir.path()), "ncclCommInitRank", |init, _| {
        type Init = extern "C" fn(*mut *mut c_void, c_int, UniqueId, c_int) -> c_int;
        // SAFETY: the signature that NCCL documents.
        let init: Init = unsafe { std::mem::transmute(init) };
        let id = UniqueId(std::array::from_fn(|i| (i * 37 + 11) as u8));
        let expected = id.0.iter().fold(0u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(*byte)));
        for _ in 0..2 {
            // The first call resolves, the second is the bare jump.
            let mut comm = std::ptr::null_mut();
            assert_eq!(init(&mut comm, 12, id, 5), 12_005);
            assert_eq!(comm as usize, expected as usize);
        }
    });
}

#[repr(C)]
#[derive(Clone, Copy, PartialEq, Debug)]
struct Team {
    ranks: c_int,
    rank: c_int,
    stride: c_int,
}

#[test]
fn a_structure_returned_by_value_arrives_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    with_shim(&stub(dir.path()), "ncclTeamWorld", |team, _| {
        // SAFETY: the signature that NCCL documents.
        let team: extern "C" fn(*mut c_void) -> Team = unsafe { std::mem::transmute(team) };
        for _ in 0..2 {
            assert_eq!(team(42 as *mut c_void), Team { ranks: 42, rank: 7, stride: -3 });
        }
    });
}

#[test]
fn calls_that_the_real_library_makes_to_itself_go_straight_through() {
    let dir = tempfile::tempdir().unwrap();
    let real = dir.path().join("libnccl.so.2");
    compile("reenter_nccl.c", &real, &["-shared", "-fPIC", "-Wl,-soname,libnccl.so.2"]);
    let reenter = dir.path().join("reenter");
    let include = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
    compile("reenter.c", &reenter, &["-I", include.to_str().unwrap(), real.to_str().unwrap()]);
    let mut command = program(&reenter);
    let output = run(command.env("LD_LIBRARY_PATH", dir.path()).env("LD_PRELOAD", shim()));
    let expected = "broadcast\nall-reduce of type 7\nall-reduce of type 6\n\
        results 0, all-reduces forwarded 1, others 1\n";
    assert_eq!(text(&output), expected, "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn a_wrong_nccl_lib_is_named_and_the_job_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let real = new_nccl();
    let expected = real_answers(dir.path(), &real);
    let text_file = dir.path().join("text.so");
    std::fs::write(&text_file, "not a library").unwrap();
    let other = dir.path().join("libother.so");
    compile("answers.c", &other, &["-shared", "-fPIC"]);
    for (wrong, why) in [
        (dir.path().join("missing.so"), "cannot open shared object file"),
        (text_file, "file too short"),
        (other, "has no ncclGetVersion"),
        (shim(), "is flashcomm itself"),
    ] {
        let mut command = program(dir.path().join("answers"));
        command.arg(shim()).env("FLASHCOMM_NCCL_LIB", &wrong).env("LD_LIBRARY_PATH", real.parent().unwrap());
        let output = run(&mut command);
        assert_eq!(text(&output), expected, "{}", wrong.display());
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(log.contains("FLASHCOMM_NCCL_LIB") && log.contains(why), "{}: {log}", wrong.display());
    }
}

#[test]
fn without_any_nccl_calls_fail_and_the_variable_is_named() {
    let dir = tempfile::tempdir().unwrap();
    compile("answers.c", &dir.path().join("answers"), &[]);
    let output = run(program(dir.path().join("answers")).arg(shim()));
    assert!(text(&output).contains("ncclGetVersion 2 -1"), "{output:?}");
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(log.matches("no real NCCL found").count(), 1, "{log}");
    assert!(log.contains("Set FLASHCOMM_NCCL_LIB"), "{log}");
}

#[test]
fn a_malformed_setting_is_named_at_the_first_call() {
    let dir = tempfile::tempdir().unwrap();
    compile("answers.c", &dir.path().join("answers"), &[]);
    let mut command = program(dir.path().join("answers"));
    let output = run(command.arg(shim()).env("FLASHCOMM_NCCL_LIB", new_nccl()).env("FLASHCOMM_BITS", "9"));
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(log.matches("FLASHCOMM_BITS=\"9\" is not allowed").count(), 1, "{log}");
}

#[test]
fn a_process_whose_first_thread_has_ended_is_not_kept_alive_by_the_statistics() {
    let dir = tempfile::tempdir().unwrap();
    let (stub, program_file, stats) = (stub(dir.path()), dir.path().join("last_thread"), dir.path().join("stats"));
    compile("last_thread.c", &program_file, &["-pthread", stub.to_str().unwrap()]);
    let mut command = program("timeout");
    command.args(["-s", "KILL", "20"]).arg(&program_file).env("LD_PRELOAD", shim()).env("FLASHCOMM_STATS_FILE", &stats);
    run(&mut command);
    assert!(std::fs::read_to_string(stats).unwrap().contains("\"broadcast\": 1"));
}

#[test]
fn loading_does_nothing() {
    let output = run(program("/bin/cat").arg("/proc/self/maps").arg("/proc/self/status").env("LD_PRELOAD", shim()));
    let text = text(&output);
    assert!(text.contains("libflashcomm.so") && output.stderr.is_empty(), "{output:?}");
    assert!(!text.contains("libcuda") && !text.contains("libnccl"), "{text}");
    assert!(text.contains("Threads:\t1\n"), "{text}");
    let dynamic = run(Command::new("readelf").args(["-d"]).arg(shim()));
    let dynamic = String::from_utf8_lossy(&dynamic.stdout).into_owned();
    let needed: Vec<&str> = dynamic.lines().filter(|line| line.contains("NEEDED")).collect();
    assert!(needed.iter().all(|line| !line.contains("cuda") && !line.contains("nccl")), "{needed:?}");
    assert!(dynamic.contains("Library soname: [libflashcomm.so]"), "{dynamic}");
}

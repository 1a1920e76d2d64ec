//! What is left of a process that does not end by `exit`: killed, left by `_exit`, forked.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use flashcomm_test_support::*;
use serde_json::Value;

/// All-reduces that the real NCCL does, on a communicator of one rank.
fn use_a_communicator(n_calls: usize) -> usize {
    use_device(0);
    let comm = init(1, unique_id(), 0);
    call_on(comm, n_calls);
    comm
}

fn call_on(comm: usize, n_calls: usize) {
    let (stream, memory) = (Stream::new(), Memory::new(400));
    (0..n_calls).for_each(|_| ok!(ncclAllReduce(memory.at, memory.at, 100, dtype::FP32, SUM, comm, stream.0)));
    stream.wait();
}

/// What a file says; `None` while there is none. It is never half of one.
fn read(path: &Path) -> Option<Value> {
    let text = std::fs::read(path).ok()?;
    Some(serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}

fn forwarded(json: &Value) -> u64 {
    json["process"]["all_reduces_forwarded"].as_u64().unwrap()
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < end, "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn wait_for_count(path: &Path, n_calls: u64) {
    wait_until(&format!("{n_calls} calls in {}", path.display()), || {
        read(path).is_some_and(|json| forwarded(&json) == n_calls)
    });
}

fn names(dir: &Path) -> BTreeSet<String> {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The folder that a job's `FLASHCOMM_STATS_FILE` is in, asked inside the job.
fn stats_dir() -> PathBuf {
    Path::new(&std::env::var_os("FLASHCOMM_STATS_FILE").unwrap()).parent().unwrap().into()
}

fn raise(signal: i32) {
    // SAFETY: a signal for this process itself.
    unsafe { libc::kill(libc::getpid(), signal) };
}

/// Runs `child` in a fork, which it must not come back from; how the fork ended.
fn fork(child: impl FnOnce()) -> i32 {
    // SAFETY: the child does what forks of Python's do; that it works is what is tested.
    match unsafe { libc::fork() } {
        0 => {
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child));
            // SAFETY: ends the fork.
            unsafe { libc::_exit(99) }
        }
        pid => {
            let mut status = 0;
            // SAFETY: a child of this process, and a valid place.
            assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
            status
        }
    }
}

#[test]
fn a_process_that_does_not_exit_leaves_its_file() {
    const SIGNALS: [i32; 3] = [libc::SIGTERM, libc::SIGKILL, libc::SIGINT];
    let dir = tempfile::tempdir().unwrap();
    let path = |rank: usize| dir.path().join(format!("stats.{rank}"));
    let settings = |rank: usize| vec![("FLASHCOMM_STATS_FILE", path(rank).to_str().unwrap().to_string())];
    let ends = processes(SIGNALS.len() + 1, settings, |process| {
        use_a_communicator(3 + process.rank);
        let file = stats_dir().join(format!("stats.{}", process.rank));
        wait_for_count(&file, 3 + process.rank as u64);
        match SIGNALS.get(process.rank) {
            Some(signal) => raise(*signal),
            // SAFETY: ends this process.
            None => unsafe { libc::_exit(7) },
        }
    });
    let Some(ends) = ends else { return };
    for (rank, (status, stderr)) in ends.iter().enumerate() {
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(status.signal(), SIGNALS.get(rank).copied(), "{status:?} {stderr}");
        assert_eq!(forwarded(&read(&path(rank)).unwrap()), 3 + rank as u64);
    }
    assert_eq!(ends[SIGNALS.len()].0.code(), Some(7));
    assert_eq!(names(dir.path()).len(), ends.len(), "nothing half written is left");
}

#[test]
fn a_fork_has_files_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let name = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let settings = |_| {
        vec![
            ("FLASHCOMM_STATS_FILE", name("stats.%p")),
            ("FLASHCOMM_LOG_FILE", name("log.%p")),
            ("FLASHCOMM_LOG", "info".to_string()),
        ]
    };
    let ends = processes(1, settings, |_| {
        let dir = stats_dir();
        let file = |kind: &str, id: u32| dir.join(format!("{kind}.{id}"));
        unique_id(); // the parent's first call of NCCL: its log is open
        // Forks before the parent has used a communicator and afterwards, when it has a thread for its file.
        for n_calls in [0, 5] {
            if n_calls > 0 {
                use_a_communicator(n_calls);
                wait_for_count(&file("stats", std::process::id()), n_calls as u64);
            }
            let status = fork(|| {
                let comm = use_a_communicator(2);
                ok!(ncclCommDestroy(comm));
                let own = file("stats", std::process::id());
                wait_until("its own file", || {
                    read(&own).is_some_and(|json| json["communicators"][0]["ended"] == true && forwarded(&json) == 2)
                });
                assert_eq!(read(&own).unwrap()["pid"], std::process::id());
                let log = std::fs::read_to_string(file("log", std::process::id())).unwrap();
                assert!(
                    log.contains("communicator 1, rank 0 of 1 ended: 0 all-reduces compressed, 2 forwarded"),
                    "{log}"
                );
                raise(libc::SIGKILL);
            });
            assert_eq!(status, libc::SIGKILL);
        }
        let log = std::fs::read_to_string(file("log", std::process::id())).unwrap();
        assert!(!log.contains("ended"), "{log}");
    });
    let Some(ends) = ends else { return };
    all_succeed(Some(ends));
    assert_eq!(names(dir.path()).len(), 2 * 3, "{:?}", names(dir.path()));
}

#[test]
fn a_fork_that_uses_nothing_leaves_its_parents_file_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stats").to_str().unwrap().to_string();
    let ends = processes(
        1,
        |_| vec![("FLASHCOMM_STATS_FILE", path.clone())],
        |_| {
            let comm = use_a_communicator(1);
            let file = stats_dir().join("stats");
            wait_for_count(&file, 1);
            // SAFETY: an exit with all its handlers, in the fork.
            assert_eq!(fork(|| unsafe { libc::exit(0) }), 0);
            assert_eq!(read(&file).unwrap()["pid"], std::process::id());
            // Nor does it end the parent's writing.
            call_on(comm, 1);
            wait_for_count(&file, 2);
        },
    );
    all_succeed(ends);
}

#[test]
fn whoever_reads_the_file_while_it_is_written_reads_all_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stats").to_str().unwrap().to_string();
    let ends = processes(
        1,
        |_| vec![("FLASHCOMM_STATS_FILE", path.clone())],
        |_| {
            let comm = use_a_communicator(1);
            let file = stats_dir().join("stats");
            wait_for_count(&file, 1);
            let mut seen = BTreeSet::new();
            let end = Instant::now() + Duration::from_secs(4);
            while Instant::now() < end {
                call_on(comm, 1);
                seen.insert(forwarded(&read(&file).expect("it is there all the time")));
            }
            assert!((3..=10).contains(&seen.len()), "written every second: {seen:?}");
        },
    );
    all_succeed(ends);
}

#[test]
fn a_rank_that_becomes_known_later_renames_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stats.%r").to_str().unwrap().to_string();
    let ends = processes(
        2,
        |_| vec![("FLASHCOMM_STATS_FILE", path.clone())],
        |process| {
            // Each is rank 0 of a communicator of its own first, and both write the same file.
            use_a_communicator(1);
            wait_until("a file", || stats_dir().join("stats.0").exists());
            call_on(init(2, process.unique_id(0), process.rank), 1);
            let own = stats_dir().join(format!("stats.{}", process.rank));
            let is_own = || read(&own).is_some_and(|json| json["pid"] == std::process::id() && forwarded(&json) == 2);
            wait_until("both calls under the rank", is_own);
            process.tell(&format!("done{}", process.rank), &[]);
            process.hear(&format!("done{}", 1 - process.rank));
            // The other may have removed what it had written under this rank; then it is written again.
            std::thread::sleep(Duration::from_secs(2));
            wait_until("both calls under the rank", is_own);
            raise(libc::SIGKILL);
        },
    );
    if ends.is_some() {
        assert_eq!(names(dir.path()), BTreeSet::from(["stats.0".to_string(), "stats.1".into()]));
    }
}

#[test]
fn a_file_that_cannot_be_written_is_told_once() {
    let ends = processes(
        1,
        |_| vec![("FLASHCOMM_STATS_FILE", "/nowhere/stats".into())],
        |_| {
            let comm = use_a_communicator(1);
            for _ in 0..25 {
                call_on(comm, 1);
                std::thread::sleep(Duration::from_millis(100));
            }
        },
    );
    let Some(ends) = ends else { return };
    assert_eq!(ends[0].1.matches("ERROR: FLASHCOMM_STATS_FILE=/nowhere/stats: ").count(), 1, "{}", ends[0].1);
    all_succeed(Some(ends));
}

/// The signals that a thread of this process does not take, by the thread's name; `None` where there is none.
fn blocked(thread: &str) -> Option<u64> {
    std::fs::read_dir("/proc/self/task").unwrap().find_map(|task| {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).ok()?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        (field("Name:") == Some(thread)).then(|| u64::from_str_radix(field("SigBlk:").unwrap(), 16).unwrap())
    })
}

#[test]
fn the_thread_for_the_file_takes_no_signals_and_is_there_only_for_a_file() {
    const THREAD: &str = "flashcomm-stats";
    let dir = tempfile::tempdir().unwrap();
    let settings = |rank: usize| match rank {
        0 => vec![("FLASHCOMM_STATS_FILE", dir.path().join("stats").to_str().unwrap().to_string())],
        _ => vec![],
    };
    let ends = processes(2, settings, |process| {
        let own = || {
            // SAFETY: asks for the set of this thread, a valid place.
            unsafe {
                let mut set: libc::sigset_t = std::mem::zeroed();
                libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::null(), &mut set);
                libc::sigismember(&set, libc::SIGTERM)
            }
        };
        unique_id();
        assert_eq!(blocked(THREAD), None, "no communicator has been used");
        use_a_communicator(1);
        assert_eq!(own(), 0, "the caller's signals are as they were");
        if process.rank == 0 {
            wait_until("a thread", || blocked(THREAD).is_some());
            let (set, wanted) = (blocked(THREAD).unwrap(), [libc::SIGINT, libc::SIGTERM, libc::SIGCHLD, libc::SIGUSR1]);
            assert!(wanted.iter().all(|signal| set & 1 << (signal - 1) != 0), "{set:x}");
        } else {
            assert_eq!(blocked(THREAD), None);
        }
    });
    all_succeed(ends);
}

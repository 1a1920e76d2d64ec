//! Harm to one rank, at every place where it can come to harm: its process is killed, or a call of its fails.
//!
//! Two processes stay. Round by round a third one joins them, is killed at its n-th step, or has its n-th allocation
//! (launch, event, NCCL call, ...) refused, and the two have to get over it. Since they stay, what they do not give
//! back adds up from round to round and is found at the end.
//!
//! `FLASHCOMM_TEST_STRIDE` (2): every how many steps a rank is killed.

#![allow(
    clippy::macro_metavars_in_unsafe,
    reason = "the tests call C throughout; what they pass is theirs to get right"
)]

mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

use half::f16;
use world::*;

/// Ranks: the two that stay, and the one that comes to harm.
const WORLD: usize = 3;
const HARMED: usize = 2;
const COUNT: usize = 9000;
const ATTACH_TIMEOUT_S: u64 = 2;
/// `FLASHCOMM_BUFFER_MIB` of the jobs.
const RECEIVE_AREA: usize = 1 << 20;
/// How soon an abort has to free what waits.
const SOON: Duration = Duration::from_secs(5);
/// What a loaded machine may add to a time limit.
const SLACK: Duration = Duration::from_secs(3);

/// How an all-reduce ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// With the reference's bits.
    Compressed,
    /// With plain NCCL's sum.
    Exact,
    /// With an error, or it waited until the abort.
    Failed,
}

/// Inputs that compress with an error, so that compressed and plain sums differ.
struct Sums {
    inputs: Vec<Vec<f16>>,
    compressed: Vec<f16>,
    exact: Vec<f16>,
}

impl Sums {
    fn of(world: usize) -> Self {
        let inputs: Vec<_> = (0..world).map(|rank| whole_numbers(COUNT, 7, rank)).collect();
        let (compressed, exact) = (reference(&inputs, legs(4, 4)), exact_sum(&inputs));
        assert!(compressed != exact);
        Sums { inputs, compressed, exact }
    }

    fn end(&self, got: &[f16], about: &str) -> End {
        if got == self.exact {
            return End::Exact;
        }
        same_bits(got, &self.compressed, about);
        End::Compressed
    }
}

/// Settings of every rank of a job.
fn settings(exchange: &str) -> Vec<(&'static str, String)> {
    // Over shared host memory a kernel gives up by itself; over peer memory it takes an abort.
    let timeout_s = if exchange == "host" { "2" } else { "0" };
    vec![
        ("FLASHCOMM_TIMEOUT_S", timeout_s.into()),
        ("FLASHCOMM_BITS", "4".into()),
        ("FLASHCOMM_EXCHANGE", exchange.into()),
        ("FLASHCOMM_ATTACH_TIMEOUT_S", ATTACH_TIMEOUT_S.to_string()),
    ]
}

/// Rank, in a round, of one of the two that stay: the harmed one is in each place in turn.
fn place(round: usize, process: usize) -> usize {
    let harmed = round % WORLD;
    match process {
        HARMED => harmed,
        _ if process < harmed => process,
        _ => process + 1,
    }
}

/// What a rank saw of a round.
struct Seen {
    ends: Vec<End>,
    /// What `ncclCommGetAsyncError` told before the abort, if anything.
    async_error: i32,
    /// How long the first all-reduce's call took.
    first_call: Duration,
}

/// Two all-reduces on a communicator, with a second thread that watches over them as engines do: `must_abort` is asked
/// now and then, with what `ncclCommGetAsyncError` tells, whether to abort.
fn watched(comm: usize, rank: usize, sums: &Sums, must_abort: impl Fn(i32, bool) -> bool + Sync) -> Seen {
    let stream = Stream::new();
    let memory = Memory::of(&sums.inputs[rank], &stream);
    stream.wait();
    let (is_over, is_aborted, in_first_call) = (AtomicBool::new(false), Mutex::new(false), AtomicBool::new(true));
    let async_error = AtomicI32::new(0);
    let mut seen = Seen { ends: Vec::new(), async_error: 0, first_call: Duration::ZERO };
    let ask = || {
        let mut told = 0;
        ok!(ncclCommGetAsyncError(comm, &mut told));
        if told != 0 {
            async_error.store(told, Ordering::Release);
        }
        told
    };
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            use_device(rank);
            while !is_over.load(Ordering::Acquire) {
                let told = ask();
                if must_abort(told, in_first_call.load(Ordering::Acquire)) {
                    *is_aborted.lock().unwrap() = true;
                    ok!(ncclCommAbort(comm));
                    return;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        for i in 0..2 {
            memory.write(&sums.inputs[rank], &stream);
            let start = Instant::now();
            let result = call!(ncclAllReduce(memory.at, memory.at, COUNT, dtype::FP16, SUM, comm, stream.0));
            if i == 0 {
                seen.first_call = start.elapsed();
                in_first_call.store(false, Ordering::Release);
            }
            // However it ends: the stream has to become idle, if only by the watcher's abort.
            let limit = Duration::from_secs(ATTACH_TIMEOUT_S) + SOON + SLACK;
            assert!(stream.becomes_idle(limit), "the stream hangs, call {i}, result {result}");
            // A kernel that gave up waiting has ended, too: what it left is no result, and NCCL's state says so.
            let is_aborted = is_aborted.lock().unwrap();
            if result != 0 || *is_aborted || ask() != 0 {
                seen.ends.push(End::Failed);
                break;
            }
            seen.ends.push(sums.end(&read(&memory, &stream), &format!("call {i}, rank {rank}")));
        }
        is_over.store(true, Ordering::Release);
        watcher.join().unwrap();
    });
    seen.async_error = async_error.load(Ordering::Acquire);
    if *is_aborted.lock().unwrap() {
        return seen;
    }
    match seen.ends.contains(&End::Failed) {
        true => ok!(ncclCommAbort(comm)),
        false => ok!(ncclCommDestroy(comm)),
    }
    seen
}

/// Reads the result; once more where that very copy was the call that failed.
fn read(memory: &Memory, stream: &Stream) -> Vec<f16> {
    let mut bytes = vec![0; COUNT * 2];
    let mut copy = || call!(cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr(), memory.at, COUNT * 2, stream.0));
    if copy() != 0 {
        assert_eq!(copy(), 0);
    }
    stream.wait();
    bytes.chunks_exact(2).map(|pair| f16::from_bits(u16::from_le_bytes([pair[0], pair[1]]))).collect()
}

/// A communicator of the given ranks works.
fn works(process: &Process, n: usize, world: usize, rank: usize) {
    let sums = Sums::of(world);
    let comm = init(world, process.unique_id(n), rank);
    let seen = watched(comm, rank, &sums, |_, _| false);
    assert_eq!(seen.ends, [End::Compressed; 2], "a new communicator, {world} ranks");
}

impl Held {
    /// With what `n` aborts may cost.
    fn and_lost(mut self, exchange: &str, n: usize) -> Self {
        // Scratch memory of attach, kept for the next one, the larger the more ranks.
        self.device_bytes += 4096;
        if exchange == "peer" {
            // What a peer's kernel may still write to is not used again: a receive area each time.
            self.device_bytes += n * RECEIVE_AREA;
        }
        self
    }
}

/// Wants nothing to have grown since `first`, but for threads that are just ending.
fn nothing_has_grown(first: Held) {
    let end = Instant::now() + SOON;
    loop {
        let last = Held::now();
        let is_flat = last.files <= first.files && last.threads <= first.threads;
        if is_flat && last.device_bytes <= first.device_bytes {
            return;
        }
        assert!(Instant::now() < end, "it grows: {first:?} {last:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Shared memory that is named now has no name soon, but what had one before.
fn no_name_stays(before: &[String]) {
    let mut named: Vec<_> = shared_memory_names().into_iter().filter(|name| !before.contains(name)).collect();
    let end = Instant::now() + Duration::from_secs(20);
    while !named.is_empty() {
        assert!(Instant::now() < end, "left in /dev/shm: {named:?}");
        std::thread::sleep(Duration::from_millis(50));
        let still = shared_memory_names();
        named.retain(|name| still.contains(name));
    }
}

/// The rank that is killed, or that lives to the end of its round.
fn victim(process: &Process, round: usize) {
    let rank = place(round, HARMED);
    use_device(rank);
    let comm = init(WORLD, process.unique_id(3 * round), rank);
    let seen = watched(comm, rank, &Sums::of(WORLD), |_, _| false);
    assert_eq!(seen.ends, [End::Compressed; 2]);
}

/// One of the two that stay, while the third is killed at its n-th step, n by n.
fn survivor(process: &Process, exchange: &str) {
    let stride = std::env::var("FLASHCOMM_TEST_STRIDE").map_or(2, |text| text.parse().unwrap());
    let (sums, me) = (Sums::of(WORLD), process.rank);
    let (mut first, mut n_died, mut n_freed) = (None, 0, 0);
    use_device(me);
    for round in 0.. {
        // Its first step is ncclCommInitRank, where the others wait as plain NCCL has it.
        let (n, rank) = (2 + round * stride, place(round, me));
        let dead = format!("dead{round}");
        let child = (me == 0).then(|| {
            let mut settings = settings(exchange);
            settings.extend([("FLASHCOMM_SIM_KILL", n.to_string()), ("WORLD_ROUND", round.to_string())]);
            process.start_rank(HARMED, &settings, &process.dir.join("victim"))
        });
        let tell = child.map(|mut child| {
            let (dir, dead) = (process.dir.clone(), dead.clone());
            std::thread::spawn(move || {
                let status = child.wait().unwrap();
                let log = std::fs::read_to_string(dir.join("victim")).unwrap();
                let was_killed = std::os::unix::process::ExitStatusExt::signal(&status) == Some(9);
                assert!(was_killed || status.success(), "step {n}: {status:?}\n{log}");
                let teller = Process { rank: 0, world: WORLD, dir };
                teller.tell(&dead, if was_killed { b"killed" } else { b"lives" });
            })
        });
        let comm = init(WORLD, process.unique_id(3 * round), rank);
        // One round in four nobody aborts while the first call waits, so that it has to return by itself.
        let patient = round % 4 == 3;
        let since_death = std::sync::OnceLock::new();
        let seen = watched(comm, rank, &sums, |told, in_first_call| {
            if process.heard(&dead).as_deref() != Some(b"killed") {
                return false;
            }
            let waited = since_death.get_or_init(Instant::now).elapsed();
            // Of a rank that is gone the kernels of ours learn nothing.
            let patience = Duration::from_millis(if exchange == "peer" { 300 } else { 8000 });
            !(patient && in_first_call) && (told != 0 || waited > patience)
        });
        tell.into_iter().for_each(|thread| thread.join().unwrap());
        let was_killed = process.hear(&dead) == b"killed";
        let limit = Duration::from_secs(ATTACH_TIMEOUT_S) + SLACK;
        assert!(seen.first_call < limit, "step {n}: the first call took {:?}", seen.first_call);
        let failed = seen.ends.contains(&End::Failed);
        assert!(was_killed || !failed, "nobody died");
        assert!(!seen.ends.contains(&End::Exact), "step {n}: {:?}", seen.ends);
        if failed && exchange != "peer" && !patient {
            assert_eq!(seen.async_error, 6, "step {n}: ncclCommGetAsyncError tells ncclRemoteError");
        }
        n_died += usize::from(was_killed);
        n_freed += usize::from(failed);
        works(process, 3 * round + 1, 2, me);
        if !was_killed {
            break;
        }
        if round == 2 {
            first = Some(Held::now());
        }
    }
    eprintln!("{exchange}: died at {n_died} steps, every {stride}th; rank {me} waited for it in {n_freed} rounds");
    assert!(n_died >= 5 && n_freed >= 3, "the steps are not where they are thought to be");
    nothing_has_grown(first.unwrap().and_lost(exchange, n_freed));
}

fn killed_at_every_step(exchange: &'static str) {
    let before = shared_memory_names();
    let ends = processes(
        2,
        |_| [settings(exchange), vec![("FLASHCOMM_LOG", "info".into())]].concat(),
        |process| match std::env::var("WORLD_ROUND") {
            Ok(round) => victim(&process, round.parse().unwrap()),
            Err(_) => survivor(&process, exchange),
        },
    );
    let Some(ends) = ends else { return };
    let summary = ends[0].1.lines().filter(|line| line.starts_with(exchange));
    summary.for_each(|line| eprintln!("{line}"));
    let is_over = ends[0].1.contains(&format!("exchange {exchange},"));
    all_succeed(Some(ends));
    assert!(is_over, "the payloads went over another exchange");
    no_name_stays(&before);
}

#[test]
fn survivors_get_over_a_rank_killed_at_any_step_over_nccl() {
    killed_at_every_step("nccl");
}

#[test]
fn survivors_get_over_a_rank_killed_at_any_step_over_peer_memory() {
    killed_at_every_step("peer");
}

#[test]
fn survivors_get_over_a_rank_killed_at_any_step_over_host_memory() {
    killed_at_every_step("host");
}

/// One call of a rank that fails.
const KINDS: [(&str, usize, &str); 9] = [
    // Kind, how many the test itself makes before, what the log says.
    ("alloc", 1, "out of memory"),
    ("hostalloc", 0, "out of memory"),
    ("register", 0, "out of memory"),
    ("ipc", 0, "driver error"),
    ("module", 0, "driver error 200"),
    ("stream", 2, "driver error"),
    ("event", 1, "driver error"),
    ("launch", 0, "driver error 719"),
    ("nccl", 0, "answered 2"),
];

/// One rank's part of a round in which a call of the harmed rank fails. The round's end.
fn round_with_a_fault(process: &Process, round: usize) -> End {
    let (rank, failed) = (place(round, process.rank), format!("failed{round}"));
    let comm = init(WORLD, process.unique_id(3 * round), rank);
    let seen = watched(comm, rank, &Sums::of(WORLD), |_, in_first_call| {
        // Who hears of an error on another rank aborts, as after any of NCCL's; but attach has to return by itself.
        !in_first_call && process.heard(&failed).is_some()
    });
    let limit = Duration::from_secs(ATTACH_TIMEOUT_S) + SLACK;
    assert!(seen.first_call < limit, "round {round}: the first call took {:?}", seen.first_call);
    let end = if seen.ends.contains(&End::Failed) { End::Failed } else { seen.ends[1] };
    assert!(end == End::Failed || seen.ends[0] == end, "round {round}: {:?}", seen.ends);
    if end == End::Failed {
        process.tell(&failed, b"");
    }
    process.tell(&format!("end{round}.{}", process.rank), format!("{end:?}").as_bytes());
    let ends: Vec<_> = (0..WORLD).map(|other| process.hear(&format!("end{round}.{other}"))).collect();
    let ends: Vec<_> = ends.iter().map(|end| String::from_utf8_lossy(end)).collect();
    let all = |wanted: End| ends.iter().all(|end| *end == format!("{wanted:?}"));
    let any = |wanted: End| ends.iter().any(|end| *end == format!("{wanted:?}"));
    assert!(all(End::Exact) || !any(End::Exact), "round {round}: some ranks compress, some do not: {ends:?}");
    // The others may be through when a last call of the harmed one fails; not the other way round.
    assert!(process.rank != HARMED || end != End::Compressed || all(end), "round {round}: {ends:?}");
    if any(End::Failed) {
        works(process, 3 * round + 1, WORLD, rank); // also the harmed rank, in the same process
    }
    if any(End::Failed) { End::Failed } else { end }
}

fn a_call_of_one_rank_fails(exchange: &'static str) {
    let before = shared_memory_names();
    let ends = processes(
        2,
        |_| [settings(exchange), vec![("FLASHCOMM_LOG", "info".into())]].concat(),
        |process| {
            use_device(process.rank);
            if let Ok(round) = std::env::var("WORLD_ROUND") {
                round_with_a_fault(&process, round.parse().unwrap());
                return;
            }
            let (mut round, mut first, mut n_failed) = (0, None, 0);
            for (kind, made_before, cause) in KINDS {
                let mut unharmed = 0;
                let mut counts = [0; 3];
                for n in made_before + 1.. {
                    let (log, mine) = (process.dir.join(format!("harmed{round}")), process.dir.join("stderr0"));
                    let n_mine = std::fs::read_to_string(&mine).unwrap().lines().count();
                    let child = (process.rank == 0).then(|| {
                        let mut settings = settings(exchange);
                        settings.push(("FLASHCOMM_SIM_FAIL", format!("{kind}:{n}")));
                        settings.push(("WORLD_ROUND", round.to_string()));
                        process.start_rank(HARMED, &settings, &log)
                    });
                    let end = round_with_a_fault(&process, round);
                    if let Some(mut child) = child {
                        let (status, log) = (child.wait().unwrap(), std::fs::read_to_string(&log).unwrap());
                        assert!(status.success(), "{kind} {n}: {status:?}\n{log}");
                        // What cannot be exported is missed by those that cannot map it.
                        let mine = std::fs::read_to_string(&mine).unwrap();
                        let mine = mine.lines().skip(if kind == "ipc" { n_mine } else { usize::MAX });
                        let names_it = |line: &&str| {
                            let is_named = line.contains(cause) || line.contains("CUDA IPC");
                            line.starts_with("flashcomm [") && is_named
                        };
                        let causes = log.lines().chain(mine).filter(names_it);
                        // Where attach fails, it says so and so does the all-reduce that asked for it.
                        let expected = if end == End::Compressed { 0..1 } else { 1..3 };
                        assert!(expected.contains(&causes.count()), "{kind} {n}, {end:?}:\n{log}");
                    }
                    works(&process, 3 * round + 2, 2, process.rank);
                    counts[end as usize] += 1;
                    unharmed = if end == End::Compressed { unharmed + 1 } else { 0 };
                    round += 1;
                    if unharmed == 3 {
                        break;
                    }
                }
                if first.is_none() {
                    first = Some(Held::now());
                } else {
                    n_failed += counts[End::Failed as usize];
                }
                eprintln!(
                    "{exchange}: {kind}: {} rounds compressed, {} plain, {} failed",
                    counts[0], counts[1], counts[2]
                );
            }
            nothing_has_grown(first.unwrap().and_lost(exchange, n_failed));
        },
    );
    let Some(ends) = ends else { return };
    let summary = ends[0].1.lines().filter(|line| line.starts_with(exchange));
    summary.for_each(|line| eprintln!("{line}"));
    let is_over = ends[0].1.contains(&format!("exchange {exchange},"));
    all_succeed(Some(ends));
    assert!(is_over, "the payloads went over another exchange");
    no_name_stays(&before);
}

#[test]
fn ranks_end_alike_when_a_call_of_one_fails_over_nccl() {
    a_call_of_one_rank_fails("nccl");
}

#[test]
fn ranks_end_alike_when_a_call_of_one_fails_over_peer_memory() {
    a_call_of_one_rank_fails("peer");
}

#[test]
fn ranks_end_alike_when_a_call_of_one_fails_over_host_memory() {
    a_call_of_one_rank_fails("host");
}

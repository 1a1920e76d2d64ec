//! Random programs, each run twice: by plain NCCL, and with the shim. *A job that plain NCCL would
//! run must run with the shim preloaded, in time*, with the results that NCCL has where calls are
//! forwarded and those of the reference where they are compressed.
//!
//! `FLASHCOMM_TEST_PROGRAMS` (400): how many. `FLASHCOMM_TEST_PROGRAM`: the seed of one, which then
//! runs alone.
//!
//! In time is twice plain NCCL's time, or two seconds more: the simulators have no time of their
//! own, so it is that of a clock on a machine that does other things, too. It finds calls that wait
//! for a timeout or poll slowly, and says nothing of speed.
//!
//! What is left out, since a job may hang there with the shim that plain NCCL runs, is in [`GAPS`].
//!
//! A process runs a few dozen programs, one after the other. It ends at the first that hangs or
//! fails, says so, and the next process goes on behind that. Where plain NCCL's hangs, its program
//! is none that this is about; there should be few.

mod data; // inputs, and what must come out
mod generate; // programs from seeds
mod machine; // whether a program ends by the application's own rules
mod program; // what a program is
mod run; // a rank does its steps

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

use flashcomm_test_support::*;

use data::Compression;
use run::{Board, Rank};

/// Whether programs do what the shim is known not to keep up with:
///
/// * A group creates several communicators that block. Their ranks meet when the group has ended. A
///   rank that creates only the first must not wait, before the others are created, for what comes
///   after that creation.
/// * A group on several communicators that do not block has calls that are forwarded and such that
///   are compressed, on the same stream. What is forwarded is issued whenever the real NCCL comes to
///   it, so it may be behind the compressed ones of another communicator.
/// * One rank has calls on several communicators in one group, in turns, and another rank has a
///   group for each of them, all on the same stream. The simulated NCCL, as the real one up to some
///   version, takes the communicators of a group in the order of their first calls, and does not see
///   the compressed ones. (Later versions take them in an order of their own, so that such a program
///   may hang by itself.)
const GAPS: bool = false;
/// Programs of a process. What it sets is the same for all of them.
const BLOCK: u64 = 50;
/// Programs whose ranks are processes have so many.
const PROCESSES: usize = 3;
/// Longer than any program takes, also with the delays of a schedule. With the shim it may take
/// twice as long.
const PLAIN_LIMIT: Duration = Duration::from_secs(5);
const SHIM_LIMIT: Duration = Duration::from_secs(10);
/// Bytes from which on it compresses.
const MIN_BYTES: usize = 600;

/// How the programs of a block run: over which exchange, with which delays, as processes.
fn kind_of(seed: u64) -> (&'static str, Option<u64>, Option<usize>) {
    let block = seed / BLOCK;
    let exchange = ["peer", "host", "nccl"][(block % 3) as usize];
    let processes = (block % 8 == 7).then_some(PROCESSES);
    (exchange, (block % 2 == 1).then_some(block), processes)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn what_plain_nccl_runs_runs_with_the_shim_in_time() {
    let one = number("FLASHCOMM_TEST_PROGRAM");
    let all = one.map_or(0..number("FLASHCOMM_TEST_PROGRAMS").unwrap_or(400), |seed| seed..seed + 1);
    let (mut next, mut n_run, mut discarded, mut wrong) = (all.start, 0, Vec::new(), Vec::new());
    while next < all.end && wrong.len() < 5 {
        let end = all.end.min((next / BLOCK + 1) * BLOCK);
        let Some(Ended { times, troubles }) = block(next, end) else { return };
        // Whatever went wrong first; what is behind that runs again.
        let first = troubles.iter().min_by_key(|trouble| trouble.seed);
        let until = first.map_or(end, |trouble| trouble.seed);
        for (seed, (plain, shim)) in times.range(next..until) {
            n_run += 1;
            if let (Some(plain), Some(shim)) = (plain, shim)
                && *shim > (*plain * 2).max(*plain + Duration::from_secs(2))
            {
                wrong.push(format!("seed {seed}: {plain:?} by plain NCCL, {shim:?} with the shim\n{}", listing(*seed)));
            }
        }
        let both = times.range(next..until).filter(|(_, times)| matches!(times, (Some(_), Some(_))));
        assert_eq!(both.count() as u64, until - next, "a process has left out programs");
        next = first.map_or(end, |trouble| trouble.seed + 1);
        if let Some(Trouble { seed, .. }) = first {
            let of_plain = troubles.iter().any(|trouble| trouble.seed == *seed && trouble.is_plain);
            let said: String =
                troubles.iter().filter(|trouble| trouble.seed == *seed).map(|it| it.said.as_str()).collect();
            if of_plain { discarded.push(said) } else { wrong.push(said) }
        }
    }
    eprintln!("programs: {n_run} run, {} discarded", discarded.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(discarded.len() as u64 * 100 <= all.end - all.start, "plain NCCL does not run\n{}", discarded.join("\n"));
}

/// Each rank's program.
fn listing(seed: u64) -> String {
    let program = generate::program(seed, kind_of(seed).2);
    (0..program.world).map(|rank| program.listing(rank, usize::MAX)).collect()
}

/// A program that hung or failed.
struct Trouble {
    seed: u64,
    is_plain: bool,
    said: String,
}

/// What came of a block.
struct Ended {
    /// Of each program, as plain NCCL ran it and with the shim; of the slowest rank.
    times: BTreeMap<u64, (Option<Duration>, Option<Duration>)>,
    troubles: Vec<Trouble>,
}

/// Runs the programs of some seeds in one block: plain and with the shim side by side.
fn block(from: u64, to: u64) -> Option<Ended> {
    let (exchange, delays, n_processes) = kind_of(from);
    let per_way = n_processes.unwrap_or(1);
    let settings = |process: usize| {
        let mut settings = vec![
            ("WORLD_PROGRAMS", format!("{from}-{to}")),
            ("FLASHCOMM_BITS", "4".into()),
            ("FLASHCOMM_EXCHANGE", exchange.into()),
            ("FLASHCOMM_MIN_BYTES", MIN_BYTES.to_string()),
            // What is not compressed is forwarded in some blocks, and in others exact and the shim's where it can be.
            ("FLASHCOMM_EXACT_MAX_BYTES", if from / BLOCK % 4 < 2 { "64K" } else { "0" }.into()),
            ("FLASHCOMM_LOG", "error".into()),
        ];
        settings.extend((process < per_way).then(|| ("WORLD_WITHOUT_SHIM", "1".into())));
        settings.extend(delays.map(|seed| ("FLASHCOMM_SIM_SEED", seed.to_string())));
        settings
    };
    let ends = processes(2 * per_way, settings, |process| {
        let text = std::env::var("WORLD_PROGRAMS").unwrap();
        let (from, to) = text.split_once('-').unwrap();
        run_all(from.parse().unwrap(), to.parse().unwrap(), process);
    })?;
    let mut ended = Ended { times: BTreeMap::new(), troubles: Vec::new() };
    for (process, (status, said)) in ends.iter().enumerate() {
        let (is_plain, mut last) = (process < per_way, from);
        for line in said.lines().filter_map(|line| line.strip_prefix("program ")) {
            let (seed, us) = line.split_once(' ').unwrap();
            last = seed.parse().unwrap();
            if let Some(us) = us.strip_suffix(" us") {
                let times = ended.times.entry(last).or_default();
                let time = if is_plain { &mut times.0 } else { &mut times.1 };
                *time = Some(time.unwrap_or_default().max(Duration::from_micros(us.parse().unwrap())));
                last += 1;
            }
        }
        if !status.success() {
            let head = format!("seed {last}, {}: {status}\n", if is_plain { "plain" } else { "with the shim" });
            let is_of_others = |line: &&str| line.starts_with("program ") && line.ends_with(" us");
            let said = said.lines().filter(|line| !is_of_others(line)).flat_map(|line| [line, "\n"]);
            ended.troubles.push(Trouble { seed: last, is_plain, said: head + &said.collect::<String>() });
        }
    }
    Some(ended)
}

/// A process' part: all programs one after the other. Ends the process at the first that hangs or
/// fails.
fn run_all(from: u64, to: u64, process: Process) {
    let is_plain = std::env::var_os("WORLD_WITHOUT_SHIM").is_some();
    let (exchange, _, n_processes) = kind_of(from);
    let process = Arc::new(process);
    for seed in from..to {
        let program = Arc::new(generate::program(seed, n_processes));
        let compression = Compression { min_bytes: MIN_BYTES, non_blocking: exchange != "nccl" };
        let memories = Arc::new(data::memories(&program, (!is_plain).then_some(compression)));
        let board = match n_processes {
            None => Board::Here(Arc::new((Mutex::new(HashMap::new()), Condvar::new()))),
            Some(_) => Board::Files(process.clone(), format!("{is_plain}-{seed}-")),
        };
        let mine: Vec<usize> = match n_processes {
            None => (0..program.world).collect(),
            Some(n_processes) => vec![process.rank % n_processes],
        };
        if mine.contains(&0) {
            (0..program.comms.len()).for_each(|comm| board.tell(&format!("id{comm}"), &unique_id().0));
        }
        let places: Arc<Vec<AtomicUsize>> = Arc::new((0..program.world).map(|_| AtomicUsize::new(0)).collect());
        let (done, ends) = mpsc::channel();
        let begin = Instant::now();
        for rank in mine.clone() {
            let (program, memories, board) = (program.clone(), memories.clone(), board.clone());
            let (done, places) = (done.clone(), places.clone());
            std::thread::spawn(move || {
                let run = || {
                    use_device(rank);
                    Rank::run(&program, rank, &board, &memories[rank], &places[rank]);
                };
                let _ = done.send(catch_unwind(AssertUnwindSafe(run)).is_ok());
            });
        }
        let limit = begin + if is_plain { PLAIN_LIMIT } else { SHIM_LIMIT };
        for _ in &mine {
            let end = ends.recv_timeout(limit.saturating_duration_since(Instant::now()));
            if end != Ok(true) {
                eprintln!("program {seed} {}", if end.is_ok() { "fails" } else { "hangs" });
                let listing = |rank: &usize| program.listing(*rank, places[*rank].load(Ordering::Relaxed));
                mine.iter().for_each(|rank| eprint!("{}", listing(rank)));
                // SAFETY: ends this process, whatever its threads wait for.
                unsafe { libc::_exit(3) };
            }
        }
        eprintln!("program {seed} {} us", begin.elapsed().as_micros());
    }
}

//! A rank's n-th call of a kind is refused, n by n; all ranks have to end alike.

use std::time::Duration;

use flashcomm_test_support::*;

use super::*;

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
    let sums = Sums::of(WORLD);
    let own = Some(own_of(rank, &sums));
    let seen = watched(process.unique_id(3 * round), rank, &sums, own, |_| {
        // Who hears of an error on another rank aborts, as after any of NCCL's.
        process.heard(&failed).is_some()
    });
    let limit = Duration::from_secs(ATTACH_TIMEOUT_S) + SLACK;
    assert!(seen.creation < limit, "round {round}: creation took {:?}", seen.creation);
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
        |_| [settings(exchange, false), vec![("FLASHCOMM_LOG", "info".into())]].concat(),
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
                        let mut settings = settings(exchange, false);
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
            nothing_has_grown(with_lost(first.unwrap(), exchange, n_failed));
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

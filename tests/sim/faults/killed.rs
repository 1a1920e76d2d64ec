//! A rank's process is killed at its n-th step, n by n; two survivors have to get over it.
//!
//! `FLASHCOMM_TEST_STRIDE` (3): every how many steps a rank is killed.

use std::time::{Duration, Instant};

use flashcomm_test_support::*;

use super::*;

/// The rank that is killed, or that lives to the end of its round.
fn victim(process: &Process, round: usize) {
    let rank = place(round, HARMED);
    use_device(rank);
    process.tell(&format!("here{round}"), b"");
    let seen = watched(process.unique_id(3 * round), rank, &Sums::of(WORLD), None, |_| false);
    assert_eq!(seen.ends, [good_end(); 2]);
}

/// One of the two that stay, while the third is killed at its n-th step, n by n.
fn survivor(process: &Process, exchange: &str) {
    let stride = std::env::var("FLASHCOMM_TEST_STRIDE").map_or(3, |text| text.parse().unwrap());
    let (sums, me) = (Sums::of(WORLD), process.rank);
    let (mut first, mut n_died, mut n_freed) = (None, 0, 0);
    use_device(me);
    for round in 0.. {
        // Its first step is ncclCommInitRank, where the others wait as plain NCCL has it.
        let (n, rank) = (2 + round * stride, place(round, me));
        let dead = format!("dead{round}");
        let child = (me == 0).then(|| {
            let mut settings = settings(exchange, is_exact());
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
        process.hear(&format!("here{round}")); // how long a process takes to start is not measured
        let since_death = std::sync::OnceLock::new();
        let seen = watched(process.unique_id(3 * round), rank, &sums, None, |told| {
            if process.heard(&dead).as_deref() != Some(b"killed") {
                return false;
            }
            let waited = since_death.get_or_init(Instant::now).elapsed();
            // Of a rank that is gone the kernels of ours learn nothing.
            let patience = Duration::from_millis(if exchange == "peer" { 300 } else { 8000 });
            told != 0 || waited > patience
        });
        tell.into_iter().for_each(|thread| thread.join().unwrap());
        let was_killed = process.hear(&dead) == b"killed";
        let limit = Duration::from_secs(ATTACH_TIMEOUT_S) + SLACK;
        assert!(seen.creation < limit, "step {n}: creation took {:?}", seen.creation);
        let failed = seen.ends.contains(&End::Failed);
        assert!(was_killed || !failed, "nobody died");
        let all_good = seen.ends.iter().all(|end| [good_end(), End::Failed].contains(end));
        assert!(all_good, "step {n}: {:?}", seen.ends);
        if failed && exchange != "peer" {
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
    assert_eq!(n_exact() > 0, is_exact(), "an exact sum is ours");
    nothing_has_grown(with_lost(first.unwrap(), exchange, n_freed));
}

fn killed_at_every_step(exchange: &'static str, is_exact: bool) {
    let before = shared_memory_names();
    let ends = processes(
        2,
        |_| [settings(exchange, is_exact), vec![("FLASHCOMM_LOG", "info".into())]].concat(),
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
    killed_at_every_step("nccl", false);
}

#[test]
fn survivors_get_over_a_rank_killed_at_any_step_over_peer_memory() {
    killed_at_every_step("peer", false);
}

#[test]
fn survivors_get_over_a_rank_killed_at_any_step_over_host_memory() {
    killed_at_every_step("host", false);
}

#[test]
fn survivors_get_over_a_rank_killed_at_any_step_of_exact_sums_over_peer_memory() {
    killed_at_every_step("peer", true);
}

#[test]
fn survivors_get_over_a_rank_killed_at_any_step_of_exact_sums_over_host_memory() {
    killed_at_every_step("host", true);
}

//! Changes that cannot be made: every rank is told why, and keeps what it had.

use std::time::Instant;

use flashcomm_test_support::*;

use super::*;

#[test]
fn ranks_that_ask_for_different_things_are_told_and_keep_what_they_had() {
    let ends = processes(
        3,
        |_| vec![("FLASHCOMM_EXCHANGE", "peer".into())],
        |process| {
            use_device(process.rank);
            let sums = Sums::of(3);
            let rank = Rank::new(&sums, process.unique_id(0), process.rank);
            rank.set(4, 4);
            let odd = process.rank == 2;
            assert_eq!(call!(flashcommSetCommBits(rank.comm, 5, if odd { 6 } else { 5 })), 5);
            let text = last_error(0);
            assert!(text.contains("rank 2 has FLASHCOMM_BITS=5:6, rank 0 has 5"), "{text}");
            rank.gives(&sums.at(4, 4), "the width stays");
            assert_eq!(call!(flashcommSetCommEnabled(rank.comm, odd.into())), 5);
            rank.gives(&sums.at(4, 4), "it stays on");
            rank.set(5, 5);
            rank.gives(&sums.at(5, 5), "and may be changed later");
            ok!(ncclCommDestroy(rank.comm));
        },
    );
    let Some(ends) = ends else { return };
    assert!(ends[0].1.contains("all ranks keep the width that they had: rank 2"), "{}", ends[0].1);
    all_succeed(Some(ends));
}

#[test]
fn where_nothing_can_be_changed_the_answer_says_why() {
    let refusals = |comm: usize, why: &str| {
        let results = [call!(flashcommSetCommBits(comm, 4, 4)), call!(flashcommSetCommEnabled(comm, 1))];
        assert_eq!(results, [5, 5]);
        assert!(last_error(0).contains(why), "{}", last_error(0));
        assert_eq!(nccl_last_error(comm), last_error(0), "where frameworks ask");
        assert_eq!(Info::of(comm).state, 2);
    };
    for (enable, why) in [("0", "FLASHCOMM_ENABLE=0"), ("1", "forward to the real NCCL")] {
        in_process(&[("FLASHCOMM_ENABLE", enable), ("CONTROL_WHY", why)], || {
            use_device(0);
            let comm = init(1, unique_id(), 0);
            for bits in [-1, 0, 1, 9, 256 + 4] {
                assert_eq!(
                    [call!(flashcommSetCommBits(comm, bits, 4)), call!(flashcommSetCommBits(comm, 4, bits))],
                    [4; 2]
                );
            }
            assert_eq!(
                [
                    call!(flashcommSetCommBits(0, 4, 4)),
                    call!(flashcommSetCommBits(comm, 8, 4)),
                    call!(flashcommSetCommEnabled(comm, 2))
                ],
                [4; 3]
            );
            refusals(comm, &std::env::var("CONTROL_WHY").unwrap());
            ok!(ncclCommDestroy(comm));
        });
        if std::env::var_os("WORLD_INNER").is_some() {
            return;
        }
    }
}

#[test]
fn a_ninth_pair_of_widths_is_refused_and_the_others_stay_usable() {
    in_process(&[("FLASHCOMM_EXCHANGE", "peer")], || {
        let (world, id) = (2, unique_id());
        let sums = Sums::of(world);
        threads(world, |rank| {
            let rank = Rank::new(&sums, id, rank);
            // The first is that of FLASHCOMM_BITS.
            (1..=7).for_each(|i| rank.set(2 + i / 7, 1 + (i - 1) % 7 + 1));
            assert_eq!(call!(flashcommSetCommBits(rank.comm, 2, 8)), 5);
            assert!(last_error(0).contains("8 pairs of widths"), "{}", last_error(0));
            rank.set(2, 4);
            rank.gives(&sums.at(2, 4), "an earlier one");
            ok!(ncclCommDestroy(rank.comm));
        });
    });
}

#[test]
fn a_rank_that_does_not_call_ends_the_others_wait() {
    let settings = |_| vec![("FLASHCOMM_ATTACH_TIMEOUT_S", "2".into()), ("FLASHCOMM_EXCHANGE", "peer".into())];
    let ends = processes(2, settings, |process| {
        use_device(process.rank);
        let sums = Sums::of(2);
        let rank = Rank::new(&sums, process.unique_id(0), process.rank);
        rank.gives(&sums.at(8, 8), "before");
        if process.rank == 0 {
            let start = Instant::now();
            assert_eq!(call!(flashcommSetCommBits(rank.comm, 4, 4)), 6, "ncclRemoteError");
            assert!((2..5).contains(&start.elapsed().as_secs()));
            assert!(last_error(0).contains("within 2 s"), "{}", last_error(0));
            process.tell("done", b"");
        } else {
            process.hear("done");
        }
        ok!(ncclCommAbort(rank.comm));
    });
    all_succeed(ends);
}

/// What rank 1 answers to two changes when its n-th call of a kind fails.
#[derive(PartialEq, Eq, Debug)]
enum Answer {
    /// Both were made.
    Changed,
    /// The second one was refused.
    Refused,
    /// The first one was, so that the communicator is off.
    Off,
    /// The test's own call failed, or the driver's or NCCL's that ends a job.
    Over,
}

/// One job in which rank 1's n-th call of a kind fails; `None` in a rank. Checks that the ranks are of one mind.
fn with_failure(exchange: &str, kind: &str, n: usize) -> Option<Answer> {
    let settings = |rank: usize| {
        let mut settings =
            vec![("FLASHCOMM_EXCHANGE", exchange.to_string()), ("FLASHCOMM_ATTACH_TIMEOUT_S", "20".into())];
        if rank == 1 {
            settings.push(("FLASHCOMM_SIM_FAIL", format!("{kind}:{n}")));
        }
        settings
    };
    const OVER: i32 = 3;
    let ends = processes(2, settings, |process| {
        use_device(process.rank);
        let sums = Sums::of(2);
        let Ok(rank) = std::panic::catch_unwind(|| Rank::new(&sums, process.unique_id(0), process.rank)) else {
            std::process::exit(OVER)
        };
        let answers = [8, 4].map(|bits| call!(flashcommSetCommBits(rank.comm, bits, bits)));
        let (expected, code) = match answers {
            [0, 0] => (sums.at(4, 4), 10),
            [0, 5] => (sums.at(8, 8), 11),
            [5, 5] => (sums.exact.clone(), 12),
            _ => std::process::exit(OVER),
        };
        let name = |rank: usize| format!("answers{rank}");
        process.tell(&name(process.rank), &[code]);
        assert_eq!(process.hear(&name(1 - process.rank)), [code], "the ranks differ");
        rank.gives(&expected, "what comes after");
        std::process::exit(code.into());
    })?;
    let codes = [0, 1].map(|rank| ends[rank].0.code());
    let answer = match codes {
        [Some(10), Some(10)] => Answer::Changed,
        [Some(11), Some(11)] => Answer::Refused,
        [Some(12), Some(12)] => Answer::Off,
        _ if codes[1] == Some(OVER) => Answer::Over,
        _ => panic!("{exchange}, {kind} {n}: {codes:?}\n{}\n{}", ends[0].1, ends[1].1),
    };
    Some(answer)
}

#[test]
fn a_rank_that_cannot_change_leaves_all_as_they_were() {
    for (exchange, kind) in [("peer", "event"), ("host", "alloc"), ("nccl", "alloc")] {
        let mut refused = 0;
        for n in 1.. {
            let Some(answer) = with_failure(exchange, kind, n) else { return };
            refused += usize::from(answer == Answer::Refused);
            // Once as many calls have been made as these jobs make, nothing fails any more.
            if answer == Answer::Changed && refused > 0 {
                break;
            }
            assert!(n < 40, "{exchange}, {kind}: no failure hit the change");
        }
    }
}

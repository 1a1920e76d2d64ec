//! What the rows of a batch have to do with each other: where the hidden size is a multiple of the group, nothing. And
//! where the result is batch invariant, not even their places and their number matter (invariant I8).

use flashcomm_test_support::*;
use half::bf16;

const WORLD: usize = 2;

/// All-reduces of these cases, each the inputs of all ranks, in one job.
fn sums(cases: &[Vec<Vec<bf16>>]) -> Vec<Vec<bf16>> {
    let id = unique_id();
    let mut of_ranks = threads(WORLD, |rank| {
        let (comm, stream) = (init(WORLD, id, rank), Stream::new());
        let sum = |inputs: &Vec<Vec<bf16>>| {
            let memory = Memory::of(&inputs[rank], &stream);
            let count = inputs[rank].len();
            ok!(ncclAllReduce(memory.at, memory.at, count, dtype::BF16, SUM, comm, stream.0));
            memory.read::<bf16>(count, &stream)
        };
        let sums: Vec<Vec<bf16>> = cases.iter().map(sum).collect();
        ok!(ncclCommDestroy(comm));
        sums
    });
    of_ranks.swap_remove(0)
}

/// These rows of every rank's input, one behind the other.
fn rows(inputs: &[Vec<bf16>], hidden: usize, which: &[usize]) -> Vec<Vec<bf16>> {
    let row = |input: &[bf16], row: &usize| input[row * hidden..][..hidden].to_vec();
    inputs.iter().map(|input| which.iter().flat_map(|n| row(input, n)).collect()).collect()
}

#[test]
fn a_row_that_changes_changes_no_bit_of_another() {
    // As by default, but for the least size that is compressed.
    in_process(&[("FLASHCOMM_MIN_BYTES", "0"), ("FLASHCOMM_EXCHANGE", "peer")], || {
        for (i, hidden) in [576, 2880, 4544, 4096].into_iter().enumerate() {
            let (n_rows, changed) = (9, 4);
            let before = inputs::<bf16>(n_rows * hidden, 1, WORLD);
            let with = |change: &dyn Fn(bf16) -> bf16| {
                let mut after = before.clone();
                after[1][changed * hidden..][..hidden].iter_mut().for_each(|x| *x = change(*x));
                after
            };
            let larger = with(&|x| bf16::from_f32(x.to_f32() * 1000.0));
            let nan = with(&|_| bf16::NAN);
            let sums = sums(&[before, larger, nan]);
            assert_eq!(n_compressed() as usize, 3 * WORLD * (i + 1), "none was forwarded");
            let [before, larger, nan] = sums.as_slice() else { unreachable!() };
            for row in 0..n_rows {
                let of = |sum: &[bf16]| sum[row * hidden..][..hidden].to_vec();
                if row == changed {
                    assert!(of(nan).iter().all(|x| x.is_nan()) && of(larger) != of(before));
                } else {
                    same_bits(&of(larger), &of(before), &format!("row {row} of {hidden} beside a larger one"));
                    same_bits(&of(nan), &of(before), &format!("row {row} of {hidden} beside NaN"));
                }
            }
        }
    });
}

/// Rows in another order, in smaller batches and alone: whether each has the same bits everywhere.
fn is_batch_invariant(hidden: usize) -> bool {
    let n_rows = 12;
    let inputs = inputs::<bf16>(n_rows * hidden, 3, WORLD);
    let batches: [&[usize]; 5] =
        [&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], &[11, 3, 7, 0, 9, 1, 10, 5, 2, 8, 4, 6], &[5, 6, 7], &[7], &[9, 0]];
    let cases: Vec<_> = batches.iter().map(|which| rows(&inputs, hidden, which)).collect();
    let sums = sums(&cases);
    assert_eq!(n_compressed() as usize, cases.len() * WORLD, "none was forwarded");
    batches.iter().zip(&sums).all(|(which, sum)| {
        let bits =
            |sum: &[bf16], n: usize| -> Vec<u16> { sum[n * hidden..][..hidden].iter().map(|x| x.to_bits()).collect() };
        which.iter().enumerate().all(|(at, row)| bits(sum, at) == bits(&sums[0], *row))
    })
}

#[test]
fn rows_have_the_same_bits_in_every_batch_and_place_if_that_is_asked_for() {
    for (exchange, hidden, bits) in
        [("peer", 576, "4"), ("host", 2880, "8"), ("nccl", 576, "4:8"), ("nccl", 576, "3:5"), ("peer", 576, "4:8")]
    {
        let part = format!("{exchange} {hidden} {bits}");
        if std::env::var("WORLD_PART").is_ok_and(|mine| mine != part) {
            continue;
        }
        let settings = [
            ("FLASHCOMM_BATCH_INVARIANT", "1"),
            ("FLASHCOMM_MIN_BYTES", "auto"),
            ("FLASHCOMM_EXCHANGE", exchange),
            ("FLASHCOMM_BITS", bits),
            ("WORLD_PART", &part),
        ];
        in_process(&settings, || assert!(is_batch_invariant(hidden), "{part}"));
    }
}

#[test]
fn and_need_not_if_it_is_not() {
    // In two hops the owner adds its own rows unquantized: whose they are depends on where they stand.
    let settings = [("FLASHCOMM_MIN_BYTES", "0"), ("FLASHCOMM_EXCHANGE", "peer"), ("FLASHCOMM_BITS", "4:8")];
    in_process(&settings, || assert!(!is_batch_invariant(576)));
}

//! The all-reduce as a pure function: what every rank of every exchange must hold, bit for bit (invariant I1).

use crate::codec::{Codec, Legs, TILE_ELEMS};
use crate::element::{Element, Summand};
use crate::plan::Plan;

/// What becomes of the inputs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Their sum.
    Sum,
    /// Their average: the sum in fp32 times `1 / world` in fp32, before it is quantized for the gather leg.
    Average,
}

impl Op {
    /// What the sum over `world` ranks is multiplied with.
    pub fn scale(self, world: usize) -> f32 {
        match self {
            Op::Sum => 1.0,
            Op::Average => 1.0 / world as f32,
        }
    }
}

/// The compressed sum, or average, of `inputs`, one slice of equal length per rank, in rank order.
///
/// Between two ranks, if both legs are coded alike, each quantizes its input, and both decode and add the two
/// ([`crate::Codec::decode_both_to`]). Otherwise each chunk's owner adds, in fp32 and in rank order, what it decodes of the others and its own input unquantized (where
/// the legs are batch invariant, as it would decode, too);
/// the sum is quantized for the gather leg, and everyone (the owner, too) keeps what that decodes to. All of it happens
/// in the domain of the code: each input enters it once, the result leaves it once.
///
/// # Panics
/// When there is no rank, no element, or the lengths differ.
pub fn all_reduce<E: Element>(inputs: &[&[E]], op: Op, legs: Legs) -> Vec<E> {
    let scale = op.scale(inputs.len());
    let count = inputs[0].len();
    assert!(inputs.iter().all(|input| input.len() == count), "every rank has the same count");
    let plan = Plan::new(count, inputs.len(), legs, usize::MAX).expect("an unbounded buffer holds any plan");
    let mut output = vec![E::from_bits(0); count];
    let mut rest = output.as_mut_slice();
    // Chunks are independent, so a core each.
    std::thread::scope(|scope| {
        for owner in 0..inputs.len() {
            let chunk = plan.chunk(owner);
            let (mine, after) = rest.split_at_mut(chunk.len());
            rest = after;
            scope.spawn(move || {
                for (i, out) in mine.chunks_mut(TILE_ELEMS).enumerate() {
                    let start = chunk.start + i * TILE_ELEMS;
                    match plan.one_hop() {
                        Some(codec) => add_tile([inputs[0], inputs[1]], scale, start, codec, out),
                        None => reduce_tile(inputs, scale, owner, start, legs, out),
                    }
                }
            });
        }
    });
    output
}

/// The exact sum, or average, of `inputs`, one slice of equal length per rank: added in fp32 and in rank order, multiplied by
/// [`Op::scale`], and rounded once.
///
/// # Panics
/// When there is no rank, or the lengths differ.
pub fn exact<S: Summand>(inputs: &[&[S]], op: Op) -> Vec<S> {
    let (first, others) = inputs.split_first().expect("a rank");
    assert!(others.iter().all(|input| input.len() == first.len()), "every rank has the same count");
    let scale = op.scale(inputs.len());
    let sum = |i: usize| others.iter().fold(first[i].widen(), |sum, input| sum + input[i].widen());
    (0..first.len()).map(|i| S::round(sum(i) * scale)).collect()
}

/// One tile in one hop, the elements from `start` on, into `out`.
fn add_tile<E: Element>(inputs: [&[E]; 2], scale: f32, start: usize, codec: Codec, out: &mut [E]) {
    let [first, second] = inputs.map(|input| {
        let mut payload = vec![0; codec.tile_bytes()];
        codec.encode_tile::<E>(&codec.enter(&input[start..start + out.len()]), &mut payload);
        payload
    });
    codec.decode_both_to([&first, &second], scale, out);
}

/// One tile of the chunk of rank `owner`, the elements from `start` on, into `out`.
fn reduce_tile<E: Element>(inputs: &[&[E]], scale: f32, owner: usize, start: usize, legs: Legs, out: &mut [E]) {
    let mut payload = vec![0; legs.reduce.tile_bytes()];
    let mut sum = Vec::new();
    for (rank, input) in inputs.iter().enumerate() {
        let mut term = legs.reduce.enter(&input[start..start + out.len()]);
        if rank != owner || legs.batch_invariant {
            legs.reduce.encode_tile::<E>(&term, &mut payload);
            legs.reduce.decode_tile::<E>(&payload, &mut term);
        }
        if rank == 0 {
            sum = term; // not 0 + term: that would lose the sign of -0
        } else {
            sum.iter_mut().zip(&term).for_each(|(s, t)| *s += t);
        }
    }
    sum.iter_mut().for_each(|s| *s *= scale);
    let mut payload = vec![0; legs.gather.tile_bytes()];
    legs.gather.encode_tile::<E>(&sum, &mut payload);
    legs.gather.decode_tile_to(&payload, out);
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::codec::{Code, GroupSize, Width};

    fn legs(reduce: u8, gather: u8) -> Legs {
        let codec = |bits| Codec::plain(Width::new(bits).unwrap(), GroupSize::new(32).unwrap());
        Legs { reduce: codec(reduce), gather: codec(gather), batch_invariant: false }
    }

    #[test]
    fn equal_inputs_of_two_values_sum_exactly() {
        // Two values per group are the group's ends: every code is exact, and so are these sums.
        let count = if cfg!(miri) { 100 } else { 9000 };
        let input: Vec<f16> = (0..count).map(|i| f16::from_f32(if i % 3 == 0 { -1.5 } else { 3.0 })).collect();
        let sum = all_reduce(&[&input, &input, &input], Op::Sum, legs(2, 2));
        assert!(input.iter().zip(&sum).all(|(x, s)| s.to_f32() == 3.0 * x.to_f32()));
    }

    #[test]
    fn an_exact_sum_is_in_rank_order_and_rounded_once() {
        let halves = |values: &[f32]| -> Vec<f16> { values.iter().map(|x| f16::from_f32(*x)).collect() };
        let inputs = [
            halves(&[2048.0, 60000.0, -0.0, 1.0]),
            halves(&[1.0, 60000.0, -0.0, 2.0]),
            halves(&[1.0, -60000.0, -0.0, 3.0]),
        ];
        let ranks: Vec<&[f16]> = inputs.iter().map(Vec::as_slice).collect();
        // Rounded at each step the first would be 2048, and the second would overflow.
        let bits = |sum: &[f16]| sum.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&exact(&ranks, Op::Sum)), bits(&halves(&[2050.0, 60000.0, -0.0, 6.0])));
        assert_eq!(exact(&ranks, Op::Average)[3], f16::from_f32(2.0));
        // fp32 rounds at each step, so the order counts.
        let (big, one) = (16_777_216.0f32, 1.0f32);
        assert_eq!(exact(&[&[big], &[one], &[one]], Op::Sum), [big]);
        assert_eq!(exact(&[&[one], &[one], &[big]], Op::Sum), [big + 2.0]);
        assert_eq!(exact(&[&[f32::INFINITY], &[f32::NEG_INFINITY]], Op::Sum)[0].to_bits(), 0x7fff_ffff);
    }

    #[test]
    fn the_owner_keeps_what_it_sent_and_adds_its_own_unquantized() {
        // One rank: nothing is sent in hop 1, so the result is one quantization of the input itself.
        let input: Vec<f16> = (0..100).map(|i| f16::from_f32(i as f32 / 7.0)).collect();
        let legs = legs(2, 4);
        let mut payload = vec![0; legs.gather.tile_bytes()];
        let values: Vec<f32> = input.iter().map(|x| x.to_f32()).collect();
        legs.gather.encode_tile::<f16>(&values, &mut payload);
        let mut expected = vec![f16::ZERO; values.len()];
        legs.gather.decode_tile_to(&payload, &mut expected);
        assert_eq!(all_reduce(&[&input], Op::Sum, legs), expected);
    }

    #[test]
    fn every_code_sums_odd_tails() {
        let count = if cfg!(miri) { 100 } else { 2 * TILE_ELEMS + 77 };
        let inputs: Vec<Vec<bf16>> = (0..3)
            .map(|rank| (0..count).map(|i| bf16::from_f32((i as f32 * 0.37 + rank as f32).sin())).collect())
            .collect();
        let ranks: Vec<&[bf16]> = inputs.iter().map(Vec::as_slice).collect();
        for code in Code::ALL {
            let codec = Codec { code, ..legs(8, 8).reduce };
            let sum = all_reduce(&ranks, Op::Sum, Legs::new(codec, codec).unwrap());
            for (i, got) in sum.iter().enumerate() {
                let exact: f32 = inputs.iter().map(|input| input[i].to_f32()).sum();
                assert!((got.to_f32() - exact).abs() < 0.12, "{code:?} {i}: {got}, not {exact}");
            }
        }
    }

    #[test]
    fn a_sum_beyond_fp16_becomes_an_infinity_as_with_nccl() {
        let input: Vec<f16> = (0..32).map(|i| f16::from_f32(if i == 5 { 60000.0 } else { 1.0 })).collect();
        let sum = all_reduce(&[&input, &input], Op::Sum, legs(8, 8));
        assert!(sum[5].is_infinite() && sum.iter().enumerate().all(|(i, s)| i == 5 || s.is_finite()));
    }

    #[test]
    fn an_average_is_the_sum_over_the_ranks_and_does_not_overflow() {
        let count = if cfg!(miri) { 100 } else { 5000 };
        let input: Vec<f16> = (0..count).map(|i| f16::from_f32(60000.0 - i as f32)).collect();
        for code in Code::ALL {
            let codec = Codec { code, ..legs(8, 8).reduce };
            // Octets of nearly equal elements are the worst of blocks.
            let most = if code == Code::Blocks { 1500.0 } else { 300.0 };
            let average = all_reduce(&[&input, &input, &input], Op::Average, Legs::new(codec, codec).unwrap());
            for (x, y) in input.iter().zip(&average) {
                assert!((x.to_f32() - y.to_f32()).abs() < most, "{code:?}: {x} {y}");
            }
        }
    }

    #[test]
    fn a_batch_invariant_result_depends_on_nothing_but_its_groups_elements() {
        // Groups of three ranks' inputs, alone, and among others in any place: chunks of other owners, too.
        let (group, n_groups) = (64, if cfg!(miri) { 3 } else { 200 });
        let inputs: Vec<Vec<bf16>> = (0..3)
            .map(|rank| (0..group * n_groups).map(|i| bf16::from_f32((i as f32 * 0.37 + rank as f32).sin())).collect())
            .collect();
        let places: Vec<usize> = (0..n_groups).map(|i| i * 77 % n_groups).collect();
        for code in Code::ALL {
            let codec = Codec { code, ..Codec::plain(Width::new(4).unwrap(), GroupSize::new(64).unwrap()) };
            let sum = |batch_invariant: bool, which: &[usize]| {
                let of = |input: &Vec<bf16>| -> Vec<bf16> {
                    which.iter().flat_map(|n| input[n * group..][..group].to_vec()).collect()
                };
                let ranks: Vec<Vec<bf16>> = inputs.iter().map(of).collect();
                let ranks: Vec<&[bf16]> = ranks.iter().map(Vec::as_slice).collect();
                all_reduce(&ranks, Op::Sum, Legs::new(codec, codec).unwrap().with_batch_invariant(batch_invariant))
            };
            let changes = |batch_invariant: bool| {
                let (all, moved) =
                    (sum(batch_invariant, &(0..n_groups).collect::<Vec<_>>()), sum(batch_invariant, &places));
                let alone = sum(batch_invariant, &[2]);
                let is_other = |(at, n): (usize, &usize)| moved[at * group..][..group] != all[n * group..][..group];
                places.iter().enumerate().any(is_other) || alone != all[2 * group..][..group]
            };
            assert!(!changes(true), "{code:?}");
            assert!(changes(false) || cfg!(miri), "{code:?}: else nobody needs it");
        }
    }
}

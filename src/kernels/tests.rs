//! Which kernels there are.

use flashcomm_wire::{Code, GroupSize, Width};

use super::*;

/// What `Legs::new` takes of any widths, codes and groups.
fn any_legs() -> impl Iterator<Item = Legs> {
    let group = |n_elems| GroupSize::new(n_elems).unwrap();
    let codecs: Vec<Codec> = (2..=16)
        .filter_map(Width::new)
        .flat_map(|width| Code::ALL.map(|code| Codec { width, group: group(128), code }))
        .chain([Codec { width: Width::new(4).unwrap(), group: group(32), code: Code::Blocks }])
        .collect();
    let pairs = codecs.clone().into_iter().flat_map(move |reduce| codecs.clone().into_iter().map(move |b| (reduce, b)));
    pairs.filter_map(|(reduce, gather)| Legs::new(reduce, gather))
}

#[test]
fn what_settings_choose_has_kernels_and_nothing_else_has() {
    let all = Instance::all();
    for legs in any_legs() {
        let widths = (legs.reduce.width, legs.gather.width);
        let can_be_set = Legs::choose(Some(legs.code()), widths, legs.reduce.group) == Some(legs);
        for element in ElementType::CODED {
            for verb in [Verb::Quantize, Verb::Reduce, Verb::Dequantize, Verb::AllReduce] {
                let found = Instance::new(verb, element, legs);
                assert_eq!(found.is_some(), can_be_set, "{verb:?} {legs:?}");
                assert!(found.is_none_or(|found| all.contains(&found)), "{verb:?} {legs:?}");
            }
        }
    }
}

#[test]
fn kernels_are_as_many_as_documented_and_have_names_of_their_own() {
    let all = Instance::all();
    let of = |verb: Verb| all.iter().filter(|instance| instance.verb() == verb).count();
    // For two types each: widths 2 to 8 in two codes and 16 bits; 28 plain pairs, 8 of blocks and 16:16; 8 of each code in
    // host memory; one hop of widths 2 to 8 in two codes. For three: the exact one. And two for none.
    assert_eq!(Verb::ALL.map(of), [2 * 15, 2 * 37, 2 * 15, 2 * 14, 2 * 37, 2 * 16, 2 * 14, 2 * 14, 3, 1, 1]);
    let names: std::collections::HashSet<&str> = all.iter().map(Instance::name).collect();
    assert_eq!((all.len(), names.len()), (329, 329));
    assert!(names.contains("flashcomm_allreduce_fp16_blocks4_blocks8"));
}

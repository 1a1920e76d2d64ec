//! What a code loses on all-reduces whose inputs are known, by the specification (`wire/`).

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc;

use anyhow::{Result, ensure};
use flashcomm_wire::reference::{self, Op};
use flashcomm_wire::{Element, Legs, TILE_ELEMS};
use serde::Serialize;

use super::read::{Origin, Tensor, Values};

/// The inputs of one all-reduce, in rank order and of equal length.
pub struct Sample {
    /// What they are, for the user.
    pub name: String,
    /// Whether each is a rank's own input; otherwise they are the parts of one tensor.
    pub is_of_ranks: bool,
    /// The inputs.
    pub inputs: Vec<Values>,
    /// Elements of each before some were picked.
    pub count: usize,
}

/// How far something is from what is exact.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Loss {
    /// The error's Euclidean norm over that of the exact numbers; of several samples the root mean square.
    pub relative_l2: f64,
    /// Signal to quantization noise, dB: `-20 log10(relative_l2)`.
    pub sqnr_db: f64,
    /// The largest error of an element.
    pub max_abs: f64,
    /// `relative_l2` of the sample that has the largest.
    pub worst_relative_l2: f64,
}

/// What a codec loses.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Row {
    /// When each input is quantized once.
    pub once: Loss,
    /// When the inputs are summed in two hops.
    pub sum: Loss,
}

/// Brings together what belongs to one all-reduce; a tensor that is alone is cut into `ranks` parts. At most
/// `max_elements` of each tensor are kept, whole tiles spread over it. Also what was left out, and why.
///
/// # Errors
/// Where nothing is left, or two files claim to be the same input.
pub fn samples(tensors: Vec<Tensor>, ranks: usize, max_elements: usize) -> Result<(Vec<Sample>, Vec<String>)> {
    let mut left_out = Vec::new();
    let mut kept: Vec<Tensor> = Vec::new();
    for tensor in tensors {
        match tensor.values.non_finite() {
            0 => kept.push(tensor),
            n => {
                let cure = match (tensor.rounded_from, &tensor.values) {
                    (Some(_), Values::Fp16(_)) => ", or beyond fp16 (--dtype bf16 takes those)",
                    _ => "",
                };
                left_out.push(format!("{}: {n} elements are NaN or infinite{cure}", tensor.name));
            }
        }
    }
    kept.sort_by(|a, b| a.origin.cmp(&b.origin)); // stable: those without one stay in the order of the files
    let same_call = |a: &Tensor, b: &Tensor| {
        let call = |tensor: &Tensor| tensor.origin.as_ref().map(|origin| (origin.communicator.clone(), origin.call));
        a.origin.is_some() && call(a) == call(b)
    };
    let mut samples = Vec::new();
    for group in kept.chunk_by(same_call) {
        for pair in group.windows(2) {
            ensure!(
                pair[0].origin != pair[1].origin,
                "{} and {} say that they are the same input; leave one out",
                pair[0].name,
                pair[1].name
            );
        }
        let sample = match group {
            [one] => cut(one, ranks),
            several => together(several),
        };
        match sample {
            Ok(mut sample) => {
                sample.pick(if sample.is_of_ranks { max_elements } else { max_elements / ranks });
                match sample.inputs.iter().all(is_zero) {
                    true => left_out.push(format!("{}: all zeros", sample.name)),
                    false => samples.push(sample),
                }
            }
            Err(why) => left_out.push(why),
        }
    }
    ensure!(!samples.is_empty(), "there is nothing to measure: {}", left_out.join("; "));
    Ok((samples, left_out))
}

/// A tensor as so many ranks' inputs: whole rows to each, where there are enough.
fn cut(tensor: &Tensor, ranks: usize) -> Result<Sample, String> {
    let n_rows = tensor.values.len() / tensor.row.max(1);
    let part = if n_rows >= ranks { n_rows / ranks * tensor.row } else { tensor.values.len() / ranks };
    if part == 0 {
        return Err(format!("{}: {} elements, too few for {ranks} ranks", tensor.name, tensor.values.len()));
    }
    let inputs = (0..ranks).map(|rank| tensor.values.at(std::iter::once(rank * part..(rank + 1) * part)));
    Ok(Sample { name: tensor.name.clone(), is_of_ranks: false, inputs: inputs.collect(), count: part })
}

/// The inputs of several ranks.
fn together(tensors: &[Tensor]) -> Result<Sample, String> {
    let Some(Origin { communicator, call, world, .. }) = &tensors[0].origin else { unreachable!("they are recorded") };
    let name = format!("communicator {communicator}, call {call}, {} of {world} ranks", tensors.len());
    let first = &tensors[0].values;
    let alike = |tensor: &Tensor| {
        std::mem::discriminant(&tensor.values) == std::mem::discriminant(first) && tensor.values.len() == first.len()
    };
    if !tensors.iter().all(alike) {
        return Err(format!("{name}: the ranks' inputs differ in type or length"));
    }
    let inputs = tensors.iter().map(|tensor| tensor.values.clone()).collect();
    Ok(Sample { name, is_of_ranks: true, inputs, count: first.len() })
}

fn is_zero(values: &Values) -> bool {
    match values {
        Values::Fp16(values) => values.iter().all(|x| x.to_f32() == 0.0),
        Values::Bf16(values) => values.iter().all(|x| x.to_f32() == 0.0),
    }
}

impl Values {
    fn at(&self, ranges: impl Iterator<Item = Range<usize>>) -> Self {
        fn gather<E: Element>(values: &[E], ranges: impl Iterator<Item = Range<usize>>) -> Vec<E> {
            ranges.flat_map(|range| values[range].iter().copied()).collect()
        }
        match self {
            Values::Fp16(values) => Values::Fp16(gather(values, ranges)),
            Values::Bf16(values) => Values::Bf16(gather(values, ranges)),
        }
    }
}

/// Tiles of `count` elements that are evenly spread and together have at most `max_elements`, but one at least.
fn spread(count: usize, max_elements: usize) -> impl Iterator<Item = Range<usize>> {
    let n_tiles = count.div_ceil(TILE_ELEMS);
    let n_kept = if count <= max_elements { n_tiles } else { (max_elements / TILE_ELEMS).clamp(1, n_tiles) };
    (0..n_kept).map(move |i| {
        let tile = i * n_tiles / n_kept;
        tile * TILE_ELEMS..((tile + 1) * TILE_ELEMS).min(count)
    })
}

impl Sample {
    /// Keeps at most so many elements of each input, the same of all.
    fn pick(&mut self, max_elements: usize) {
        let count = self.count;
        self.inputs.iter_mut().for_each(|input| *input = input.at(spread(count, max_elements)));
    }

    /// Elements of each input that are measured.
    pub fn n_kept(&self) -> usize {
        self.inputs[0].len()
    }

    fn measure(&self, legs: Legs) -> [Part; 2] {
        fn typed<E: Element>(inputs: &[&[E]], legs: Legs) -> [Part; 2] {
            let once = inputs.iter().map(|input| Part::of(&[input], legs)).reduce(Part::joined);
            [once.expect("a sample has inputs"), Part::of(inputs, legs)]
        }
        let inputs = &self.inputs;
        let fp16: Vec<_> =
            inputs.iter().filter_map(|x| if let Values::Fp16(x) = x { Some(&x[..]) } else { None }).collect();
        let bf16: Vec<_> =
            inputs.iter().filter_map(|x| if let Values::Bf16(x) = x { Some(&x[..]) } else { None }).collect();
        if bf16.is_empty() { typed(&fp16, legs) } else { typed(&bf16, legs) }
    }
}

/// The error of one sample, or a part of it.
#[derive(Clone, Copy)]
struct Part {
    signal: f64,
    noise: f64,
    max_abs: f64,
}

impl Part {
    /// Of the sum of these inputs. One input alone is quantized once, and that is the specification's sum.
    fn of<E: Element>(inputs: &[&[E]], legs: Legs) -> Self {
        let mut part = Part { signal: 0.0, noise: 0.0, max_abs: 0.0 };
        for (i, got) in reference::all_reduce(inputs, Op::Sum, legs).into_iter().enumerate() {
            let exact: f64 = inputs.iter().map(|input| f64::from(input[i].to_f32())).sum();
            let error = (exact - f64::from(got.to_f32())).abs();
            part.signal += exact * exact;
            part.noise += error * error;
            if error > part.max_abs || error.is_nan() {
                part.max_abs = error; // and a NaN stays
            }
        }
        part
    }

    fn joined(self, other: Part) -> Part {
        Part {
            signal: self.signal + other.signal,
            noise: self.noise + other.noise,
            max_abs: self.max_abs.max(other.max_abs),
        }
    }

    fn relative_l2(self) -> f64 {
        // A sum that cancels to nothing: any error is infinitely large beside it.
        if self.noise == 0.0 { 0.0 } else { (self.noise / self.signal).sqrt() }
    }
}

impl Loss {
    fn of(parts: impl Iterator<Item = Part> + Clone) -> Self {
        let (mut squares, mut n) = (0.0, 0.0);
        let (mut max_abs, mut worst) = (0.0f64, 0.0f64);
        for part in parts {
            let relative = part.relative_l2();
            squares += relative * relative;
            n += 1.0;
            for (largest, value) in [(&mut max_abs, part.max_abs), (&mut worst, relative)] {
                if value > *largest || value.is_nan() {
                    *largest = value;
                }
            }
        }
        let relative_l2 = (squares / n).sqrt();
        Self { relative_l2, sqnr_db: -20.0 * relative_l2.log10(), max_abs, worst_relative_l2: worst }
    }
}

/// Measures every codec on every sample, a core each; `tick` after each measurement.
pub fn measure(samples: &[Sample], codecs: &[Legs], mut tick: impl FnMut()) -> Vec<Row> {
    let n_jobs = samples.len() * codecs.len();
    let next = AtomicUsize::new(0);
    let (sender, answers) = mpsc::channel();
    let mut parts = vec![None; n_jobs];
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from).min(n_jobs) {
            let (sender, next) = (sender.clone(), &next);
            scope.spawn(move || {
                loop {
                    let job = next.fetch_add(1, Relaxed);
                    if job >= n_jobs {
                        break;
                    }
                    let part = samples[job % samples.len()].measure(codecs[job / samples.len()]);
                    let _ = sender.send((job, part));
                }
            });
        }
        drop(sender);
        for (job, part) in answers {
            parts[job] = Some(part);
            tick();
        }
    });
    let row = |parts: &[Option<[Part; 2]>]| {
        let loss = |which: usize| Loss::of(parts.iter().flatten().map(|part| part[which]));
        Row { once: loss(0), sum: loss(1) }
    };
    parts.chunks(samples.len()).map(row).collect()
}

#[cfg(test)]
mod tests {
    use flashcomm_wire::{Code, Codec, GroupSize, Width};
    use half::{bf16, f16};

    use super::*;

    fn wave(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7 + seed * 13) as f32 * 0.37).sin() * if i % 97 == 0 { 20.0 } else { 1.0 }).collect()
    }

    fn tensor(values: Values, row: usize, origin: Option<(u64, usize)>) -> Tensor {
        let origin = origin.map(|(call, rank)| Origin { communicator: "c".into(), call, rank, world: 4 });
        Tensor { name: format!("{origin:?}"), values, row, rounded_from: None, origin }
    }

    fn fp16(values: &[f32]) -> Values {
        Values::Fp16(values.iter().map(|x| f16::from_f32(*x)).collect())
    }

    fn legs(code: Code, bits: u8) -> Legs {
        let codec = Codec { code, ..Codec::plain(Width::new(bits).unwrap(), GroupSize::new(128).unwrap()) };
        Legs::new(codec, codec).unwrap()
    }

    #[test]
    fn the_table_is_what_the_specification_does_to_the_tensor() {
        // Both by wire's own functions: tile by tile for one quantization, the reference's all-reduce for the sum.
        let inputs: Vec<Vec<bf16>> =
            (0..3).map(|rank| wave(TILE_ELEMS + 900, rank).into_iter().map(bf16::from_f32).collect()).collect();
        let recorded = inputs.iter().enumerate().map(|(rank, x)| tensor(Values::Bf16(x.clone()), 1, Some((5, rank))));
        let (samples, left_out) = samples(recorded.collect(), 4, usize::MAX).unwrap();
        assert_eq!((samples.len(), samples[0].is_of_ranks, left_out.len()), (1, true, 0));
        for code in Code::ALL {
            let legs = legs(code, 4);
            let [row] = measure(&samples, &[legs], || {})[..] else { panic!("one row") };
            let (mut signal, mut noise, mut max_abs) = (0.0, 0.0, 0.0f64);
            for tile in inputs.iter().flat_map(|input| input.chunks(TILE_ELEMS)) {
                let mut payload = vec![0; legs.reduce.tile_bytes()];
                legs.reduce.encode_tile::<bf16>(&legs.reduce.enter(tile), &mut payload);
                let mut decoded = vec![bf16::ZERO; tile.len()];
                legs.reduce.decode_tile_to(&payload, &mut decoded);
                for (x, got) in tile.iter().zip(decoded) {
                    let error = x.to_f64() - got.to_f64();
                    (signal, noise) = (signal + x.to_f64().powi(2), noise + error * error);
                    max_abs = max_abs.max(error.abs());
                }
            }
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-12 * b.abs();
            assert!(close(row.once.relative_l2, (noise / signal).sqrt()) && row.once.max_abs == max_abs, "{code:?}");
            assert!(close(row.once.sqnr_db, 10.0 * (signal / noise).log10()), "{code:?}");

            let ranks: Vec<&[bf16]> = inputs.iter().map(Vec::as_slice).collect();
            let (mut signal, mut noise) = (0.0, 0.0);
            for (i, got) in reference::all_reduce(&ranks, Op::Sum, legs).iter().enumerate() {
                let exact: f64 = inputs.iter().map(|input| input[i].to_f64()).sum();
                (signal, noise) = (signal + exact * exact, noise + (exact - got.to_f64()).powi(2));
            }
            assert!(close(row.sum.relative_l2, (noise / signal).sqrt()), "{code:?}");
            assert_eq!(row.sum.relative_l2, row.sum.worst_relative_l2);
        }
    }

    #[test]
    fn several_samples_count_alike_whatever_their_size_and_the_worst_is_told() {
        let small: Vec<f32> = wave(8192, 1).iter().map(|x| x / 1000.0).collect();
        let both = vec![tensor(fp16(&wave(8192, 2)), 1, None), tensor(fp16(&small), 1, None)];
        let (both, _) = samples(both, 2, usize::MAX).unwrap();
        let legs = [legs(Code::Plain, 3), legs(Code::Plain, 8)];
        let mut n_ticks = 0;
        let rows = measure(&both, &legs, || n_ticks += 1);
        assert_eq!((rows.len(), n_ticks), (2, 4));
        for (row, legs) in rows.iter().zip(legs) {
            let each: Vec<f64> = both.iter().map(|sample| sample.measure(legs)[1].relative_l2()).collect();
            assert_eq!(row.sum.worst_relative_l2, each[0].max(each[1]));
            assert_eq!(row.sum.relative_l2, ((each[0] * each[0] + each[1] * each[1]) / 2.0).sqrt());
        }
        assert!(rows[1].sum.relative_l2 < rows[0].sum.relative_l2 / 10.0);
    }

    #[test]
    fn a_tensor_alone_is_cut_at_rows_where_it_has_enough() {
        let numbers: Vec<f32> = (0..70).map(|i| i as f32).collect();
        let parts =
            |row: usize, ranks: usize| cut(&tensor(fp16(&numbers), row, None), ranks).map(|sample| sample.inputs);
        assert_eq!(parts(10, 3).unwrap(), [fp16(&numbers[..20]), fp16(&numbers[20..40]), fp16(&numbers[40..60])]);
        assert_eq!(parts(70, 2).unwrap(), [fp16(&numbers[..35]), fp16(&numbers[35..])]);
        assert!(parts(1, 71).unwrap_err().contains("too few"));
    }

    #[test]
    fn whole_tiles_are_kept_evenly_spread() {
        let kept = |count, max| spread(count, max).map(|range| (range.start, range.end)).collect::<Vec<_>>();
        assert_eq!(kept(5000, 5000), [(0, 4096), (4096, 5000)]);
        assert_eq!(kept(40_960, 8192), [(0, 4096), (20_480, 24_576)]);
        assert_eq!(kept(10_000, 1), [(0, 4096)]);
        assert_eq!(kept(100, 1), [(0, 100)]);
    }

    #[test]
    fn what_cannot_be_measured_is_left_out_and_said() {
        let tensors = vec![
            tensor(fp16(&[1.0, f32::NAN, f32::INFINITY]), 1, None),
            tensor(fp16(&[0.0; 100]), 1, None),
            tensor(fp16(&[1.0]), 1, None),
            tensor(fp16(&[1.0; 10]), 1, Some((1, 0))),
            tensor(fp16(&[1.0; 11]), 1, Some((1, 1))),
            tensor(fp16(&[1.0; 12]), 1, Some((2, 1))),
        ];
        let (samples, left_out) = samples(tensors, 2, 1000).unwrap();
        assert_eq!((samples.len(), samples[0].is_of_ranks, samples[0].count), (1, false, 6), "a rank alone is cut");
        for (left_out, said) in
            left_out.iter().zip(["2 elements are NaN", "all zeros", "too few", "differ in type or length"])
        {
            assert!(left_out.contains(said), "{left_out}");
        }
        let none = super::samples(vec![tensor(fp16(&[0.0; 9]), 1, None)], 2, 1000).err().unwrap().to_string();
        assert!(none.contains("nothing to measure") && none.contains("all zeros"), "{none}");
        let twice = (0..2).map(|_| tensor(fp16(&[1.0; 9]), 1, Some((1, 1)))).collect();
        assert!(super::samples(twice, 2, 1000).err().unwrap().to_string().contains("the same input"));
    }
}

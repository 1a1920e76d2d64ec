//! `flashcomm codec`: what each width and code loses on tensors of the user's, and which one to take.
//!
//! Everything is computed by the specification (`wire/`), so there is no GPU in it: what the kernels do is the same, bit for
//! bit. Two things are measured on each all-reduce: every input quantized once, and the sum in two hops, which is what
//! a job would get.

mod measure;
mod plot;
mod read;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use flashcomm_wire::{Code, Codec, GroupSize, Legs, Width};
use serde::Serialize;

use self::measure::{Row, Sample, measure, samples};
use self::read::{Tensor, Values};
use super::client::rank::Dtype;
use super::plot::check_name;
use super::provenance::Provenance;
use super::{Bytes, progress, table};

/// Arguments.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Inputs that flashcomm run --record saved are summed over the ranks whose files are there. Any other tensor is \
                  cut into --ranks equal parts, by whole rows where it has enough, and these are summed.\n\n\
                  Exit code: 1 where --error is given and no code stays below it, or a file cannot be read."
)]
pub struct Args {
    /// Files of numpy (.npy: fp16, fp32, fp64) or .safetensors (fp16, bf16, fp32), or folders of them
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Widths, or reduce:gather as in 4:8
    #[arg(long, value_delimiter = ',', default_value = "8,7,6,5,4,3,2", value_parser = parse_widths)]
    bits: Vec<Widths>,
    /// Codes: plain, blocks
    #[arg(long, value_delimiter = ',', default_value = "plain,blocks", value_parser = parse_code)]
    codes: Vec<Code>,
    /// Elements that share a scale: 32, 64 or 128
    #[arg(long, value_delimiter = ',', default_value = "64", value_parser = parse_group)]
    group: Vec<GroupSize>,
    /// Ranks that a tensor is cut for, unless it was recorded of several
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(2..=64))]
    ranks: u64,
    /// What fp32 and fp64 are rounded to first
    #[arg(long, value_enum, default_value_t = Dtype::Fp16)]
    dtype: Dtype,
    /// Elements of each tensor that are measured at most: tiles of 4096, evenly spread
    #[arg(long, value_name = "N", default_value = "1M")]
    max_elements: Bytes,
    /// Name the code with the fewest bits whose sum is off by at most this: L2 of the error over L2 of the sum, in every
    /// all-reduce [default: 0.02]
    #[arg(long, value_name = "X", value_parser = parse_error)]
    error: Option<f64>,
    /// Write the table, and what it was measured on, to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw error over bits to this file, an SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

const DEFAULT_ERROR: f64 = 0.02;

/// Samples that are told one by one.
const MAX_TOLD: usize = 8;

/// `FLASHCOMM_BITS`.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Widths(Width, Width);

fn parse_widths(text: &str) -> Result<Widths, String> {
    let width = |text: &str| text.parse().ok().and_then(Width::new).filter(|width| !width.is_uncompressed());
    let (reduce, gather) = text.split_once(':').unwrap_or((text, text));
    let widths = width(reduce).zip(width(gather)).filter(|(reduce, gather)| reduce <= gather);
    let widths = widths.map(|(reduce, gather)| Widths(reduce, gather));
    widths
        .ok_or_else(|| format!("{text:?} is no width; it takes 2 to 8, or reduce:gather as in 4:8, the second no less"))
}

fn parse_code(text: &str) -> Result<Code, String> {
    Code::by_name(text)
        .ok_or_else(|| format!("there is no code {text:?}; there are {}", Code::ALL.map(Code::name).join(", ")))
}

fn parse_group(text: &str) -> Result<GroupSize, String> {
    text.parse()
        .ok()
        .and_then(GroupSize::new)
        .ok_or_else(|| format!("{text:?} is no group size; it takes 32, 64 or 128"))
}

fn parse_error(text: &str) -> Result<f64, String> {
    let error = text.parse().ok().filter(|error: &f64| error.is_finite() && *error > 0.0);
    error.ok_or_else(|| format!("{text:?} is no relative error; write for example 0.02"))
}

/// One line of the table.
#[derive(Clone, PartialEq, Debug, Serialize)]
struct Line {
    /// `FLASHCOMM_BITS`.
    bits: String,
    /// `FLASHCOMM_CODE`; `None`: 16 bits, as they are.
    code: Option<&'static str>,
    /// `FLASHCOMM_GROUP`; as above.
    group: Option<usize>,
    /// On the wire, parameters included, mean of the two hops.
    bits_per_element: f64,
    /// Bytes of 16 bits an element over those sent.
    smaller: f64,
    #[serde(flatten)]
    row: Row,
}

impl Line {
    fn of(legs: Legs, row: Row) -> Self {
        let codec = (!legs.reduce.width.is_uncompressed()).then_some(legs.reduce);
        let bits_per_element = (legs.reduce.bits_per_element() + legs.gather.bits_per_element()) / 2.0;
        Self {
            bits: legs.to_string(),
            code: codec.map(|codec| codec.code.name()),
            group: codec.map(|codec| codec.group.n_elems()),
            bits_per_element,
            smaller: 16.0 / bits_per_element,
            row,
        }
    }

    fn settings(&self) -> Option<Vec<String>> {
        let group = self.group? as u16;
        let mut lines = vec![format!("FLASHCOMM_BITS={}", self.bits), format!("FLASHCOMM_CODE={}", self.code?)];
        if group != flashcomm::tooling::settings::Config::default().legs.reduce.group.n_elems() as u16 {
            lines.push(format!("FLASHCOMM_GROUP={group}"));
        }
        Some(lines)
    }
}

/// The line with the fewest bits an element whose sum is off by at most `error` in every sample; of several the best.
fn recommend(lines: &[Line], error: f64) -> Option<&Line> {
    let cost = |line: &Line| (line.bits_per_element, line.row.sum.relative_l2);
    let fit = lines.iter().filter(|line| line.code.is_some() && line.row.sum.worst_relative_l2 <= error);
    fit.min_by(|a, b| cost(a).partial_cmp(&cost(b)).expect("numbers"))
}

/// Runs it; false where an error was asked for that no code meets.
pub fn run(args: &Args) -> Result<bool> {
    args.plot.as_deref().map(check_name).transpose()?;
    let mut left_out = Vec::new();
    let mut tensors: Vec<Tensor> = Vec::new();
    let files = read::files(&args.files)?;
    for file in &files {
        let (some, without) = read::read(file, args.dtype)?;
        tensors.extend(some);
        left_out.extend(without);
    }
    for rounded in ["fp32", "fp64"] {
        let of_type = || tensors.iter().filter(|tensor| tensor.rounded_from == Some(rounded));
        if let Some(first) = of_type().next() {
            let others =
                if of_type().count() > 1 { format!(" and {} more", of_type().count() - 1) } else { String::new() };
            println!("{}{others}: {rounded}, rounded to {} first (--dtype).", first.name, args.dtype);
        }
    }
    let (samples, without) = samples(tensors, args.ranks as usize, args.max_elements.0)?;
    left_out.extend(without);
    samples.iter().take(MAX_TOLD).for_each(|sample| println!("{}", describe(sample)));
    if samples.len() > MAX_TOLD {
        println!("and {} more.", samples.len() - MAX_TOLD);
    }
    left_out.iter().take(MAX_TOLD).for_each(|what| println!("Left out: {what}."));
    if left_out.len() > MAX_TOLD {
        println!("Left out: {} more.", left_out.len() - MAX_TOLD);
    }

    let codecs = codecs(args);
    let progress = progress(codecs.len() * samples.len());
    let (start, mut n_done) = (Instant::now(), 0);
    let rows = measure(&samples, &codecs, || {
        n_done += 1;
        if start.elapsed() > Duration::from_secs(1) {
            progress.set_position(n_done);
        }
    });
    progress.finish_and_clear();
    let lines: Vec<Line> = codecs.iter().zip(rows).map(|(legs, row)| Line::of(*legs, row)).collect();
    print_table(&lines, samples.len());

    let error = args.error.unwrap_or(DEFAULT_ERROR);
    let recommended = recommend(&lines, error);
    print_recommendation(recommended, error, samples.len());
    if let Some(path) = &args.json {
        write_json(path, &lines, &samples, &left_out, error, recommended)?;
    }
    if let Some(path) = &args.plot {
        plot::write(path, &lines, &subtitle(&samples), error)?;
    }
    Ok(recommended.is_some() || args.error.is_none())
}

/// What is measured; first of all 16 bits, to compare with.
fn codecs(args: &Args) -> Vec<Legs> {
    let plain = Codec::plain(Width::new(16).expect("a width"), args.group[0]);
    let mut codecs = vec![Legs { reduce: plain, gather: plain, batch_invariant: false }];
    for Widths(reduce, gather) in &args.bits {
        for code in &args.codes {
            for group in &args.group {
                // What has no kernels is no answer.
                let legs = Legs::choose(Some(*code), (*reduce, *gather), *group);
                codecs.extend(legs.filter(|legs| !codecs.contains(legs)));
            }
        }
    }
    codecs
}

fn dtype(sample: &Sample) -> Dtype {
    match sample.inputs[0] {
        Values::Fp16(_) => Dtype::Fp16,
        Values::Bf16(_) => Dtype::Bf16,
    }
}

fn describe(sample: &Sample) -> String {
    let Sample { name, is_of_ranks, inputs, count } = sample;
    let dtype = dtype(sample);
    let kept = sample.n_kept();
    let picked = if kept < *count { format!(", of which {kept} are measured") } else { String::new() };
    match is_of_ranks {
        true => format!("{name}: {dtype}, {count} elements of each{picked}."),
        false => format!("{name}: {dtype}, cut into {} inputs of {count} elements{picked}.", inputs.len()),
    }
}

fn subtitle(samples: &[Sample]) -> String {
    match samples {
        [one] => describe(one),
        several => format!("{} all-reduces, the first: {}", several.len(), describe(&several[0])),
    }
}

fn print_table(lines: &[Line], n_samples: usize) {
    let mut header = vec!["bits", "code", "group", "bits/el.", "smaller", "once L2", "dB", "sum L2", "dB", "max abs"];
    if n_samples > 1 {
        header.push("worst L2");
    }
    let mut table = table(&header);
    for line in lines {
        let Row { once, sum } = line.row;
        let mut cells = vec![
            line.bits.clone(),
            line.code.unwrap_or("-").into(),
            line.group.map_or("-".into(), |group| group.to_string()),
            format!("{:.3}", line.bits_per_element),
            format!("{:.2}x", line.smaller),
            format!("{:.5}", once.relative_l2),
            format!("{:.1}", once.sqnr_db),
            format!("{:.5}", sum.relative_l2),
            format!("{:.1}", sum.sqnr_db),
            format!("{:.3e}", sum.max_abs),
        ];
        if n_samples > 1 {
            cells.push(format!("{:.5}", sum.worst_relative_l2));
        }
        table.add_row(cells);
    }
    println!("\n{}\n", table.trim_fmt());
    println!("once: an input that is quantized once; sum, max abs: the sum in two hops, beside the exact one");
    println!("L2: the error's norm over that of what is exact; dB: the same as signal to noise");
    if n_samples > 1 {
        println!("L2, dB: root mean square over {n_samples} all-reduces; worst: of the worst one; max abs: of all");
    }
}

fn print_recommendation(recommended: Option<&Line>, error: f64, n_samples: usize) {
    let each = if n_samples > 1 { " in each all-reduce" } else { "" };
    match recommended.and_then(|line| Some((line, line.settings()?))) {
        Some((line, settings)) => {
            let (bits, worst) = (line.bits_per_element, line.row.sum.worst_relative_l2);
            println!(
                "\nThe fewest bits with an error of at most {error}{each}: {bits:.3} an element, error {worst:.5}.\n"
            );
            settings.iter().for_each(|setting| println!("  {setting}"));
        }
        None => println!("\nNo code here stays at an error of at most {error}{each}: add wider ones, or leave it off."),
    }
}

#[derive(Serialize)]
struct CodecReport<'a> {
    #[serde(flatten)]
    provenance: Provenance,
    format: u32,
    samples: Vec<Told<'a>>,
    left_out: &'a [String],
    lines: &'a [Line],
    error: f64,
    recommended: Option<&'a Line>,
}

/// A sample, in the report.
#[derive(Serialize)]
struct Told<'a> {
    name: &'a str,
    dtype: String,
    /// Whether the inputs are those of ranks, or parts of a tensor.
    recorded: bool,
    inputs: usize,
    /// Of each input.
    elements: usize,
    measured: usize,
}

fn write_json(
    path: &Path,
    lines: &[Line],
    samples: &[Sample],
    left_out: &[String],
    error: f64,
    recommended: Option<&Line>,
) -> Result<()> {
    let samples = samples.iter().map(|sample| Told {
        name: &sample.name,
        dtype: dtype(sample).to_string(),
        recorded: sample.is_of_ranks,
        inputs: sample.inputs.len(),
        elements: sample.count,
        measured: sample.n_kept(),
    });
    let provenance = Provenance::at(SystemTime::now());
    let report = CodecReport { provenance, format: 1, samples: samples.collect(), left_out, lines, error, recommended };
    let text = serde_json::to_string_pretty(&report)?;
    std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::measure::Loss;
    use super::*;

    fn line(bits: &str, code: Option<&'static str>, bits_per_element: f64, errors: (f64, f64)) -> Line {
        let loss = Loss { relative_l2: errors.0, sqnr_db: 0.0, max_abs: 0.0, worst_relative_l2: errors.1 };
        let group = code.map(|_| if code == Some("blocks") { 32 } else { 64 });
        Line { bits: bits.into(), code, group, bits_per_element, smaller: 1.0, row: Row { once: loss, sum: loss } }
    }

    #[test]
    fn the_fewest_bits_within_the_error_are_recommended() {
        let lines = [
            line("16", None, 16.0, (0.0, 0.0)),
            line("8", Some("plain"), 8.25, (0.005, 0.006)),
            line("7", Some("plain"), 6.75, (0.010, 0.012)),
            line("6", Some("plain"), 6.25, (0.015, 0.030)),
            line("5:7", Some("plain"), 6.25, (0.013, 0.020)),
            line("6", Some("blocks"), 6.25, (0.012, 0.019)),
            line("2", Some("plain"), 2.25, (f64::NAN, f64::NAN)),
        ];
        for (error, expected) in [
            (1.0, Some(("6", "blocks"))), // of equal bits the best
            (0.0195, Some(("6", "blocks"))),
            (0.015, Some(("7", "plain"))), // the mean would do for plain, its worst does not
            (0.006, Some(("8", "plain"))), // at most, not below
            (0.001, None),                 // 16 bits are no answer
        ] {
            let found = recommend(&lines, error).map(|line| (line.bits.as_str(), line.code.unwrap()));
            assert_eq!(found, expected, "{error}");
        }
        assert_eq!(recommend(&[], 1.0), None);
    }

    #[test]
    fn the_settings_to_use_leave_out_the_default_group() {
        let settings = |line: Line| line.settings();
        let expected = ["FLASHCOMM_BITS=4:8", "FLASHCOMM_CODE=plain"].map(String::from).to_vec();
        assert_eq!(settings(line("4:8", Some("plain"), 6.25, (0.0, 0.0))), Some(expected));
        let expected = ["FLASHCOMM_BITS=4", "FLASHCOMM_CODE=blocks", "FLASHCOMM_GROUP=32"].map(String::from).to_vec();
        assert_eq!(settings(line("4", Some("blocks"), 4.25, (0.0, 0.0))), Some(expected));
        assert_eq!(settings(line("16", None, 16.0, (0.0, 0.0))), None);
    }

    #[test]
    fn arguments_are_checked_by_name() {
        assert!(parse_widths("4:8").is_ok() && parse_widths("16").unwrap_err().contains("2 to 8"));
        assert!(parse_code("blocks").is_ok() && parse_code("spikes").unwrap_err().contains("plain, blocks"));
        assert!(parse_group("64").is_ok() && parse_group("100").unwrap_err().contains("32, 64 or 128"));
        assert!(parse_error("1e-3").is_ok());
        assert!(["0", "-1", "nan", "inf", "x"].iter().all(|text| parse_error(text).unwrap_err().contains("0.02")));
    }
}

//! `flashcomm demo`: one all-reduce at each width, by ranks that are processes, as applications start them.
//!
//! The inputs are normally distributed and the same in every run. The table says what the shim put on the wire (its own
//! count) and how far the result is from the sum taken in fp64; it proves that all ranks hold the same bits and that they
//! are those of the specification (`wire/`), and that an fp32 all-reduce went to the real NCCL as it was.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::client::job::{Job, Start};
use super::client::machine::{LibraryPaths, Machine, Wanted};
use super::client::party::{Assignment, Party, Role};
use super::client::rank::{Dtype, Rank};
use super::client::values::{self, Distance};
use super::plot::{Axis, BLACK, COLORS, Line, Look, Mark, Panel, Picture, check_name, decades};
use super::{Bytes, progress, table};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Ranks, each a process
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(2..=16))]
    ranks: u64,
    /// Widths, or reduce:gather as in 4:8; with a code as in 4-plain
    #[arg(long, value_delimiter = ',', default_value = "8,6,5,4,3,2")]
    bits: Vec<String>,
    /// Bytes that each rank sums
    #[arg(long, default_value = "8M")]
    size: Bytes,
    /// Element type
    #[arg(long, value_enum, default_value_t = Dtype::Fp16)]
    dtype: Dtype,
    /// Seed of the inputs
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Draw the error against the bits sent to this file, an SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Run on the simulator even if there is a GPU
    #[arg(long)]
    simulator: bool,
    #[command(flatten)]
    paths: LibraryPaths,
}

/// What the ranks do.
#[derive(Clone, Serialize, Deserialize)]
struct Task {
    n_bytes: usize,
    dtype: Dtype,
    seed: u64,
    /// `None`: nothing is compressed.
    bits: Option<String>,
}

/// What a rank has to say.
#[derive(Serialize, Deserialize)]
struct Answer {
    hash: u64,
    bytes_on_wire: u64,
    compressed: u64,
    forwarded: u64,
    /// Whether the fp32 all-reduce came to the exact sum.
    exact: bool,
    /// Rank 0's alone.
    check: Option<Check>,
}

#[derive(Serialize, Deserialize)]
struct Check {
    distance: Distance,
    /// `None` where nothing was compressed.
    is_reference: Option<bool>,
}

const HEADER: [&str; 10] =
    ["bits", "sent", "smaller", "rel. L2", "SQNR dB", "max abs", "same bits", "reference", "compressed", "forwarded"];

/// Elements of the fp32 all-reduce that is forwarded.
const FORWARDED_ELEMS: usize = 1000;
/// How long one width may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs it; whether everything was as it must be.
pub fn run(args: &Args) -> Result<bool> {
    ensure!(args.size.0 >= args.dtype.n_bytes(), "--size {} holds no element", args.size);
    for bits in &args.bits {
        values::legs(bits)?;
    }
    args.plot.as_deref().map(check_name).transpose()?;
    let machine = Machine::find(&args.paths, if args.simulator { Wanted::Simulator } else { Wanted::Any })?;
    if let Some(why) = &machine.no_gpu {
        println!("No GPU here ({why}).");
    }
    println!("Running on {}.", machine.describe());
    let count = args.size.0 / args.dtype.n_bytes();
    println!(
        "{} processes call ncclAllReduce (sum, {}, {count} normally distributed elements, {} bytes) through {}.\n",
        args.ranks,
        args.dtype,
        args.size,
        machine.shim.display()
    );

    let mut table = table(&HEADER);
    let progress = progress(args.bits.len() + 1);
    let (mut problems, mut points) = (Vec::new(), Vec::new());
    for bits in [None].into_iter().chain(args.bits.iter().map(Some)) {
        progress.set_message(bits.map_or("plain NCCL".into(), |bits| format!("{bits} bits")));
        let (answers, stderr) = one(&machine, args, bits)?;
        let row = Row::of(&answers, args, bits);
        table.add_row(row.cells);
        points.push(row.point);
        problems.extend(row.problems);
        problems.extend(stderr);
        progress.inc(1);
    }
    progress.finish_and_clear();
    println!("{}\n", table.trim_fmt());
    if problems.is_empty() {
        println!(
            "sent: by a rank in all hops, as the shim counts; first row: in a ring all-reduce\n\
             rel. L2, SQNR, max abs: the error against the sum taken in fp64\n\
             same bits: on all {} ranks; reference: bit for bit what the specification (wire/) gives\n\
             compressed, forwarded: calls of a rank; forwarded here: an fp32 sum, which stayed exact",
            args.ranks
        );
    }
    problems.iter().for_each(|problem| println!("! {problem}"));
    if let Some(path) = &args.plot {
        draw(path, args, points, &machine.describe())?;
    }
    Ok(problems.is_empty())
}

/// The error of each width against what it sends.
fn draw(path: &Path, args: &Args, points: Vec<Point>, place: &str) -> Result<()> {
    let (plain, mut widths): (Vec<Point>, Vec<Point>) =
        points.into_iter().partition(|point| point.name.starts_with("16"));
    widths.sort_by(|a, b| a.bits.total_cmp(&b.bits));
    let line = |name: &str, look: Look, points: &[Point], labels: Vec<String>| Line {
        name: name.into(),
        look,
        points: points.iter().map(|point| (point.bits, point.relative_l2)).collect(),
        labels,
    };
    let labels = widths.iter().map(|point| format!("{} ({:.2}x smaller)", point.name, 16.0 / point.bits)).collect();
    let lines = vec![
        line("NCCL, 16 bits", Look { color: BLACK, mark: Mark::Cross }, &plain, vec!["rounding".into()]),
        line("flashcomm, by FLASHCOMM_BITS", Look { color: COLORS[0], mark: Mark::Circle }, &widths, labels),
    ];
    // Every line but one has points; a width of which nothing was sent has no place.
    let errors = lines.iter().flat_map(|line| &line.points).map(|(_, error)| *error).filter(|error| *error > 0.0);
    let y = Axis {
        label: "relative L2 error of the sum".into(),
        ticks: decades(errors, false),
        text: |error| error.to_string(),
        log: true,
    };
    let ticks = (1..=9).map(|i| 2.0 * f64::from(i)).collect();
    let x = Axis {
        label: "bits sent for each element, scales included".into(),
        ticks,
        text: |bits| bits.to_string(),
        log: false,
    };
    let picture = Picture {
        title: "One all-reduce: error against bits".into(),
        subtitle: format!(
            "{} ranks, {}, {} of normally distributed elements; {place}",
            args.ranks, args.dtype, args.size
        ),
        panels: vec![Panel { title: String::new(), x, y, level: None, lines }],
        columns: 1,
        panel_px: (820, 420),
    };
    picture.write(path)
}

/// One width, in processes of its own.
fn one(machine: &Machine, args: &Args, bits: Option<&String>) -> Result<(Vec<Answer>, Vec<String>)> {
    let mut settings = vec![
        ("FLASHCOMM_ENABLE", if bits.is_some() { "1" } else { "0" }),
        ("FLASHCOMM_MIN_BYTES", "0"),
        ("FLASHCOMM_EXACT_MAX_BYTES", "0"), // the float sum stays NCCL's: this is about widths
        ("FLASHCOMM_TUNE", "off"),
    ];
    let group = values::GROUP.to_string();
    settings.extend([("FLASHCOMM_GROUP", group.as_str()), ("FLASHCOMM_DTYPES", "fp16,bf16")]);
    if let Some((bits, code)) = bits.map(|bits| values::bits_and_code(bits)) {
        settings.extend([("FLASHCOMM_BITS", bits), ("FLASHCOMM_CODE", code)]);
    }
    let settings = settings.into_iter().map(|(name, value)| (name.into(), value.into())).collect();
    let world = args.ranks as usize;
    let start = Start { role: Role::Demo, world, processes: true, shim: true, settings, limit: LIMIT };
    let mut job = Job::start(machine, &start)?;
    job.answers::<Option<Answer>>(LIMIT)?;
    let task = Task { n_bytes: args.size.0, dtype: args.dtype, seed: args.seed, bits: bits.cloned() };
    let answers: Vec<Option<Answer>> = job.ask(&task, LIMIT)?;
    Ok((answers.into_iter().flatten().collect(), job.end(LIMIT)?))
}

/// In a child: the rank.
pub fn child(told: Assignment) -> Result<()> {
    let party = Party::new(told)?;
    party.run(|_| Ok(((), None)), |rank, (), task: Task| perform(rank, &task).map(Some));
    Ok(())
}

fn perform(rank: &Rank, task: &Task) -> Result<Answer> {
    let [send, receive] = [rank.allocate(task.n_bytes)?, rank.allocate(task.n_bytes)?];
    rank.write(send, &values::input(task.n_bytes, task.dtype, task.seed, rank.rank))?;
    rank.all_reduce(send, receive, task.n_bytes, task.dtype)?;
    let output = rank.read(receive, task.n_bytes)?;

    let exact = forwards_fp32(rank)?;
    let check = (rank.rank == 0).then(|| -> Result<Check> {
        let inputs = values::inputs(task.n_bytes, task.dtype, task.seed, rank.world);
        let legs = task.bits.as_ref().map(|bits| values::legs(bits)).transpose()?;
        let is_reference = legs.map(|legs| values::reference(&inputs, task.dtype, legs) == output);
        Ok(Check { distance: values::distance(&inputs, &output, task.dtype), is_reference })
    });
    let stats = rank.nccl.stats();
    Ok(Answer {
        hash: values::hash(&output),
        bytes_on_wire: stats.as_ref().map_or(0, |stats| stats.bytesOnWire),
        compressed: stats.as_ref().map_or(0, |stats| stats.allReducesCompressed),
        forwarded: stats.as_ref().map_or(0, |stats| stats.allReducesForwarded),
        exact,
        check: check.transpose()?,
    })
}

/// Sums whole numbers in fp32; whether the sum is exact.
fn forwards_fp32(rank: &Rank) -> Result<bool> {
    let n_bytes = FORWARDED_ELEMS * 4;
    let at = rank.allocate(n_bytes)?;
    let mine: Vec<u8> = (0..FORWARDED_ELEMS).flat_map(|i| ((i + rank.rank) as f32).to_le_bytes()).collect();
    rank.write(at, &mine)?;
    rank.all_reduce(at, at, n_bytes, Dtype::Fp32)?;
    let ranks = rank.world * (rank.world - 1) / 2;
    let expected = (0..FORWARDED_ELEMS).flat_map(|i| ((i * rank.world + ranks) as f32).to_le_bytes());
    Ok(rank.read(at, n_bytes)?.into_iter().eq(expected))
}

/// A width in the picture.
struct Point {
    name: String,
    /// Sent for each element.
    bits: f64,
    relative_l2: f64,
}

struct Row {
    cells: Vec<String>,
    point: Point,
    problems: Vec<String>,
}

impl Row {
    fn of(answers: &[Answer], args: &Args, bits: Option<&String>) -> Self {
        let name = bits.map_or("16 (NCCL)".into(), |bits| bits.to_string());
        let first = &answers[0];
        let check = first.check.as_ref().expect("rank 0 checks");
        let same = answers.iter().all(|answer| answer.hash == first.hash);
        // What a ring all-reduce of the whole type sends; NCCL's other algorithms send at least as much.
        let ranks = args.ranks as f64;
        let whole = 2.0 * (ranks - 1.0) / ranks * args.size.0 as f64;
        let sent = if bits.is_some() { first.bytes_on_wire as f64 } else { whole };

        let mut problems = Vec::new();
        let mut expect = |holds: bool, what: &str| {
            if !holds {
                problems.push(format!("{name}: {what}"));
            }
        };
        expect(same, "the ranks hold different results");
        expect(check.is_reference != Some(false), "the result is not that of the specification");
        expect(answers.iter().all(|answer| answer.exact), "the forwarded fp32 sum is not exact");
        let (compressed, forwarded) = if bits.is_some() { (1, 1) } else { (0, 2) };
        expect(
            answers.iter().all(|answer| answer.compressed == compressed && answer.forwarded == forwarded),
            "the shim compressed or forwarded something else; its log above or FLASHCOMM_LOG=info says why",
        );

        let yes = |holds: bool| if holds { "yes" } else { "NO" }.to_string();
        let cells = vec![
            name.clone(),
            format!("{:.2} MiB", sent / f64::from(1 << 20)),
            format!("{:.2}x", whole / sent),
            format!("{:.5}", check.distance.relative_l2),
            format!("{:.1}", check.distance.sqnr_db),
            format!("{:.4}", check.distance.max_abs),
            yes(same),
            check.is_reference.map_or("-".into(), yes),
            first.compressed.to_string(),
            first.forwarded.to_string(),
        ];
        let point = Point { name, bits: 16.0 * sent / whole, relative_l2: check.distance.relative_l2 };
        Row { cells, point, problems }
    }
}

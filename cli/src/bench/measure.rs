//! In a child: a rank measures.
//!
//! A batch is `k` all-reduces issued back to back (or a graph of them), between two events on the stream; `k` is chosen
//! so that a batch takes some milliseconds. Before the first event comes one more all-reduce: it ends on all ranks at
//! about the same time, so the ranks' hosts, which come from a barrier at different times, are not in what is measured.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::client::api::Ptr;
use crate::client::party::{Assignment, Party};
use crate::client::rank::{Dtype, Rank};
use crate::client::values;

/// What to measure.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Task {
    /// Bytes that each rank sums.
    pub n_bytes: usize,
    /// Bytes of the largest task of the job.
    pub max_bytes: usize,
    /// Of what type.
    pub dtype: Dtype,
    /// Whether a batch is a captured graph.
    pub graph: bool,
    /// Batches to time.
    pub batches: usize,
    /// Microseconds that a batch takes at least.
    pub batch_us: f64,
    /// Whether to look at the results before and after.
    pub check: Check,
}

/// How results are checked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Check {
    /// Not at all.
    No,
    /// The same bits on all ranks, before the measurement and after it.
    SameBits,
    /// Those of the specification, too: at this `FLASHCOMM_BITS` where the shim compresses, of an
    /// exact sum where it sums exactly. What it forwards has none.
    Reference(String),
}

/// What the shim did with the all-reduces of a measurement.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "they say it")]
pub enum Route {
    Exact,
    Compressed,
    Forwarded,
}

/// A rank's answer.
#[derive(Debug, Serialize, Deserialize)]
pub struct Measured {
    /// Microseconds of one all-reduce, by batch.
    pub us: Vec<f64>,
    /// All-reduces of a batch.
    pub per_batch: usize,
    /// Hashes of the results before and after.
    pub hashes: Option<[u64; 2]>,
    /// The hash that they must have; from rank 0.
    pub reference: Option<u64>,
    /// What the shim did with all of them in this process; `None` for the real NCCL, and where they differ.
    pub route: Option<Route>,
    /// All-reduces that the shim forwarded in this process.
    pub forwarded: u64,
}

const SEED: u64 = 1;
/// All-reduces before anything is measured.
const WARM_UP: usize = 3;
/// All-reduces by which `k` is chosen.
const TRIAL: usize = 4;
/// The largest `k`: what a stream takes without making its host wait.
const MAX_PER_BATCH: f64 = 400.0;

/// Where a rank's data is.
struct Buffers {
    send: Ptr,
    receive: Ptr,
    dtype: Dtype,
}

/// Runs the ranks of this process.
pub fn child(told: Assignment) -> Result<()> {
    Party::new(told)?.run(|_| Ok((None, None)), |rank, buffers, task: Task| perform(rank, buffers, &task).map(Some));
    Ok(())
}

fn perform(rank: &Rank, buffers: &mut Option<Buffers>, task: &Task) -> Result<Measured> {
    let &Task { n_bytes, dtype, .. } = task;
    let (send, receive) = prepare(rank, buffers, task)?;
    rank.meet(&())?; // after all allocations
    let before = rank.nccl.stats();
    rank.meet(&())?; // and before all calls
    let issue = |n: usize| (0..n).try_for_each(|_| rank.all_reduce(send, receive, n_bytes, dtype));
    let hash = || -> Result<u64> { Ok(values::hash(&rank.read(receive, n_bytes)?)) };

    issue(1)?;
    let first = (task.check != Check::No).then(hash).transpose()?;
    issue(WARM_UP)?;
    let per_batch = choose(rank, task.batch_us, issue)?;
    let graph = if task.graph { Some(rank.capture(|| issue(per_batch))?) } else { None };
    let batch = || match &graph {
        Some(graph) => rank.launch(graph),
        None => issue(per_batch),
    };
    rank.meet(&())?;
    batch()?;
    rank.wait()?;

    let mut us = Vec::new();
    let (start, end) = (rank.event()?, rank.event()?);
    for _ in 0..task.batches {
        rank.meet(&())?;
        issue(1)?;
        rank.record(start)?;
        batch()?;
        rank.record(end)?;
        rank.wait()?;
        us.push(rank.elapsed_us(start, end)? / per_batch as f64);
    }
    let last = (task.check != Check::No).then(hash).transpose()?;
    rank.meet(&())?;
    let after = rank.nccl.stats();
    if let Some(graph) = graph {
        rank.drop_graph(graph)?;
    }

    let counts = before.zip(after).map_or([0; 3], |(before, after)| {
        [
            after.allReducesExact - before.allReducesExact,
            after.allReducesCompressed - before.allReducesCompressed,
            after.allReducesForwarded - before.allReducesForwarded,
        ]
    });
    let route = Route::of(counts);
    let reference = match &task.check {
        Check::Reference(bits) if rank.rank == 0 => {
            let inputs = || values::inputs(n_bytes, dtype, SEED, rank.world);
            let expected = match route {
                Some(Route::Exact) => Some(values::exact(&inputs(), dtype)),
                Some(Route::Compressed) => Some(values::reference(&inputs(), dtype, values::legs(bits)?)),
                Some(Route::Forwarded) | None => None,
            };
            expected.as_deref().map(values::hash)
        }
        _ => None,
    };
    let hashes = first.zip(last).map(Into::into);
    Ok(Measured { us, per_batch, hashes, reference, route, forwarded: counts[2] })
}

impl Route {
    /// Of so many that were exact, compressed and forwarded.
    fn of(counts: [u64; 3]) -> Option<Self> {
        match counts.map(|n| n > 0) {
            [true, false, false] => Some(Route::Exact),
            [false, true, false] => Some(Route::Compressed),
            [false, false, true] => Some(Route::Forwarded),
            _ => None,
        }
    }
}

/// The rank's buffers, filled for this type: made at the first task.
fn prepare(rank: &Rank, buffers: &mut Option<Buffers>, task: &Task) -> Result<(Ptr, Ptr)> {
    let (send, receive) = match buffers {
        Some(buffers) if buffers.dtype == task.dtype => return Ok((buffers.send, buffers.receive)),
        Some(buffers) => (buffers.send, buffers.receive),
        None => (rank.allocate(task.max_bytes)?, rank.allocate(task.max_bytes)?),
    };
    rank.write(send, &values::input(task.max_bytes, task.dtype, SEED, rank.rank))?;
    *buffers = Some(Buffers { send, receive, dtype: task.dtype });
    Ok((send, receive))
}

/// How many all-reduces make a batch of `batch_us`; the same on all ranks.
fn choose(rank: &Rank, batch_us: f64, issue: impl Fn(usize) -> Result<()>) -> Result<usize> {
    let (start, end) = (rank.event()?, rank.event()?);
    rank.meet(&())?;
    issue(1)?;
    rank.record(start)?;
    issue(TRIAL)?;
    rank.record(end)?;
    rank.wait()?;
    let each = rank.meet(&(rank.elapsed_us(start, end)? / TRIAL as f64))?;
    let slowest = each.into_iter().fold(0.0, f64::max);
    ensure!(slowest.is_finite(), "events without a time");
    Ok((batch_us / slowest.max(0.1)).ceil().clamp(1.0, MAX_PER_BATCH) as usize)
}

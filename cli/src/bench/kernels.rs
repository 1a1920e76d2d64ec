//! `bench --kernels`: bytes per second of the quantize and dequantize kernels alone, beside a device copy of the same run.
//!
//! Bytes read plus bytes written, medians of timed batches of launches.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use flashcomm::tooling::cuda::{self, Context, DeviceMemory, PinnedMemory, Stream, sys};
use flashcomm::tooling::kernels::{ElementType, Kernels, Piece};
use flashcomm_wire::{Code, Codec, GroupSize, Legs, Plan, TILE_ELEMS, Width};
use serde::{Deserialize, Serialize};

use crate::client::job::{Job, Start};
use crate::client::machine::Machine;
use crate::client::party::{Assignment, Party, Role};
use crate::client::rank::Dtype;
use crate::client::values;

/// What was measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Speeds {
    /// Bytes of the fp16 or bf16 side.
    pub n_bytes: usize,
    /// The device copy, TB/s.
    pub copy_tb_s: f64,
    /// The link to pinned host memory, both directions at once and added up, GB/s.
    pub host_link: HostLink,
    /// The kernels.
    pub kernels: Vec<Speed>,
}

/// Bytes per second between the device and pinned host memory, those read and those written.
#[derive(Debug, Serialize, Deserialize)]
pub struct HostLink {
    /// By copies in both directions at once.
    pub copies_gb_s: f64,
    /// By a kernel that reads and writes as those of the exchange `host` do: quantize at 16 bits, which copies.
    pub kernel_gb_s: f64,
}

/// One kernel.
#[derive(Debug, Serialize, Deserialize)]
pub struct Speed {
    /// Its name.
    pub kernel: String,
    /// Element type.
    pub dtype: String,
    /// Width.
    pub bits: u8,
    /// What the bits say.
    pub code: String,
    /// Microseconds of a launch.
    pub us: f64,
    /// Bytes read and written, TB/s.
    pub tb_s: f64,
    /// The same over the copy's.
    pub of_copy: f64,
}

/// How long it may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Measures on the first GPU.
pub fn measure(machine: &Machine) -> Result<Speeds> {
    let mut job = Job::start(machine, &Start { role: Role::Kernels, limit: LIMIT, ..Start::default() })?;
    job.answers(LIMIT)?.pop().context("one answer")
}

/// In a child.
pub fn child(told: Assignment) -> Result<()> {
    // What the simulator can do, only shows that this works.
    let extent = if told.simulated {
        Extent { n_bytes: 64 << 10, launches: 1, batches: 3 }
    } else {
        Extent { n_bytes: 256 << 20, launches: 10, batches: 30 }
    };
    Party::new(told)?.answer_alone(&speeds(&extent)?)
}

/// How much is measured.
struct Extent {
    n_bytes: usize,
    launches: usize,
    batches: usize,
}

fn speeds(extent: &Extent) -> Result<Speeds> {
    let n_bytes = extent.n_bytes;
    cuda::init()?;
    let context = Context::retain(0)?;
    let _entered = context.enter()?;
    let stream = Stream::new()?;
    let (a, b) = (DeviceMemory::new(2 * n_bytes)?, DeviceMemory::new(2 * n_bytes)?);
    let noise = values::input(n_bytes, Dtype::Fp16, 1, 0);
    a.write(0, &noise, &stream)?;
    a.write(n_bytes, &noise, &stream)?;

    let copy = median_s(extent, &stream, || {
        let (to, from) = (b.at(0) as u64, a.at(0) as u64);
        // SAFETY: both ranges are allocated.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, n_bytes, stream.handle()) };
        ensure!(result == sys::CUresult::CUDA_SUCCESS, "a device copy answers {result:?}");
        Ok(())
    })?;
    let copy_rate = 2.0 * n_bytes as f64 / copy;
    let host_link = host_link(extent, &stream, a.at(0) as u64, b.at(0) as u64)?;
    let mut kernels = Vec::new();
    for (bits, code) in (2..=8).flat_map(|bits| [Code::Plain, Code::Blocks].map(|code| (bits, code))) {
        let (legs, codec) = legs(bits, code);
        let entries = Kernels::load(0, legs, 2)?;
        let payload = n_bytes / 2 / TILE_ELEMS * codec.tile_bytes();
        // Between two ranks, quantize sends all of the `n_bytes`.
        let two = Plan::new(n_bytes / 2, 2, legs, usize::MAX)?;
        let one = Plan::new(n_bytes / 2, 1, legs, usize::MAX)?;
        for element in ElementType::CODED {
            let quantize = median_s(extent, &stream, || {
                let piece = Piece { plan: &two, slice: 0, element, scale: 1.0 };
                // SAFETY: both buffers are large enough.
                Ok(unsafe { entries.quantize(piece, 1, a.at(0), b.at(0), stream.handle()) }?)
            })?;
            let dequantize = median_s(extent, &stream, || {
                let piece = Piece { plan: &one, slice: 0, element, scale: 1.0 };
                // SAFETY: both buffers are large enough.
                Ok(unsafe { entries.dequantize(piece, b.at(0), b.at(n_bytes), stream.handle()) }?)
            })?;
            for (kernel, seconds) in [("quantize", quantize), ("dequantize", dequantize)] {
                let rate = (n_bytes + payload) as f64 / seconds;
                kernels.push(Speed {
                    kernel: kernel.into(),
                    dtype: element.name().into(),
                    bits,
                    code: code.name().into(),
                    us: seconds * 1e6,
                    tb_s: rate / 1e12,
                    of_copy: rate / copy_rate,
                });
            }
        }
    }
    Ok(Speeds { n_bytes, copy_tb_s: copy_rate / 1e12, host_link, kernels })
}

/// `from`, `to`: device memory of at least a quarter of the extent.
fn host_link(extent: &Extent, stream: &Stream, from: u64, to: u64) -> Result<HostLink> {
    let n_bytes = extent.n_bytes / 4;
    let (down, up) = (PinnedMemory::new(n_bytes)?, PinnedMemory::new(n_bytes)?);
    let back = Stream::new()?;
    let copies = median_s(extent, stream, || {
        // SAFETY: all ranges are allocated, the host's pinned.
        let results = unsafe {
            [
                sys::cuMemcpyDtoHAsync_v2(down.address(), from, n_bytes, stream.handle()),
                sys::cuMemcpyHtoDAsync_v2(to, up.address(), n_bytes, back.handle()),
            ]
        };
        ensure!(results == [sys::CUresult::CUDA_SUCCESS; 2], "copies to and from the host answer {results:?}");
        Ok(back.synchronize()?)
    })?;
    let (legs, _) = legs(16, Code::Plain);
    let (entries, two) = (Kernels::load(0, legs, 2)?, Plan::new(n_bytes, 2, legs, usize::MAX)?);
    let kernel = median_s(extent, stream, || {
        let piece = Piece { plan: &two, slice: 0, element: ElementType::Fp16, scale: 1.0 };
        // SAFETY: of two ranks' chunks the other's is sent, of `n_bytes`, which both buffers hold.
        Ok(unsafe { entries.quantize(piece, 1, up.address(), down.address(), stream.handle()) }?)
    })?;
    let rate = |seconds: f64| 2.0 * n_bytes as f64 / seconds / 1e9;
    Ok(HostLink { copies_gb_s: rate(copies), kernel_gb_s: rate(kernel) })
}

fn legs(bits: u8, code: Code) -> (Legs, Codec) {
    let (width, group) = (Width::new(bits).expect("a width"), GroupSize::new(values::GROUP).expect("a size"));
    let legs = Legs::choose(Some(code), (width, width), group).expect("every code takes equal widths");
    (legs, legs.reduce)
}

/// Median seconds of one launch, after three batches that warm up.
fn median_s(extent: &Extent, stream: &Stream, mut launch: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut times = Vec::new();
    for _ in 0..extent.batches + 3 {
        stream.synchronize()?;
        let start = Instant::now();
        (0..extent.launches).try_for_each(|_| launch())?;
        stream.synchronize()?;
        times.push(start.elapsed().as_secs_f64() / extent.launches as f64);
    }
    Ok(super::report::median(&times[3..]))
}

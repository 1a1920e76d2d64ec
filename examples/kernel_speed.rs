//! Bytes per second of the quantize and dequantize kernels on 256 MiB of fp16, beside a device copy of the same run.
//!
//! Prints JSON: medians of 30 timed batches of 10 launches, bytes read plus bytes written.

use std::time::Instant;

use cudarc::driver::sys;
use flashcomm::cuda::{self, Context, DeviceMemory, Stream};
use flashcomm::kernels::{ElementType, Kernels, Piece};
use flashcomm_wire::{Codec, GroupSize, Legs, Plan, Width};

const N_BYTES: usize = 256 << 20;
const LAUNCHES: usize = 10;

/// Median seconds of one launch.
fn median(stream: &Stream, mut launch: impl FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..33)
        .map(|_| {
            stream.synchronize().expect("synchronize");
            let start = Instant::now();
            (0..LAUNCHES).for_each(|_| launch());
            stream.synchronize().expect("synchronize");
            start.elapsed().as_secs_f64() / LAUNCHES as f64
        })
        .skip(3)
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    cuda::init().expect("a CUDA driver");
    let context = Context::retain(0).expect("a GPU");
    let _entered = context.enter().expect("its context");
    let stream = Stream::new().expect("a stream");
    let (a, b) = (DeviceMemory::new(2 * N_BYTES).expect("memory"), DeviceMemory::new(2 * N_BYTES).expect("memory"));
    let noise: Vec<u8> = (0..N_BYTES as u32 / 2)
        .flat_map(|i| {
            let x = i.wrapping_mul(2654435761) >> 16;
            half::f16::from_f32((x % 4001) as f32 / 1000.0 - 2.0).to_le_bytes()
        })
        .collect();
    a.write(0, &noise, &stream).expect("write");
    a.write(N_BYTES, &noise, &stream).expect("write");

    let copy = median(&stream, || {
        let (to, from) = (b.at(0) as u64, a.at(0) as u64);
        // SAFETY: both ranges are allocated.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, N_BYTES, stream.handle()) };
        assert_eq!(result, sys::CUresult::CUDA_SUCCESS);
    });
    let copy_rate = 2.0 * N_BYTES as f64 / copy;
    println!("{{\"n_bytes\": {N_BYTES}, \"copy_tb_s\": {:.3}, \"kernels\": [", copy_rate / 1e12);
    for bits in 2..=8 {
        let codec = Codec { width: Width::new(bits).unwrap(), group: GroupSize::new(128).unwrap() };
        let legs = Legs { reduce: codec, gather: codec };
        let kernels = Kernels::load(0, legs).expect("kernels");
        let payload = N_BYTES / 2 / 4096 * codec.tile_bytes();
        for element in ElementType::ALL {
            // Of two ranks' chunks, quantize sends one: 256 MiB.
            let two = Plan::new(N_BYTES, 2, legs, 4 << 30).expect("plan");
            let one = Plan::new(N_BYTES / 2, 1, legs, 4 << 30).expect("plan");
            let quantize = median(&stream, || {
                let piece = Piece { plan: &two, slice: 0, element };
                // SAFETY: both buffers are large enough.
                unsafe { kernels.quantize(piece, 1, a.at(0), b.at(0), stream.handle()) }.expect("launch");
            });
            let dequantize = median(&stream, || {
                let piece = Piece { plan: &one, slice: 0, element };
                // SAFETY: both buffers are large enough.
                unsafe { kernels.dequantize(piece, b.at(0), b.at(N_BYTES), stream.handle()) }.expect("launch");
            });
            for (name, seconds) in [("quantize", quantize), ("dequantize", dequantize)] {
                let rate = (N_BYTES + payload) as f64 / seconds;
                println!(
                    "  {{\"kernel\": \"{name}\", \"dtype\": \"{}\", \"bits\": {bits}, \"us\": {:.1}, \"tb_s\": {:.3}, \
                     \"of_copy\": {:.3}}},",
                    element.name(),
                    seconds * 1e6,
                    rate / 1e12,
                    rate / copy_rate
                );
            }
        }
    }
    println!("  null]}}");
}

//! The kernels against the scalar codec of `wire/`, bit for bit, on a GPU.
//!
//! Where there is no GPU these tests say so and pass; `FLASHCOMM_REQUIRE_GPU=1` turns that into a failure.

#![allow(clippy::needless_range_loop, reason = "ranks index more than the inputs")]

use std::ffi::c_void;
use std::sync::{Mutex, MutexGuard, PoisonError};

use flashcomm::tooling::cuda::{self, Context, DeviceMemory, Stream};
use flashcomm::tooling::kernels::{ElementType, Kernels, Piece};
use flashcomm_wire::{Code, Codec, Element, GroupSize, Legs, Plan, TILE_ELEMS, Width};
use half::{bf16, f16};

/// Of the test that has the GPU: what another frees would wait for kernels, which may wait for what is launched after that.
static ALONE: Mutex<()> = Mutex::new(());

/// The first device for the calling test alone, or `None` with a word about it.
pub fn gpu() -> Option<(Context, MutexGuard<'static, ()>)> {
    let found = cuda::init().is_ok() && cuda::device_count().is_ok_and(|n| n > 0);
    if found {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        return Some((Context::retain(0).expect("device 0"), alone));
    }
    assert!(std::env::var_os("FLASHCOMM_REQUIRE_GPU").is_none(), "FLASHCOMM_REQUIRE_GPU is set and there is no GPU");
    eprintln!("SKIPPED: no GPU on this machine, the kernels were not run");
    None
}

pub fn legs(code: Code, reduce: u8, gather: u8, group: u16) -> Legs {
    let width = |bits| Width::new(bits).unwrap();
    Legs::choose(Some(code), (width(reduce), width(gather)), GroupSize::new(group).unwrap()).unwrap()
}

/// A small fast generator; the seed is in the failure's message.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 ^ (self.0 >> 29)) >> 16
    }
}

/// Adversarial and ordinary elements, in stretches: bell-like, any bits, subnormal, constant, zeros of both signs,
/// extremes, octets of equal elements, hot elements, and now and then a NaN, an infinity or what is too large for a code.
pub fn elements<E: Element>(count: usize, seed: u64) -> Vec<E> {
    let mut random = Random(seed);
    let mut out = Vec::with_capacity(count);
    while out.len() < count {
        let stretch = 1 + random.next() as usize % 700;
        let kind = random.next() % 11;
        let fixed = E::from_bits(random.next() as u16);
        let scale = (random.next() % 1000) as f32 / 50.0;
        for _ in 0..stretch {
            let unit = (0..4).map(|_| (random.next() % 2001) as f32 / 1000.0 - 1.0).sum::<f32>();
            let any = E::from_bits(random.next() as u16);
            let x = match kind {
                0..=3 => E::from_f32_nearest(unit * scale),
                4 if any.to_f32().is_finite() => any,
                4 => E::from_f32_nearest(0.0),
                5 => E::from_bits((random.next() % 300) as u16 | (random.next() as u16 & 0x8000)),
                6 if fixed.to_f32().is_finite() => fixed,
                6 => E::from_f32_nearest(-0.0),
                7 => E::from_bits((random.next() as u16) & 0x8000),
                // The same of every rank, so that sums are constant octets, too; every third is -0.
                8 => match out.len() / 8 {
                    octet if octet % 3 == 0 => E::from_bits(0x8000),
                    octet => E::from_f32_nearest((octet % 997) as f32 / 8.0 - 50.0),
                },
                // Some at the same places of every rank, so that sums have bands, too.
                9 => {
                    let is_hot = out.len().is_multiple_of(61) || random.next().is_multiple_of(97);
                    E::from_f32_nearest(if is_hot { (unit + 1.0) * scale * scale } else { unit })
                }
                _ => match random.next() % 400 {
                    0 => E::CANONICAL_NAN,
                    1 => E::from_f32_nearest(f32::INFINITY),
                    2 => E::from_f32_nearest(f32::NEG_INFINITY),
                    3 => E::from_bits(0xffff),
                    4 | 5 => E::from_f32_nearest(65504.0),
                    6 => E::from_f32_nearest(-65504.0),
                    7 => E::from_f32_nearest(-1e38),
                    _ => E::from_f32_nearest(unit),
                },
            };
            out.push(x);
        }
    }
    out.truncate(count);
    out
}

fn bytes<E: Element>(x: &[E]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect()
}

/// What the tiles of `x` become before they are encoded: whole tiles. Past the end each input repeats its last element, and
/// so every part of the pipeline goes on there.
fn enter<E: Element>(x: &[E], codec: Codec) -> Vec<f32> {
    let whole = |tile: &[E]| {
        let mut values = codec.enter(tile);
        values.resize(TILE_ELEMS, values[values.len() - 1]);
        values
    };
    x.chunks(TILE_ELEMS).flat_map(whole).collect()
}

/// Expected payloads of whole tiles.
fn encode<E: Element>(x: &[f32], codec: Codec) -> Vec<u8> {
    let mut payload = vec![0; x.len() / TILE_ELEMS * codec.tile_bytes()];
    for (tile, payload) in x.chunks(TILE_ELEMS).zip(payload.chunks_mut(codec.tile_bytes())) {
        codec.encode_tile::<E>(tile, payload);
    }
    payload
}

fn decode<E: Element>(payload: &[u8], codec: Codec) -> Vec<f32> {
    let mut x = vec![0.0; payload.len() / codec.tile_bytes() * TILE_ELEMS];
    for (tile, payload) in x.chunks_mut(TILE_ELEMS).zip(payload.chunks(codec.tile_bytes())) {
        codec.decode_tile::<E>(payload, tile);
    }
    x
}

/// As the output has it.
fn decode_to<E: Element>(payload: &[u8], codec: Codec, count: usize) -> Vec<E> {
    let mut decoded = vec![E::from_bits(0); count];
    for (x, payload) in decoded.chunks_mut(TILE_ELEMS).zip(payload.chunks(codec.tile_bytes())) {
        codec.decode_tile_to(payload, x);
    }
    decoded
}

/// The same of both ranks' in one hop.
fn decode_both_to<E: Element>(payloads: &[Vec<u8>; 2], codec: Codec, scale: f32, count: usize) -> Vec<E> {
    let mut decoded = vec![E::from_bits(0); count];
    let tiles = |rank: usize| payloads[rank].chunks(codec.tile_bytes());
    for (x, (first, second)) in decoded.chunks_mut(TILE_ELEMS).zip(tiles(0).zip(tiles(1))) {
        codec.decode_both_to([first, second], scale, x);
    }
    decoded
}

/// One operation as one rank sees it, each kernel on given inputs, compared byte for byte.
#[derive(Debug)]
struct Case {
    count: usize,
    world: usize,
    legs: Legs,
    buffer_bytes: usize,
    /// 2-byte steps by which the user's buffers are off 256-byte alignment.
    misaligned: usize,
    seed: u64,
}

/// One slice where one hop is enough.
#[allow(clippy::too_many_arguments, reason = "the case of `check`, taken apart")]
fn check_one_hop<E: Element>(
    kernels: &Kernels,
    piece: Piece<'_>,
    inputs: &[Vec<E>],
    rank: usize,
    (user, offset): (&DeviceMemory, usize),
    incoming: &DeviceMemory,
    stream: &Stream,
    about: &dyn Fn() -> String,
) {
    let Piece { plan, slice, scale, .. } = piece;
    let codec = plan.one_hop().unwrap();
    let range = plan.slice(0, slice);
    let slots = [0, 1].map(|rank| rank * plan.reduce_slot_bytes(slice));
    let payloads = [0, 1].map(|rank| encode::<E>(&enter(&inputs[rank][range.clone()], codec), codec));

    // Quantize: all of it.
    user.write(offset, &bytes(&inputs[rank]), stream).unwrap();
    // SAFETY: buffers of the plan's sizes, waited for below.
    unsafe { kernels.quantize(piece, rank, user.at(offset), incoming.at(slots[rank]), stream.handle()) }.unwrap();
    let mut got = vec![0; payloads[rank].len()];
    incoming.read(slots[rank], &mut got, stream).unwrap();
    assert!(got == payloads[rank], "quantize: {}", about());

    // Combine, into a buffer whose other bytes must stay.
    incoming.write(slots[1 - rank], &payloads[1 - rank], stream).unwrap();
    user.write(0, &vec![0xa5; user.n_bytes()], stream).unwrap();
    let mut expected = vec![0xa5; user.n_bytes()];
    let both = decode_both_to::<E>(&payloads, codec, scale, range.len());
    expected[offset + range.start * 2..offset + range.end * 2].copy_from_slice(&bytes(&both));
    // SAFETY: buffers of the plan's sizes, waited for below.
    unsafe { kernels.combine(piece, incoming.at(0), user.at(offset), stream.handle()) }.unwrap();
    let mut got = vec![0; user.n_bytes()];
    user.read(0, &mut got, stream).unwrap();
    assert!(got == expected, "combine: {}", about());
}

fn check<E: Element>(stream: &Stream, element: ElementType, case: &Case) {
    let Case { count, world, legs, buffer_bytes, misaligned, seed } = *case;
    let about = || format!("{element:?} {} of {} {case:?}", legs.code().name(), legs.reduce.group.n_elems());
    let plan = Plan::new(count, world, legs, buffer_bytes).unwrap();
    let kernels = Kernels::load(0, legs, world).expect("kernels load");
    let outgoing_bytes = Plan::outgoing_bytes(world, legs, buffer_bytes);
    let (all, offset) = (Plan::staging_bytes(world, legs, buffer_bytes), misaligned * 2);
    let (user, outgoing, incoming) = (
        DeviceMemory::new(count * 2 + offset + 16).unwrap(),
        DeviceMemory::new(outgoing_bytes.max(128)).unwrap(), // in one hop there is none
        DeviceMemory::new(all - outgoing_bytes).unwrap(),
    );
    let inputs: Vec<Vec<E>> = (0..world as u64).map(|rank| elements(count, seed + rank)).collect();
    let rank = seed as usize % world;
    let scale = if seed % 3 == 0 { 1.0 / world as f32 } else { 1.0 };

    for slice in 0..plan.n_slices() {
        let piece = Piece { plan: &plan, slice, element, scale };
        if plan.one_hop().is_some() {
            check_one_hop(&kernels, piece, &inputs, rank, (&user, offset), &incoming, stream, &about);
            continue;
        }
        // Quantize: every other rank's chunk.
        user.write(offset, &bytes(&inputs[rank]), stream).unwrap();
        // SAFETY: buffers of the plan's sizes, waited for below.
        unsafe { kernels.quantize(piece, rank, user.at(offset), outgoing.at(0), stream.handle()) }.unwrap();
        for owner in (0..world).filter(|owner| *owner != rank) {
            let range = plan.slice(owner, slice);
            let expected = encode::<E>(&enter(&inputs[rank][range], legs.reduce), legs.reduce);
            let mut got = vec![0; expected.len()];
            outgoing.read(Plan::outgoing_slot(rank, owner) * plan.reduce_slot_bytes(slice), &mut got, stream).unwrap();
            assert!(got == expected, "quantize: {}", about());
        }

        // Reduce: this rank's chunk.
        let mine = plan.slice(rank, slice);
        if !mine.is_empty() {
            let mut sum: Vec<f32> = Vec::new();
            for sender in 0..world {
                let mut term = enter(&inputs[sender][mine.clone()], legs.reduce);
                if sender != rank || legs.batch_invariant {
                    let payload = encode::<E>(&term, legs.reduce);
                    if sender != rank {
                        incoming.write(sender * plan.reduce_slot_bytes(slice), &payload, stream).unwrap();
                    }
                    term = decode::<E>(&payload, legs.reduce);
                }
                sum = if sender == 0 { term } else { sum.iter().zip(&term).map(|(s, t)| s + t).collect() };
            }
            // SAFETY: buffers of the plan's sizes, waited for below.
            unsafe { kernels.reduce(piece, rank, user.at(offset), incoming.at(0), outgoing.at(0), stream.handle()) }
                .unwrap();
            sum.iter_mut().for_each(|s| *s *= scale);
            let expected = encode::<E>(&sum, legs.gather);
            let mut got = vec![0; expected.len()];
            outgoing.read(0, &mut got, stream).unwrap();
            assert!(got == expected, "reduce: {}", about());
        }

        // Dequantize: every chunk, into a buffer whose other bytes must stay.
        user.write(0, &vec![0xa5; user.n_bytes()], stream).unwrap();
        let mut expected = vec![0xa5; user.n_bytes()];
        for owner in 0..world {
            let range = plan.slice(owner, slice);
            if range.is_empty() {
                continue;
            }
            let payload = encode::<E>(&enter(&inputs[owner][range.clone()], legs.gather), legs.gather);
            incoming.write(owner * plan.gather_slot_bytes(slice), &payload, stream).unwrap();
            let decoded = decode_to::<E>(&payload, legs.gather, range.len());
            expected[offset + range.start * 2..offset + range.end * 2].copy_from_slice(&bytes(&decoded));
        }
        let output: *mut c_void = user.at(offset);
        // SAFETY: buffers of the plan's sizes, waited for below.
        unsafe { kernels.dequantize(piece, incoming.at(0), output, stream.handle()) }.unwrap();
        let mut got = vec![0; user.n_bytes()];
        user.read(0, &mut got, stream).unwrap();
        assert!(got == expected, "dequantize: {}", about());
    }
}

fn check_both(stream: &Stream, case: &Case) {
    check::<f16>(stream, ElementType::Fp16, case);
    check::<bf16>(stream, ElementType::Bf16, case);
}

#[test]
fn kernels_equal_the_reference_for_every_pair_of_widths() {
    let Some((context, _alone)) = gpu() else { return };
    let _entered = context.enter().unwrap();
    let stream = Stream::new().unwrap();
    let mut seed = 1;
    let pairs = (2..=8).flat_map(|reduce| (reduce..=8).map(move |gather| (reduce, gather))).chain([(16, 16)]);
    let plain = pairs.map(|(reduce, gather)| (Code::Plain, reduce, gather));
    let blocks = (2..=8).map(|bits| (bits, bits)).chain([(4, 8)]);
    for (code, reduce, gather) in plain.chain(blocks.map(|(reduce, gather)| (Code::Blocks, reduce, gather))) {
        for group in [32, 64, 128] {
            let legs = legs(code, reduce, gather, group);
            let case = Case { count: 30_011, world: 3, legs, buffer_bytes: 1 << 20, misaligned: 0, seed };
            check_both(&stream, &case);
            let legs = legs.with_batch_invariant(true);
            check_both(&stream, &Case { legs, ..case });
            seed += 10;
        }
    }
}

#[test]
fn kernels_equal_the_reference_at_every_border_and_alignment() {
    let Some((context, _alone)) = gpu() else { return };
    let _entered = context.enter().unwrap();
    let stream = Stream::new().unwrap();
    let mut seed = 7;
    let counts =
        [1, 2, 7, 8, 9, 31, 127, 128, 129, 255, 257, 1023, 1025, 4095, 4096, 4097, 8191, 8193, 40_961, 100_003];
    for count in counts {
        for (world, misaligned) in [(2, 0), (2, 1), (3, 3), (4, 8), (5, 7), (8, 0)] {
            let bits = [(4, 4), (8, 8), (5, 5), (6, 6), (4, 8), (3, 7), (2, 2), (16, 16)][seed as usize % 8];
            let code = if bits == (3, 7) { Code::Plain } else { Code::ALL[seed as usize % 3 % 2] };
            let legs = legs(code, bits.0, bits.1, 128);
            // A buffer of a few tiles a rank makes many slices of the larger counts.
            let buffer_bytes = 3 * Plan::staging_bytes_per_tile(world, legs);
            check_both(&stream, &Case { count, world, legs, buffer_bytes, misaligned, seed });
            seed += 1;
        }
    }
}

#[test]
fn kernels_equal_the_reference_on_ten_million_elements() {
    let Some((context, _alone)) = gpu() else { return };
    let _entered = context.enter().unwrap();
    let stream = Stream::new().unwrap();
    for (seed, bits, code) in [(100, 4, Code::Plain), (200, 8, Code::Plain), (300, 4, Code::Blocks)] {
        let legs = legs(code, bits, bits, 128);
        let case = Case { count: 10_000_000, world: 2, legs, buffer_bytes: 16 << 20, misaligned: 0, seed };
        check_both(&stream, &case);
    }
}

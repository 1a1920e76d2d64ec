//! The codec: one tile of up to [`TILE_ELEMS`] elements as integers of 2 to 8 bits, with parameters per quantization
//! group; or as they are. This scalar code is the specification; the kernels' `kernels/codec.cuh` equals it bit for bit.
//!
//! How integers are made of a group is its [`Code`]: the plain one, below, or blocks, in the file beside this one.
//! Blocks work in another *domain*: [`Codec::enter`] turns elements into what is encoded, summed and encoded again, and
//! [`Codec::decode_tile_to`] turns it back (it is linear, so the sum does not mind).
//!
//! # Arithmetic of the plain code
//!
//! A quantization group is g consecutive elements (Flash Communication, arXiv 2412.04964, asymmetric). All arithmetic
//! is IEEE fp32, rounding to nearest even unless said otherwise, with subnormals kept:
//!
//! ```text
//! z  = min(group) rounded toward -inf to the storage type
//! s  = (max(group) - z) / (2^b - 1) rounded toward +inf to the storage type; in both, -0 is written as +0
//! q  = rint((x - z) * (1/s)), or 0 where 1/s is not finite
//! x' = fma(q, s, z)
//! ```
//!
//! The directed roundings see to it that q stays within 0 and 2^b - 1 without a clamp. A group that holds a NaN or an infinity, or whose `z`
//! or `s` is not finite, is written with `s = z = NaN` and `q = 0`: it decodes to NaN throughout, so overflow checks
//! downstream still fire.
//!
//! # Layout of a tile
//!
//! A tile is always encoded whole: past the last element, that element repeats. (So a short tile needs no special
//! case anywhere; a receiver ignores the repeats.) A payload is the *planes* of the codes, widest first, then the
//! groups' parameters; every part is a multiple of 64 bytes, and of 128 in the plain code.
//!
//! Codes are split by bits (*FlashCommunication V2*, arXiv 2508.03760): 8; 4+2+1; 4+2; 4+1; 4; 2+1; 2. The widest
//! plane holds the lowest bits. Within a tile the elements are dealt to 128 threads so that every access of the
//! kernels is one vector per thread: element `i` is code `k` of thread `t`, where (`warp`, `row`, `lane`, `e`) are
//! the digits of `i` in the bases (4, 4, 32, 8), `t = warp * 32 + lane` and `k = row * 8 + e`. Thread `t` owns p
//! consecutive 32-bit words of a plane of p bits, little-endian (the plane of 8 bits is two half planes of 4 words a
//! thread). With `n = k / 4`, code `k` stands in word `n * p / 8`, in byte `k % 4`, from bit `n * p % 8` on: so four codes,
//! one in each byte, move at a time.
//! Whatever there is per group lies in the order (warp, lane / (g / 8), row), so that a thread's four groups are one
//! access. Of the plain code that is `s`, `z`: 16 bytes per thread.
//!
//! # 16 bits
//!
//! The width 16 codes nothing: a payload is the tile's elements as they are stored, in their order, NaN as 0x7fff. The
//! two hops are the same, so it is what compression is to be compared with.

use std::fmt;

use crate::element::Element;

mod blocks;

pub use blocks::MAX_LEVEL;

/// Elements of a tile, the unit of coding and of chunking.
pub const TILE_ELEMS: usize = 4096;

/// Elements of a tile that one warp codes.
pub const WARP_ELEMS: usize = 1024;
/// Elements that a warp loads at once: 32 lanes, 8 elements (16 bytes) each.
pub const ROW_ELEMS: usize = 256;
/// Elements that a lane loads at once.
pub const LANE_ELEMS: usize = 8;
/// Bytes of one group's scale and zero.
const META_BYTES: usize = 4;

/// Bits per code, 2 to 8; or 16, the elements themselves.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Width(u8);

impl Width {
    /// `bits` as a width, if it is one of 2 to 8, or 16.
    pub const fn new(bits: u8) -> Option<Self> {
        if bits >= 2 && bits <= 8 || bits == 16 { Some(Self(bits)) } else { None }
    }

    /// Whether elements go as they are: 16.
    pub const fn is_uncompressed(self) -> bool {
        self.0 == 16
    }

    /// Bits per code.
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// The largest code, 2^b - 1, of a width that has codes.
    pub const fn max_code(self) -> u8 {
        (u8::MAX) >> (8 - self.0)
    }

    /// The bit planes, widest first: (bits of the plane, position of its lowest bit in the code).
    pub fn planes(self) -> impl Iterator<Item = (usize, u32)> {
        let bits = self.0;
        let mut shift = 0;
        [8u8, 4, 2, 1].into_iter().filter(move |plane| bits & plane != 0).map(move |plane| {
            let at = shift;
            shift += u32::from(plane);
            (usize::from(plane), at)
        })
    }
}

/// Elements per quantization group: 32, 64 or 128.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct GroupSize(u16);

impl GroupSize {
    /// `n_elems` as a group size, if it is 32, 64 or 128.
    pub const fn new(n_elems: u16) -> Option<Self> {
        match n_elems {
            32 | 64 | 128 => Some(Self(n_elems)),
            _ => None,
        }
    }

    /// Elements per group.
    pub const fn n_elems(self) -> usize {
        self.0 as usize
    }
}

/// How the integers of a quantization group are made. A width of 16 bits has none of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Code {
    /// Scale and zero point from the extremes of the group.
    #[default]
    Plain,
    /// Blocks of 8 elements, each transformed, with a scale of 4 bits below the group's: the least error per bit.
    Blocks,
}

impl Code {
    /// Both of them.
    pub const ALL: [Code; 2] = [Code::Plain, Code::Blocks];

    /// The code of a name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.name() == name)
    }

    /// The name, as settings have it.
    pub const fn name(self) -> &'static str {
        match self {
            Code::Plain => "plain",
            Code::Blocks => "blocks",
        }
    }
}

/// How a tile is coded.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Codec {
    /// Bits per code.
    pub width: Width,
    /// Elements per quantization group.
    pub group: GroupSize,
    /// What the integers are made of.
    pub code: Code,
}

/// The codecs of the two legs of an all-reduce. `4:8` sends 4 bits to the owner of a chunk and 8 bits back.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Legs {
    /// Hop 1, to the owner of the chunk.
    pub reduce: Codec,
    /// Hop 2, from the owner to everyone.
    pub gather: Codec,
}

impl Legs {
    /// The legs of two widths, with `code` or, without one, the code that is the default for them; `None` where there are no
    /// kernels for that: the plain code has them for all pairs of widths, blocks for each width with itself and for `4:8`,
    /// and a width of 16 goes with itself only.
    pub fn choose(code: Option<Code>, (reduce, gather): (Width, Width), group: GroupSize) -> Option<Self> {
        let is_plain_only = reduce != gather && (reduce.bits(), gather.bits()) != (4, 8);
        let code = match code {
            _ if reduce.is_uncompressed() => Code::Plain,
            Some(Code::Blocks) if is_plain_only => return None,
            Some(code) => code,
            None if is_plain_only => Code::Plain,
            None => Code::Blocks,
        };
        let codec = |width| Codec { width, group, code };
        Self::new(codec(reduce), codec(gather))
    }

    /// The code of both legs.
    pub const fn code(self) -> Code {
        self.reduce.code
    }

    /// The legs, unless one is compressed and the other is not (there are no kernels for that), or only one has its
    /// elements transformed: the sum is encoded as it stands.
    pub fn new(reduce: Codec, gather: Codec) -> Option<Self> {
        let compressed = reduce.width.is_uncompressed() == gather.width.is_uncompressed();
        (compressed && reduce.transforms() == gather.transforms()).then_some(Self { reduce, gather })
    }
}

impl fmt::Display for Legs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (reduce, gather) = (self.reduce.width.bits(), self.gather.width.bits());
        if reduce == gather { write!(f, "{reduce}") } else { write!(f, "{reduce}:{gather}") }
    }
}

/// Scale and zero point of one group, as fp32 values that the storage type holds exactly.
#[derive(Clone, Copy, Debug)]
struct GroupParams {
    scale: f32,
    zero: f32,
}

impl Codec {
    /// The plain code at a width.
    pub const fn plain(width: Width, group: GroupSize) -> Self {
        Self { width, group, code: Code::Plain }
    }

    /// Bytes of one encoded tile: codes, then the groups' parameters; or the elements.
    pub const fn tile_bytes(self) -> usize {
        if self.width.is_uncompressed() { self.codes_bytes() } else { self.codes_bytes() + self.params_bytes() }
    }

    /// Bits that an element takes on the wire.
    pub const fn bits_per_element(self) -> f64 {
        (self.tile_bytes() * 8) as f64 / TILE_ELEMS as f64
    }

    /// Bytes of the codes of one tile.
    const fn codes_bytes(self) -> usize {
        TILE_ELEMS / 8 * self.width.bits() as usize
    }

    /// Bytes of the parameters of one tile.
    pub const fn params_bytes(self) -> usize {
        let n_groups = TILE_ELEMS / self.group.n_elems();
        match self.code {
            Code::Plain => n_groups * META_BYTES,
            Code::Blocks => blocks::LEVELS_BYTES + n_groups * blocks::GROUP_BYTES,
        }
    }

    /// Whether what is encoded and summed is a transform of the elements.
    fn transforms(self) -> bool {
        self.code == Code::Blocks && !self.width.is_uncompressed()
    }

    /// Elements of one tile as they are encoded and summed. A code that transforms them makes it a whole tile, the last
    /// element repeated.
    ///
    /// # Panics
    /// When there are not 1 to [`TILE_ELEMS`] elements.
    pub fn enter<E: Element>(self, elements: &[E]) -> Vec<f32> {
        assert!((1..=TILE_ELEMS).contains(&elements.len()), "a tile has 1 to {TILE_ELEMS} elements");
        let mut values: Vec<f32> = elements.iter().map(|x| x.to_f32()).collect();
        values.resize(self.n_values(elements.len()), values[elements.len() - 1]);
        if self.transforms() {
            values.chunks_exact_mut(LANE_ELEMS).for_each(blocks::enter::<E>);
        }
        values
    }

    /// How many values [`Codec::enter`] makes of so many elements of a tile.
    pub fn n_values(self, n_elems: usize) -> usize {
        if self.transforms() { TILE_ELEMS } else { n_elems }
    }

    /// Encodes one tile.
    ///
    /// `values`: 1 to [`TILE_ELEMS`] values in fp32 (what [`Codec::enter`] makes, or sums of it); `payload`:
    /// [`Codec::tile_bytes`] bytes.
    ///
    /// # Panics
    /// When a length is not that.
    pub fn encode_tile<E: Element>(self, values: &[f32], payload: &mut [u8]) {
        assert!((1..=TILE_ELEMS).contains(&values.len()), "a tile has 1 to {TILE_ELEMS} elements");
        assert_eq!(payload.len(), self.tile_bytes(), "payload of one tile");
        payload.fill(0);
        let last = values[values.len() - 1];
        let value = |i: usize| values.get(i).copied().unwrap_or(last);
        if self.width.is_uncompressed() {
            for (i, place) in payload.chunks_exact_mut(2).enumerate() {
                place.copy_from_slice(&E::from_f32_nearest(value(i)).to_bits().to_le_bytes());
            }
            return;
        }
        for start in (0..TILE_ELEMS).step_by(self.group.n_elems()) {
            let group: Vec<f32> = (start..start + self.group.n_elems()).map(value).collect();
            match self.code {
                Code::Plain => self.encode_plain::<E>(&group, start, payload),
                Code::Blocks => self.encode_blocks::<E>(&group, start, payload),
            }
        }
    }

    /// Decodes the first `values.len()` values of one tile to fp32, as they are summed: not turned back into elements,
    /// not rounded to the storage type.
    ///
    /// # Panics
    /// When `payload` is not [`Codec::tile_bytes`] long or `values` longer than a tile.
    pub fn decode_tile<E: Element>(self, payload: &[u8], values: &mut [f32]) {
        assert!(values.len() <= TILE_ELEMS, "a tile has at most {TILE_ELEMS} elements");
        assert_eq!(payload.len(), self.tile_bytes(), "payload of one tile");
        if self.width.is_uncompressed() {
            values.iter_mut().enumerate().for_each(|(i, value)| *value = stored::<E>(payload, i * 2).to_f32());
            return;
        }
        for (g, group) in values.chunks_mut(self.group.n_elems()).enumerate() {
            let start = g * self.group.n_elems();
            match self.code {
                Code::Plain => self.decode_plain::<E>(payload, start, group),
                Code::Blocks => self.decode_blocks::<E>(payload, start, group),
            }
        }
    }

    /// Decodes the first `output.len()` elements of one tile as the output has them.
    ///
    /// # Panics
    /// As [`Codec::decode_tile`].
    pub fn decode_tile_to<E: Element>(self, payload: &[u8], output: &mut [E]) {
        assert!(output.len() <= TILE_ELEMS, "a tile has at most {TILE_ELEMS} elements");
        assert_eq!(payload.len(), self.tile_bytes(), "payload of one tile");
        if self.width.is_uncompressed() {
            output.iter_mut().enumerate().for_each(|(i, x)| *x = stored(payload, i * 2));
            return;
        }
        for (g, group) in output.chunks_mut(self.group.n_elems()).enumerate() {
            let start = g * self.group.n_elems();
            match self.code {
                Code::Plain => self.decode_plain_to(payload, start, group),
                Code::Blocks => self.decode_blocks_to(payload, start, group),
            }
        }
    }

    fn encode_plain<E: Element>(self, group: &[f32], start: usize, payload: &mut [u8]) {
        let params = self.group_params::<E>(group.iter().copied());
        self.write_params::<E>(start, params, payload);
        for (i, x) in group.iter().enumerate() {
            self.write_code(start + i, self.quantize(*x, params), payload);
        }
    }

    fn decode_plain<E: Element>(self, payload: &[u8], start: usize, group: &mut [f32]) {
        let GroupParams { scale, zero } = self.read_params::<E>(start, payload);
        for (i, value) in group.iter_mut().enumerate() {
            *value = f32::from(self.read_code(start + i, payload)).mul_add(scale, zero);
        }
    }

    fn decode_plain_to<E: Element>(self, payload: &[u8], start: usize, group: &mut [E]) {
        let GroupParams { scale, zero } = self.read_params::<E>(start, payload);
        for (i, x) in group.iter_mut().enumerate() {
            *x = E::fused(f32::from(self.read_code(start + i, payload)), scale, zero);
        }
    }

    fn group_params<E: Element>(self, values: impl Iterator<Item = f32>) -> GroupParams {
        let (mut min, mut max, mut all_finite) = (f32::INFINITY, f32::NEG_INFINITY, true);
        for x in values {
            (min, max) = (min.min(x), max.max(x));
            all_finite &= x.is_finite();
        }
        // Adding +0 turns -0 into +0: which of the two is the minimum, or the maximum, depends on the order of
        // comparison.
        let zero = E::from_f32_down(min).to_f32() + 0.0;
        let scale = E::from_f32_up((max - zero) / f32::from(self.width.max_code())).to_f32() + 0.0;
        if all_finite && zero.is_finite() && scale.is_finite() {
            GroupParams { scale, zero }
        } else {
            GroupParams { scale: f32::NAN, zero: f32::NAN }
        }
    }

    fn quantize(self, x: f32, GroupParams { scale, zero }: GroupParams) -> u8 {
        if scale.is_nan() {
            return self.width.max_code(); // a group that is not finite; its codes do not matter
        }
        let inverse = 1.0 / scale;
        if !inverse.is_finite() {
            return 0; // a constant group, or a scale so small that its inverse overflows
        }
        let q = ((x - zero) * inverse).round_ties_even();
        debug_assert!((0.0..=f32::from(self.width.max_code())).contains(&q), "{x} {zero} {scale}");
        q as u8
    }

    fn write_params<E: Element>(self, start: usize, params: GroupParams, payload: &mut [u8]) {
        let at = self.codes_bytes() + self.group_at(start) * META_BYTES;
        store::<E>(payload, at, params.scale);
        store::<E>(payload, at + 2, params.zero);
    }

    fn read_params<E: Element>(self, start: usize, payload: &[u8]) -> GroupParams {
        let at = self.codes_bytes() + self.group_at(start) * META_BYTES;
        GroupParams { scale: stored::<E>(payload, at).to_f32(), zero: stored::<E>(payload, at + 2).to_f32() }
    }

    /// The how-many-eth of the groups, as their parameters lie, is the one that starts at element `start`.
    fn group_at(self, start: usize) -> usize {
        let Place { warp, row, lane, .. } = Place::of(start);
        let groups_per_row = ROW_ELEMS / self.group.n_elems();
        let column = lane * LANE_ELEMS / self.group.n_elems();
        (warp * groups_per_row + column) * (WARP_ELEMS / ROW_ELEMS) + row
    }

    fn write_code(self, i: usize, code: u8, payload: &mut [u8]) {
        self.for_each_plane(i, |byte, bit, mask, shift| payload[byte] |= ((code >> shift) & mask) << bit);
    }

    fn read_code(self, i: usize, payload: &[u8]) -> u8 {
        let mut code = 0;
        self.for_each_plane(i, |byte, bit, mask, shift| code |= ((payload[byte] >> bit) & mask) << shift);
        code
    }

    /// Calls `visit(byte of the payload, bit in it, mask of the plane, shift in the code)` for each plane of code `i`.
    fn for_each_plane(self, i: usize, mut visit: impl FnMut(usize, usize, u8, u32)) {
        let place = Place::of(i);
        let (thread, k) = (place.thread(), place.row * LANE_ELEMS + place.e);
        let mut plane_at = 0;
        for (plane_bits, shift) in self.width.planes() {
            let n = k / 4;
            let word = n * plane_bits / 8;
            let word_at = match plane_bits {
                8 => word / 4 * TILE_ELEMS / 2 + (thread * 4 + word % 4) * 4,
                _ => (thread * plane_bits + word) * 4,
            };
            visit(plane_at + word_at + k % 4, n * plane_bits % 8, u8::MAX >> (8 - plane_bits), shift);
            plane_at += TILE_ELEMS / 8 * plane_bits;
        }
    }
}

/// The element that stands at byte `at`.
fn stored<E: Element>(payload: &[u8], at: usize) -> E {
    E::from_bits(u16::from_le_bytes([payload[at], payload[at + 1]]))
}

/// Stores `x`, rounded to nearest, at byte `at`.
fn store<E: Element>(payload: &mut [u8], at: usize, x: f32) {
    payload[at..at + 2].copy_from_slice(&E::from_f32_nearest(x).to_bits().to_le_bytes());
}

/// The digits of an element's index in a tile, in the bases (4, 4, 32, 8).
struct Place {
    warp: usize,
    row: usize,
    lane: usize,
    e: usize,
}

impl Place {
    fn of(i: usize) -> Self {
        Place {
            warp: i / WARP_ELEMS,
            row: i % WARP_ELEMS / ROW_ELEMS,
            lane: i % ROW_ELEMS / LANE_ELEMS,
            e: i % LANE_ELEMS,
        }
    }

    fn thread(&self) -> usize {
        self.warp * 32 + self.lane
    }
}

#[cfg(test)]
mod tests;

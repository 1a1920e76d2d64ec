//! The codec: one tile of up to [`TILE_ELEMS`] elements as integers of 2 to 8 bits, its *quants*, with parameters per
//! quantization group; or as they are. This scalar code is the specification; the kernels' `kernels/codec.cuh` equals it
//! bit for bit.
//!
//! How quants are made of a group is its [`Code`]; each has a file beside this one with its formulas, `plain.rs` and
//! `blocks.rs`. Where quants and parameters stand in a payload is in `layout.rs`. Blocks work in another *domain*:
//! [`Codec::enter`] turns elements into what is encoded, summed and encoded again, and [`Codec::decode_tile_to`] turns it
//! back (it is linear, so the sum does not mind).
//!
//! # 16 bits
//!
//! The width 16 codes nothing: a payload is the tile's elements as they are stored, in their order, NaN as 0x7fff. The
//! two hops are the same, so it is what compression is to be compared with.

use std::fmt;

use self::layout::stored;
use crate::element::Element;

mod blocks;
mod layout;
mod plain;
mod scale;

pub use layout::{LANE_ELEMS, ROW_ELEMS, WARP_ELEMS};
pub use scale::MAX_LEVEL;

/// Elements of a tile, the unit of coding and of chunking.
pub const TILE_ELEMS: usize = 4096;

/// Bits per quant, 2 to 8; or 16, the elements themselves.
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

    /// Bits per quant.
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// The largest quant, 2^b - 1, of a width that has quants.
    pub const fn max_quant(self) -> u8 {
        (u8::MAX) >> (8 - self.0)
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

/// How the quants of a quantization group are made. A width of 16 bits has none of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Code {
    /// Scale and zero point from the extremes of the group.
    #[default]
    Plain,
    /// Octets, blocks of 8 elements, each transformed, with a scale of 4 bits below the group's: the least error per bit.
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
    /// Bits per quant.
    pub width: Width,
    /// Elements per quantization group.
    pub group: GroupSize,
    /// What the quants are made of.
    pub code: Code,
}

/// The codecs of the two legs of an all-reduce. `4:8` sends 4 bits to the owner of a chunk and 8 bits back.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Legs {
    /// Hop 1, to the owner of the chunk.
    pub reduce: Codec,
    /// Hop 2, from the owner to everyone.
    pub gather: Codec,
    /// Whether the owner's own chunk goes through the reduce leg's codec as everyone else's does. Then the result for an
    /// element does not depend on where in the operation it stands, but for what shares its group.
    pub batch_invariant: bool,
}

impl Legs {
    /// The legs of two widths, with `code` or, without one, the code that is the default for them; `None` where there are no
    /// kernels for that: the plain code has them where the gather leg is no narrower, blocks for each width with itself and
    /// for `4:8`, and a width of 16 goes with itself only. (A narrower gather leg loses more than the same two widths the
    /// other way round, since it carries the sum: docs/choosing-a-width.md.)
    pub fn choose(code: Option<Code>, (reduce, gather): (Width, Width), group: GroupSize) -> Option<Self> {
        if reduce > gather {
            return None;
        }
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

    /// The codec of the one hop that is enough for `world` ranks, or `None`: two ranks send each other all they have, if both
    /// legs are coded alike. (Uncompressed, two hops and one are the same sum.)
    pub fn one_hop(self, world: usize) -> Option<Codec> {
        (world == 2 && self.reduce == self.gather && !self.reduce.width.is_uncompressed()).then_some(self.reduce)
    }

    /// The code of both legs.
    pub const fn code(self) -> Code {
        self.reduce.code
    }

    /// The legs, unless one is compressed and the other is not (there are no kernels for that), or only one has its
    /// elements transformed: the sum is encoded as it stands.
    pub fn new(reduce: Codec, gather: Codec) -> Option<Self> {
        let compressed = reduce.width.is_uncompressed() == gather.width.is_uncompressed();
        (compressed && reduce.transforms() == gather.transforms()).then_some(Self {
            reduce,
            gather,
            batch_invariant: false,
        })
    }

    /// The same, batch invariant or not.
    pub const fn with_batch_invariant(self, batch_invariant: bool) -> Self {
        Self { batch_invariant, ..self }
    }
}

impl fmt::Display for Legs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (reduce, gather) = (self.reduce.width.bits(), self.gather.width.bits());
        if reduce == gather { write!(f, "{reduce}") } else { write!(f, "{reduce}:{gather}") }
    }
}

impl Codec {
    /// The plain code at a width.
    pub const fn plain(width: Width, group: GroupSize) -> Self {
        Self { width, group, code: Code::Plain }
    }

    /// Bytes of one encoded tile: quants, then the groups' parameters; or the elements.
    pub const fn tile_bytes(self) -> usize {
        if self.width.is_uncompressed() { self.quants_bytes() } else { self.quants_bytes() + self.params_bytes() }
    }

    /// Bits that an element takes on the wire.
    pub const fn bits_per_element(self) -> f64 {
        (self.tile_bytes() * 8) as f64 / TILE_ELEMS as f64
    }

    /// Bytes of the quants of one tile.
    const fn quants_bytes(self) -> usize {
        TILE_ELEMS / 8 * self.width.bits() as usize
    }

    /// Bytes of the parameters of one tile.
    pub const fn params_bytes(self) -> usize {
        let n_groups = TILE_ELEMS / self.group.n_elems();
        match self.code {
            Code::Plain => n_groups * plain::GROUP_BYTES,
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

    /// Decodes the first `output.len()` elements of one tile of two ranks and adds them: what one hop ends with. The sum is
    /// multiplied with `scale`, 1 or 1/2. Where it is rounded each code says.
    ///
    /// # Panics
    /// As [`Codec::decode_tile`], and of the width 16.
    pub fn decode_both_to<E: Element>(self, payloads: [&[u8]; 2], scale: f32, output: &mut [E]) {
        assert!(output.len() <= TILE_ELEMS, "a tile has at most {TILE_ELEMS} elements");
        assert!(!self.width.is_uncompressed(), "16 bits go in two hops");
        payloads.iter().for_each(|payload| assert_eq!(payload.len(), self.tile_bytes(), "payload of one tile"));
        for (g, group) in output.chunks_mut(self.group.n_elems()).enumerate() {
            let start = g * self.group.n_elems();
            match self.code {
                Code::Plain => self.decode_both_plain(payloads, start, scale, group),
                Code::Blocks => self.decode_both_blocks(payloads, start, scale, group),
            }
        }
    }
}

#[cfg(test)]
mod tests;

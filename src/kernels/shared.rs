//! What Rust and CUDA both know of the kernels: constants, and the structs that they get.
//!
//! This is the one source. `build.rs` includes this file and writes of it `shared.cuh`, which the
//! kernels include: the constants, the structs, and an assertion for the size of each and the place
//! of every field. So a name that one side changes alone stops the build, and so does a layout that
//! the two compilers see differently. The simulator includes the file, too. Whoever adds a field
//! adds it here only.
//!
//! The numbers of the wire format are `flashcomm-wire`'s and pass through here on their way to
//! CUDA.

use std::ffi::c_void;

use flashcomm_wire::Element;
use flashcomm_wire::codec::{Code, Codec, GroupSize, LANE_ELEMS, MAX_LEVEL, ROW_ELEMS, TILE_ELEMS, WARP_ELEMS, Width};
use flashcomm_wire::mailboxes::{LANE_PACKETS, LANE_VECS, LANES, RENEWAL, TURNS};
use flashcomm_wire::rings::{
    LAGGING_WORLD, LINE_BYTES, MAX_WORLD, ROUND_TILES, SIGNAL_BYTES, TURNS as RING_TURNS, slots,
};
use half::{bf16, f16};

/// Threads that code one tile, 32 elements each.
pub const TILE_THREADS: usize = TILE_ELEMS / 32;

/// Input tiles on their way to a channel of the fused kernel.
const STAGES: usize = 2;

/// Most bytes that a tile's payload has behind its quants.
const MAX_PARAMS_BYTES: usize = {
    let (plain, blocks) = (params_bytes(Code::Plain), params_bytes(Code::Blocks));
    if plain > blocks { plain } else { blocks }
};

/// Shared memory of a channel of the fused kernel: its `ChannelMemory`.
pub const CHANNEL_SHARED_BYTES: usize = STAGES * TILE_ELEMS * 2 + MAX_PARAMS_BYTES;

/// Words of an encoded tile that a thread holds beside its quants, which are as many as they have bits.
const PLAIN_WORDS: usize = 4;
const BLOCKS_WORDS: usize = 3;

/// The same of the kernel of one hop, which keeps what it has sent of two rounds: its `OneHopMemory`.
pub const fn one_hop_shared_bytes(codec: Codec) -> usize {
    let words = match codec.code {
        Code::Plain => PLAIN_WORDS,
        Code::Blocks => BLOCKS_WORDS,
    } + codec.width.bits() as usize;
    CHANNEL_SHARED_BYTES + 2 * ROUND_TILES * words * TILE_THREADS * 4
}

/// Channels of a block at most where the areas are in host memory: what is under way then stays in the caches of the host,
/// and each channel has registers for payloads that come late.
pub const HOST_CHANNELS: usize = 3;

/// Threads of a block of the exact kernel at most.
pub const EXACT_THREADS: usize = 512;

/// [`GaveUp::why`]: the communicator was aborted.
pub const ABORTED: u32 = 1;
/// [`GaveUp::why`]: the deadline passed.
pub const DEADLINE_PASSED: u32 = 2;

/// In the smallest groups, which have most.
const fn params_bytes(code: Code) -> usize {
    let (Some(width), Some(group)) = (Width::new(8), GroupSize::new(32)) else { unreachable!() };
    Codec { width, group, code }.params_bytes()
}

/// For `shared.cuh`: type, name and value of each constant.
pub const CONSTANTS: [(&str, &str, usize); 28] = [
    ("int", "kTileElems", TILE_ELEMS),
    ("int", "kTileThreads", TILE_THREADS),
    ("int", "kWarpElems", WARP_ELEMS),
    ("int", "kRowElems", ROW_ELEMS),
    ("int", "kRows", WARP_ELEMS / ROW_ELEMS),
    ("int", "kLaneElems", LANE_ELEMS),
    ("int", "kMaxLevel", MAX_LEVEL as usize),
    ("unsigned", "kLineBytes", LINE_BYTES),
    ("unsigned", "kMaxWorld", MAX_WORLD),
    ("unsigned", "kSignalWords", SIGNAL_BYTES / 4),
    ("unsigned", "kLaggingWorld", LAGGING_WORLD),
    ("unsigned", "kLaggingSlots", slots(LAGGING_WORLD)),
    ("unsigned", "kStages", STAGES),
    ("unsigned", "kMaxParamsBytes", MAX_PARAMS_BYTES),
    ("unsigned", "kChannelSharedBytes", CHANNEL_SHARED_BYTES),
    ("unsigned", "kRingTurns", RING_TURNS),
    ("unsigned", "kRoundTiles", ROUND_TILES),
    ("unsigned", "kPlainWords", PLAIN_WORDS),
    ("unsigned", "kBlocksWords", BLOCKS_WORDS),
    ("unsigned", "kHostChannels", HOST_CHANNELS),
    ("unsigned", "kExactThreads", EXACT_THREADS),
    ("unsigned", "kTurns", TURNS),
    ("uint32_t", "kRenewal", RENEWAL as usize),
    ("unsigned", "kLanes", LANES),
    ("unsigned", "kLaneVecs", LANE_VECS),
    ("unsigned", "kLanePackets", LANE_PACKETS),
    ("uint32_t", "kAborted", ABORTED as usize),
    ("uint32_t", "kDeadlinePassed", DEADLINE_PASSED as usize),
];

/// The same of floating-point numbers.
pub const FLOAT_CONSTANTS: [(&str, f32); 4] = [
    ("kLeastUnitFp16", <f16 as Element>::LEAST_UNIT),
    ("kGreatestFp16", <f16 as Element>::GREATEST),
    ("kLeastUnitBf16", <bf16 as Element>::LEAST_UNIT),
    ("kGreatestBf16", <bf16 as Element>::GREATEST),
];

/// A struct below, for `shared.cuh`.
pub struct Layout {
    /// Its name, the same in CUDA.
    pub name: &'static str,
    /// Its size.
    pub n_bytes: usize,
    /// Name, Rust type and offset of each field.
    pub fields: &'static [(&'static str, &'static str, usize)],
}

/// Defines structs as C lays them out, and `LAYOUTS`, which describes them.
macro_rules! shared_structs {
    ($($(#[$doc:meta])* struct $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug)]
            pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }
        )*

        /// For `shared.cuh`: every struct, each behind those that it holds.
        pub const LAYOUTS: &[Layout] = &[$(Layout {
            name: stringify!($name),
            n_bytes: size_of::<$name>(),
            fields: &[$((stringify!($field), stringify!($type), std::mem::offset_of!($name, $field)),)*],
        },)*];
    };
}

shared_structs! {
    /// One slice of one all-reduce, as the kernels of the exchange `nccl` get it.
    struct Slice {
        /// Elements of the whole operation.
        count: u64,
        /// First tile of the slice within each chunk.
        first_tile: u64,
        /// Tiles of the longest chunk.
        chunk_tiles: u64,
        /// Tiles of the slice in the longest chunk.
        n_tiles: u32,
        /// log2 of the lanes that hold one quantization group in a row: its elements / 8.
        group_shift: u32,
    }

    /// What `quantize` gets.
    struct QuantizeArgs {
        /// The operation's elements.
        input: *const c_void,
        /// Slots of the other ranks, in order.
        outgoing: *mut u8,
        /// Bytes from one slot to the next.
        slot_bytes: u64,
        /// The calling rank: its own chunk stays with it.
        rank: u32,
        /// What of the operation.
        slice: Slice,
    }

    /// What `reduce` gets.
    struct ReduceArgs {
        /// The operation's elements.
        input: *const c_void,
        /// Slots of all ranks, in order.
        incoming: *mut u8,
        /// The sum's payload.
        outgoing: *mut u8,
        /// Bytes from one incoming slot to the next.
        slot_bytes: u64,
        /// The calling rank.
        rank: u32,
        /// Ranks.
        world: u32,
        /// What of the operation.
        slice: Slice,
        /// What the sum is multiplied with: 1, or 1 / world for an average.
        scale: f32,
        /// 1: the rank's own input is quantized before it is added, as those of the others are; else 0.
        batch_invariant: u32,
    }

    /// What `dequantize` gets.
    struct DequantizeArgs {
        /// Slots of all ranks, in order.
        payload: *const u8,
        /// The operation's elements.
        output: *mut c_void,
        /// Bytes from one slot to the next.
        slot_bytes: u64,
        /// What of the operation.
        slice: Slice,
    }

    /// What `combine` gets.
    struct CombineArgs {
        /// Slots of both ranks, in order.
        payload: *const u8,
        /// The operation's elements.
        output: *mut c_void,
        /// Bytes from one slot to the next.
        slot_bytes: u64,
        /// What of the operation.
        slice: Slice,
        /// As in [`ReduceArgs`].
        scale: f32,
    }

    /// What a fused kernel that gives up waiting leaves for the host.
    struct GaveUp {
        /// 0: nobody has; else [`ABORTED`] or [`DEADLINE_PASSED`]. Written last.
        why: u32,
        /// The one that writes the rest has come.
        claimed: u32,
        /// The rank that had not signalled.
        peer: u32,
        /// The channel, or block of the exact kernel, that waited.
        channel: u32,
        /// Its iteration, or stripe.
        iteration: u32,
    }

    /// What the fused kernels get, of two hops and of one.
    struct AllReduceArgs {
        /// `count` elements.
        input: *const c_void,
        /// The same; may be the input.
        output: *mut c_void,
        /// Elements of the operation.
        count: u64,
        /// Tiles of the longest chunk. Of two hops.
        chunk_tiles: u64,
        /// Every rank's receive area ([`flashcomm_wire::Rings`]), as this rank's kernels reach it: each at a multiple of
        /// 128 bytes.
        areas: [*mut u8; MAX_WORLD],
        /// Device memory: how often each channel has ever signalled.
        signals: *mut u32,
        /// Host memory: not 0 once the communicator is aborted.
        abort: *const u32,
        /// Host memory.
        gave_up: *mut GaveUp,
        /// Nanoseconds that a wait may last; 0: no bound.
        timeout_ns: u64,
        /// Host memory: where the kernel may leave what it took, in nanoseconds below a number that changes; null: not.
        took: *mut u64,
        /// This rank.
        rank: u32,
        /// Ranks.
        world: u32,
        /// Channels that the areas have room for.
        max_channels: u32,
        /// As in [`Slice`].
        group_shift: u32,
        /// What the sum is multiplied with: 1, or 1 / world for an average.
        scale: f32,
        /// As in [`ReduceArgs`]. Of two hops.
        batch_invariant: u32,
        /// Tiles that a channel takes in a round, at most [`ROUND_TILES`]. Of one hop.
        round_tiles: u32,
        /// Not 0: payloads are read from the area of who wrote them, not written to that of who reads them.
        pulls: u32,
    }

    /// What `signal` gets.
    struct SignalArgs {
        /// Device memory: how often has been told so.
        count: *mut u32,
        /// Where each rank that is told looks; null: it is not.
        words: [*mut u32; MAX_WORLD],
        /// How much more often it is with this time: 0 or 1.
        step: u32,
    }

    /// What `wait` gets.
    struct WaitArgs {
        /// Device memory: how often has been waited, or told.
        count: *mut u32,
        /// Where each rank that is waited for tells; null: it is not.
        words: [*mut u32; MAX_WORLD],
        /// As in [`AllReduceArgs`].
        abort: *const u32,
        /// As in [`AllReduceArgs`].
        gave_up: *mut GaveUp,
        /// As in [`AllReduceArgs`].
        timeout_ns: u64,
        /// As in [`SignalArgs`].
        step: u32,
        /// By how much less often than that others may have told.
        lag: u32,
    }

    /// What the exact kernel gets.
    struct ExactArgs {
        /// `count` elements.
        input: *const c_void,
        /// The same; may be the input.
        output: *mut c_void,
        /// Elements of the operation.
        count: u64,
        /// Every rank's mailboxes ([`flashcomm_wire::Mailboxes`]), as this rank's kernels reach them: each at a multiple of
        /// 128 bytes.
        mailboxes: [*mut u8; MAX_WORLD],
        /// Device memory: the epoch of each block.
        epochs: *mut u32,
        /// As in [`AllReduceArgs`].
        abort: *const u32,
        /// As in [`AllReduceArgs`].
        gave_up: *mut GaveUp,
        /// As in [`AllReduceArgs`].
        timeout_ns: u64,
        /// As in [`AllReduceArgs`].
        took: *mut u64,
        /// This rank.
        rank: u32,
        /// Ranks.
        world: u32,
        /// Stripes that each block takes of this operation.
        block_stripes: u32,
        /// Blocks that the mailboxes have room for.
        max_blocks: u32,
        /// Stripes of a block that they have room for.
        max_block_stripes: u32,
        /// Whether stripes go over their owners.
        two_hops: u32,
        /// As in [`AllReduceArgs`].
        scale: f32,
    }
}

//! Typed launches of the kernels in `kernels/`, found by name in the embedded fatbin.
//!
//! The argument structs mirror those of the `.cu` files; the GPU tests would not survive a difference.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_void};

use flashcomm_wire::{Codec, Legs, Plan, TILE_ELEMS, rings};
use once_cell::sync::Lazy;
use parking_lot::Mutex;

use crate::cuda::{Context, CudaResult, Function, Module, Shape, StreamHandle};

/// Every kernel for every architecture, from build.rs.
static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/flashcomm.fatbin"));

/// Threads that work on one tile.
const TILE_THREADS: u32 = 128;

/// Shared memory of a channel of the fused kernel, its `ChannelMemory`: `kStages` tiles of input, `kMaxParamsBytes`.
pub const CHANNEL_SHARED_BYTES: usize = 2 * TILE_ELEMS * 2 + 512;

/// Storage type of the elements.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ElementType {
    /// IEEE half precision.
    Fp16,
    /// bfloat16.
    Bf16,
}

impl ElementType {
    /// Both types, in the order of the kernel tables.
    pub const ALL: [ElementType; 2] = [ElementType::Fp16, ElementType::Bf16];

    /// As in kernel names and settings.
    pub const fn name(self) -> &'static str {
        match self {
            ElementType::Fp16 => "fp16",
            ElementType::Bf16 => "bf16",
        }
    }

    /// Bytes of an element.
    pub const fn n_bytes(self) -> usize {
        2
    }
}

/// Where the receive areas of a fused all-reduce live; each has a kernel of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AreaMemory {
    /// GPU memory of the receiver.
    Gpu,
    /// Pinned host memory.
    Host,
}

/// Mirrors `Slice` in `kernels/layout.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct SliceArgs {
    count: u64,
    first_tile: u64,
    chunk_tiles: u64,
    n_tiles: u32,
    group_shift: u32,
}

#[repr(C)]
struct QuantizeArgs {
    input: *const c_void,
    outgoing: *mut c_void,
    slot_bytes: u64,
    rank: u32,
    slice: SliceArgs,
}

#[repr(C)]
struct ReduceArgs {
    input: *const c_void,
    incoming: *const c_void,
    outgoing: *mut c_void,
    slot_bytes: u64,
    rank: u32,
    world: u32,
    slice: SliceArgs,
    scale: f32,
}

#[repr(C)]
struct DequantizeArgs {
    payload: *const c_void,
    output: *mut c_void,
    slot_bytes: u64,
    slice: SliceArgs,
}

/// What a fused kernel that gives up waiting leaves for the host. Mirrors `GaveUp` in `kernels/layout.cuh`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GaveUp {
    /// 0: nobody has; 1: the communicator was aborted; 2: the deadline passed. Written last.
    pub why: u32,
    /// The one that writes the rest has come.
    pub claimed: u32,
    /// The rank that had not signalled.
    pub peer: u32,
    /// The channel that waited.
    pub channel: u32,
    /// Its iteration.
    pub iteration: u32,
}

/// What the fused kernel needs, beside the operation. Mirrors `AllReduceArgs` in `kernels/layout.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AllReduceArgs {
    /// `count` elements.
    pub input: *const c_void,
    /// The same; may be the input.
    pub output: *mut c_void,
    /// Elements of the operation.
    pub count: u64,
    /// Tiles of the longest chunk.
    pub chunk_tiles: u64,
    /// Every rank's receive area ([`flashcomm_wire::Rings`]), as this rank's kernels reach it.
    pub areas: [*mut c_void; rings::MAX_WORLD],
    /// Device memory: signals that each channel ever gave.
    pub signals: *mut c_void,
    /// Host memory: a 32-bit word, not 0 once the communicator is aborted.
    pub abort: *const c_void,
    /// Host memory.
    pub gave_up: *mut GaveUp,
    /// Nanoseconds that a wait may last; 0: no bound.
    pub timeout_ns: u64,
    /// This rank.
    pub rank: u32,
    /// Ranks.
    pub world: u32,
    /// Channels that the areas have room for.
    pub max_channels: u32,
    /// log2 of a quantization group's elements / 8.
    pub group_shift: u32,
    /// What the sum is multiplied with.
    pub scale: f32,
}

/// The kernels of one element type and pair of widths.
#[derive(Clone, Copy, Debug)]
struct Entries {
    quantize: Function,
    reduce: Function,
    dequantize: Function,
    /// By [`AreaMemory`].
    all_reduce: [Function; 2],
}

/// One slice of one planned all-reduce: what every launch is about.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// The whole operation.
    pub plan: &'a Plan,
    /// Which slice of it.
    pub slice: usize,
    /// Storage type of the elements.
    pub element: ElementType,
    /// What the sum is multiplied with.
    pub scale: f32,
}

impl Piece<'_> {
    fn args(&self, codec: Codec) -> SliceArgs {
        SliceArgs {
            count: self.plan.count() as u64,
            first_tile: self.plan.first_tile(self.slice) as u64,
            chunk_tiles: self.plan.chunk_tiles() as u64,
            n_tiles: self.n_tiles(),
            group_shift: group_shift(codec),
        }
    }

    fn n_tiles(&self) -> u32 {
        u32::try_from(self.plan.max_slice_tiles(self.slice)).expect("a slice fits the staging buffer")
    }
}

/// The kernels for one pair of codecs, ready in one context.
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    entries: [Entries; ElementType::ALL.len()],
}

impl Kernels {
    /// The kernels for `legs` in the primary context of device `ordinal`, loaded at the first call.
    ///
    /// Loading may wait for all work of the context, some of which may wait for another rank of this very process;
    /// whoever comes second must find the kernels loaded. Hence the one lock around it all.
    ///
    /// # Errors
    /// The driver's, when the fatbin has no code for this GPU or the driver is older than the compiler.
    pub fn load(ordinal: i32, legs: Legs) -> CudaResult<Self> {
        static LOADED: Lazy<Mutex<Loaded>> = Lazy::new(Default::default);
        let mut loaded = LOADED.lock();
        let Loaded { modules, kernels } = &mut *loaded;
        if let Some(kernels) = kernels.get(&(ordinal, legs)) {
            return Ok(*kernels);
        }
        if let Entry::Vacant(vacant) = modules.entry(ordinal) {
            let context = Context::retain(ordinal)?;
            let entered = context.enter()?;
            let module = Module::load(FATBIN)?;
            drop(entered);
            vacant.insert((context, module));
        }
        let (context, module) = &modules[&ordinal];
        let _entered = context.enter()?;
        let found = Self::find(module, legs)?;
        kernels.insert((ordinal, legs), found);
        Ok(found)
    }

    fn find(module: &Module, legs: Legs) -> CudaResult<Self> {
        let name = |codec: Codec| format!("{}{}", codec.code.name(), codec.width.bits());
        let (reduce, gather) = (name(legs.reduce), name(legs.gather));
        let function = |name: String| module.function(&CString::new(name).expect("kernel names hold no NUL"));
        let host = if has_host_kernel(legs) { "hostallreduce" } else { "allreduce" };
        let entries = |element: ElementType| -> CudaResult<Entries> {
            let element = element.name();
            Ok(Entries {
                quantize: function(format!("flashcomm_quantize_{element}_{reduce}"))?,
                reduce: function(format!("flashcomm_reduce_{element}_{reduce}_{gather}"))?,
                dequantize: function(format!("flashcomm_dequantize_{element}_{gather}"))?,
                all_reduce: [
                    function(format!("flashcomm_allreduce_{element}_{reduce}_{gather}"))?,
                    function(format!("flashcomm_{host}_{element}_{reduce}_{gather}"))?,
                ],
            })
        };
        Ok(Self { entries: [entries(ElementType::ALL[0])?, entries(ElementType::ALL[1])?] })
    }

    /// Readies the fused kernels for blocks of as many channels as the device takes; how many that is.
    ///
    /// # Errors
    /// The driver's, when not even one channel fits.
    pub fn prepare_fused(&self, context: &Context) -> CudaResult<usize> {
        let optin = cudarc::driver::sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let mut channels = context.attribute(optin)? / CHANNEL_SHARED_BYTES;
        let fused = || self.entries.iter().flat_map(|entries| entries.all_reduce);
        for function in fused() {
            channels = channels.min(function.max_threads()? / TILE_THREADS as usize);
        }
        for function in fused() {
            function.allow_shared(channels * CHANNEL_SHARED_BYTES)?;
            let shape = fused_shape(1, channels);
            if function.occupancy(shape.block.0 * shape.block.1, shape.shared_bytes as usize)? == 0 {
                return Ok(0);
            }
        }
        Ok(channels)
    }

    /// The whole all-reduce over areas in `memory`, by `n_blocks` blocks of `block_channels` channels.
    ///
    /// # Safety
    /// The arguments are what they say until the kernel has run on `stream`, which is of the current context; every rank
    /// launches alike, and all blocks of all ranks that share a device fit on it at once.
    pub unsafe fn all_reduce(
        &self,
        element: ElementType,
        memory: AreaMemory,
        (n_blocks, block_channels): (usize, usize),
        args: &AllReduceArgs,
        stream: StreamHandle,
    ) -> CudaResult<()> {
        let function = self.entries(element).all_reduce[memory as usize];
        // SAFETY: as the caller vouches; the struct is the kernel's.
        unsafe { function.launch(fused_shape(n_blocks, block_channels), stream, args) }
    }

    /// Quantizes the chunks of all ranks but `rank` into the slots of `outgoing`.
    ///
    /// # Safety
    /// `input` holds the operation's elements and `outgoing` is a staging area of the plan, both until the kernel
    /// has run on `stream`, which is of the current context.
    pub unsafe fn quantize(
        &self,
        piece: Piece<'_>,
        rank: usize,
        input: *const c_void,
        outgoing: *mut c_void,
        stream: StreamHandle,
    ) -> CudaResult<()> {
        let n_owners = piece.plan.world() as u32 - 1;
        let args = QuantizeArgs {
            input,
            outgoing,
            slot_bytes: piece.plan.reduce_slot_bytes(piece.slice) as u64,
            rank: rank as u32,
            slice: piece.args(piece.plan.legs().reduce),
        };
        let shape = tiles(piece.n_tiles(), n_owners);
        // SAFETY: as the caller vouches; the struct is the kernel's.
        unsafe { self.entries(piece.element).quantize.launch(shape, stream, &args) }
    }

    /// Sums the payloads in `incoming` and the caller's own chunk, and quantizes the sum to `outgoing`.
    ///
    /// # Safety
    /// As for [`Kernels::quantize`]; both areas are the plan's, and what is in `outgoing` is overwritten.
    pub unsafe fn reduce(
        &self,
        piece: Piece<'_>,
        rank: usize,
        input: *const c_void,
        incoming: *const c_void,
        outgoing: *mut c_void,
        stream: StreamHandle,
    ) -> CudaResult<()> {
        let args = ReduceArgs {
            input,
            incoming,
            outgoing,
            slot_bytes: piece.plan.reduce_slot_bytes(piece.slice) as u64,
            rank: rank as u32,
            world: piece.plan.world() as u32,
            slice: piece.args(piece.plan.legs().reduce),
            scale: piece.scale,
        };
        // SAFETY: as the caller vouches; the struct is the kernel's.
        unsafe { self.entries(piece.element).reduce.launch(tiles(piece.n_tiles(), 1), stream, &args) }
    }

    /// Decodes the gathered payloads of all ranks into `output`.
    ///
    /// # Safety
    /// As for [`Kernels::quantize`]; `output` has room for the operation's elements.
    pub unsafe fn dequantize(
        &self,
        piece: Piece<'_>,
        gathered: *const c_void,
        output: *mut c_void,
        stream: StreamHandle,
    ) -> CudaResult<()> {
        let args = DequantizeArgs {
            payload: gathered,
            output,
            slot_bytes: piece.plan.gather_slot_bytes(piece.slice) as u64,
            slice: piece.args(piece.plan.legs().gather),
        };
        let shape = tiles(piece.n_tiles(), piece.plan.world() as u32);
        // SAFETY: as the caller vouches; the struct is the kernel's.
        unsafe { self.entries(piece.element).dequantize.launch(shape, stream, &args) }
    }

    fn entries(&self, element: ElementType) -> &Entries {
        &self.entries[element as usize]
    }
}

/// Whether these legs have a kernel of their own for areas in host memory: `FLASHCOMM_EACH_HOST_PAIR` in
/// `kernels/codec.cuh`. The others take the one for GPU memory there, too.
fn has_host_kernel(legs: Legs) -> bool {
    let widths = (legs.reduce.width.bits(), legs.gather.width.bits());
    widths.0 == widths.1 && widths.0 <= 8 || widths == (4, 8)
}

/// A block for each tile.
const fn tiles(x: u32, y: u32) -> Shape {
    Shape { grid: (x, y), block: (TILE_THREADS, 1), shared_bytes: 0 }
}

const fn fused_shape(n_blocks: usize, block_channels: usize) -> Shape {
    Shape {
        grid: (n_blocks as u32, 1),
        block: (TILE_THREADS, block_channels as u32),
        shared_bytes: (block_channels * CHANNEL_SHARED_BYTES) as u32,
    }
}

/// log2 of the lanes, of 8 elements each, that hold a quantization group.
pub fn group_shift(codec: Codec) -> u32 {
    (codec.group.n_elems() / 8).ilog2()
}

/// What has been loaded, by device; kept as long as the process.
#[derive(Default)]
struct Loaded {
    modules: HashMap<i32, (Context, Module)>,
    kernels: HashMap<(i32, Legs), Kernels>,
}

const _: () = assert!(TILE_ELEMS == 32 * TILE_THREADS as usize, "a thread codes 32 elements");

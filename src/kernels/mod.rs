//! Typed launches of the kernels in `kernels/`, found by name in the embedded fatbin.
//!
//! What both sides know lives in two files that `build.rs` reads, too: [`shared`], the structs and constants, and
//! [`instances`], which kernels there are.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::{CString, c_void};

use flashcomm_wire::mailboxes::LANES;
use flashcomm_wire::{Codec, Legs, Plan};
use once_cell::sync::Lazy;
use parking_lot::Mutex;

use self::instances::{Instance, Verb};
use self::shared::{
    CHANNEL_SHARED_BYTES, CombineArgs, DequantizeArgs, QuantizeArgs, ReduceArgs, Slice, TILE_THREADS,
    one_hop_shared_bytes,
};
use crate::cuda::{Context, CudaError, CudaResult, Function, Module, Shape, StreamHandle};
use crate::element::ElementType;

#[allow(dead_code, unreachable_pub, reason = "build.rs and the simulator use the file, too")]
mod instances;
#[allow(dead_code, unreachable_pub, reason = "build.rs uses the file, too")]
mod shared;

pub use shared::ExactArgs;
pub(crate) use shared::{ABORTED, AllReduceArgs, EXACT_THREADS, GaveUp, HOST_CHANNELS, SignalArgs, WaitArgs};

/// Every kernel for every architecture, from build.rs.
static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/flashcomm.fatbin"));

/// Where the receive areas of a fused all-reduce live, which decides the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Areas {
    /// In GPU memory.
    InGpuMemory,
    /// In host memory.
    InHostMemory,
}

impl Areas {
    const ALL: [Self; 2] = [Self::InGpuMemory, Self::InHostMemory];

    /// Channels of a block, where a device takes so many.
    pub(crate) fn block_channels(self, device: usize) -> usize {
        match self {
            Self::InGpuMemory => device,
            Self::InHostMemory => device.min(HOST_CHANNELS),
        }
    }
}

/// The kernels of one element type and pair of widths.
#[derive(Clone, Copy, Debug)]
struct Entries {
    quantize: Function,
    reduce: Function,
    dequantize: Function,
    /// Of one hop.
    combine: Option<Function>,
    /// By [`Areas`]: of one hop, where that is enough, or of two.
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
    fn args(&self, codec: Codec) -> Slice {
        Slice {
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
    /// Shared memory of a channel of the fused kernels.
    channel_bytes: usize,
    entries: [Entries; ElementType::CODED.len()],
    /// By element type.
    exact: [Function; ElementType::ALL.len()],
    signal: Function,
    wait: Function,
}

impl Kernels {
    /// The kernels for `legs` among `world` ranks, in the primary context of device `ordinal`, loaded at the first call.
    ///
    /// Loading may wait for all work of the context, some of which may wait for another rank of this very process;
    /// whoever comes second must find the kernels loaded. Hence the one lock around it all.
    ///
    /// # Errors
    /// The driver's, when the fatbin has no code for this GPU or the driver is older than the compiler.
    pub fn load(ordinal: i32, legs: Legs, world: usize) -> CudaResult<Self> {
        static LOADED: Lazy<Mutex<Loaded>> = Lazy::new(Default::default);
        let mut loaded = LOADED.lock();
        let Loaded { modules, kernels } = &mut *loaded;
        let one_hop = legs.one_hop(world);
        if let Some(kernels) = kernels.get(&(ordinal, legs, one_hop.is_some())) {
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
        let found = Self::find(module, legs, one_hop)?;
        kernels.insert((ordinal, legs, one_hop.is_some()), found);
        Ok(found)
    }

    fn find(module: &Module, legs: Legs, one_hop: Option<Codec>) -> CudaResult<Self> {
        let named =
            |instance: Instance| module.function(&CString::new(instance.name()).expect("kernel names hold no NUL"));
        let entries = |element: ElementType| -> CudaResult<Entries> {
            let function =
                |verb: Verb| -> Option<CudaResult<Function>> { Instance::new(verb, element, legs).map(named) };
            let not_found = CudaError(cudarc::driver::sys::CUresult::CUDA_ERROR_NOT_FOUND);
            let of_all_legs = |verb| function(verb).unwrap_or(Err(not_found));
            let [in_gpu_memory, in_host_memory] = match one_hop {
                Some(_) => [Verb::OneHop, Verb::HostOneHop],
                None => [Verb::AllReduce, Verb::HostAllReduce],
            };
            let all_reduce = of_all_legs(in_gpu_memory)?;
            Ok(Entries {
                quantize: of_all_legs(Verb::Quantize)?,
                reduce: of_all_legs(Verb::Reduce)?,
                dequantize: of_all_legs(Verb::Dequantize)?,
                combine: one_hop.map(|_| of_all_legs(Verb::Combine)).transpose()?,
                all_reduce: [all_reduce, function(in_host_memory).unwrap_or(Ok(all_reduce))?],
            })
        };
        let exact = |element| named(Instance::exact(element));
        Ok(Self {
            channel_bytes: one_hop.map_or(CHANNEL_SHARED_BYTES, one_hop_shared_bytes),
            entries: [entries(ElementType::Fp16)?, entries(ElementType::Bf16)?],
            exact: [exact(ElementType::Fp16)?, exact(ElementType::Bf16)?, exact(ElementType::Fp32)?],
            signal: named(Instance::without_elements(Verb::Signal))?,
            wait: named(Instance::without_elements(Verb::Wait))?,
        })
    }

    /// Readies the fused kernels for blocks of as many channels as the device takes over GPU memory; how many that is.
    ///
    /// # Errors
    /// The driver's, when not even one channel fits.
    pub fn prepare_fused(&self, context: &Context) -> CudaResult<usize> {
        let optin = cudarc::driver::sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let mut channels = context.attribute(optin)? / self.channel_bytes;
        for entries in &self.entries {
            channels = channels.min(entries.all_reduce[Areas::InGpuMemory as usize].max_threads()? / TILE_THREADS);
        }
        for (function, areas) in self.entries.iter().flat_map(|entries| entries.all_reduce.into_iter().zip(Areas::ALL))
        {
            function.allow_shared(channels * self.channel_bytes)?;
            let shape = self.fused_shape(1, areas.block_channels(channels));
            if function.occupancy(shape.block.0 * shape.block.1, shape.shared_bytes as usize)? == 0 {
                return Ok(0);
            }
        }
        Ok(channels)
    }

    /// The whole all-reduce over `areas`, by `n_blocks` blocks of `block_channels` channels.
    ///
    /// # Safety
    /// The arguments are what they say until the kernel has run on `stream`, which is of the current context; every rank
    /// launches alike, and all blocks of all ranks that share a device fit on it at once.
    pub unsafe fn all_reduce(
        &self,
        element: ElementType,
        areas: Areas,
        (n_blocks, block_channels): (usize, usize),
        args: &AllReduceArgs,
        stream: StreamHandle,
    ) -> CudaResult<()> {
        let function = self.entries(element).all_reduce[areas as usize];
        // SAFETY: as the caller vouches; the struct is the kernel's.
        unsafe { function.launch(self.fused_shape(n_blocks, block_channels), stream, args) }
    }

    /// The whole all-reduce over mailboxes, uncompressed, by `n_blocks` blocks of `n_warps` warps.
    ///
    /// # Safety
    /// As for [`Kernels::all_reduce`].
    pub unsafe fn exact(
        &self,
        element: ElementType,
        (n_blocks, n_warps): (usize, usize),
        args: &ExactArgs,
        stream: StreamHandle,
    ) -> CudaResult<()> {
        let shape = Shape { grid: (n_blocks as u32, 1), block: ((n_warps * LANES) as u32, 1), shared_bytes: 0 };
        // SAFETY: as the caller vouches; the struct is the kernel's.
        unsafe { self.exact[element as usize].launch(shape, stream, args) }
    }

    /// Tells other ranks, by words of theirs, of what stands before it on the stream.
    ///
    /// # Safety
    /// The words live until the kernel has run on `stream`, which is of the current context.
    pub(crate) unsafe fn signal(&self, args: &SignalArgs, stream: StreamHandle) -> CudaResult<()> {
        // SAFETY: as the caller vouches; the struct is the kernel's.
        unsafe { self.signal.launch(A_WARP, stream, args) }
    }

    /// Waits for other ranks' words.
    ///
    /// # Safety
    /// As for [`Kernels::signal`]; every rank launches alike.
    pub(crate) unsafe fn wait(&self, args: &WaitArgs, stream: StreamHandle) -> CudaResult<()> {
        // SAFETY: as the caller vouches; the struct is the kernel's.
        unsafe { self.wait.launch(A_WARP, stream, args) }
    }

    /// Quantizes the chunks of all ranks but `rank` into the slots of `outgoing`; where one hop is enough, all of the operation.
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
            outgoing: outgoing.cast(),
            slot_bytes: piece.plan.reduce_slot_bytes(piece.slice) as u64,
            rank: if piece.plan.one_hop().is_some() { 1 } else { rank as u32 }, // the chunk of rank 0 is all there is
            slice: piece.args(piece.plan.legs().reduce),
        };
        let shape = tiles(piece.n_tiles(), n_owners);
        // SAFETY: as the caller vouches; the struct is the kernel's.
        unsafe { self.entries(piece.element).quantize.launch(shape, stream, &args) }
    }

    /// Sums the payloads in `incoming` and the caller's own chunk, and quantizes the sum to `outgoing`.
    ///
    /// # Safety
    /// As for [`Kernels::quantize`]; both areas are the plan's, and what is in `outgoing` is overwritten, as is the rank's
    /// own slot of `incoming` where the legs are batch invariant.
    pub unsafe fn reduce(
        &self,
        piece: Piece<'_>,
        rank: usize,
        input: *const c_void,
        incoming: *mut c_void,
        outgoing: *mut c_void,
        stream: StreamHandle,
    ) -> CudaResult<()> {
        let args = ReduceArgs {
            input,
            incoming: incoming.cast(),
            outgoing: outgoing.cast(),
            slot_bytes: piece.plan.reduce_slot_bytes(piece.slice) as u64,
            rank: rank as u32,
            world: piece.plan.world() as u32,
            slice: piece.args(piece.plan.legs().reduce),
            scale: piece.scale,
            batch_invariant: piece.plan.legs().batch_invariant.into(),
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
            payload: gathered.cast(),
            output,
            slot_bytes: piece.plan.gather_slot_bytes(piece.slice) as u64,
            slice: piece.args(piece.plan.legs().gather),
        };
        let shape = tiles(piece.n_tiles(), piece.plan.world() as u32);
        // SAFETY: as the caller vouches; the struct is the kernel's.
        unsafe { self.entries(piece.element).dequantize.launch(shape, stream, &args) }
    }

    /// Decodes both ranks' payloads of one hop into `output`, added.
    ///
    /// # Safety
    /// As for [`Kernels::dequantize`].
    ///
    /// # Panics
    /// Where one hop is not enough.
    pub unsafe fn combine(
        &self,
        piece: Piece<'_>,
        gathered: *const c_void,
        output: *mut c_void,
        stream: StreamHandle,
    ) -> CudaResult<()> {
        let args = CombineArgs {
            payload: gathered.cast(),
            output,
            slot_bytes: piece.plan.gather_slot_bytes(piece.slice) as u64,
            slice: piece.args(piece.plan.legs().gather),
            scale: piece.scale,
        };
        let combine = self.entries(piece.element).combine.expect("one hop is enough");
        // SAFETY: as the caller vouches; the struct is the kernel's.
        unsafe { combine.launch(tiles(piece.n_tiles(), 1), stream, &args) }
    }

    fn entries(&self, element: ElementType) -> &Entries {
        &self.entries[element as usize]
    }

    const fn fused_shape(&self, n_blocks: usize, block_channels: usize) -> Shape {
        Shape {
            grid: (n_blocks as u32, 1),
            block: (TILE_THREADS as u32, block_channels as u32),
            shared_bytes: (block_channels * self.channel_bytes) as u32,
        }
    }
}

/// A block of one warp.
const A_WARP: Shape = Shape { grid: (1, 1), block: (LANES as u32, 1), shared_bytes: 0 };

/// A block for each tile.
const fn tiles(x: u32, y: u32) -> Shape {
    Shape { grid: (x, y), block: (TILE_THREADS as u32, 1), shared_bytes: 0 }
}

/// log2 of the lanes, of 8 elements each, that hold a quantization group.
pub(crate) fn group_shift(codec: Codec) -> u32 {
    (codec.group.n_elems() / 8).ilog2()
}

/// What has been loaded, by device; kept as long as the process.
#[derive(Default)]
struct Loaded {
    modules: HashMap<i32, (Context, Module)>,
    /// Each of one hop or of two.
    kernels: HashMap<(i32, Legs, bool), Kernels>,
}

#[cfg(test)]
mod tests;

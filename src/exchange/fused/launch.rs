//! Launches of the two kernels of a fused exchange.

use std::ffi::c_void;
use std::time::Duration;

use flashcomm_wire::mailboxes::{LANES, STRIPE_VECS, VEC_BYTES};
use flashcomm_wire::{Mailboxes, Plan, rings};

use super::Fused;
use crate::cuda::{Stream, StreamHandle};
use crate::element::ElementType;
use crate::error::{Error, Result};
use crate::kernels::{self, AllReduceArgs, Areas, EXACT_THREADS, ExactArgs, HOST_CHANNELS, Kernels};

/// An all-reduce.
pub struct Call {
    /// The storage type.
    pub element: ElementType,
    /// What the sum is multiplied with.
    pub scale: f32,
    /// The operation's elements.
    pub input: *const c_void,
    /// The same; may be the input.
    pub output: *mut c_void,
    /// Whether it has the device's large share; the same on all ranks.
    pub is_large: bool,
    /// Whether ranks read payloads from their writers; the same on all ranks. Of compressed ones.
    pub pulls: bool,
}

impl Fused {
    /// Issues a compressed all-reduce cut by `plan` to `stream`, of the current context.
    ///
    /// # Errors
    /// The driver's; [`Error::GaveUp`] when an earlier one did not come to its end.
    ///
    /// # Safety
    /// The buffers hold the operation's elements until it has run.
    pub unsafe fn all_reduce(&self, kernels: &Kernels, plan: &Plan, call: &Call, stream: StreamHandle) -> Result<()> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        // SAFETY: as the caller vouches.
        unsafe { self.launch(kernels, plan, call, self.timeout, stream) }
    }

    /// The same whatever became of earlier ones, with a timeout of its own.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// As for [`Fused::all_reduce`].
    pub(in crate::exchange) unsafe fn launch(
        &self,
        kernels: &Kernels,
        plan: &Plan,
        call: &Call,
        timeout: Option<Duration>,
        stream: StreamHandle,
    ) -> Result<()> {
        let Call { element, scale, input, output, is_large, pulls } = *call;
        let chunk_tiles = plan.chunk_tiles();
        let max_blocks = if is_large { self.max_blocks } else { self.usual_blocks };
        let is_host = self.memory() == Areas::InHostMemory;
        // In one hop tiles share rounds where a channel would have several of those anyway: over host memory many, in which
        // the ways of signals to and fro hide one another.
        let several = if is_host { 8 } else { 1 };
        let is_shared = plan.one_hop().is_some() && chunk_tiles > several * max_blocks * self.block_channels;
        let round_tiles = if is_shared { rings::ROUND_TILES } else { 1 };
        let n_channels = chunk_tiles.div_ceil(round_tiles);
        // Few channels rather spread over multiprocessors than share one; many take as few blocks as do with as many rounds.
        // (Over host memory those that share one are faster as soon as some have to.)
        let block_channels = match n_channels.div_ceil(max_blocks) {
            2.. if is_host => self.block_channels,
            block_channels => block_channels.min(self.block_channels),
        };
        let n_rounds = n_channels.div_ceil(max_blocks * block_channels);
        let n_blocks = n_channels.div_ceil(n_rounds * block_channels);
        let args = AllReduceArgs {
            input,
            output,
            count: plan.count() as u64,
            chunk_tiles: chunk_tiles as u64,
            round_tiles: round_tiles as u32,
            pulls: pulls.into(),
            scale,
            timeout_ns: nanoseconds(timeout),
            took: self.took(false, plan.count() * element.n_bytes()),
            ..self.all_reduce_args()
        };
        // SAFETY: the areas are every rank's and stay; the caller vouches for the rest; the blocks fit by `residency`.
        unsafe { kernels.all_reduce(element, self.memory(), (n_blocks, block_channels), &args, stream) }
            .map_err(Error::cuda("launching the all-reduce"))
    }

    /// Issues an exact all-reduce of `count` elements, for which there are mailboxes, in one hop or in two, to `stream`, of
    /// the current context.
    ///
    /// # Errors
    /// As for [`Fused::all_reduce`].
    ///
    /// # Safety
    /// As for [`Fused::all_reduce`].
    pub unsafe fn exact(
        &self,
        kernels: &Kernels,
        (count, two_hops): (usize, bool),
        call: &Call,
        stream: StreamHandle,
    ) -> Result<()> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        // SAFETY: as the caller vouches.
        unsafe { self.launch_exact(kernels, (count, two_hops), call, self.timeout, stream) }
    }

    /// The same whatever became of earlier ones, with a timeout of its own.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// As for [`Fused::all_reduce`].
    pub(in crate::exchange) unsafe fn launch_exact(
        &self,
        kernels: &Kernels,
        (count, two_hops): (usize, bool),
        call: &Call,
        timeout: Option<Duration>,
        stream: StreamHandle,
    ) -> Result<()> {
        let Call { element, scale, input, output, .. } = *call;
        let mailboxes = self.layout.mailboxes.expect("the range of exact sums is empty without them");
        let n_bytes = count * element.n_bytes();
        let n_stripes = n_bytes.div_ceil(STRIPE_VECS * VEC_BYTES);
        assert!(n_stripes <= mailboxes.blocks * mailboxes.block_stripes, "the range of exact sums ends there");
        let (n_blocks, block_stripes) = exact_shape(n_stripes, &mailboxes);
        let (count, timeout_ns) = (count as u64, nanoseconds(timeout));
        let two_hops = two_hops.into();
        let took = self.took(true, n_bytes);
        let args =
            ExactArgs { input, output, count, block_stripes, two_hops, scale, timeout_ns, took, ..self.exact_args() };
        // SAFETY: the mailboxes are every rank's and stay; the rest as for `launch`.
        unsafe { kernels.exact(element, (n_blocks, self.exact_warps(block_stripes)), &args, stream) }
            .map_err(Error::cuda("launching the exact all-reduce"))
    }

    /// A warp for each stripe of a block, as far as that goes. Of more than two ranks over host memory, more warps than
    /// compressed sums have would wait there, and looking whether something has come takes from what comes.
    fn exact_warps(&self, block_stripes: u32) -> usize {
        let is_crowded = self.memory() == Areas::InHostMemory && self.world() > 2;
        let most = if is_crowded { HOST_CHANNELS } else { EXACT_THREADS / LANES };
        (block_stripes as usize).min(most)
    }

    /// Runs the kernels once over nothing, as large as they ever are. What the driver does at the first launch of a kernel
    /// (loading it, making room for its local memory) may wait for all work of the device; were that another rank's
    /// all-reduce, which waits for this one's, both would wait for ever.
    ///
    /// # Errors
    /// The driver's.
    pub fn warm_up(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        let doing = "launching the all-reduce for the first time";
        for element in ElementType::CODED {
            let shape = (self.max_blocks, self.block_channels);
            // SAFETY: without tiles the kernel touches no memory.
            unsafe { kernels.all_reduce(element, self.memory(), shape, &self.all_reduce_args(), stream.handle()) }
                .map_err(Error::cuda(doing))?;
        }
        if let Some(mailboxes) = self.layout.mailboxes {
            let block_stripes = mailboxes.block_stripes as u32;
            let args = ExactArgs { block_stripes, ..self.exact_args() };
            let shape = (mailboxes.blocks, self.exact_warps(block_stripes));
            for element in ElementType::ALL {
                // SAFETY: without elements the kernel touches no memory.
                unsafe { kernels.exact(element, shape, &args, stream.handle()) }.map_err(Error::cuda(doing))?;
            }
        }
        self.warm_up_copies(kernels, stream.handle()).map_err(Error::cuda(doing))?;
        stream.synchronize().map_err(Error::cuda("running the all-reduce for the first time"))
    }

    /// What all compressed ones have in common; the operation is to be filled in.
    fn all_reduce_args(&self) -> AllReduceArgs {
        let rings = &self.layout.rings;
        AllReduceArgs {
            input: std::ptr::null(),
            output: std::ptr::null_mut(),
            count: 0,
            chunk_tiles: 0,
            areas: self.areas.map(<*mut c_void>::cast),
            signals: self.counters.at(0).cast(),
            abort: self.control.address().cast(),
            gave_up: self.gave_up_ptr(),
            timeout_ns: 0,
            took: std::ptr::null_mut(),
            rank: self.rank as u32,
            world: rings.world as u32,
            max_channels: rings.channels as u32,
            group_shift: kernels::group_shift(rings.legs.reduce),
            scale: 1.0,
            batch_invariant: rings.legs.batch_invariant.into(),
            round_tiles: 1,
            pulls: 0,
        }
    }

    /// The same of exact ones.
    fn exact_args(&self) -> ExactArgs {
        let (rings, mailboxes) = (&self.layout.rings, self.layout.mailboxes);
        let mailboxes_at = self.layout.mailboxes_at();
        ExactArgs {
            input: std::ptr::null(),
            output: std::ptr::null_mut(),
            count: 0,
            mailboxes: self.areas.map(|area| area.cast::<u8>().wrapping_add(mailboxes_at)),
            epochs: self.counters.at(rings.channels * 4).cast(),
            abort: self.control.address().cast(),
            gave_up: self.gave_up_ptr(),
            timeout_ns: 0,
            took: std::ptr::null_mut(),
            rank: self.rank as u32,
            world: rings.world as u32,
            block_stripes: 0,
            max_blocks: mailboxes.map_or(0, |mailboxes| mailboxes.blocks as u32),
            max_block_stripes: mailboxes.map_or(0, |mailboxes| mailboxes.block_stripes as u32),
            two_hops: 0,
            scale: 1.0,
        }
    }
}

/// 0: no bound.
pub(super) fn nanoseconds(timeout: Option<Duration>) -> u64 {
    timeout.map_or(0, |timeout| u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX))
}

/// Blocks for so many stripes, more than 0 and not more than there is room for, and stripes of each: few rather spread over
/// multiprocessors than share one.
fn exact_shape(n_stripes: usize, room: &Mailboxes) -> (usize, u32) {
    let block_stripes = n_stripes.div_ceil(n_stripes.min(room.blocks));
    (n_stripes.div_ceil(block_stripes), block_stripes as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_exact_has_room_in_its_blocks_mailboxes() {
        for (max_bytes, blocks) in [1, 1536, 1537, 5000, 16 << 10, 100_000, 1 << 20]
            .into_iter()
            .flat_map(|max_bytes| [1, 3, 22, 33, 66].map(|blocks| (max_bytes, blocks)))
        {
            let room = Mailboxes::for_bytes(2, blocks, max_bytes);
            for n_stripes in 1..=max_bytes.div_ceil(STRIPE_VECS * VEC_BYTES) {
                let (n_blocks, block_stripes) = exact_shape(n_stripes, &room);
                let each = block_stripes as usize;
                assert!(n_blocks <= room.blocks && each <= room.block_stripes, "{n_blocks} of {each} in {room:?}");
                assert!((n_blocks - 1) * each < n_stripes && n_stripes <= n_blocks * each, "{n_stripes} in {room:?}");
            }
        }
    }
}

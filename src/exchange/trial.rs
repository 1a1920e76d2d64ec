//! A link is believed when a kernel's bytes have crossed it.
//!
//! A driver may say that GPUs reach each other's memory where stores are lost or garbage arrives: an IOMMU that remaps,
//! PCIe access control, a patched driver. So before an exchange is taken, the ranks run one small all-reduce over it whose
//! sum is exact in every code, and compare. Its kernel gives up after [`DEADLINE`].

use std::time::Duration;

use flashcomm_wire::{Plan, TILE_ELEMS};
use half::f16;

use super::fused::{Call, Fused};
use crate::cuda::{CudaResult, Event, Lent, PinnedMemory, Stream};
use crate::element::ElementType;
use crate::error::{Error, Result};
use crate::kernels::Kernels;

/// How long a kernel waits for what a peer has written. The ranks have just met, so a peer is not late by more than its
/// process is held up.
pub(super) const DEADLINE: Duration = Duration::from_secs(10);

/// Tiles of each chunk: so many channels take part, in as many blocks.
const CHUNK_TILES: usize = 2;

/// Neighbours that have the same value, the largest group: every code carries such groups exactly.
const EQUAL_ELEMS: usize = 128;

/// The trial of one rank.
pub(crate) struct Trial {
    world: usize,
    /// The input, then the output: kernels reach host memory, and nothing has to be copied.
    memory: Lent<PinnedMemory>,
    done: Event,
}

impl Trial {
    /// What it takes, made before another rank's kernel may wait.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn new(world: usize, device: i32) -> Result<Self> {
        let n_bytes = 2 * Self::count(world) * size_of::<f16>();
        let memory = Lent::new(device, n_bytes).map_err(Error::cuda("allocating for the trial of the links"))?;
        Ok(Self { world, memory, done: Event::new().map_err(Error::cuda("creating an event"))? })
    }

    fn count(world: usize) -> usize {
        world * CHUNK_TILES * TILE_ELEMS
    }

    /// What the element at `i` of a rank is: whole numbers, of which the sum of as many ranks as there may be is exact.
    fn element(rank: usize, i: usize) -> f16 {
        f16::from_f32((1 + (i / EQUAL_ELEMS * 7 + rank * 13) % 61) as f32)
    }

    /// Issues it over an exchange that every rank has connected.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn launch(
        &mut self,
        rank: usize,
        pulls: bool,
        fused: &Fused,
        kernels: &Kernels,
        stream: &Stream,
    ) -> Result<()> {
        let count = Self::count(self.world);
        let input = self.memory.address().cast::<f16>();
        let output = input.wrapping_add(count);
        for i in 0..count {
            // SAFETY: the memory has room for both, and no kernel has it yet.
            unsafe {
                input.add(i).write(Self::element(rank, i));
                output.add(i).write(f16::NAN);
            }
        }
        let plan = Plan::new(count, self.world, fused.legs(), usize::MAX)
            .map_err(|_| Error::BufferTooSmall { world: self.world })?;
        let (input, output, handle) = (input.cast_const().cast(), output.cast(), stream.handle());
        let call = Call { element: ElementType::Fp16, scale: 1.0, input, output, is_large: false, pulls };
        // SAFETY: the buffers stay until `result`, or for good.
        unsafe { fused.launch(kernels, &plan, &call, Some(DEADLINE), handle) }?;
        // SAFETY: the stream is ours.
        unsafe { self.done.record(handle, false) }.map_err(Error::cuda("recording an event"))
    }

    /// Whether it has run, or given up.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn is_over(&self) -> CudaResult<bool> {
        self.done.is_complete()
    }

    /// What came of it, when it is over.
    ///
    /// # Errors
    /// [`Error::Unmappable`] where something did not arrive as it was sent.
    pub(crate) fn result(&self, fused: &Fused) -> Result<()> {
        if fused.gave_up().is_some() {
            return Err(Error::Unmappable(
                "what another rank's kernel wrote did not arrive in 10 s: this machine loses stores between its GPUs (an \
                 IOMMU, PCIe access control, a patched driver). NCCL_P2P_DISABLE=1 keeps the real NCCL from it, too",
            ));
        }
        let count = Self::count(self.world);
        let output = self.memory.address().cast::<f16>().wrapping_add(count);
        let expected = |i: usize| (0..self.world).map(|rank| Self::element(rank, i).to_f32()).sum::<f32>();
        // SAFETY: the kernel has run.
        let is_wrong = |i: usize| unsafe { output.add(i).read() }.to_f32() != expected(i);
        if (0..count).any(is_wrong) {
            return Err(Error::Unmappable(
                "what another rank's kernel wrote arrived as something else: this machine garbles stores between its GPUs \
                 (an IOMMU, PCIe access control, a patched driver). NCCL_P2P_DISABLE=1 keeps the real NCCL from it, too",
            ));
        }
        Ok(())
    }

    /// A kernel may still write to its memory: nobody may have it again.
    pub(crate) fn lose(&mut self) {
        self.memory.lose();
    }
}

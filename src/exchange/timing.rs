//! What a sum takes: launched a few times one behind the other, between two events.

use std::ffi::c_void;

use flashcomm_wire::{Plan, TILE_ELEMS};
use half::{bf16, f16};

use super::fused::{Call, Fused};
use super::trial::DEADLINE;
use crate::cuda::{CudaResult, DeviceMemory, Event, Lent, Stream};
use crate::element::ElementType;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::verdict::Way;

/// What is summed is written by so many tiles at a time, which are all alike.
const PATTERN_TILES: usize = 32;

/// A stopwatch of one rank, with something to sum.
pub(crate) struct Timing {
    element: ElementType,
    /// Numbers as between the layers of a model: the codes take longer for octets that are constant or stand out.
    terms: Lent<DeviceMemory>,
    /// Where sums go.
    sums: Lent<DeviceMemory>,
    begun: Event,
    ended: Event,
}

impl Timing {
    /// Of elements of a type that has codes, so many bytes at most, with memory that is there before another rank's kernel may
    /// wait.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn new(element: ElementType, n_bytes: usize, device: i32, stream: &Stream) -> Result<Self> {
        let memory = || Lent::<DeviceMemory>::new(device, n_bytes).map_err(Error::cuda("allocating for measurements"));
        let (terms, sums) = (memory()?, memory()?);
        let pattern = pattern(element);
        for at in (0..n_bytes).step_by(pattern.len()) {
            let bytes = &pattern[..pattern.len().min(n_bytes - at)];
            terms.write(at, bytes, stream).map_err(Error::cuda("writing what is summed to measure"))?;
        }
        let event = || Event::timed().map_err(Error::cuda("creating an event"));
        Ok(Self { element, terms, sums, begun: event()?, ended: event()? })
    }

    /// Of the elements.
    pub(crate) fn element(&self) -> ElementType {
        self.element
    }

    /// What is to be summed, and where to.
    pub(crate) fn buffers(&self) -> (*const c_void, *mut c_void) {
        (self.terms.at(0).cast_const(), self.sums.at(0))
    }

    /// Everything that is issued to `stream` from now on counts.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn begin(&self, stream: &Stream) -> Result<()> {
        // SAFETY: the stream is ours.
        unsafe { self.begun.record(stream.handle(), false) }.map_err(Error::cuda("recording an event"))
    }

    /// The same, up to now.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn end(&self, stream: &Stream) -> Result<()> {
        // SAFETY: the stream is ours.
        unsafe { self.ended.record(stream.handle(), false) }.map_err(Error::cuda("recording an event"))
    }

    /// Whether it has run, or given up.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn is_over(&self) -> CudaResult<bool> {
        self.ended.is_complete()
    }

    /// Nanoseconds between the two, when it is over.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn nanoseconds(&self) -> CudaResult<u64> {
        Ok((f64::from(self.ended.milliseconds_since(&self.begun)?).max(0.0) * 1e6) as u64)
    }

    /// Issues one sum of ours, of so many bytes, to `stream`, of the current context; one that is compressed by the blocks of
    /// the large share, if `is_large`.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn launch(
        &self,
        way: Way,
        (n_bytes, is_large): (usize, bool),
        fused: &Fused,
        kernels: &Kernels,
        stream: &Stream,
    ) -> Result<()> {
        let Self { element, .. } = *self;
        let count = n_bytes / element.n_bytes();
        let ((input, output), handle) = (self.buffers(), stream.handle());
        let call = Call { element, scale: 1.0, input, output, is_large, pulls: way == Way::Pulled };
        match way {
            Way::Forward => Ok(()),
            Way::ExactOneHop | Way::ExactTwoHops => {
                let how = (count, way == Way::ExactTwoHops);
                // SAFETY: the memory stays until it is over, or for good.
                unsafe { fused.launch_exact(kernels, how, &call, Some(DEADLINE), handle) }
            }
            Way::Compressed | Way::Pulled | Way::Copied => {
                let (world, by_copies) = (fused.world(), way == Way::Copied);
                let staging_bytes = fused.copy_staging_bytes(count).filter(|_| by_copies).unwrap_or(usize::MAX);
                let plan = Plan::new(count, world, fused.legs(), staging_bytes)
                    .map_err(|_| Error::BufferTooSmall { world })?;
                match by_copies {
                    // SAFETY: as above.
                    true => unsafe { fused.launch_copies(kernels, &plan, &call, Some(DEADLINE), handle) },
                    // SAFETY: as above.
                    false => unsafe { fused.launch(kernels, &plan, &call, Some(DEADLINE), handle) },
                }
            }
        }
    }

    /// A kernel may still write to its memory: nobody may have it again.
    pub(crate) fn lose(&mut self) {
        self.terms.lose();
        self.sums.lose();
    }
}

/// Tiles of numbers that are evenly spread from -1 to 1, by the linear congruential generator of Numerical Recipes.
fn pattern(element: ElementType) -> Vec<u8> {
    let mut state = 0u32;
    let bits = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let x = state.cast_signed() as f32 / 2.0f32.powi(31);
        if element == ElementType::Fp16 { f16::from_f32(x).to_bits() } else { bf16::from_f32(x).to_bits() }
    };
    let tile: Vec<u8> = std::iter::repeat_with(bits).take(TILE_ELEMS).flat_map(u16::to_le_bytes).collect();
    tile.repeat(PATTERN_TILES)
}

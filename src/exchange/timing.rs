//! What a sum takes: launched a few times one behind the other, between two events.

use std::ffi::c_void;

use flashcomm_wire::Plan;

use super::fused::{Call, Fused};
use super::trial::DEADLINE;
use crate::cuda::{CudaResult, DeviceMemory, Event, Lent, Stream};
use crate::element::ElementType;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::verdict::Way;

/// A stopwatch of one rank, with a buffer to sum.
pub(crate) struct Timing {
    /// Of zeros, which a sum in place leaves as they are.
    buffer: Lent<DeviceMemory>,
    begun: Event,
    ended: Event,
}

impl Timing {
    /// With a buffer of so many bytes, made before another rank's kernel may wait.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn new(n_bytes: usize, device: i32, stream: &Stream) -> Result<Self> {
        let buffer = Lent::<DeviceMemory>::new(device, n_bytes).map_err(Error::cuda("allocating for measurements"))?;
        buffer.clear(stream).map_err(Error::cuda("clearing memory for measurements"))?;
        let event = || Event::timed().map_err(Error::cuda("creating an event"));
        Ok(Self { begun: event()?, ended: event()?, buffer })
    }

    /// What is to be summed, in place.
    pub(crate) fn buffer(&self) -> *mut c_void {
        self.buffer.at(0)
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

    /// Issues one sum of ours, of as many bytes of the buffer, to `stream`, of the current context; one that is compressed by
    /// the blocks of the large share, if `is_large`.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn launch(
        &self,
        way: Way,
        (element, n_bytes, is_large): (ElementType, usize, bool),
        fused: &Fused,
        kernels: &Kernels,
        stream: &Stream,
    ) -> Result<()> {
        let count = n_bytes / element.n_bytes();
        let (buffer, handle) = (self.buffer(), stream.handle());
        let call = Call { element, scale: 1.0, input: buffer, output: buffer, is_large, pulls: way == Way::Pulled };
        match way {
            Way::Forward => Ok(()),
            Way::ExactOneHop | Way::ExactTwoHops => {
                let how = (count, way == Way::ExactTwoHops);
                // SAFETY: the buffer stays until it is over, or for good.
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
        self.buffer.lose();
    }
}

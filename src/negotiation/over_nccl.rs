//! Meeting by the real NCCL: an all-gather on a stream of ours, waited for with an eye on the abort.

use std::ffi::c_void;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::facts::BLOB_BYTES;
use super::meeting::{Meeting, poll};
use crate::cuda::{DeviceMemory, Event, Lent, Stream};
use crate::element::ElementType;
use crate::error::{Error, Result};
use crate::exchange::nccl::{Transfer, all_gather, all_to_all};
use crate::nccl::{CommPtr, DataType, NcclResult, RedOp};
use crate::real;

/// How long a communicator's handle may be used.
#[derive(Debug, Default)]
pub(crate) struct Life {
    has_ended: AtomicBool,
    in_use: Mutex<()>,
}

impl Life {
    /// Whether the application has aborted or destroyed the communicator.
    pub(crate) fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Acquire)
    }

    /// The application is about to do that.
    pub(crate) fn end(&self) {
        self.has_ended.store(true, Ordering::Release);
    }

    /// Waits until no thread of ours is in a call on the communicator. Only for one that does not block, in which no call
    /// lasts.
    pub(crate) fn wait_for_calls(&self) {
        drop(self.in_use.lock());
    }

    /// A call on the communicator, unless that has ended.
    ///
    /// # Errors
    /// [`Error::Aborted`].
    pub(crate) fn call<T>(&self, call: impl FnOnce() -> T) -> Result<T> {
        let _in_use = self.in_use.lock();
        if self.has_ended() { Err(Error::Aborted) } else { Ok(call()) }
    }
}

/// A sum: of a type, from an address to another, of so many elements.
pub(crate) type Sum = (ElementType, (*const c_void, *mut c_void), usize);

/// Issues a sum of a communicator to a stream of ours. Answers whether the call was done at once, which that of a communicator
/// that does not block need not be.
///
/// # Errors
/// The real NCCL's, or [`Error::Aborted`].
pub(crate) fn all_reduce(
    comm: CommPtr,
    life: &Life,
    (element, (from, to), count): Sum,
    stream: &Stream,
) -> Result<bool> {
    let datatype = match element {
        ElementType::Fp16 => DataType::FLOAT16,
        ElementType::Bf16 => DataType::BFLOAT16,
        ElementType::Fp32 => DataType::FLOAT32,
    };
    let handle = stream.handle().cast();
    // SAFETY: the elements are ours and stay until they are summed; handle and stream live.
    let issue = || unsafe { real::all_reduce(from, to, count, datatype, RedOp::SUM, comm, handle) };
    match life.call(issue)? {
        NcclResult::SUCCESS => Ok(true),
        NcclResult::IN_PROGRESS => {
            let check = || if life.has_ended() { Err(Error::Aborted) } else { Ok(()) };
            poll(check, || Ok(life.call(|| real::state(comm))? != NcclResult::IN_PROGRESS))?;
            Ok(false)
        }
        result => Err(Error::Nccl { function: "ncclAllReduce", result }),
    }
}

/// Ranks of a communicator meet over it.
pub(crate) struct OverNccl<'a> {
    comm: CommPtr,
    life: &'a Life,
    rank: usize,
    world: usize,
    stream: Rc<Stream>,
    done: Event,
    memory: Lent<DeviceMemory>,
    is_nonblocking: bool,
}

impl<'a> OverNccl<'a> {
    /// Of `comm`, a live communicator of `world` ranks until `life` says otherwise; `device` has the current context.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn new(
        comm: CommPtr,
        life: &'a Life,
        device: i32,
        (rank, world): (usize, usize),
        stream: Rc<Stream>,
    ) -> Result<Self> {
        let done = Event::new().map_err(Error::cuda("creating an event"))?;
        let memory = Lent::new(device, (2 * world - 1) * BLOB_BYTES).map_err(Error::cuda("allocating for attach"))?;
        Ok(Self { comm, life, rank, world, stream, done, memory, is_nonblocking: false })
    }

    /// Takes something through both hops, so that the real NCCL connects all ranks: the hot path must not do that, least of
    /// all inside a capture, and the first sum would wait for the slowest rank.
    ///
    /// Whether calls may be issued without waiting for each: a communicator that does not block takes one at a time.
    ///
    /// # Errors
    /// The real NCCL's, or as [`Meeting::check`].
    pub(crate) fn connect(&mut self) -> Result<bool> {
        // SAFETY: the ranges lie in our memory, the handle and the stream live.
        let result = self.life.call(|| unsafe { all_to_all(std::iter::once(self.transfer())) })?;
        self.finish("ncclSend and ncclRecv", result)?;
        self.gather()?;
        Ok(!self.is_nonblocking)
    }

    /// Hop 2, as [`Self::connect`] takes hop 1.
    fn gather(&mut self) -> Result<()> {
        // SAFETY: the ranges lie in our memory, the handle and the stream live.
        let result = self.life.call(|| unsafe { all_gather(std::iter::once(self.transfer())) })?;
        self.finish("ncclAllGather", result)
    }

    /// One hop with a blob in every slot: everyone's at the start of our memory, behind them those to send.
    fn transfer(&self) -> Transfer {
        Transfer {
            comm: self.comm,
            rank: self.rank,
            world: self.world,
            outgoing: self.memory.at(self.world * BLOB_BYTES),
            incoming: self.memory.at(0),
            slot_bytes: BLOB_BYTES,
            stream: self.stream.handle(),
        }
    }

    /// Waits until what was issued has run. The thread that called is blocked by this, as it is when NCCL connects.
    fn finish(&mut self, function: &'static str, result: NcclResult) -> Result<()> {
        if result == NcclResult::IN_PROGRESS {
            self.is_nonblocking = true;
            poll(
                || self.check(),
                || match self.life.call(|| real::state(self.comm))? {
                    NcclResult::SUCCESS => Ok(true),
                    NcclResult::IN_PROGRESS => Ok(false),
                    result => Err(Error::Nccl { function, result }),
                },
            )?;
        } else if result != NcclResult::SUCCESS {
            return Err(Error::Nccl { function, result });
        }
        // SAFETY: the stream is ours.
        unsafe { self.done.record(self.stream.handle(), false) }.map_err(Error::cuda("recording an event"))?;
        poll(|| self.check(), || self.done.is_complete().map_err(Error::cuda("waiting for the other ranks")))
    }
}

impl Meeting for OverNccl<'_> {
    fn say(&mut self, mine: &[u8; BLOB_BYTES]) -> Result<()> {
        let at = self.world * BLOB_BYTES;
        self.memory.write(at, mine, &self.stream).map_err(Error::cuda("writing the blob"))
    }

    fn hear(&mut self) -> Result<Vec<u8>> {
        self.gather()?;
        let mut gathered = vec![0; self.world * BLOB_BYTES];
        self.memory.read(0, &mut gathered, &self.stream).map_err(Error::cuda("reading the blobs"))?;
        Ok(gathered)
    }

    fn check(&self) -> Result<()> {
        if self.life.has_ended() { Err(Error::Aborted) } else { Ok(()) }
    }
}

impl Drop for OverNccl<'_> {
    fn drop(&mut self) {
        // After an abort something may still write to it; then it is left alone.
        if self.done.is_complete() != Ok(true) {
            self.memory.lose();
        }
    }
}

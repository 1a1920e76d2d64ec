//! The exchange over the real NCCL: grouped send and receive for hop 1, an all-gather for hop 2; one all-gather where one hop is
//! enough. Payload travels as bytes.

use std::ffi::c_void;

use flashcomm_wire::{Legs, Plan};

use crate::cuda::{DeviceMemory, StreamHandle};
use crate::error::{Error, Result};
use crate::nccl::{CommPtr, DataType, NcclResult};
use crate::real;

/// Where payloads lie before and after a hop: the two areas of [`Plan`].
pub struct Staging {
    memory: DeviceMemory,
    /// The agreed bound of the memory.
    pub buffer_bytes: usize,
    incoming_at: usize,
}

impl Staging {
    /// Allocates it in the current context.
    ///
    /// # Errors
    /// When `buffer_bytes` do not hold a tile of each rank, or there is no memory.
    pub fn new(world: usize, legs: Legs, buffer_bytes: usize) -> Result<Self> {
        let n_bytes = Plan::staging_bytes(world, legs, buffer_bytes);
        if n_bytes == 0 {
            return Err(Error::BufferTooSmall { world });
        }
        let memory = DeviceMemory::new(n_bytes)
            .map_err(Error::cuda("allocating the staging memory (FLASHCOMM_BUFFER_MIB makes it smaller)"))?;
        Ok(Self { memory, buffer_bytes, incoming_at: Plan::outgoing_bytes(world, legs, buffer_bytes) })
    }

    /// What goes out.
    pub fn outgoing(&self) -> *mut c_void {
        self.memory.at(0)
    }

    /// What comes in.
    pub fn incoming(&self) -> *mut c_void {
        self.memory.at(self.incoming_at)
    }
}

/// One hop of one rank.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
    /// The communicator.
    pub comm: CommPtr,
    /// This rank in it.
    pub rank: usize,
    /// Ranks in it.
    pub world: usize,
    /// In hop 1 a slot for each other rank; in hop 2 one slot, for all.
    pub outgoing: *mut c_void,
    /// A slot from each rank; the rank's own holds nothing to be read after hop 1.
    pub incoming: *mut c_void,
    /// Bytes of every slot.
    pub slot_bytes: usize,
    /// The stream.
    pub stream: StreamHandle,
}

/// Runs `issue` between the real group calls; the first error of it or of them.
///
/// # Safety
/// As for the calls that `issue` makes.
pub(crate) unsafe fn grouped(issue: impl FnOnce() -> NcclResult) -> NcclResult {
    // SAFETY: takes nothing.
    let started = unsafe { real::group_start() };
    if started != NcclResult::SUCCESS {
        return started;
    }
    let issued = issue();
    // SAFETY: ends the group just started.
    let ended = unsafe { real::group_end() };
    if issued == NcclResult::SUCCESS { ended } else { issued }
}

/// Hop 1: to every rank its slot.
///
/// Between two ranks that is an all-gather, and goes as one: over sockets it is a third faster than send and receive
/// of the same bytes.
///
/// # Safety
/// The areas have the slots that [`Transfer`] tells of until the hop has run; handles and streams live.
pub(crate) unsafe fn all_to_all(hops: impl Iterator<Item = Transfer>) -> NcclResult {
    // SAFETY: as the caller vouches.
    let issue = |hop: Transfer| unsafe { if hop.world == 2 { gather(hop) } else { send_and_receive(hop) } };
    // SAFETY: as the caller vouches.
    unsafe { grouped(|| first_error(hops.map(issue))) }
}

/// Hop 2: everyone's slot to everyone.
///
/// # Safety
/// As for [`all_to_all`].
pub(crate) unsafe fn all_gather(hops: impl Iterator<Item = Transfer>) -> NcclResult {
    // SAFETY: as the caller vouches.
    unsafe { grouped(|| first_error(hops.map(|hop| gather(hop)))) }
}

unsafe fn gather(hop: Transfer) -> NcclResult {
    let Transfer { comm, outgoing, incoming, slot_bytes, stream, .. } = hop;
    // SAFETY: as the caller vouches.
    unsafe { real::all_gather(outgoing, incoming, slot_bytes, DataType::UINT8, comm, stream.cast()) }
}

unsafe fn send_and_receive(hop: Transfer) -> NcclResult {
    let Transfer { comm, rank, world, outgoing, incoming, slot_bytes, stream } = hop;
    first_error((0..world).filter(|peer| *peer != rank).map(|peer| {
        let send = outgoing.wrapping_byte_add(Plan::outgoing_slot(rank, peer) * slot_bytes);
        let receive = incoming.wrapping_byte_add(peer * slot_bytes);
        let (peer, stream) = (peer as i32, stream.cast());
        // SAFETY: as the caller vouches.
        match unsafe { real::send(send, slot_bytes, DataType::UINT8, peer, comm, stream) } {
            // SAFETY: as the caller vouches.
            NcclResult::SUCCESS => unsafe { real::recv(receive, slot_bytes, DataType::UINT8, peer, comm, stream) },
            error => error,
        }
    }))
}

/// Stops at the first that is no success.
fn first_error(mut results: impl Iterator<Item = NcclResult>) -> NcclResult {
    results.find(|result| *result != NcclResult::SUCCESS).unwrap_or(NcclResult::SUCCESS)
}

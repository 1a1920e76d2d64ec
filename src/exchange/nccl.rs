//! The exchange over the real NCCL: grouped send and receive for hop 1, an all-gather in place for hop 2. Payload
//! travels as bytes.

use super::Transfer;
use crate::cuda::StreamHandle;
use crate::nccl::{self, CommPtr, DataType, NcclResult};

/// Runs `issue` between the real group calls; the first error of it or of them.
///
/// # Safety
/// As for the calls that `issue` makes.
pub unsafe fn grouped(issue: impl FnOnce() -> NcclResult) -> NcclResult {
    // SAFETY: takes nothing.
    let started = unsafe { nccl::group_start() };
    if started != NcclResult::SUCCESS {
        return started;
    }
    let issued = issue();
    // SAFETY: ends the group just started.
    let ended = unsafe { nccl::group_end() };
    if issued == NcclResult::SUCCESS { ended } else { issued }
}

/// Hop 1: all transfers in one group.
///
/// # Safety
/// The ranges hold what they say until the transfers have run; handles and streams live.
pub unsafe fn transfer(transfers: impl Iterator<Item = Transfer>) -> NcclResult {
    let byte = DataType::UINT8;
    let issue = || {
        for Transfer { comm, peer, send, send_bytes, receive, receive_bytes, stream } in transfers {
            let (peer, stream) = (peer as i32, stream.cast());
            if send_bytes > 0 {
                // SAFETY: as the caller vouches.
                let sent = unsafe { nccl::send(send, send_bytes, byte, peer, comm, stream) };
                if sent != NcclResult::SUCCESS {
                    return sent;
                }
            }
            if receive_bytes > 0 {
                // SAFETY: as the caller vouches.
                let received = unsafe { nccl::recv(receive, receive_bytes, byte, peer, comm, stream) };
                if received != NcclResult::SUCCESS {
                    return received;
                }
            }
        }
        NcclResult::SUCCESS
    };
    // SAFETY: as the caller vouches.
    unsafe { grouped(issue) }
}

/// Hop 2: gathers `slot_bytes` of every rank into consecutive slots at `gathered`; this rank's is in place.
///
/// # Safety
/// `gathered` has a slot for each rank; handle and stream live.
pub unsafe fn all_gather(
    gathered: *mut std::ffi::c_void,
    rank: usize,
    slot_bytes: usize,
    comm: CommPtr,
    stream: StreamHandle,
) -> NcclResult {
    let mine = gathered.wrapping_byte_add(rank * slot_bytes);
    // SAFETY: as the caller vouches.
    unsafe { nccl::all_gather(mine, gathered, slot_bytes, DataType::UINT8, comm, stream.cast()) }
}

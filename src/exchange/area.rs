//! Receive areas: memory of one rank that every rank writes.
//!
//! An area lives in GPU memory of its owner, which the others reach by CUDA IPC or, within a
//! process, by its address; or in pinned host memory that the ranks share. Its owner makes it and
//! *offers* it; when all ranks have, each *maps* the others'.

use std::ffi::c_void;

use super::imports;
use super::shared::SharedMemory;
use crate::cuda::{Context, DeviceMemory, IpcHandle, Lent, Registered, Stream};
use crate::error::{Error, Result};
use crate::kernels::Areas;

/// Bytes of an [`Offer`].
pub(crate) const OFFER_BYTES: usize = 80;

/// What a rank tells the others of its area, in bytes that only [`Area::map`] understands.
pub(crate) type Offer = [u8; OFFER_BYTES];

/// A rank, as the others see it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer {
    /// Tells processes of the host apart.
    pub process: u64,
    /// Tells apart what shared memory processes see; 0 where there is none.
    pub shared_memory: u64,
    /// Its device, by the number that its process knows it by.
    pub device: i32,
    /// Its area.
    pub offer: Offer,
}

/// An area that this rank owns.
pub(crate) enum Area {
    /// In its GPU's memory. Lent, not freed: a process that still has freed memory mapped would be left with a mapping
    /// whose behavior is undefined.
    Gpu(Lent<DeviceMemory>),
    /// In host memory.
    Host(HostArea),
}

/// An area of another rank's, mapped here.
pub(crate) struct Mapped {
    /// Where this rank's kernels reach it.
    pub address: *mut c_void,
    /// Keeps the mapping, where it does not stay for good.
    _host: Option<HostArea>,
}

/// Shared host memory, as this rank's kernels reach it.
pub(crate) struct HostArea {
    // Dropped in this order: unregistered, then unmapped.
    registered: Registered,
    shared: SharedMemory,
}

impl HostArea {
    fn new(shared: SharedMemory) -> Result<Self> {
        // SAFETY: the mapping lives as long as the registration, see the order of the fields.
        let registered = unsafe { Registered::new(shared.address(), shared.n_bytes()) }
            .map_err(Error::cuda("registering shared host memory"))?;
        Ok(Self { registered, shared })
    }
}

impl Area {
    /// Makes this rank's area of `n_bytes`, zeroed, in the current context, with what the others need to map it.
    ///
    /// # Errors
    /// When memory or the driver does not allow it.
    pub(crate) fn new(memory: Areas, n_bytes: usize, context: &Context, stream: &Stream) -> Result<(Self, Offer)> {
        let mut offer = [0; OFFER_BYTES];
        match memory {
            Areas::InGpuMemory => {
                let area = Lent::<DeviceMemory>::new(context.device(), n_bytes)
                    .map_err(Error::cuda("allocating the receive area (FLASHCOMM_BUFFER_MIB makes it smaller)"))?;
                area.clear(stream).map_err(Error::cuda("clearing the receive area"))?;
                offer[..8].copy_from_slice(&(area.at(0) as u64).to_le_bytes());
                // Without IPC (containers may forbid it) the ranks of this process can still use the address.
                match area.export() {
                    Ok(handle) => {
                        offer[8] = 1;
                        offer[16..].copy_from_slice(&handle);
                    }
                    Err(error) => log::info!("no CUDA IPC for the exchange peer: {error}"),
                }
                Ok((Area::Gpu(area), offer))
            }
            Areas::InHostMemory => {
                let shared = SharedMemory::create(n_bytes, context.numa_node())?;
                offer[..16].copy_from_slice(shared.name());
                Ok((Area::Host(HostArea::new(shared)?), offer))
            }
        }
    }

    /// Where this rank's kernels reach it.
    pub(crate) fn address(&self) -> *mut c_void {
        match self {
            Area::Gpu(area) => area.at(0),
            Area::Host(area) => area.registered.device_address(),
        }
    }

    /// Where it lives.
    pub(crate) fn memory(&self) -> Areas {
        match self {
            Area::Gpu(_) => Areas::InGpuMemory,
            Area::Host(_) => Areas::InHostMemory,
        }
    }

    /// Maps the area of `peer`, of the same kind and size as this one. `me`: this rank.
    ///
    /// # Errors
    /// When the driver or the system does not allow it.
    pub(crate) fn map(&self, peer: &Peer, me: &Peer, n_bytes: usize, context: &Context) -> Result<Mapped> {
        let Peer { process, device, offer, .. } = *peer;
        match self {
            Area::Gpu(_) if process == me.process => {
                let peer_context = Context::retain(device).map_err(Error::cuda("retaining a peer's context"))?;
                context.enable_peer(&peer_context).map_err(Error::cuda("enabling peer access"))?;
                let address = u64::from_le_bytes(offer[..8].try_into().expect("8 bytes")) as *mut c_void;
                Ok(Mapped { address, _host: None })
            }
            Area::Gpu(_) => Ok(Mapped { address: map_ipc(peer, me, context.device())?, _host: None }),
            Area::Host(_) => {
                let name = offer[..16].try_into().expect("16 bytes");
                let host = HostArea::new(SharedMemory::open(name, n_bytes)?)?;
                Ok(Mapped { address: host.registered.device_address(), _host: Some(host) })
            }
        }
    }

    /// Every rank has mapped it: what was named for that needs no name any more.
    pub(crate) fn unlink(&mut self) {
        if let Area::Host(host) = self {
            host.shared.unlink();
        }
    }

    /// Peers may still write to it, and nothing tells when they stop: nobody may have it again.
    pub(crate) fn lose(&mut self) {
        if let Area::Gpu(area) = self {
            area.lose();
        }
    }
}

fn map_ipc(peer: &Peer, me: &Peer, device: i32) -> Result<*mut c_void> {
    let Peer { process, offer, .. } = peer;
    if offer[8] == 0 {
        return Err(Error::Unmappable("the other process may not export GPU memory (CUDA IPC)"));
    }
    let handle: IpcHandle = offer[16..].try_into().expect("64 bytes");
    imports::may_be_mapped_by(*process, peer.shared_memory != 0 && peer.shared_memory == me.shared_memory);
    imports::map(*process, handle, device, (me.process, me.shared_memory != 0))
}

//! The exchanges `peer` and `host`: one kernel does the whole all-reduce over receive areas that every rank can write.
//!
//! The two differ only in where an area lives. `peer`: in the GPU memory of its owner, reached by CUDA IPC or, within a
//! process, by its address. `host`: in pinned host memory that the ranks share. How attach brings it about: every rank
//! makes its area and *offers* it; when all have, each *maps* the others'; when all could, the exchange is on.
//!
//! What waits must be resident at once (invariant I6), so the grid never follows the size of the message: see
//! [`block_limit`].

use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::{ManuallyDrop, offset_of};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use flashcomm_wire::{Plan, Rings, rings};
use once_cell::sync::Lazy;
use parking_lot::Mutex;

use super::shared::SharedMemory;
use crate::cuda::{self, Context, DeviceMemory, IpcHandle, PinnedMemory, Registered, Stream, StreamHandle};
use crate::element::ElementType;
use crate::error::{Error, Result};
use crate::kernels::{self, ABORTED, AllReduceArgs, Areas, GaveUp, Kernels};

/// Where receive areas live.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// GPU memory of the receiver.
    Peer,
    /// Pinned host memory.
    Host,
}

impl Kind {
    /// As in settings and in the log.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Peer => "peer",
            Kind::Host => "host",
        }
    }

    const fn areas(self) -> Areas {
        match self {
            Kind::Peer => Areas::InGpuMemory,
            Kind::Host => Areas::InHostMemory,
        }
    }
}

/// Bytes of an [`Offer`].
pub const OFFER_BYTES: usize = 80;

/// What a rank tells the others of its area, in bytes that only [`Prepared::connect`] understands.
pub type Offer = [u8; OFFER_BYTES];

/// An area of this rank's.
enum Area {
    Peer(PeerArea),
    Host(HostArea),
}

/// GPU memory that is lent to a communicator, and for use by the next one when dropped: it is never freed, since a
/// process that has it mapped would be left with a mapping whose behavior is undefined.
struct PeerArea {
    device: i32,
    memory: ManuallyDrop<DeviceMemory>,
    /// Peers may still write to it, and nothing tells when they have stopped: nobody may have it again.
    is_lost: bool,
}

/// Areas that are not in use, by device.
static IDLE_AREAS: Mutex<Vec<(i32, DeviceMemory)>> = Mutex::new(Vec::new());

impl PeerArea {
    fn new(device: i32, n_bytes: usize) -> Result<Self> {
        let idle = {
            let mut areas = IDLE_AREAS.lock();
            let fits = |(owner, memory): &(i32, DeviceMemory)| *owner == device && memory.n_bytes() == n_bytes;
            areas.iter().position(fits).map(|i| areas.swap_remove(i).1)
        };
        let memory = match idle {
            Some(memory) => memory,
            None => DeviceMemory::new(n_bytes)
                .map_err(Error::cuda("allocating the receive area (FLASHCOMM_BUFFER_MIB makes it smaller)"))?,
        };
        Ok(Self { device, memory: ManuallyDrop::new(memory), is_lost: false })
    }
}

impl Drop for PeerArea {
    fn drop(&mut self) {
        if !self.is_lost {
            // SAFETY: not used any more.
            IDLE_AREAS.lock().push((self.device, unsafe { ManuallyDrop::take(&mut self.memory) }));
        }
    }
}

/// Shared host memory, as this rank's kernels reach it.
struct HostArea {
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

/// A rank, as the others see it.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// Tells processes of the host apart.
    pub process: u64,
    /// Its device, by the number that its process knows it by.
    pub device: i32,
    /// Its area.
    pub offer: Offer,
}

/// What this rank has made for an exchange, before the others' areas are known.
pub struct Prepared {
    kind: Kind,
    rings: Rings,
    area: Area,
    offer: Offer,
    signals: DeviceMemory,
    control: PinnedMemory,
}

/// A fused exchange of one rank.
pub struct Fused {
    /// Where the areas live.
    pub kind: Kind,
    rings: Rings,
    rank: usize,
    max_blocks: usize,
    block_channels: usize,
    areas: [*mut c_void; rings::MAX_WORLD],
    mine: Area,
    _theirs: Vec<HostArea>,
    signals: DeviceMemory,
    control: PinnedMemory,
    timeout: Option<Duration>,
    is_reported: AtomicBool,
}

// SAFETY: addresses that only kernels follow.
unsafe impl Send for Fused {}
// SAFETY: as above.
unsafe impl Sync for Fused {}

/// Bytes of the control memory: the abort word, then at [`GAVE_UP_AT`] a [`GaveUp`].
const CONTROL_BYTES: usize = 4096;
const GAVE_UP_AT: usize = 128;

/// Areas of other processes that are mapped here, by process, handle and device of ours. They stay mapped: the owner lends
/// them again and again.
static MAPPED: Lazy<Mutex<HashMap<(u64, IpcHandle, i32), usize>>> = Lazy::new(Default::default);

/// Multiprocessors that are left to the kernels of the real NCCL, which fill one with each block and wait, too.
const NCCL_MULTIPROCESSORS: usize = 32;

/// The same for each of several ranks that share a device, of few: they have to cap NCCL's blocks by `NCCL_MAX_CTAS` anyway.
const NCCL_MULTIPROCESSORS_SHARING: usize = 8;

/// Blocks that a rank's kernel may have. Each may fill a multiprocessor.
///
/// `multiprocessors` of the device, which `sharing` ranks of the communicator use; `is_first`: whether every rank's
/// [`Seat`] is; `max_ctas`: the setting, 0 for none. By default the first communicator of a device, a later one and a
/// kernel of the real NCCL fit on it together. Most engines have large sums on one communicator only, so it gets more.
pub fn block_limit(multiprocessors: usize, sharing: usize, is_first: bool, max_ctas: u32) -> usize {
    match max_ctas as usize {
        0 => {
            let left = multiprocessors.saturating_sub(nccl_multiprocessors(sharing)).max(multiprocessors / 2);
            let share = match (sharing, is_first) {
                (1, true) => left * 2 / 3,
                (1, false) => left / 3,
                (sharing, _) => left / sharing,
            };
            share.max(1)
        }
        max_ctas => max_ctas.min(multiprocessors / sharing).max(1),
    }
}

/// Multiprocessors of a device that are left to NCCL where so many ranks share it.
fn nccl_multiprocessors(sharing: usize) -> usize {
    if sharing == 1 { NCCL_MULTIPROCESSORS } else { NCCL_MULTIPROCESSORS.min(sharing * NCCL_MULTIPROCESSORS_SHARING) }
}

/// Communicators of this process with a fused exchange, or on the way to one, by device.
static SEATED: Lazy<Mutex<HashMap<i32, usize>>> = Lazy::new(Default::default);

/// A communicator's place among those of a device.
#[derive(Debug)]
pub struct Seat {
    device: i32,
    /// Whether the device had no other when it was taken.
    pub is_first: bool,
}

impl Seat {
    /// Takes one, until it is dropped.
    pub fn take(device: i32) -> Self {
        let mut seated = SEATED.lock();
        let n_seated = seated.entry(device).or_default();
        *n_seated += 1;
        Self { device, is_first: *n_seated == 1 }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(n_seated) = SEATED.lock().get_mut(&self.device) {
            *n_seated -= 1;
        }
    }
}

impl Prepared {
    /// Makes this rank's area, zeroed, in the current context.
    ///
    /// # Errors
    /// When memory or the driver does not allow it.
    pub fn new(kind: Kind, rings: Rings, context: &Context, stream: &Stream) -> Result<Self> {
        let n_bytes = rings.area_bytes();
        let mut offer = [0; OFFER_BYTES];
        let area = match kind {
            Kind::Peer => {
                let area = PeerArea::new(context.device(), n_bytes)?;
                area.memory.clear(stream).map_err(Error::cuda("clearing the receive area"))?;
                offer[..8].copy_from_slice(&(area.memory.at(0) as u64).to_le_bytes());
                // Without IPC (containers may forbid it) the ranks of this process can still use the address.
                match area.memory.export() {
                    Ok(handle) => {
                        offer[8] = 1;
                        offer[16..].copy_from_slice(&handle);
                    }
                    Err(error) => log::info!("no CUDA IPC for the exchange peer: {error}"),
                }
                Area::Peer(area)
            }
            Kind::Host => {
                let shared = SharedMemory::create(n_bytes, context.numa_node())?;
                offer[..16].copy_from_slice(shared.name());
                Area::Host(HostArea::new(shared)?)
            }
        };
        let signals =
            DeviceMemory::new(rings.channels * 4).map_err(Error::cuda("allocating the channels' counters"))?;
        signals.clear(stream).map_err(Error::cuda("clearing the channels' counters"))?;
        let control = PinnedMemory::new(CONTROL_BYTES).map_err(Error::cuda("allocating the abort word"))?;
        Ok(Self { kind, rings, area, offer, signals, control })
    }

    /// What the others need to map the area.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Maps the others' areas.
    ///
    /// `peers`: every rank, this one included; `block_channels`: channels that a block of the kernel may have.
    ///
    /// # Errors
    /// When one cannot be mapped.
    pub fn connect(
        self,
        rank: usize,
        peers: &[Peer],
        context: &Context,
        block_channels: usize,
        timeout: Option<Duration>,
    ) -> Result<Fused> {
        let mut areas = [std::ptr::null_mut(); rings::MAX_WORLD];
        let mut theirs = Vec::new();
        for (peer, Peer { process, device, offer }) in peers.iter().enumerate() {
            areas[peer] = match &self.area {
                Area::Peer(area) if peer == rank => area.memory.at(0),
                Area::Host(host) if peer == rank => host.registered.device_address(),
                Area::Peer(_) if *process == peers[rank].process => {
                    let peer_context = Context::retain(*device).map_err(Error::cuda("retaining a peer's context"))?;
                    context.enable_peer(&peer_context).map_err(Error::cuda("enabling peer access"))?;
                    u64::from_le_bytes(offer[..8].try_into().expect("8 bytes")) as *mut c_void
                }
                Area::Peer(_) => map_ipc(*process, offer, context.device())?,
                Area::Host(_) => {
                    let name = offer[..16].try_into().expect("16 bytes");
                    let host = HostArea::new(SharedMemory::open(name, self.rings.area_bytes())?)?;
                    let address = host.registered.device_address();
                    theirs.push(host);
                    address
                }
            };
        }
        Ok(Fused {
            kind: self.kind,
            rings: self.rings,
            rank,
            max_blocks: (self.rings.channels / block_channels).max(1),
            block_channels: block_channels.min(self.rings.channels),
            areas,
            mine: self.area,
            _theirs: theirs,
            signals: self.signals,
            control: self.control,
            timeout,
            is_reported: AtomicBool::new(false),
        })
    }
}

fn map_ipc(process: u64, offer: &Offer, device: i32) -> Result<*mut c_void> {
    if offer[8] == 0 {
        return Err(Error::Unmappable("the other process may not export GPU memory (CUDA IPC)"));
    }
    let handle: IpcHandle = offer[16..].try_into().expect("64 bytes");
    let mut mapped = MAPPED.lock();
    if let Some(address) = mapped.get(&(process, handle, device)) {
        return Ok(*address as *mut c_void);
    }
    let address = cuda::open_ipc(&handle).map_err(Error::cuda("mapping another rank's GPU memory"))?;
    mapped.insert((process, handle, device), address as usize);
    Ok(address)
}

impl Fused {
    /// Every rank has mapped everything: what was named for that needs no name any more.
    pub fn unlink(&mut self) {
        if let Area::Host(host) = &mut self.mine {
            host.shared.unlink();
        }
    }

    /// Blocks of a kernel at most.
    pub fn max_blocks(&self) -> usize {
        self.max_blocks
    }

    /// Issues the all-reduce of `plan` to `stream`, of the current context.
    ///
    /// # Errors
    /// The driver's; [`Error::GaveUp`] when an earlier one did not come to its end.
    ///
    /// # Safety
    /// `input` and `output` hold the operation's elements until it has run.
    pub unsafe fn all_reduce(
        &self,
        kernels: &Kernels,
        plan: &Plan,
        element: ElementType,
        scale: f32,
        (input, output): (*const c_void, *mut c_void),
        stream: StreamHandle,
    ) -> Result<()> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        let chunk_tiles = plan.chunk_tiles();
        // Few tiles rather spread over multiprocessors than share one; many take as few blocks as do with as many rounds.
        let block_channels = chunk_tiles.div_ceil(self.max_blocks).min(self.block_channels);
        let n_rounds = chunk_tiles.div_ceil(self.max_blocks * block_channels);
        let n_blocks = chunk_tiles.div_ceil(n_rounds * block_channels);
        let (count, chunk_tiles) = (plan.count() as u64, chunk_tiles as u64);
        let args = AllReduceArgs { input, output, count, chunk_tiles, scale, ..self.args() };
        // SAFETY: the areas are every rank's and stay; the caller vouches for the rest; the blocks fit by `block_limit`.
        unsafe { kernels.all_reduce(element, self.kind.areas(), (n_blocks, block_channels), &args, stream) }
            .map_err(Error::cuda("launching the all-reduce"))
    }

    /// Runs the kernels once over nothing, as large as they ever are. What the driver does at the first launch of a kernel
    /// (loading it, making room for its local memory) may wait for all work of the device; were that another rank's
    /// all-reduce, which waits for this one's, both would wait for ever.
    ///
    /// # Errors
    /// The driver's.
    pub fn warm_up(&self, kernels: &Kernels, stream: &Stream) -> Result<()> {
        for element in ElementType::ALL {
            let shape = (self.max_blocks, self.block_channels);
            // SAFETY: without tiles the kernel touches no memory.
            unsafe { kernels.all_reduce(element, self.kind.areas(), shape, &self.args(), stream.handle()) }
                .map_err(Error::cuda("launching the all-reduce for the first time"))?;
        }
        stream.synchronize().map_err(Error::cuda("running the all-reduce for the first time"))
    }

    /// What all launches have in common; the operation is to be filled in.
    fn args(&self) -> AllReduceArgs {
        AllReduceArgs {
            input: std::ptr::null(),
            output: std::ptr::null_mut(),
            count: 0,
            chunk_tiles: 0,
            areas: self.areas.map(<*mut c_void>::cast),
            signals: self.signals.at(0).cast(),
            abort: self.control.address().cast(),
            gave_up: self.gave_up_ptr(),
            timeout_ns: self.timeout.map_or(0, |timeout| u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX)),
            rank: self.rank as u32,
            world: self.rings.world as u32,
            max_channels: self.rings.channels as u32,
            group_shift: kernels::group_shift(self.rings.legs.reduce),
            scale: 1.0,
        }
    }

    /// Frees every kernel of this rank that waits (invariant I5).
    pub fn abort(&self) {
        self.word(0).store(1, Ordering::SeqCst);
    }

    fn is_aborted(&self) -> bool {
        self.word(0).load(Ordering::Relaxed) != 0
    }

    /// What a kernel that gave up was waiting for.
    pub fn gave_up(&self) -> Option<GaveUp> {
        if self.word(GAVE_UP_AT + offset_of!(GaveUp, why)).load(Ordering::Acquire) == 0 {
            return None;
        }
        // SAFETY: it lies in the control memory; the kernel that gave up wrote it before the word just seen.
        Some(unsafe { self.gave_up_ptr().read_volatile() })
    }

    fn gave_up_ptr(&self) -> *mut GaveUp {
        self.control.address().wrapping_byte_add(GAVE_UP_AT).cast()
    }

    /// The error of a kernel that gave up, logged when first asked for.
    pub fn failure(&self) -> Option<Error> {
        let GaveUp { why, peer, channel, iteration, .. } = self.gave_up()?;
        let error = Error::GaveUp { rank: self.rank, peer, channel, iteration, is_aborted: why == ABORTED };
        if !self.is_reported.swap(true, Ordering::Relaxed) {
            log::error!("{error}");
        }
        Some(error)
    }

    fn word(&self, at: usize) -> &AtomicU32 {
        // SAFETY: 4-byte aligned words of the control memory, which lives as long as `self`.
        unsafe { AtomicU32::from_ptr(self.control.address().wrapping_byte_add(at).cast()) }
    }
}

impl Drop for Fused {
    fn drop(&mut self) {
        // When all its kernels have run to their end, every peer has done its part, and nobody writes here any more.
        let is_lost = self.is_aborted() || self.gave_up().is_some();
        if let Area::Peer(area) = &mut self.mine {
            area.is_lost = is_lost;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_default_two_communicators_and_nccl_fit_together() {
        for multiprocessors in [28, 64, 84, 108, 132, 148, 188] {
            for sharing in 1..=16 {
                let [first, later] = [true, false].map(|is_first| block_limit(multiprocessors, sharing, is_first, 0));
                assert!(first >= later && later >= 1);
                if multiprocessors >= 64 && later > 1 {
                    let all = if sharing == 1 { first + later } else { sharing * first };
                    assert!(all + nccl_multiprocessors(sharing) <= multiprocessors, "{multiprocessors} {sharing}");
                }
            }
        }
        assert_eq!([true, false].map(|is_first| block_limit(132, 1, is_first, 0)), [66, 33]);
        assert_eq!([2, 4, 8].map(|sharing| block_limit(132, sharing, true, 0)), [58, 25, 12]);
    }

    #[test]
    fn a_device_has_one_first_communicator_at_a_time() {
        let (device, other) = (-1, -2); // no test has such devices
        let first = Seat::take(device);
        let second = Seat::take(device);
        assert!(first.is_first && !second.is_first && Seat::take(other).is_first);
        drop(first);
        assert!(!Seat::take(device).is_first, "the second is still there");
        drop(second);
        assert!(Seat::take(device).is_first);
    }

    #[test]
    fn the_setting_bounds_the_blocks_but_never_beyond_the_device() {
        assert_eq!(block_limit(132, 2, true, 66), 66);
        assert_eq!(block_limit(132, 4, true, 66), 33);
        assert_eq!(block_limit(132, 1, false, 1), 1);
        assert_eq!(block_limit(132, 1, false, 1024), 132);
    }
}

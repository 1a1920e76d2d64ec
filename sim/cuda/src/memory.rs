//! Memory: addresses that fault on the host, and the bytes behind them.
//!
//! Two ranges of [`ARENA_BYTES`] of address space: one that nobody can touch, whose addresses are handed out as device
//! pointers, and one where the bytes are, a mapping of a shared-memory file. A device address and its byte have the
//! same offset in their ranges. An IPC handle names this process, the file and the range; who opens it maps the
//! owner's bytes over a part of its own range. The file has no name, so nothing is left behind by a killed process.
//!
//! Pinned host memory lies in the second range and is handed out by its true address. Every copy and kernel resolves
//! its pointers here, so an access outside of a live allocation is found when it happens.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::Ordering;

use once_cell::sync::Lazy;
use parking_lot::RwLock;

use crate::cu_result::{CuResult, Result};
use crate::device::{self, Device};

/// Address space of each range.
const ARENA_BYTES: usize = 1 << 37;
/// Blocks are powers of two from this size on, so they can be mapped by page.
const MIN_BLOCK: usize = 4096;
/// Fresh memory holds this, not zeros, as far as [`POISON_BYTES`] go.
const POISON: u8 = 0xA5;
const POISON_BYTES: usize = 64 << 10;

/// What an allocation is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Memory of a device.
    Device,
    /// A peer's memory, opened by its IPC handle.
    Imported,
    /// Pinned host memory of ours.
    Pinned,
    /// The application's memory, registered.
    Registered,
}

/// A live allocation.
#[derive(Clone, Copy, Debug)]
pub struct Allocation {
    /// Its first address.
    pub address: usize,
    /// Its bytes.
    pub n_bytes: usize,
    /// What it is.
    pub kind: Kind,
    /// The device it belongs to.
    pub device: i32,
}

/// An IPC handle's contents.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct IpcHandle {
    magic: u64,
    process: u32,
    file: i32,
    offset: u64,
    n_bytes: u64,
    /// Allocations of the owner before this one: a handle of freed memory is not one of what comes after it.
    serial: u64,
    device: i32,
    padding: [u32; 5],
}

const IPC_MAGIC: u64 = u64::from_le_bytes(*b"simcuipc");

struct Arena {
    /// Start of the range that faults.
    fenced: usize,
    /// Start of the range that holds the bytes.
    bytes: usize,
    file: File,
    table: RwLock<Table>,
}

#[derive(Default)]
struct Table {
    live: BTreeMap<usize, Allocation>,
    /// Free blocks' offsets by size.
    free: HashMap<usize, Vec<usize>>,
    end: usize,
    /// How often a device range was handed out.
    serial: u64,
    serials: HashMap<usize, u64>,
}

static ARENA: Lazy<Arena> = Lazy::new(|| {
    // SAFETY: a fresh anonymous file with a literal name.
    let file = unsafe { libc::memfd_create(c"flashcomm-sim-memory".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(file >= 0, "memfd_create: {}", std::io::Error::last_os_error());
    // SAFETY: just opened, owned by nobody else.
    let file = unsafe { File::from_raw_fd(file) };
    file.set_len(ARENA_BYTES as u64).expect("a sparse file of any length");
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let fenced = map(std::ptr::null_mut(), ARENA_BYTES, libc::PROT_NONE, flags, -1, 0);
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let bytes =
        map(std::ptr::null_mut(), ARENA_BYTES, access, libc::MAP_SHARED | libc::MAP_NORESERVE, file.as_raw_fd(), 0);
    let (fenced, bytes) = (fenced.expect("address space"), bytes.expect("address space"));
    Arena { fenced, bytes, file, table: RwLock::default() }
});

fn map(at: *mut libc::c_void, n_bytes: usize, access: i32, flags: i32, file: i32, offset: usize) -> Option<usize> {
    // SAFETY: fixed mappings are only asked for within our own ranges.
    let address = unsafe { libc::mmap(at, n_bytes, access, flags, file, offset as i64) };
    (address != libc::MAP_FAILED).then_some(address as usize)
}

const fn block_bytes(n_bytes: usize) -> usize {
    let n_bytes = n_bytes.next_power_of_two();
    if n_bytes < MIN_BLOCK { MIN_BLOCK } else { n_bytes }
}

impl Table {
    fn take(&mut self, n_bytes: usize) -> Result<usize> {
        let block = block_bytes(n_bytes);
        if let Some(offset) = self.free.get_mut(&block).and_then(Vec::pop) {
            return Ok(offset);
        }
        if block > ARENA_BYTES - self.end {
            return Err(CuResult::OUT_OF_MEMORY);
        }
        self.end += block;
        Ok(self.end - block)
    }

    fn give_back(&mut self, offset: usize, n_bytes: usize) {
        self.free.entry(block_bytes(n_bytes)).or_default().push(offset);
    }

    fn find(&self, address: usize, n_bytes: usize) -> Option<&Allocation> {
        let (_, found) = self.live.range(..=address).next_back()?;
        let end = address.checked_add(n_bytes)?;
        (address < found.address + found.n_bytes && end <= found.address + found.n_bytes).then_some(found)
    }
}

/// Allocates memory of `device`, or pinned host memory.
pub fn allocate(n_bytes: usize, kind: Kind, device: &Device) -> Result<usize> {
    if n_bytes == 0 || n_bytes > ARENA_BYTES {
        return Err(if n_bytes == 0 { CuResult::INVALID_VALUE } else { CuResult::OUT_OF_MEMORY });
    }
    let used = device.used_bytes.fetch_add(n_bytes as i64, Ordering::Relaxed);
    if kind == Kind::Device && used + n_bytes as i64 > device::total_bytes() {
        device.used_bytes.fetch_sub(n_bytes as i64, Ordering::Relaxed);
        return Err(CuResult::OUT_OF_MEMORY);
    }
    let mut table = ARENA.table.write();
    let offset = table.take(n_bytes)?;
    // SAFETY: a block of our own range that belongs to nobody else.
    unsafe { std::ptr::write_bytes((ARENA.bytes + offset) as *mut u8, POISON, n_bytes.min(POISON_BYTES)) };
    let address = if kind == Kind::Pinned { ARENA.bytes } else { ARENA.fenced } + offset;
    table.live.insert(address, Allocation { address, n_bytes, kind, device: device.ordinal });
    table.serial += 1;
    let serial = table.serial;
    table.serials.insert(address, serial);
    Ok(address)
}

/// Frees what [`allocate`] gave.
pub fn free(address: usize, kind: Kind) -> Result<()> {
    let mut table = ARENA.table.write();
    let allocation = *table.live.get(&address).filter(|found| found.kind == kind).ok_or(CuResult::INVALID_VALUE)?;
    table.live.remove(&address);
    table.serials.remove(&address);
    let offset = address - if kind == Kind::Pinned { ARENA.bytes } else { ARENA.fenced };
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let (start, length) = (offset as i64, block_bytes(allocation.n_bytes) as i64);
    // SAFETY: our own file; the range belongs to the block.
    unsafe { libc::fallocate(ARENA.file.as_raw_fd(), mode, start, length) };
    table.give_back(offset, allocation.n_bytes);
    let device = device::of(allocation.device)?;
    device.used_bytes.fetch_sub(allocation.n_bytes as i64, Ordering::Relaxed);
    Ok(())
}

/// Registers the application's memory for use by devices.
pub fn register(address: usize, n_bytes: usize) -> Result<()> {
    let mut table = ARENA.table.write();
    let end = address.checked_add(n_bytes).ok_or(CuResult::INVALID_VALUE)?;
    let overlaps = table.live.range(..end).next_back().is_some_and(|(start, found)| start + found.n_bytes > address);
    if overlaps {
        return Err(CuResult::HOST_MEMORY_ALREADY_REGISTERED);
    }
    table.live.insert(address, Allocation { address, n_bytes, kind: Kind::Registered, device: 0 });
    Ok(())
}

/// Undoes [`register`].
pub fn unregister(address: usize) -> Result<()> {
    let mut table = ARENA.table.write();
    if table.live.get(&address).is_none_or(|found| found.kind != Kind::Registered) {
        return Err(CuResult::HOST_MEMORY_NOT_REGISTERED);
    }
    table.live.remove(&address);
    Ok(())
}

/// The live allocation that holds an address.
pub fn allocation_of(address: usize) -> Option<Allocation> {
    ARENA.table.read().find(address, 1).copied()
}

/// The bytes behind a range that devices may access.
pub fn resolve(address: usize, n_bytes: usize) -> Result<*mut u8> {
    if n_bytes == 0 {
        return Ok(std::ptr::dangling_mut());
    }
    let found = *ARENA.table.read().find(address, n_bytes).ok_or(CuResult::ILLEGAL_ADDRESS)?;
    Ok(match found.kind {
        Kind::Device | Kind::Imported => (address - ARENA.fenced + ARENA.bytes) as *mut u8,
        Kind::Pinned | Kind::Registered => address as *mut u8,
    })
}

/// Whether an address lies in the range that the host cannot touch.
pub fn is_fenced(address: usize) -> bool {
    (ARENA.fenced..ARENA.fenced + ARENA_BYTES).contains(&address)
}

/// The handle by which other processes map a device allocation.
pub fn export(address: usize) -> Result<IpcHandle> {
    let table = ARENA.table.read();
    let found = table.find(address, 1).filter(|found| found.kind == Kind::Device).ok_or(CuResult::INVALID_VALUE)?;
    Ok(IpcHandle {
        magic: IPC_MAGIC,
        process: std::process::id(),
        file: ARENA.file.as_raw_fd(),
        offset: (found.address - ARENA.fenced) as u64,
        n_bytes: found.n_bytes as u64,
        serial: table.serials[&found.address],
        device: found.device,
        padding: [0; 5],
    })
}

/// Maps what a handle of another process names. (One's own cannot be opened, as with the driver.)
pub fn import(handle: &IpcHandle, device: &Device) -> Result<usize> {
    if handle.magic != IPC_MAGIC || handle.process == std::process::id() {
        return Err(CuResult::INVALID_VALUE);
    }
    if handle.device != device.ordinal && !device::reach_each_other() {
        return Err(CuResult::PEER_ACCESS_UNSUPPORTED);
    }
    let path = format!("/proc/{}/fd/{}", handle.process, handle.file);
    let file = File::options().read(true).write(true).open(path).map_err(|_| CuResult::INVALID_VALUE)?;
    let n_bytes = usize::try_from(handle.n_bytes).map_err(|_| CuResult::INVALID_VALUE)?;
    let mut table = ARENA.table.write();
    let offset = table.take(n_bytes)?;
    let at = (ARENA.bytes + offset) as *mut libc::c_void;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
    if map(at, block_bytes(n_bytes), access, flags, file.as_raw_fd(), handle.offset as usize).is_none() {
        table.give_back(offset, n_bytes);
        return Err(CuResult::INVALID_VALUE);
    }
    let address = ARENA.fenced + offset;
    table.live.insert(address, Allocation { address, n_bytes, kind: Kind::Imported, device: device.ordinal });
    Ok(address)
}

/// Undoes [`import`].
pub fn close(address: usize) -> Result<()> {
    let mut table = ARENA.table.write();
    let found =
        *table.live.get(&address).filter(|found| found.kind == Kind::Imported).ok_or(CuResult::INVALID_VALUE)?;
    table.live.remove(&address);
    let offset = address - ARENA.fenced;
    let at = (ARENA.bytes + offset) as *mut libc::c_void;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE;
    map(at, block_bytes(found.n_bytes), access, flags, ARENA.file.as_raw_fd(), offset)
        .ok_or(CuResult::INVALID_VALUE)?;
    table.give_back(offset, found.n_bytes);
    Ok(())
}

//! What the ranks of a communicator share: a nameless file in memory, mapped by every process that has one of them.
//!
//! The unique id names a process that has the file open and the file's number there; whoever has the id opens it
//! through /proc. So nothing needs a name that somebody would have to clean up. As with NCCL, the process that made the
//! id has to live until the communicator is made.
//!
//! ```text
//! 0            Shared: counters of each rank, channels between each two
//! OUTBOX_AT    an outbox for each rank: what it contributes to the collective or sends that are running
//! ```
//!
//! Waiting is on one word, the bell, which everyone rings who has changed something.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use once_cell::sync::Lazy;
use parking_lot::Mutex;

use crate::types::{Code, Result};

/// Ranks of a communicator at most.
pub const MAX_WORLD: usize = 64;
/// Bytes of an outbox: half for collectives, half for sends.
pub const OUTBOX_BYTES: usize = 1 << 30;
const OUTBOX_AT: usize = 2 << 20;
const MAP_BYTES: usize = OUTBOX_AT + MAX_WORLD * OUTBOX_BYTES;

/// One rank's part.
#[repr(C)]
pub struct RankPart {
    /// Its process.
    pub process: AtomicU32,
    /// Its device, plus one.
    pub device: AtomicI32,
    /// Whether it has joined.
    pub joined: AtomicU32,
    /// Collectives that it has contributed to.
    pub posted: AtomicU64,
    /// Collectives that it has taken everything from.
    pub done: AtomicU64,
    /// What it calls the collective that it posted last: kind, count, type, operation, root.
    pub call: [AtomicU64; 5],
}

/// A channel from one rank to another.
#[repr(C)]
pub struct Channel {
    /// Messages sent.
    pub sent: AtomicU64,
    /// Messages taken.
    pub taken: AtomicU64,
    /// Where in the sender's outbox the last one sent is.
    pub offset: AtomicU64,
    /// Its bytes.
    pub n_bytes: AtomicU64,
    /// The same for words between hosts.
    pub words_sent: AtomicU64,
    /// See `words_sent`.
    pub words_taken: AtomicU64,
    /// The words.
    pub words: [AtomicU64; 6],
}

/// What stands at the beginning.
#[repr(C)]
pub struct Shared {
    bell: AtomicU32,
    waiting: AtomicU32,
    /// Ranks; 0 until the first has come.
    pub world: AtomicU32,
    /// Ranks that have joined.
    pub joined: AtomicU32,
    nonce: AtomicU64,
    /// The ranks.
    pub ranks: [RankPart; MAX_WORLD],
    /// From, then to.
    pub channels: [[Channel; MAX_WORLD]; MAX_WORLD],
}

const _: () = assert!(size_of::<Shared>() <= OUTBOX_AT);

/// A mapped segment.
pub struct Segment {
    address: usize,
    nonce: u64,
}

/// A unique id's contents.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Id {
    magic: u64,
    process: u64,
    file: u64,
    nonce: u64,
}

const MAGIC: u64 = u64::from_le_bytes(*b"simnccl1");

impl Id {
    /// As words that travel.
    pub fn words(self) -> [u64; 4] {
        [self.magic, self.process, self.file, self.nonce]
    }

    /// From such words.
    pub fn from_words(words: &[u64]) -> Self {
        Self { magic: words[0], process: words[1], file: words[2], nonce: words[3] }
    }
}

/// Files of segments that not everyone has opened yet.
static OFFERED: Mutex<Vec<(File, Arc<Segment>)>> = Mutex::new(Vec::new());
static OPEN: Lazy<Mutex<HashMap<u64, Weak<Segment>>>> = Lazy::new(Default::default);

fn nonce() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let time =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64);
    (time ^ u64::from(std::process::id()) << 40) << 12 | NEXT.fetch_add(1, Ordering::Relaxed) & 0xfff
}

impl Segment {
    /// A new one, offered to whoever has its id until all have joined.
    pub fn create() -> Result<(Arc<Self>, Id)> {
        sweep();
        // SAFETY: a fresh anonymous file with a literal name.
        let file = unsafe { libc::memfd_create(c"flashcomm-sim-nccl".as_ptr(), libc::MFD_CLOEXEC) };
        if file < 0 {
            return Err(Code::SYSTEM_ERROR);
        }
        // SAFETY: just opened, owned by nobody else.
        let file = unsafe { File::from_raw_fd(file) };
        file.set_len(MAP_BYTES as u64).map_err(|_| Code::SYSTEM_ERROR)?;
        let mut segment = Self::map(&file)?;
        let nonce = nonce();
        segment.shared().nonce.store(nonce, Ordering::Release);
        segment.nonce = nonce;
        let segment = Arc::new(segment);
        OPEN.lock().insert(nonce, Arc::downgrade(&segment));
        let id = Id { magic: MAGIC, process: std::process::id().into(), file: file.as_raw_fd() as u64, nonce };
        OFFERED.lock().push((file, segment.clone()));
        Ok((segment, id))
    }

    /// That of an id.
    pub fn open(id: Id) -> Result<Arc<Self>> {
        if id.magic != MAGIC {
            return Err(Code::INVALID_ARGUMENT);
        }
        let mut open = OPEN.lock();
        if let Some(segment) = open.get(&id.nonce).and_then(Weak::upgrade) {
            return Ok(segment);
        }
        let path = format!("/proc/{}/fd/{}", id.process, id.file);
        let file = File::options().read(true).write(true).open(path).map_err(|_| Code::SYSTEM_ERROR)?;
        let mut segment = Self::map(&file)?;
        if segment.shared().nonce.load(Ordering::Acquire) != id.nonce {
            drop(open); // dropping a segment takes the lock
            return Err(Code::SYSTEM_ERROR);
        }
        segment.nonce = id.nonce;
        let segment = Arc::new(segment);
        open.insert(id.nonce, Arc::downgrade(&segment));
        Ok(segment)
    }

    /// Its nonce is to be read, or set, by the caller.
    fn map(file: &File) -> Result<Self> {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE);
        // SAFETY: a fresh mapping of an open file.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), MAP_BYTES, access, flags, file.as_raw_fd(), 0) };
        if address == libc::MAP_FAILED {
            return Err(Code::SYSTEM_ERROR);
        }
        Ok(Segment { address: address as usize, nonce: 0 })
    }

    /// The counters.
    pub fn shared(&self) -> &Shared {
        // SAFETY: mapped while `self` lives, large enough; atomics only, of which zeros are values.
        unsafe { &*(self.address as *const Shared) }
    }

    /// The outbox of a rank.
    pub fn outbox(&self, rank: usize) -> *mut u8 {
        assert!(rank < MAX_WORLD);
        (self.address + OUTBOX_AT + rank * OUTBOX_BYTES) as *mut u8
    }

    /// Says that something has changed.
    pub fn ring(&self) {
        let shared = self.shared();
        shared.bell.fetch_add(1, Ordering::SeqCst);
        if shared.waiting.load(Ordering::SeqCst) > 0 {
            // SAFETY: a futex word of ours.
            unsafe { libc::syscall(libc::SYS_futex, &raw const shared.bell, libc::FUTEX_WAKE, i32::MAX) };
        }
    }

    /// Waits until `poll` has an answer; it is asked again whenever something changed, and now and then.
    pub fn wait<T>(&self, mut poll: impl FnMut() -> Option<T>) -> T {
        let shared = self.shared();
        loop {
            shared.waiting.fetch_add(1, Ordering::SeqCst);
            let bell = shared.bell.load(Ordering::SeqCst);
            let answer = poll();
            if answer.is_none() {
                let pause = libc::timespec { tv_sec: 0, tv_nsec: 20_000_000 };
                // SAFETY: a futex word of ours and a valid time.
                unsafe {
                    libc::syscall(libc::SYS_futex, &raw const shared.bell, libc::FUTEX_WAIT, bell, &raw const pause)
                };
            }
            shared.waiting.fetch_sub(1, Ordering::SeqCst);
            if let Some(answer) = answer {
                return answer;
            }
        }
    }

    /// Whether the process of a rank that had joined has died.
    pub fn is_dead(&self, rank: usize) -> bool {
        let part = &self.shared().ranks[rank];
        if part.joined.load(Ordering::Acquire) == 0 {
            return false;
        }
        let process = part.process.load(Ordering::Acquire);
        if process == std::process::id() {
            return false;
        }
        match std::fs::read_to_string(format!("/proc/{process}/stat")) {
            Ok(stat) => stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X'])),
            Err(_) => true,
        }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: mapped by us, used by nobody any more.
        unsafe { libc::munmap(self.address as *mut libc::c_void, MAP_BYTES) };
        let mut open = OPEN.lock();
        if open.get(&self.nonce).is_some_and(|known| known.strong_count() == 0) {
            open.remove(&self.nonce);
        }
    }
}

/// Takes back an offer that nobody needs.
pub fn withdraw(id: Id) {
    let withdrawn: Vec<_> = OFFERED.lock().extract_if(.., |(_, segment)| segment.nonce == id.nonce).collect();
    drop(withdrawn);
}

/// Closes the files that everyone has opened.
pub fn sweep() {
    let mut offered = OFFERED.lock();
    let is_complete = |segment: &Segment| {
        let world = segment.shared().world.load(Ordering::Acquire);
        world > 0 && segment.shared().joined.load(Ordering::Acquire) >= world
    };
    let complete: Vec<_> = offered.extract_if(.., |(_, segment)| is_complete(segment)).collect();
    drop(offered);
    drop(complete);
}

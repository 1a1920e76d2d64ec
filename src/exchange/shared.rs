//! Host memory that the processes of one user share, for as long as any has it mapped.
//!
//! It is made private to the user under a name that nobody can guess, and the name goes as soon as every rank has mapped
//! it. As long as it has a name its maker holds a lock on it, which ends with the process; a name without a lock is
//! what a killed process left, and whoever makes shared memory next removes it.
//!
//! Where all know a secret, they may name it by that: then whoever comes first makes it. Those who share such memory can tell
//! who of them has ended, by locks on its bytes.

use std::ffi::{CString, c_int, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::ptr;

use crate::error::{Error, Result};

/// What every name begins with.
const PREFIX: &str = "flashcomm-";

/// The random part of the name.
pub(crate) type Name = [u8; 16];

/// A mapping of shared memory.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    address: *mut c_void,
    n_bytes: usize,
    name: Name,
    /// Locked, while it has a name that is ours to remove.
    linked: Option<File>,
}

// SAFETY: a mapping; whoever uses it synchronizes.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Makes zeroed memory, on `numa_node` if one is given.
    ///
    /// # Errors
    /// When the system has no room for it (containers bound /dev/shm) or does not allow it.
    pub(crate) fn create(n_bytes: usize, numa_node: Option<u32>) -> Result<Self> {
        sweep();
        let (file, name) = loop {
            let mut name = Name::default();
            // SAFETY: `name` has the room that it says.
            if unsafe { libc::getrandom(name.as_mut_ptr().cast(), name.len(), 0) } != name.len() as isize {
                return Err(failed("naming shared memory"));
            }
            if let Some(file) = open_locked(&name, libc::O_CREAT | libc::O_EXCL | libc::O_RDWR)? {
                break (file, name);
            }
        };
        let mut shared = Self { address: ptr::null_mut(), n_bytes, name, linked: None };
        shared.take(file)?;
        if let Some(node) = numa_node.filter(|node| *node < 64) {
            prefer(shared.address, n_bytes, node);
        }
        Ok(shared)
    }

    /// Memory of a name that nobody else can guess: made, zeroed, by whoever comes first.
    ///
    /// # Errors
    /// As for [`SharedMemory::create`]; when the name is another user's.
    pub(crate) fn join(name: Name, n_bytes: usize) -> Result<Self> {
        sweep();
        let file = loop {
            if let Some(file) = open_locked(&name, libc::O_CREAT | libc::O_RDWR)? {
                break file;
            }
        };
        let mut shared = Self { address: ptr::null_mut(), n_bytes, name, linked: None };
        shared.take(file)?;
        Ok(shared)
    }

    /// Whether there is memory of this name whose maker lives.
    pub(crate) fn is_in_use(name: &Name) -> bool {
        open(name, libc::O_RDWR).is_ok_and(|file| !lock(&file, libc::LOCK_EX))
    }

    /// Tells the others, as long as it lives, that the one of this number has not ended. Before [`SharedMemory::unlink`].
    ///
    /// # Errors
    /// When the system does not allow it.
    pub(crate) fn become_member(&self, number: usize) -> Result<Member> {
        const DOING: &str = "locking a byte of shared memory";
        let linked = self.linked.as_ref().expect("it has its name");
        // The locks are the open file's, not the process's: ranks may be threads.
        let file = linked.try_clone().map_err(|error| Error::System { doing: DOING, error })?;
        match byte_lock(&file, libc::F_OFD_SETLK, libc::F_WRLCK, number) {
            Some(_) => Ok(Member { file }),
            None => Err(failed(DOING)),
        }
    }

    /// Maps what another process has made.
    ///
    /// # Errors
    /// When there is none of this name and size that belongs to this user.
    pub(crate) fn open(name: Name, n_bytes: usize) -> Result<Self> {
        let file = open(&name, libc::O_RDWR)?;
        let length = file.metadata().map_err(|error| Error::System { doing: "measuring shared memory", error })?.len();
        if length != n_bytes as u64 {
            return Err(Error::Unmappable("the shared memory of another rank has another size"));
        }
        let mut shared = Self { address: ptr::null_mut(), n_bytes, name, linked: None };
        shared.map(&file)?;
        Ok(shared)
    }

    /// Where it is mapped; whole pages.
    pub(crate) fn address(&self) -> *mut c_void {
        self.address
    }

    /// Bytes of it, whole pages when mapped.
    pub(crate) fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// Its name, for [`SharedMemory::open`].
    pub(crate) fn name(&self) -> &Name {
        &self.name
    }

    /// Removes the name. The memory stays for those who have it mapped.
    pub(crate) fn unlink(&mut self) {
        if let Some(_locked) = self.linked.take() {
            // SAFETY: a NUL-terminated name.
            unsafe { libc::shm_unlink(path(&self.name).as_ptr()) };
        }
    }

    /// Makes the memory of a file, which has its lock.
    fn take(&mut self, file: File) -> Result<()> {
        let file = self.linked.insert(file); // from here on the name is removed when this is dropped
        // Takes the pages now: without that a full /dev/shm would be a bus error later.
        // SAFETY: an open file.
        let result = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, self.n_bytes as libc::off_t) };
        if result != 0 {
            let error = io::Error::from_raw_os_error(result);
            return Err(Error::System { doing: "taking shared memory (is /dev/shm large enough?)", error });
        }
        let file = file.try_clone().map_err(|error| Error::System { doing: "keeping shared memory", error })?;
        self.map(&file)
    }

    fn map(&mut self, file: &File) -> Result<()> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping of an open file.
        let address = unsafe { libc::mmap(ptr::null_mut(), self.n_bytes, protection, flags, file.as_raw_fd(), 0) };
        if address == libc::MAP_FAILED {
            return Err(failed("mapping shared memory"));
        }
        self.address = address;
        Ok(())
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        self.unlink();
        if !self.address.is_null() {
            // SAFETY: mapped in `map`, once.
            unsafe { libc::munmap(self.address, self.n_bytes) };
        }
    }
}

fn path(name: &Name) -> CString {
    let hex: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
    CString::new(format!("/{PREFIX}{hex}")).expect("no NUL in it")
}

fn open(name: &Name, flags: i32) -> Result<File> {
    // SAFETY: a NUL-terminated name.
    let descriptor = unsafe { libc::shm_open(path(name).as_ptr(), flags | libc::O_CLOEXEC, 0o600) };
    if descriptor < 0 {
        return Err(failed("opening shared memory"));
    }
    // SAFETY: just opened, and nobody else's.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}

/// One of those who share memory.
#[derive(Debug)]
pub(crate) struct Member {
    file: File,
}

impl Member {
    /// Whether the one of this number has not ended, nor left.
    pub(crate) fn has(&self, number: usize) -> bool {
        // Where the system does not tell, it is as if it had not.
        byte_lock(&self.file, libc::F_OFD_GETLK, libc::F_WRLCK, number)
            .is_none_or(|found| found != libc::F_UNLCK as libc::c_short)
    }

    /// Tells the others that this one has left.
    pub(crate) fn leave(&self, number: usize) {
        byte_lock(&self.file, libc::F_OFD_SETLK, libc::F_UNLCK, number);
    }
}

/// Asks for a lock of one byte of a file, or about it; what was found there.
fn byte_lock(file: &File, command: c_int, kind: c_int, number: usize) -> Option<libc::c_short> {
    // SAFETY: all zeros are a value of it.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    (lock.l_start, lock.l_len) = (number as libc::off_t, 1);
    // SAFETY: an open file, and a lock of the layout that these commands take.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
    (result == 0).then_some(lock.l_type)
}

/// Opens shared memory and locks it against [`sweep`]. `None` where that has just taken the name away.
fn open_locked(name: &Name, flags: i32) -> Result<Option<File>> {
    let file = open(name, flags)?;
    let is_kept = lock(&file, libc::LOCK_SH) && file.metadata().is_ok_and(|file| file.nlink() == 1);
    Ok(is_kept.then_some(file))
}

/// Locks a file, shared or not, unless another process's lock forbids it.
fn lock(file: &File, how: i32) -> bool {
    // SAFETY: an open file.
    unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) == 0 }
}

/// Removes the names that killed processes of this user have left.
fn sweep() {
    // Where it cannot be listed nothing is swept; making memory says what is wrong.
    for entry in std::fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
        let is_ours = entry.file_name().to_str().and_then(|name| name.strip_prefix(PREFIX)).is_some_and(|rest| {
            rest.len() == 2 * size_of::<Name>() && rest.bytes().all(|digit| digit.is_ascii_hexdigit())
        });
        let open = || File::options().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(entry.path());
        if let Some(file) = is_ours.then(open).and_then(io::Result::ok)
            && lock(&file, libc::LOCK_EX)
            && file.metadata().is_ok_and(|file| file.nlink() == 1)
        {
            // Still locked: its maker, if there is one after all, has yet to get its lock and will not. (Had another one swept
            // it away before, the name would be that of a newer one by now.)
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn failed(doing: &'static str) -> Error {
    Error::System { doing, error: io::Error::last_os_error() }
}

/// Asks for the pages of a range to stand on a NUMA node, moving them there. A wish: where the system has one node, or
/// does not let a container choose, they stay.
fn prefer(address: *mut c_void, n_bytes: usize, node: u32) {
    const MPOL_PREFERRED: libc::c_int = 1;
    const MPOL_MF_MOVE: libc::c_uint = 2;
    let nodes: u64 = 1 << node;
    // SAFETY: the range is mapped, and the mask has the bits that it says.
    unsafe { libc::syscall(libc::SYS_mbind, address, n_bytes, MPOL_PREFERRED, &raw const nodes, 64u64, MPOL_MF_MOVE) };
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn both_sides_see_the_same_bytes_and_no_name_stays() {
        let mut mine = SharedMemory::create(8192, Some(0)).unwrap();
        let name = path(mine.name());
        let file = std::path::Path::new("/dev/shm").join(name.to_str().unwrap().trim_start_matches('/'));
        let mode = std::fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let theirs = SharedMemory::open(*mine.name(), 8192).unwrap();
        mine.unlink();
        assert!(!file.exists());
        // SAFETY: both mappings have 8192 bytes.
        unsafe {
            mine.address().cast::<u8>().add(8191).write_volatile(77);
            assert_eq!(theirs.address().cast::<u8>().add(8191).read_volatile(), 77);
        }
        drop(mine);
        // SAFETY: as above.
        assert_eq!(unsafe { theirs.address().cast::<u8>().add(8191).read_volatile() }, 77);
    }

    #[test]
    fn a_wrong_name_or_size_is_an_error() {
        let mine = SharedMemory::create(4096, None).unwrap();
        assert!(SharedMemory::open([1; 16], 4096).is_err());
        assert!(SharedMemory::open(*mine.name(), 8192).unwrap_err().to_string().contains("another size"));
    }

    #[test]
    fn who_joins_has_the_same_memory_and_tells_by_a_lock_that_it_is_there() {
        let name = [0x5a; 16];
        let mut both = [0, 1].map(|_| SharedMemory::join(name, 4096).unwrap());
        let members = [0, 1].map(|i| both[i].become_member(i).unwrap());
        // SAFETY: both mappings have 4096 bytes.
        unsafe {
            assert_eq!(both[0].address().cast::<u8>().add(9).read_volatile(), 0);
            both[0].address().cast::<u8>().add(9).write_volatile(7);
            assert_eq!(both[1].address().cast::<u8>().add(9).read_volatile(), 7);
        }
        both.iter_mut().for_each(SharedMemory::unlink);
        assert!(members[0].has(1) && members[1].has(0) && !members[0].has(2));
        let [first, second] = members;
        second.leave(1);
        assert!(!first.has(1), "it has left");
        drop((first, both));
        assert!(!second.has(0), "it has ended");
        assert!(SharedMemory::open(name, 4096).is_err(), "the name is gone");
    }

    #[test]
    fn those_who_join_at_once_share_one_memory_while_all_of_them_sweep() {
        const N: usize = 4;
        let gate = std::sync::Barrier::new(N);
        let join_and_look = |i: usize| {
            for round in 0..1000u32 {
                let mut name = [0xc3; 16];
                name[..4].copy_from_slice(&round.to_le_bytes());
                gate.wait();
                let mine = SharedMemory::join(name, 4096).unwrap();
                // SAFETY: the mapping has 4096 bytes.
                let byte =
                    |at: usize| unsafe { std::sync::atomic::AtomicU8::from_ptr(mine.address().cast::<u8>().add(at)) };
                byte(i).store(1, std::sync::atomic::Ordering::SeqCst);
                gate.wait();
                let n = (0..N).filter(|at| byte(*at).load(std::sync::atomic::Ordering::SeqCst) == 1).count();
                assert_eq!(n, N, "round {round}");
                gate.wait();
            }
        };
        std::thread::scope(|scope| {
            (0..N).for_each(|i| {
                drop(scope.spawn({
                    let job = &join_and_look;
                    move || job(i)
                }))
            })
        });
    }

    #[test]
    fn memory_that_was_never_mapped_by_others_leaves_no_name() {
        let name = path(SharedMemory::create(4096, None).unwrap().name());
        let file = std::path::Path::new("/dev/shm").join(name.to_str().unwrap().trim_start_matches('/'));
        assert!(!file.exists());
    }

    #[test]
    fn a_name_that_a_killed_process_left_is_swept_and_one_in_use_is_not() {
        let used = SharedMemory::create(4096, None).unwrap();
        let left: Name = [0xab; 16];
        drop(open(&left, libc::O_CREAT | libc::O_RDWR).unwrap()); // without the lock, as after a kill
        drop(SharedMemory::create(4096, None).unwrap());
        assert!(open(&left, libc::O_RDWR).is_err(), "not swept");
        assert!(SharedMemory::open(*used.name(), 4096).is_ok(), "swept while in use");
        assert!(SharedMemory::is_in_use(used.name()) && !SharedMemory::is_in_use(&left));
    }
}

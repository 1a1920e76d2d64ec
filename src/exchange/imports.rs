//! GPU memory that processes have of one another, by CUDA IPC.
//!
//! What this process has mapped stays mapped while it has communicators: the owners lend the same memory again and again.
//! With the last communicator it goes. Whoever owns memory must not free it before, so a process that has any mapped shows
//! a *flag*, a name in shared memory that goes with it, also if it is killed.

use std::collections::{HashMap, HashSet};
use std::ffi::c_void;

use once_cell::sync::Lazy;
use parking_lot::Mutex;

use super::shared::{Name, SharedMemory};
use crate::cuda::{self, Context, IpcHandle};
use crate::error::{Error, Result};

#[derive(Default)]
struct Imports {
    /// Where it is mapped, by owner, handle and device of ours.
    mapped: HashMap<(u64, IpcHandle, i32), usize>,
    /// Up while anything is.
    flag: Option<SharedMemory>,
}

/// Other processes that may have memory of ours mapped.
#[derive(Default)]
struct Importers {
    /// Those whose flags can be seen here.
    with_flag: HashSet<u64>,
    /// Whether there are any others: of those it never becomes known that they have closed.
    are_others: bool,
}

static IMPORTS: Lazy<Mutex<Imports>> = Lazy::new(Default::default);
static IMPORTERS: Lazy<Mutex<Importers>> = Lazy::new(Default::default);

/// Bytes of a flag: shared memory is never empty.
const FLAG_BYTES: usize = 1;

/// What a process's flag is called: its number is random, and known to those it shares a communicator with.
fn flag(process: u64) -> Name {
    let mut name = Name::default();
    name[..8].copy_from_slice(&process.to_le_bytes());
    name[8..].copy_from_slice(&(!process).to_le_bytes());
    name
}

/// Maps memory of another process for `device`, whose context is current. `process`: this one; `shows_flag`: whether there
/// is shared memory, in which it can be seen.
///
/// # Errors
/// The driver's, or the system's.
pub(super) fn map(
    owner: u64,
    handle: IpcHandle,
    device: i32,
    (process, shows_flag): (u64, bool),
) -> Result<*mut c_void> {
    let mut imports = IMPORTS.lock();
    if let Some(address) = imports.mapped.get(&(owner, handle, device)) {
        return Ok(*address as *mut c_void);
    }
    if shows_flag && imports.flag.is_none() {
        imports.flag = Some(SharedMemory::join(flag(process), FLAG_BYTES)?);
    }
    let address = cuda::open_ipc(&handle).map_err(Error::cuda("mapping another rank's GPU memory"))?;
    imports.mapped.insert((owner, handle, device), address as usize);
    Ok(address)
}

/// From now on another process may have memory of ours. `has_flag`: whether its flag would be seen here.
pub(super) fn may_be_mapped_by(process: u64, has_flag: bool) {
    let mut importers = IMPORTERS.lock();
    match has_flag {
        true => drop(importers.with_flag.insert(process)),
        false => importers.are_others = true,
    }
}

/// Closes everything that is mapped here. No kernel uses it any more.
pub(crate) fn close_all() {
    let mut imports = IMPORTS.lock();
    for ((_, _, device), address) in imports.mapped.drain() {
        if let Ok(context) = Context::retain(device) {
            let _entered = context.enter();
            cuda::close_ipc(address as *mut c_void);
        }
    }
    imports.flag = None;
}

/// Whether nobody has memory of ours mapped any more.
pub(crate) fn is_ours_alone() -> bool {
    let mut importers = IMPORTERS.lock();
    importers.with_flag.retain(|process| SharedMemory::is_in_use(&flag(*process)));
    importers.with_flag.is_empty() && !importers.are_others
}

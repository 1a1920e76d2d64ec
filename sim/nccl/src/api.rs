//! The C functions, by the names and signatures of NCCL's `nccl.h`.
//!
//! More than 400 lines: it is the list of NCCL's functions, one behind the other.

#![allow(non_snake_case, reason = "NCCL's names")]
#![allow(clippy::missing_safety_doc, reason = "every function is as NCCL documents it")]

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use flashcomm_sim_schedule as schedule;

use crate::comm::{self, Comm, check_world};
use crate::driver::driver;
use crate::group;
use crate::segment::{Id, Segment, withdraw};
use crate::types::{Code, Collective, DataType, Kind, Op, Result, Scalar};

/// What this says it is: the first version with all that is simulated.
const VERSION: c_int = 22807;
/// `NCCL_SPLIT_NOCOLOR`.
const NO_COLOR: c_int = -1;
/// `NCCL_SHRINK_ABORT`.
const SHRINK_ABORT: c_int = 1;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Runs the body of an export; a panic is a bug of the simulator.
fn answer(function: &str, body: impl FnOnce() -> Result<()>) -> c_int {
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or(Err(Code::INTERNAL_ERROR));
    let Err(code) = result else { return 0 };
    if code != Code::IN_PROGRESS {
        let text = format!("{function} : simulated NCCL answers {}", code.0);
        LAST_ERROR.set(CString::new(text).unwrap_or_default());
    }
    code.0
}

/// Defines exports of NCCL.
macro_rules! nccl {
    ($(fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        #[doc = concat!("`", stringify!($name), "`.")]
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> c_int {
            answer(stringify!($name), || $body)
        }
    )*};
}

fn put<T>(place: *mut T, value: T) -> Result<()> {
    if place.is_null() {
        return Err(Code::INVALID_ARGUMENT);
    }
    // SAFETY: not null, and the caller of NCCL vouches for the place.
    unsafe { place.write(value) };
    Ok(())
}

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId {
    words: [u64; 16],
}

impl UniqueId {
    fn id(&self) -> Id {
        Id::from_words(&self.words)
    }
}

/// The head of `ncclConfig_t`.
#[repr(C)]
pub struct Config {
    n_bytes: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

/// Whether a configuration, or without one its default, asks for blocking calls.
fn is_blocking(config: *const Config, default: bool) -> Result<bool> {
    if config.is_null() {
        return Ok(default);
    }
    // SAFETY: not null, so a configuration.
    let config = unsafe { &*config };
    match config.blocking {
        _ if config.magic != 0xcafe_beef => Err(Code::INVALID_ARGUMENT),
        c_int::MIN => Ok(default),
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Code::INVALID_ARGUMENT),
    }
}

fn init(place: *mut usize, world: c_int, id: Id, rank: c_int, device: Option<c_int>, blocking: bool) -> Result<()> {
    let (world, rank) = check_world(world, rank)?;
    schedule::step();
    let device = match device {
        Some(device) if (0..driver()?.device_count()?).contains(&device) => device,
        Some(_) => return Err(Code::INVALID_ARGUMENT),
        None => driver()?.current_device(),
    };
    if place.is_null() {
        return Err(Code::INVALID_ARGUMENT);
    }
    let (comm, handle) = Comm::create(device, blocking);
    put(place, handle)?;
    let joining = comm.clone();
    let made = group::make(comm, Box::new(move || joining.join(id, world, rank)));
    if let Err(code) = made
        && code != Code::IN_PROGRESS
    {
        comm::remove(handle)?;
        put(place, 0)?;
    }
    made
}

/// A communicator of some of a communicator's ranks. `chosen`: of every member's words, whether it is one of the new
/// one's ranks, and its key there.
fn child(
    parent: Arc<Comm>,
    members: Vec<usize>,
    words: (u64, u64),
    chosen: bool,
    place: *mut usize,
    config: *const Config,
) -> Result<()> {
    let blocking = is_blocking(config, parent.is_blocking)?;
    if place.is_null() {
        return Err(Code::INVALID_ARGUMENT);
    }
    let new = chosen.then(|| Comm::create(parent.device, blocking));
    put(place, new.as_ref().map_or(0, |(_, handle)| *handle))?;
    let handle = new.as_ref().map(|(_, handle)| *handle);
    let new = new.map(|(comm, _)| comm);
    let joining = new.clone();
    let exchanging = parent.clone();
    let making = move || {
        let offer = joining.as_ref().map(|_| Segment::create()).transpose()?.map(|(_, id)| id);
        let id_words = offer.map_or([0; 4], Id::words);
        let mine = [words.0, words.1, id_words[0], id_words[1], id_words[2], id_words[3]];
        let all = exchanging.exchange(&members, mine)?;
        let (Some(comm), Some(offer)) = (joining, offer) else { return Ok(()) };
        let rank = exchanging.ready()?.rank;
        // Ranks of the same color, by key and then by rank.
        let mut same: Vec<_> = members.iter().zip(&all).filter(|(_, theirs)| theirs[0] == words.0).collect();
        same.sort_by_key(|(member, theirs)| (theirs[1] as i64, **member));
        let id = Id::from_words(&same[0].1[2..]);
        if id != offer {
            withdraw(offer);
        }
        let new_rank = same.iter().position(|(member, _)| **member == rank).ok_or(Code::INTERNAL_ERROR)?;
        comm.join(id, same.len(), new_rank)
    };
    let made = match &new {
        Some(new) => group::make(new.clone(), Box::new(making)),
        None => {
            // Nothing is made, but the others need this rank's word; its own state is that of the call.
            let (none, none_handle) = Comm::create(parent.device, blocking);
            comm::remove(none_handle)?;
            group::make(none, Box::new(making))
        }
    };
    if let (Err(code), Some(handle)) = (made, handle)
        && code != Code::IN_PROGRESS
    {
        comm::remove(handle)?;
        put(place, 0)?;
    }
    made
}

/// Checks and queues a collective.
#[allow(clippy::too_many_arguments, reason = "NCCL's")]
fn collective(
    kind: Kind,
    send: usize,
    recv: usize,
    count: usize,
    datatype: c_int,
    op: c_int,
    root: c_int,
    handle: usize,
    stream: usize,
) -> Result<()> {
    group::call(|| {
        let comm = comm::find(handle)?;
        let world = comm.check_usable()?.world;
        let datatype = DataType::new(datatype).ok_or(Code::INVALID_ARGUMENT)?;
        let op = comm.operation(op, datatype)?;
        if root < 0 || root as usize >= world {
            return Err(Code::INVALID_ARGUMENT);
        }
        let root = root as usize;
        let call = Collective { kind, send, recv, count, datatype, op, root };
        Ok((count > 0).then_some((comm, stream, Op::Collective(call))))
    })
}

/// Checks and queues a send or a receive.
fn transfer(
    op: fn(usize, usize, usize) -> Op,
    address: usize,
    count: usize,
    datatype: c_int,
    peer: c_int,
    handle: usize,
    stream: usize,
) -> Result<()> {
    group::call(|| {
        let comm = comm::find(handle)?;
        let world = comm.check_usable()?.world;
        let datatype = DataType::new(datatype).ok_or(Code::INVALID_ARGUMENT)?;
        if peer < 0 || peer as usize >= world {
            return Err(Code::INVALID_ARGUMENT);
        }
        let n_bytes = count.checked_mul(datatype.n_bytes()).ok_or(Code::INVALID_ARGUMENT)?;
        Ok(Some((comm, stream, op(address, n_bytes, peer as usize))))
    })
}

/// Calls one of our own exports the way NCCL does: through the loader, so that whoever stands before us gets it.
macro_rules! reenter {
    ($name:ident, $own:expr, fn($($type:ty),*), ($($arg:expr),*)) => {{
        // SAFETY: the default order of lookup and a NUL-terminated name.
        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, concat!(stringify!($name), "\0").as_ptr().cast()) };
        let own: unsafe extern "C" fn($($type),*) -> c_int = $own;
        let function = if found.is_null() {
            own
        } else {
            // SAFETY: NCCL's function of this name has this signature.
            unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> c_int>(found) }
        };
        // SAFETY: the caller's own arguments.
        match unsafe { function($($arg),*) } {
            0 => Ok(()),
            code => Err(Code(code)),
        }
    }};
}

nccl! {
    fn ncclGetVersion(version: *mut c_int) { put(version, VERSION) }
    fn ncclGetUniqueId(place: *mut UniqueId) {
        if place.is_null() {
            return Err(Code::INVALID_ARGUMENT);
        }
        let (_, id) = Segment::create()?;
        let mut words = [0; 16];
        words[..4].copy_from_slice(&id.words());
        put(place, UniqueId { words })
    }
    fn ncclCommInitRank(comm: *mut usize, world: c_int, id: UniqueId, rank: c_int) {
        init(comm, world, id.id(), rank, None, true)
    }
    fn ncclCommInitRankConfig(comm: *mut usize, world: c_int, id: UniqueId, rank: c_int, config: *const Config) {
        init(comm, world, id.id(), rank, None, is_blocking(config, true)?)
    }
    fn ncclCommInitRankScalable(
        comm: *mut usize, world: c_int, rank: c_int, n_ids: c_int, ids: *const UniqueId, config: *const Config,
    ) {
        if ids.is_null() || n_ids < 1 || n_ids > world {
            return Err(Code::INVALID_ARGUMENT);
        }
        // SAFETY: not null, and there is at least one.
        let id = unsafe { *ids };
        init(comm, world, id.id(), rank, None, is_blocking(config, true)?)
    }
    fn ncclCommInitAll(comms: *mut usize, n_devices: c_int, devices: *const c_int) {
        if comms.is_null() || n_devices < 1 {
            return Err(Code::INVALID_ARGUMENT);
        }
        let (_, id) = Segment::create()?;
        group::start();
        let mut outcome = Ok(());
        for i in 0..n_devices {
            // SAFETY: the caller vouches for as many devices, if any, and places.
            let (device, place) = unsafe {
                (if devices.is_null() { i } else { *devices.add(i as usize) }, comms.add(i as usize))
            };
            outcome = outcome.and(init(place, n_devices, id, i, Some(device), true));
        }
        let ended = group::end();
        outcome.and(ended)
    }
    fn ncclCommSplit(handle: usize, color: c_int, key: c_int, new: *mut usize, config: *const Config) {
        let parent = comm::find(handle)?;
        let world = parent.ready()?.world;
        if color < NO_COLOR {
            return Err(Code::INVALID_ARGUMENT);
        }
        let words = (color as i64 as u64, i64::from(key) as u64);
        child(parent, (0..world).collect(), words, color != NO_COLOR, new, config)
    }
    fn ncclCommShrink(
        handle: usize, excluded: *const c_int, n_excluded: c_int, new: *mut usize, config: *const Config, flags: c_int,
    ) {
        let parent = comm::find(handle)?;
        let (world, rank) = (parent.ready()?.world, parent.ready()?.rank);
        if excluded.is_null() || n_excluded < 1 || n_excluded as usize >= world || flags & !SHRINK_ABORT != 0 {
            return Err(Code::INVALID_ARGUMENT);
        }
        // SAFETY: the caller vouches for as many.
        let excluded = unsafe { std::slice::from_raw_parts(excluded, n_excluded as usize) };
        let members: Vec<_> = (0..world).filter(|rank| !excluded.contains(&(*rank as c_int))).collect();
        if !members.contains(&rank) {
            return Err(Code::INVALID_USAGE);
        }
        if flags & SHRINK_ABORT != 0 {
            parent.revoke();
        }
        child(parent, members, (0, 0), true, new, config)
    }
    fn ncclCommFinalize(handle: usize) { comm::find(handle)?.finalize() }
    fn ncclCommDestroy(handle: usize) {
        if handle == 0 {
            return Ok(());
        }
        comm::remove(handle).map(drop)
    }
    fn ncclCommAbort(handle: usize) {
        if handle == 0 {
            return Ok(());
        }
        comm::remove(handle)?.abort();
        Ok(())
    }
    fn ncclCommRevoke(handle: usize, flags: c_int) {
        if flags != 0 {
            return Err(Code::INVALID_ARGUMENT);
        }
        comm::find(handle)?.revoke();
        Ok(())
    }
    fn ncclCommGetAsyncError(handle: usize, result: *mut c_int) { put(result, comm::find(handle)?.state()) }
    fn ncclCommCount(handle: usize, count: *mut c_int) { put(count, comm::find(handle)?.ready()?.world as c_int) }
    fn ncclCommUserRank(handle: usize, rank: *mut c_int) { put(rank, comm::find(handle)?.ready()?.rank as c_int) }
    fn ncclCommCuDevice(handle: usize, device: *mut c_int) {
        let comm = comm::find(handle)?;
        comm.ready()?;
        put(device, comm.device)
    }
    fn ncclMemAlloc(place: *mut usize, n_bytes: usize) {
        let driver = driver()?;
        let _entered = driver.enter(driver.current_device())?;
        put(place, driver.allocate(n_bytes)?)
    }
    fn ncclMemFree(address: usize) {
        let driver = driver()?;
        let _entered = driver.enter(driver.current_device())?;
        driver.free(address)
    }
    fn ncclGroupStart() {
        group::start();
        Ok(())
    }
    fn ncclGroupEnd() { group::end() }
    fn ncclGroupSimulateEnd(info: *mut f32) {
        group::simulate_end()?;
        if info.is_null() {
            return Ok(());
        }
        // SAFETY: an ncclSimInfo_t, whose estimate is its fifth word.
        put(unsafe { info.add(4) }, 0.0)
    }
    fn ncclRedOpCreatePreMulSum(
        op: *mut c_int, scalar: *const u8, datatype: c_int, residence: c_int, handle: usize,
    ) {
        let comm = comm::find(handle)?;
        let datatype = DataType::new(datatype).ok_or(Code::INVALID_ARGUMENT)?;
        let scalar = match residence {
            _ if scalar.is_null() => return Err(Code::INVALID_ARGUMENT),
            0 => Scalar::Device(scalar as usize),
            1 => {
                let mut bytes = [0; 8];
                // SAFETY: the caller vouches for one element.
                unsafe { std::ptr::copy_nonoverlapping(scalar, bytes.as_mut_ptr(), datatype.n_bytes()) };
                Scalar::Here(bytes)
            }
            _ => return Err(Code::INVALID_ARGUMENT),
        };
        put(op, comm.add_operation(datatype, scalar))
    }
    fn ncclRedOpDestroy(op: c_int, handle: usize) { comm::find(handle)?.remove_operation(op) }
    fn ncclAllReduce(
        send: usize, recv: usize, count: usize, datatype: c_int, op: c_int, comm: usize, stream: usize,
    ) { collective(Kind::AllReduce, send, recv, count, datatype, op, 0, comm, stream) }
    fn ncclReduce(
        send: usize, recv: usize, count: usize, datatype: c_int, op: c_int, root: c_int, comm: usize, stream: usize,
    ) { collective(Kind::Reduce, send, recv, count, datatype, op, root, comm, stream) }
    fn ncclReduceScatter(
        send: usize, recv: usize, count: usize, datatype: c_int, op: c_int, comm: usize, stream: usize,
    ) { collective(Kind::ReduceScatter, send, recv, count, datatype, op, 0, comm, stream) }
    fn ncclAllGather(send: usize, recv: usize, count: usize, datatype: c_int, comm: usize, stream: usize) {
        collective(Kind::AllGather, send, recv, count, datatype, 0, 0, comm, stream)
    }
    fn ncclAlltoAll(send: usize, recv: usize, count: usize, datatype: c_int, comm: usize, stream: usize) {
        collective(Kind::AlltoAll, send, recv, count, datatype, 0, 0, comm, stream)
    }
    fn ncclBroadcast(
        send: usize, recv: usize, count: usize, datatype: c_int, root: c_int, comm: usize, stream: usize,
    ) { collective(Kind::Broadcast, send, recv, count, datatype, 0, root, comm, stream) }
    fn ncclBcast(buffer: usize, count: usize, datatype: c_int, root: c_int, comm: usize, stream: usize) {
        reenter!(
            ncclBroadcast, ncclBroadcast, fn(usize, usize, usize, c_int, c_int, usize, usize),
            (buffer, buffer, count, datatype, root, comm, stream)
        )
    }
    fn ncclSend(address: usize, count: usize, datatype: c_int, peer: c_int, comm: usize, stream: usize) {
        transfer(|from, n_bytes, peer| Op::Send { from, n_bytes, peer }, address, count, datatype, peer, comm, stream)
    }
    fn ncclRecv(address: usize, count: usize, datatype: c_int, peer: c_int, comm: usize, stream: usize) {
        transfer(|to, n_bytes, peer| Op::Recv { to, n_bytes, peer }, address, count, datatype, peer, comm, stream)
    }
}

/// `ncclGetErrorString`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetErrorString(code: c_int) -> *const c_char {
    const TEXTS: [&CStr; 8] = [
        c"no error",
        c"unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
        c"unhandled system error (run with NCCL_DEBUG=INFO for details)",
        c"internal error - please report this issue to the NCCL developers",
        c"invalid argument (run with NCCL_DEBUG=WARN for details)",
        c"invalid usage (run with NCCL_DEBUG=WARN for details)",
        c"remote process exited or there was a network error",
        c"NCCL operation in progress",
    ];
    usize::try_from(code).ok().and_then(|code| TEXTS.get(code)).unwrap_or(&c"unknown result code").as_ptr()
}

/// `ncclGetLastError`: of this thread; the communicator does not matter.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetLastError(_comm: usize) -> *const c_char {
    LAST_ERROR.with_borrow(|text| text.as_ptr())
}

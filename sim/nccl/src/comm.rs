//! Communicators: how they are made and end, and what they hold.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

use once_cell::sync::{Lazy, OnceCell};
use parking_lot::{Mutex, RwLock};

use crate::driver::driver;
use crate::segment::{self, Id, MAX_WORLD, Segment};
use crate::types::{Code, DataType, RedOp, Result, Scalar};

/// One rank of a communicator.
pub struct Comm {
    /// Its device.
    pub device: i32,
    /// Whether its calls return only when they are done with the host's part.
    pub is_blocking: bool,
    ready: OnceCell<Ready>,
    /// 0, `ncclInProgress`, or what went wrong.
    state: AtomicI32,
    is_aborted: AtomicBool,
    is_revoked: AtomicBool,
    is_finalized: AtomicBool,
    /// The chain of its launches.
    pub order: Mutex<Order>,
    /// Collectives run; held by the launch that runs.
    pub turn: Mutex<u64>,
    operations: Mutex<Vec<Option<(DataType, Scalar)>>>,
}

/// What is known when all ranks have joined.
pub struct Ready {
    /// Shared with the other ranks.
    pub segment: Arc<Segment>,
    /// This rank.
    pub rank: usize,
    /// Ranks.
    pub world: usize,
}

/// Events that chain the launches whatever streams they are on.
pub struct Order {
    /// The end of the last launch, eager or replayed.
    pub last: Option<usize>,
    /// The end of the last one within the capture of that id.
    pub captured: Option<(u64, usize)>,
}

/// Why a wait ended without what it waited for.
pub enum Stop {
    /// The communicator was aborted or revoked.
    Aborted,
    /// Something is wrong; the driver's code for it.
    Wrong(i32),
}

static COMMS: Lazy<RwLock<HashMap<usize, Arc<Comm>>>> = Lazy::new(Default::default);

/// The communicator of a handle.
pub fn find(handle: usize) -> Result<Arc<Comm>> {
    COMMS.read().get(&handle).cloned().ok_or(Code::INVALID_ARGUMENT)
}

/// Takes a handle out of use; its address may come again.
pub fn remove(handle: usize) -> Result<Arc<Comm>> {
    COMMS.write().remove(&handle).ok_or(Code::INVALID_ARGUMENT)
}

impl Comm {
    /// A communicator in the making; its handle is good from now on.
    pub fn create(device: i32, is_blocking: bool) -> (Arc<Self>, usize) {
        let comm = Arc::new(Comm {
            device,
            is_blocking,
            ready: OnceCell::new(),
            state: AtomicI32::new(Code::IN_PROGRESS.0),
            is_aborted: AtomicBool::new(false),
            is_revoked: AtomicBool::new(false),
            is_finalized: AtomicBool::new(false),
            order: Mutex::new(Order { last: None, captured: None }),
            turn: Mutex::new(0),
            operations: Mutex::default(),
        });
        let handle = Arc::as_ptr(&comm) as usize;
        COMMS.write().insert(handle, comm.clone());
        (comm, handle)
    }

    /// Joins the others.
    pub fn join(&self, id: Id, world: usize, rank: usize) -> Result<()> {
        let segment = Segment::open(id)?;
        let shared = segment.shared();
        if let Err(other) = shared.world.compare_exchange(0, world as u32, Ordering::AcqRel, Ordering::Acquire)
            && other as usize != world
        {
            return Err(Code::INVALID_USAGE);
        }
        let part = &shared.ranks[rank];
        part.process.store(std::process::id(), Ordering::Release);
        part.device.store(self.device + 1, Ordering::Release);
        if part.joined.swap(1, Ordering::AcqRel) == 1 {
            return Err(Code::INVALID_USAGE); // two that say they are this rank
        }
        shared.joined.fetch_add(1, Ordering::AcqRel);
        segment.ring();
        let mut last_look = Instant::now();
        segment.wait(|| {
            if shared.joined.load(Ordering::Acquire) as usize >= world {
                return Some(Ok(()));
            }
            if self.is_aborted() {
                return Some(Err(Code::INTERNAL_ERROR));
            }
            let is_time = last_look.elapsed() > LOOK_FOR_THE_DEAD;
            if is_time {
                last_look = Instant::now();
            }
            (is_time && (0..world).any(|rank| segment.is_dead(rank))).then_some(Err(Code::REMOTE_ERROR))
        })?;
        segment::sweep();
        let devices: Vec<_> = shared.ranks[..world].iter().map(|part| part.device.load(Ordering::Acquire)).collect();
        let is_twice = |i: usize| devices[..i].contains(&devices[i]);
        let may_share = std::env::var_os("NCCL_MULTI_RANK_GPU_ENABLE").is_some_and(|value| value == "1");
        if !may_share && (0..world).any(is_twice) {
            return Err(Code::INVALID_USAGE); // as NCCL: duplicate GPU
        }
        let driver = driver()?;
        let _entered = driver.enter(self.device)?;
        self.order.lock().last = Some(driver.event()?);
        let _ = self.ready.set(Ready { segment, rank, world });
        Ok(())
    }

    /// Words of each member to each, among ranks that all call this.
    pub fn exchange(&self, members: &[usize], mine: [u64; 6]) -> Result<Vec<[u64; 6]>> {
        let Ready { segment, rank, .. } = self.ready()?;
        let channels = &segment.shared().channels;
        let stopped = |_| Code::INTERNAL_ERROR;
        for to in members {
            let channel = &channels[*rank][*to];
            let sent = channel.words_sent.load(Ordering::Acquire);
            self.wait(|| channel.words_taken.load(Ordering::Acquire) == sent).map_err(stopped)?;
            channel.words.iter().zip(mine).for_each(|(place, word)| place.store(word, Ordering::Relaxed));
            channel.words_sent.store(sent + 1, Ordering::Release);
        }
        segment.ring();
        let mut all = Vec::new();
        for from in members {
            let channel = &channels[*from][*rank];
            let taken = channel.words_taken.load(Ordering::Acquire);
            self.wait(|| channel.words_sent.load(Ordering::Acquire) > taken).map_err(stopped)?;
            all.push(std::array::from_fn(|i| channel.words[i].load(Ordering::Relaxed)));
            channel.words_taken.store(taken + 1, Ordering::Release);
        }
        segment.ring();
        Ok(all)
    }

    /// Waits for something that other ranks do.
    pub fn wait(&self, mut is_so: impl FnMut() -> bool) -> std::result::Result<(), Stop> {
        let Ok(Ready { segment, world, .. }) = self.ready() else { return Err(Stop::Aborted) };
        let mut last_look = Instant::now();
        segment.wait(|| {
            if is_so() {
                return Some(Ok(()));
            }
            if self.is_aborted() || self.is_revoked() {
                return Some(Err(Stop::Aborted));
            }
            if last_look.elapsed() > LOOK_FOR_THE_DEAD {
                last_look = Instant::now();
                if (0..*world).any(|rank| segment.is_dead(rank)) {
                    self.settle(Err(Code::REMOTE_ERROR)); // and goes on waiting, as a kernel of NCCL's would
                }
            }
            None
        })
    }

    /// What is known since all have joined.
    pub fn ready(&self) -> Result<&Ready> {
        self.ready.get().ok_or(Code::INVALID_ARGUMENT)
    }

    /// To be asked before a collective.
    pub fn check_usable(&self) -> Result<&Ready> {
        match self.state.load(Ordering::Acquire) {
            0 => {}
            7 => return Err(Code::INVALID_ARGUMENT), // the last call of a non-blocking one is not done yet
            code => return Err(Code(code)),
        }
        if self.is_revoked() || self.is_finalized.load(Ordering::Acquire) {
            return Err(Code::INVALID_USAGE);
        }
        self.ready()
    }

    /// For `ncclCommGetAsyncError`.
    pub fn state(&self) -> i32 {
        self.state.load(Ordering::Acquire)
    }

    /// Settles the state after a call.
    pub fn settle(&self, result: Result<()>) {
        self.state.store(result.err().map_or(0, |code| code.0), Ordering::Release);
    }

    /// Marks that a call is under way.
    pub fn begin(&self) {
        self.state.store(Code::IN_PROGRESS.0, Ordering::Release);
    }

    /// Ends everything that waits.
    pub fn abort(&self) {
        self.is_aborted.store(true, Ordering::Release);
        self.ring();
    }

    /// Ends everything that waits; the communicator can only have children or be destroyed afterwards.
    pub fn revoke(&self) {
        self.is_revoked.store(true, Ordering::Release);
        self.ring();
    }

    fn ring(&self) {
        if let Ok(Ready { segment, .. }) = self.ready() {
            segment.ring();
        }
    }

    fn is_aborted(&self) -> bool {
        self.is_aborted.load(Ordering::Acquire)
    }

    /// Whether it is revoked.
    pub fn is_revoked(&self) -> bool {
        self.is_revoked.load(Ordering::Acquire)
    }

    /// Waits for its launches, and takes no more.
    pub fn finalize(&self) -> Result<()> {
        self.is_finalized.store(true, Ordering::Release);
        let last = self.order.lock().last.ok_or(Code::INVALID_ARGUMENT)?;
        driver()?.synchronize(last)
    }

    /// The reduction of a number.
    pub fn operation(&self, number: i32, datatype: DataType) -> Result<RedOp> {
        match number {
            0 => Ok(RedOp::Sum),
            1 => Ok(RedOp::Prod),
            2 => Ok(RedOp::Max),
            3 => Ok(RedOp::Min),
            4 => Ok(RedOp::Avg),
            5.. => match self.operations.lock().get(number as usize - 5) {
                Some(Some((made_for, scalar))) if *made_for == datatype => Ok(RedOp::PreMulSum(*scalar)),
                _ => Err(Code::INVALID_ARGUMENT),
            },
            _ => Err(Code::INVALID_ARGUMENT),
        }
    }

    /// A new operation's number.
    pub fn add_operation(&self, datatype: DataType, scalar: Scalar) -> i32 {
        let mut operations = self.operations.lock();
        let free = operations.iter().position(Option::is_none).unwrap_or_else(|| {
            operations.push(None);
            operations.len() - 1
        });
        operations[free] = Some((datatype, scalar));
        free as i32 + 5
    }

    /// Forgets an operation.
    pub fn remove_operation(&self, number: i32) -> Result<()> {
        let mut operations = self.operations.lock();
        let place = usize::try_from(number - 5).ok().and_then(|i| operations.get_mut(i));
        place.and_then(Option::take).map(drop).ok_or(Code::INVALID_ARGUMENT)
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        let Ok(driver) = driver() else { return };
        let Order { last, captured } = &*self.order.lock();
        last.iter().chain(captured.iter().map(|(_, event)| event)).for_each(|event| driver.destroy_event(*event));
    }
}

const LOOK_FOR_THE_DEAD: Duration = Duration::from_millis(50);

/// Whether a world can be made.
pub fn check_world(world: i32, rank: i32) -> Result<(usize, usize)> {
    if world < 1 || rank < 0 || rank >= world || world as usize > MAX_WORLD {
        return Err(Code::INVALID_ARGUMENT);
    }
    Ok((world as usize, rank as usize))
}

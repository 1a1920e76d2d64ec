//! Streams, events, capture and graphs.
//!
//! A stream is a queue of tasks and, while there are any, a thread that runs them in order. A task
//! is a function that may run more than once, since a graph is tasks with dependencies, replayed by
//! the stream that it is launched on. An event is a mark that a task completes; to wait for it is a
//! task, too. So whatever waits here waits as on a device: in its stream, while the others go on.
//!
//! The legacy stream waits for all blocking streams of its device and they for it, at the time of issue.

mod capture;
mod event;
mod graph;

pub use capture::{CaptureStatus, GLOBAL, Node, RELAXED, check_capture_allows, exchange_mode};
use capture::{Capturing, NodeWork};
pub use event::Event;
pub use graph::{Executable, Launched};

use flashcomm_sim_schedule as schedule;
use once_cell::sync::Lazy;
use parking_lot::{Condvar, Mutex, RwLock};
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::clock::{self, Clock};
use crate::cu_result::{CuResult, Result};
use crate::device::{self, Device};
use crate::green::Green;

/// A piece of stream work.
pub type Task = Arc<dyn Fn() -> Result<()> + Send + Sync>;

/// A stream's thread ends when it has had nothing to do for so long, and another one begins with the next task. So a fork
/// finds none that waits: what such a thread leaves in the lists of those that wait is garbage in the child.
const IDLE: Duration = Duration::from_millis(5);

/// How a stream relates to the legacy stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// It is the legacy stream.
    Legacy,
    /// It synchronizes with it.
    Blocking,
    /// It does not.
    NonBlocking,
}

/// A stream.
pub struct Stream {
    /// Its handle.
    pub handle: usize,
    /// Its device.
    pub device: &'static Device,
    /// The green context that it is of, if it is of one.
    pub green: Option<&'static Green>,
    /// How it relates to the legacy stream.
    pub kind: Kind,
    state: Mutex<State>,
    changed: Condvar,
    /// Virtual nanoseconds at the end of what has run.
    clock_ns: AtomicU64,
}

#[derive(Default)]
struct State {
    tasks: VecDeque<Task>,
    issued: u64,
    completed: u64,
    has_worker: bool,
    closing: bool,
    capture: Option<Capturing>,
}

impl State {
    /// Whether what comes behind the `n`-th task has to know of it: it has not run, or it has a
    /// time.
    fn matters(&self, n: u64) -> bool {
        self.completed < n || n > 0 && clock::is_virtual()
    }
}

static STREAMS: Lazy<RwLock<HashMap<usize, Arc<Stream>>>> = Lazy::new(Default::default);
static LEGACY: Lazy<Mutex<HashMap<i32, Arc<Stream>>>> = Lazy::new(Default::default);
static NEXT: AtomicUsize = AtomicUsize::new(1);

/// A handle that is no address of anything.
pub fn fresh_handle() -> usize {
    0x5100_0000_0000_0000 + NEXT.fetch_add(1, Ordering::Relaxed) * 16
}

thread_local! {
    static PER_THREAD: RefCell<HashMap<i32, PerThread>> = RefCell::default();
}

/// A per-thread default stream, which ends with its thread.
struct PerThread(Arc<Stream>);

impl Drop for PerThread {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Stream {
    /// A new stream of `device`.
    pub fn new(device: &'static Device, green: Option<&'static Green>, kind: Kind) -> Arc<Self> {
        let handle = fresh_handle();
        let (state, changed, clock_ns) = (Mutex::default(), Condvar::new(), AtomicU64::new(0));
        let stream = Arc::new(Stream { handle, device, green, kind, state, changed, clock_ns });
        STREAMS.write().insert(handle, stream.clone());
        stream
    }

    /// The legacy stream of a device.
    pub fn legacy(device: &'static Device) -> Arc<Self> {
        LEGACY.lock().entry(device.ordinal).or_insert_with(|| Stream::new(device, None, Kind::Legacy)).clone()
    }

    /// This thread's default stream on a device.
    pub fn per_thread(device: &'static Device) -> Arc<Self> {
        PER_THREAD.with_borrow_mut(|streams| {
            let new = || PerThread(Stream::new(device, None, Kind::Blocking));
            streams.entry(device.ordinal).or_insert_with(new).0.clone()
        })
    }

    /// The stream of a handle that was created and not destroyed.
    pub fn find(handle: usize) -> Option<Arc<Self>> {
        STREAMS.read().get(&handle).filter(|stream| !stream.state.lock().closing).cloned()
    }

    /// Every stream of a device, also those that only finish their work.
    fn all(device: &'static Device) -> Vec<Arc<Stream>> {
        STREAMS.read().values().filter(|stream| stream.device.ordinal == device.ordinal).cloned().collect()
    }

    /// Multiprocessors that its kernels may run on.
    pub fn multiprocessors(&self) -> i32 {
        self.green.map_or_else(device::affinity, |green| green.multiprocessors.min(device::affinity()))
    }

    /// Destroys the stream as soon as its work is done.
    pub fn close(&self) {
        let mut state = self.state.lock();
        state.closing = true;
        self.changed.notify_all();
        if !state.has_worker {
            drop(state);
            STREAMS.write().remove(&self.handle);
        }
    }

    /// Issues a task: into the graph being captured, or to the queue.
    pub fn issue(self: &Arc<Self>, task: Task) -> Result<()> {
        self.device.check()?;
        let task = match self.kind {
            Kind::Legacy => self.behind_blocking_streams(task)?,
            Kind::Blocking => self.behind_legacy_stream(task),
            Kind::NonBlocking => task,
        };
        let mut state = self.state.lock();
        if let Some(capturing) = state.capture_mut()? {
            capturing.add(NodeWork::Task(task));
            return Ok(());
        }
        state.tasks.push_back(task);
        state.issued += 1;
        if !state.has_worker {
            state.has_worker = true;
            let stream = self.clone();
            thread::Builder::new().name("sim-stream".into()).spawn(move || stream.work()).expect("a thread");
        }
        self.changed.notify_all();
        Ok(())
    }

    fn behind_blocking_streams(&self, task: Task) -> Result<Task> {
        let mut before = Vec::new();
        for stream in Stream::all(self.device).into_iter().filter(|stream| stream.kind == Kind::Blocking) {
            let state = stream.state.lock();
            if let Some(capturing) = &state.capture {
                return Err(capturing.session.invalidate(CuResult::STREAM_CAPTURE_IMPLICIT));
            }
            if state.matters(state.issued) {
                before.push((stream.clone(), state.issued));
            }
        }
        if before.is_empty() {
            return Ok(task);
        }
        Ok(Arc::new(move || {
            before.iter().for_each(|(stream, n)| stream.come_after(*n));
            task()
        }))
    }

    fn behind_legacy_stream(&self, task: Task) -> Task {
        let Some(legacy) = LEGACY.lock().get(&self.device.ordinal).cloned() else { return task };
        let (is_capturing, issued, matters) = {
            let is_capturing = self.state.lock().capture.is_some();
            let state = legacy.state.lock();
            (is_capturing, state.issued, state.matters(state.issued))
        };
        if is_capturing || !matters {
            return task;
        }
        Arc::new(move || {
            legacy.come_after(issued);
            task()
        })
    }

    fn work(self: Arc<Self>) {
        clock::set(Clock::of(self.device.ordinal).raised(self.clock_ns.load(Ordering::Acquire)));
        loop {
            let task = {
                let mut state = self.state.lock();
                while state.tasks.is_empty() && !state.closing {
                    let is_idle = self.changed.wait_for(&mut state, IDLE).timed_out();
                    if is_idle && state.tasks.is_empty() && !state.closing {
                        state.has_worker = false;
                        return;
                    }
                }
                match state.tasks.pop_front() {
                    Some(task) => task,
                    None => break,
                }
            };
            schedule::point();
            // In a lost context nothing runs any more.
            if self.device.check().is_ok() {
                schedule::step();
                if let Err(code) = task() {
                    self.device.lose(code);
                }
            }
            drop(task);
            self.clock_ns.store(clock::current().now_ns(), Ordering::Release);
            schedule::point();
            self.state.lock().completed += 1;
            self.changed.notify_all();
        }
        STREAMS.write().remove(&self.handle);
    }

    fn wait_for(&self, n: u64) {
        let mut state = self.state.lock();
        while state.completed < n {
            self.changed.wait(&mut state);
        }
    }

    /// Makes the stream of this thread wait for the `n`-th task of this one.
    fn come_after(&self, n: u64) {
        self.wait_for(n);
        clock::raise(self.clock_ns.load(Ordering::Acquire));
    }

    /// Waits until everything issued so far has run.
    pub fn synchronize(&self) -> Result<()> {
        let issued = {
            let mut state = self.state.lock();
            if let Some(capturing) = state.capture_mut()? {
                return Err(capturing.session.invalidate(CuResult::STREAM_CAPTURE_UNSUPPORTED));
            }
            state.issued
        };
        self.wait_for(issued);
        self.device.check()
    }

    /// Whether everything issued so far has run.
    pub fn is_idle(&self) -> Result<bool> {
        let mut state = self.state.lock();
        if let Some(capturing) = state.capture_mut()? {
            return Err(capturing.session.invalidate(CuResult::STREAM_CAPTURE_UNSUPPORTED));
        }
        self.device.check()?;
        Ok(state.completed == state.issued)
    }

    /// Waits for all streams of a device.
    pub fn synchronize_all(device: &'static Device) -> Result<()> {
        let issued: Vec<_> = Stream::all(device)
            .into_iter()
            .map(|stream| {
                let issued = stream.state.lock().issued;
                (stream, issued)
            })
            .collect();
        issued.iter().for_each(|(stream, n)| stream.wait_for(*n));
        device.check()
    }
}

//! Streams, events, capture and graphs.
//!
//! A stream is a queue of tasks and a thread that runs them in order. A task is a function that may run more than once,
//! since a graph is tasks with dependencies, replayed by the stream that it is launched on. An event is a mark that a
//! task completes; to wait for it is a task, too. So whatever waits here waits as on a device: in its stream, while
//! the others go on.
//!
//! The legacy stream waits for all blocking streams of its device and they for it, at the time of issue.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use flashcomm_sim_schedule as schedule;
use once_cell::sync::Lazy;
use parking_lot::{Condvar, Mutex, RwLock};

use crate::cu_result::{CuResult, Result};
use crate::device::Device;

/// A piece of stream work.
pub type Task = Arc<dyn Fn() -> Result<()> + Send + Sync>;

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
    /// How it relates to the legacy stream.
    pub kind: Kind,
    state: Mutex<State>,
    changed: Condvar,
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

/// A stream's part in a capture.
#[derive(Clone)]
struct Capturing {
    session: Arc<Session>,
    /// The nodes that the next one depends on.
    last: Vec<usize>,
    is_origin: bool,
}

impl Capturing {
    fn add(&mut self, work: NodeWork) {
        self.last = vec![self.session.add(work, self.last.clone())];
    }
}

/// A capture in progress.
pub struct Session {
    /// Unique in the process.
    pub id: u64,
    nodes: Mutex<Vec<Node>>,
    /// Nodes that nobody needs to join, taken out of a stream's dependencies.
    loose: Mutex<Vec<usize>>,
    is_invalid: AtomicBool,
    has_ended: AtomicBool,
    mode: i32,
    thread: ThreadId,
}

/// A node of a graph.
#[derive(Clone)]
pub struct Node {
    work: NodeWork,
    needs: Vec<usize>,
}

/// What a node does at a replay. Which record an event node is about is settled when the graph is launched, not when the
/// node's turn comes: by then the host may have recorded what is queued behind the graph.
#[derive(Clone)]
enum NodeWork {
    Task(Task),
    Record(Arc<Event>),
    Wait(Arc<Event>),
}

/// Modes of capture: forbids potentially unsafe calls to all threads, to this one, to none.
pub const GLOBAL: i32 = 0;
/// See [`GLOBAL`].
pub const RELAXED: i32 = 2;

static STREAMS: Lazy<RwLock<HashMap<usize, Arc<Stream>>>> = Lazy::new(Default::default);
static LEGACY: Lazy<Mutex<HashMap<i32, Arc<Stream>>>> = Lazy::new(Default::default);
static NEXT: AtomicUsize = AtomicUsize::new(1);
static CAPTURES: AtomicU64 = AtomicU64::new(1);
static ACTIVE: Mutex<Vec<Arc<Session>>> = Mutex::new(Vec::new());

/// A handle that is no address of anything.
pub fn fresh_handle() -> usize {
    0x5100_0000_0000_0000 + NEXT.fetch_add(1, Ordering::Relaxed) * 16
}

thread_local! {
    static MODE: Cell<i32> = const { Cell::new(GLOBAL) };
    static PER_THREAD: RefCell<HashMap<i32, PerThread>> = RefCell::default();
}

/// A per-thread default stream, which ends with its thread.
struct PerThread(Arc<Stream>);

impl Drop for PerThread {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Swaps this thread's capture mode.
pub fn exchange_mode(mode: i32) -> i32 {
    MODE.replace(mode)
}

/// To be asked before every call that a capture may forbid; invalidates the capture that does.
pub fn check_capture_allows() -> Result<()> {
    let mode = MODE.get();
    if mode == RELAXED {
        return Ok(());
    }
    let me = thread::current().id();
    let forbids = |session: &&Arc<Session>| match session.thread == me {
        true => session.mode != RELAXED,
        false => mode == GLOBAL && session.mode == GLOBAL,
    };
    match ACTIVE.lock().iter().find(forbids) {
        None => Ok(()),
        Some(session) => Err(session.invalidate(CuResult::STREAM_CAPTURE_UNSUPPORTED)),
    }
}

impl Session {
    fn invalidate(&self, code: CuResult) -> CuResult {
        self.is_invalid.store(true, Ordering::Release);
        code
    }

    fn add(&self, work: NodeWork, needs: Vec<usize>) -> usize {
        let mut nodes = self.nodes.lock();
        nodes.push(Node { work, needs });
        nodes.len() - 1
    }
}

/// What a capture query answers.
pub enum CaptureStatus {
    /// Not capturing.
    None,
    /// Capturing, by this id.
    Active(u64),
    /// The capture has been invalidated.
    Invalidated,
}

impl Stream {
    /// A new stream of `device`.
    pub fn new(device: &'static Device, kind: Kind) -> Arc<Self> {
        let handle = fresh_handle();
        let stream = Arc::new(Stream { handle, device, kind, state: Mutex::default(), changed: Condvar::new() });
        STREAMS.write().insert(handle, stream.clone());
        stream
    }

    /// The legacy stream of a device.
    pub fn legacy(device: &'static Device) -> Arc<Self> {
        LEGACY.lock().entry(device.ordinal).or_insert_with(|| Stream::new(device, Kind::Legacy)).clone()
    }

    /// This thread's default stream on a device.
    pub fn per_thread(device: &'static Device) -> Arc<Self> {
        PER_THREAD.with_borrow_mut(|streams| {
            let new = || PerThread(Stream::new(device, Kind::Blocking));
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
            if state.completed < state.issued {
                before.push((stream.clone(), state.issued));
            }
        }
        if before.is_empty() {
            return Ok(task);
        }
        Ok(Arc::new(move || {
            before.iter().for_each(|(stream, n)| stream.wait_for(*n));
            task()
        }))
    }

    fn behind_legacy_stream(&self, task: Task) -> Task {
        let Some(legacy) = LEGACY.lock().get(&self.device.ordinal).cloned() else { return task };
        let (is_capturing, issued, completed) = {
            let is_capturing = self.state.lock().capture.is_some();
            let state = legacy.state.lock();
            (is_capturing, state.issued, state.completed)
        };
        if is_capturing || completed >= issued {
            return task;
        }
        Arc::new(move || {
            legacy.wait_for(issued);
            task()
        })
    }

    fn work(self: Arc<Self>) {
        loop {
            let task = {
                let mut state = self.state.lock();
                while state.tasks.is_empty() && !state.closing {
                    self.changed.wait(&mut state);
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

    /// What happens to work that is issued now.
    pub fn capture_status(&self) -> Result<CaptureStatus> {
        if self.kind == Kind::Legacy {
            let captures =
                |stream: &Arc<Stream>| stream.kind == Kind::Blocking && stream.state.lock().capture.is_some();
            return match Stream::all(self.device).iter().any(captures) {
                true => Err(CuResult::STREAM_CAPTURE_IMPLICIT),
                false => Ok(CaptureStatus::None),
            };
        }
        Ok(match self.state.lock().capture_mut() {
            Ok(None) => CaptureStatus::None,
            Ok(Some(capturing)) => CaptureStatus::Active(capturing.session.id),
            Err(_) => CaptureStatus::Invalidated,
        })
    }

    /// The nodes that what is captured next depends on.
    pub fn dependencies(&self) -> Result<Vec<usize>> {
        Ok(self.state.lock().capture_mut()?.map(|capturing| capturing.last.clone()).unwrap_or_default())
    }

    /// Adds to them, or puts others in their place.
    pub fn update_dependencies(&self, nodes: &[usize], add: bool) -> Result<()> {
        let mut state = self.state.lock();
        let capturing = state.capture_mut()?.ok_or(CuResult::INVALID_VALUE)?;
        let n_nodes = capturing.session.nodes.lock().len();
        if nodes.iter().any(|node| *node >= n_nodes) {
            return Err(CuResult::INVALID_VALUE);
        }
        let before = if add { capturing.last.clone() } else { Vec::new() };
        let before = std::mem::replace(&mut capturing.last, before);
        capturing.last.extend(nodes);
        capturing.last.sort_unstable();
        capturing.last.dedup();
        capturing.session.loose.lock().extend(before);
        Ok(())
    }

    /// Starts a capture.
    pub fn begin_capture(&self, mode: i32) -> Result<()> {
        let mut state = self.state.lock();
        if self.kind == Kind::Legacy {
            return Err(CuResult::STREAM_CAPTURE_UNSUPPORTED);
        }
        if state.capture.is_some() {
            return Err(CuResult::INVALID_VALUE);
        }
        let session = Arc::new(Session {
            id: CAPTURES.fetch_add(1, Ordering::Relaxed),
            nodes: Mutex::default(),
            loose: Mutex::default(),
            is_invalid: AtomicBool::new(false),
            has_ended: AtomicBool::new(false),
            mode,
            thread: thread::current().id(),
        });
        ACTIVE.lock().push(session.clone());
        state.capture = Some(Capturing { session, last: Vec::new(), is_origin: true });
        Ok(())
    }

    /// Ends a capture: its nodes.
    pub fn end_capture(&self) -> Result<Vec<Node>> {
        let capturing = self.state.lock().capture.clone().ok_or(CuResult::INVALID_VALUE)?;
        if !capturing.is_origin {
            return Err(CuResult::STREAM_CAPTURE_UNMATCHED);
        }
        let session = &capturing.session;
        session.has_ended.store(true, Ordering::Release);
        ACTIVE.lock().retain(|active| active.id != session.id);
        for stream in Stream::all(self.device) {
            let mut state = stream.state.lock();
            if state.capture.as_ref().is_some_and(|other| other.session.id == session.id) {
                state.capture = None;
            }
        }
        if session.is_invalid.load(Ordering::Acquire) {
            return Err(CuResult::STREAM_CAPTURE_INVALIDATED);
        }
        // Taken out: an event that keeps the session must not keep what the nodes hold.
        let nodes = std::mem::take(&mut *session.nodes.lock());
        let mut is_joined = vec![false; nodes.len()];
        let mut open = capturing.last.clone();
        open.extend(&*session.loose.lock());
        while let Some(node) = open.pop() {
            if !std::mem::replace(&mut is_joined[node], true) {
                open.extend(&nodes[node].needs);
            }
        }
        if is_joined.iter().all(|joined| *joined) { Ok(nodes) } else { Err(CuResult::STREAM_CAPTURE_UNJOINED) }
    }
}

impl State {
    /// The capture, if there is one that is still good.
    fn capture_mut(&mut self) -> Result<Option<&mut Capturing>> {
        match &mut self.capture {
            Some(capturing) if capturing.session.is_invalid.load(Ordering::Acquire) => {
                Err(CuResult::STREAM_CAPTURE_INVALIDATED)
            }
            capture => Ok(capture.as_mut()),
        }
    }
}

/// What a record completes.
#[derive(Default)]
pub struct Mark {
    at: Mutex<Option<Instant>>,
    done: Condvar,
}

impl Mark {
    fn complete(&self) {
        *self.at.lock() = Some(Instant::now());
        self.done.notify_all();
    }

    /// Waits; no longer than the context is good, since in a lost one nothing completes any more.
    fn wait(&self, device: &Device) {
        let mut at = self.at.lock();
        while at.is_none() && device.check().is_ok() {
            self.done.wait_for(&mut at, Duration::from_millis(100));
        }
    }
}

/// An event.
pub struct Event {
    device: &'static Device,
    has_timing: bool,
    state: Mutex<EventState>,
}

#[derive(Clone)]
enum EventState {
    Never,
    Recorded(Arc<Mark>),
    Captured(Arc<Session>, Vec<usize>),
}

static EVENTS: Lazy<RwLock<HashMap<usize, Arc<Event>>>> = Lazy::new(Default::default);

impl Event {
    /// A new event; its handle.
    pub fn create(device: &'static Device, has_timing: bool) -> usize {
        let handle = fresh_handle();
        EVENTS.write().insert(handle, Arc::new(Event { device, has_timing, state: Mutex::new(EventState::Never) }));
        handle
    }

    /// The event of a handle.
    pub fn find(handle: usize) -> Result<Arc<Self>> {
        EVENTS.read().get(&handle).cloned().ok_or(CuResult::INVALID_HANDLE)
    }

    /// Destroys it.
    pub fn destroy(handle: usize) -> Result<()> {
        let event = EVENTS.write().remove(&handle); // dropped without the lock: it may hold other events
        event.map(drop).ok_or(CuResult::INVALID_HANDLE)
    }

    /// Records the work of a stream so far; `external`: at each replay of the graph being captured.
    pub fn record(self: &Arc<Self>, stream: &Arc<Stream>, external: bool) -> Result<()> {
        let mut state = stream.state.lock();
        match (state.capture_mut()?, external) {
            (Some(capturing), false) => {
                *self.state.lock() = EventState::Captured(capturing.session.clone(), capturing.last.clone());
                Ok(())
            }
            (Some(capturing), true) => {
                self.device.check()?;
                capturing.add(NodeWork::Record(self.clone()));
                Ok(())
            }
            (None, true) => Err(CuResult::INVALID_VALUE),
            (None, false) => {
                drop(state);
                let mark = self.next_mark();
                stream.issue(Arc::new(move || {
                    mark.complete();
                    Ok(())
                }))
            }
        }
    }

    /// The mark of a record that is issued now.
    fn next_mark(&self) -> Arc<Mark> {
        let mark = Arc::new(Mark::default());
        *self.state.lock() = EventState::Recorded(mark.clone());
        mark
    }

    /// The mark of the last record, if there is one.
    fn last_mark(&self) -> Option<Arc<Mark>> {
        match &*self.state.lock() {
            EventState::Recorded(mark) => Some(mark.clone()),
            _ => None,
        }
    }

    /// Makes a stream wait for it; `external`: at each replay, for what was recorded last then.
    pub fn make_wait(self: &Arc<Self>, stream: &Arc<Stream>, external: bool) -> Result<()> {
        let recorded = self.state.lock().clone();
        let mut state = stream.state.lock();
        let Some(capturing) = state.capture_mut()? else {
            return match recorded {
                _ if external => Err(CuResult::INVALID_VALUE),
                EventState::Never => Ok(()),
                EventState::Captured(session, _) if session.has_ended.load(Ordering::Acquire) => {
                    Err(CuResult::CAPTURED_EVENT)
                }
                EventState::Captured(session, _) if stream.kind == Kind::Legacy => {
                    Err(session.invalidate(CuResult::STREAM_CAPTURE_IMPLICIT))
                }
                EventState::Captured(session, last) => {
                    state.capture = Some(Capturing { session, last, is_origin: false });
                    Ok(())
                }
                EventState::Recorded(mark) => {
                    drop(state);
                    if mark.at.lock().is_some() {
                        return stream.device.check();
                    }
                    let device = self.device;
                    stream.issue(Arc::new(move || {
                        mark.wait(device);
                        Ok(())
                    }))
                }
            };
        };
        match recorded {
            _ if external => {
                self.device.check()?;
                capturing.add(NodeWork::Wait(self.clone()));
                Ok(())
            }
            EventState::Captured(session, last) if session.id == capturing.session.id => {
                capturing.last.extend(last);
                capturing.last.sort_unstable();
                capturing.last.dedup();
                Ok(())
            }
            EventState::Never => Ok(()),
            _ => Err(capturing.session.invalidate(CuResult::STREAM_CAPTURE_ISOLATION)),
        }
    }

    /// Whether what was recorded has run.
    pub fn is_complete(&self) -> Result<bool> {
        self.device.check()?;
        match &*self.state.lock() {
            EventState::Never => Ok(true),
            EventState::Recorded(mark) => Ok(mark.at.lock().is_some()),
            EventState::Captured(session, _) => Err(session.invalidate(CuResult::CAPTURED_EVENT)),
        }
    }

    /// Waits until what was recorded has run.
    pub fn synchronize(&self) -> Result<()> {
        let recorded = self.state.lock().clone();
        match recorded {
            EventState::Never => {}
            EventState::Recorded(mark) => mark.wait(self.device),
            EventState::Captured(session, _) => return Err(session.invalidate(CuResult::CAPTURED_EVENT)),
        }
        self.device.check()
    }

    /// Milliseconds from `self` to `end`.
    pub fn elapsed_ms(&self, end: &Event) -> Result<f32> {
        let at = |event: &Event| match &*event.state.lock() {
            EventState::Recorded(mark) if event.has_timing => mark.at.lock().ok_or(CuResult::NOT_READY),
            _ => Err(CuResult::INVALID_HANDLE),
        };
        let (start, end) = (at(self)?, at(end)?);
        Ok(end
            .checked_duration_since(start)
            .map_or_else(|| -(start - end).as_secs_f32() * 1e3, |forward| forward.as_secs_f32() * 1e3))
    }
}

/// The records that the event nodes of one launch are about, by node.
pub struct Launched(Vec<Option<Arc<Mark>>>);

/// An instantiated graph. Launches of the same one run one after the other.
pub struct Executable {
    nodes: Vec<Node>,
    successors: Vec<Vec<usize>>,
    running: Mutex<()>,
}

impl Executable {
    /// From the nodes of a capture.
    pub fn new(nodes: Vec<Node>) -> Self {
        let mut successors = vec![Vec::new(); nodes.len()];
        for (i, node) in nodes.iter().enumerate() {
            node.needs.iter().for_each(|needed| successors[*needed].push(i));
        }
        Executable { nodes, successors, running: Mutex::new(()) }
    }

    /// Settles which records its event nodes are about, in the order in which they were captured. To be called when it is
    /// launched; the answer is for [`Executable::run`].
    pub fn launch(&self) -> Launched {
        let mark = |node: &Node| match &node.work {
            NodeWork::Task(_) => None,
            NodeWork::Record(event) => Some(event.next_mark()),
            NodeWork::Wait(event) => event.last_mark(),
        };
        Launched(self.nodes.iter().map(mark).collect())
    }

    /// Runs every node after those that it needs; branches run side by side.
    pub fn run(&self, Launched(marks): &Launched) -> Result<()> {
        let _running = self.running.lock();
        let left: Vec<_> = self.nodes.iter().map(|node| AtomicUsize::new(node.needs.len())).collect();
        let outcome = Mutex::new(Ok(()));
        let ready = (0..self.nodes.len()).filter(|i| self.nodes[*i].needs.is_empty()).collect();
        thread::scope(|scope| self.follow(scope, ready, marks, &left, &outcome));
        outcome.into_inner()
    }

    /// Runs the first of the ready nodes and what then becomes ready, the others on threads of their own.
    fn follow<'scope, 'env>(
        &'env self,
        scope: &'scope thread::Scope<'scope, 'env>,
        mut ready: Vec<usize>,
        marks: &'env [Option<Arc<Mark>>],
        left: &'env [AtomicUsize],
        outcome: &'env Mutex<Result<()>>,
    ) {
        while let Some(node) = ready.pop() {
            for other in ready.drain(..) {
                scope.spawn(move || self.follow(scope, vec![other], marks, left, outcome));
            }
            schedule::point();
            if outcome.lock().is_ok() {
                schedule::step();
                match (&self.nodes[node].work, &marks[node]) {
                    (NodeWork::Task(task), _) => {
                        if let Err(code) = task() {
                            *outcome.lock() = Err(code);
                        }
                    }
                    (NodeWork::Record(_), Some(mark)) => mark.complete(),
                    (NodeWork::Wait(event), Some(mark)) => mark.wait(event.device),
                    (_, None) => {}
                }
            }
            let becomes_ready = |next: &&usize| left[**next].fetch_sub(1, Ordering::AcqRel) == 1;
            ready.extend(self.successors[node].iter().filter(becomes_ready));
        }
    }
}

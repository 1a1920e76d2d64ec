//! Capture: a stream that captures makes nodes of a graph of what is issued to it.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, ThreadId};

use parking_lot::Mutex;

use super::event::Event;
use super::{Kind, State, Stream, Task};
use crate::cu_result::{CuResult, Result};

/// A stream's part in a capture.
#[derive(Clone)]
pub(super) struct Capturing {
    pub(super) session: Arc<Session>,
    /// The nodes that the next one depends on.
    pub(super) last: Vec<usize>,
    pub(super) is_origin: bool,
}

impl Capturing {
    pub(super) fn add(&mut self, work: NodeWork) {
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
    pub(super) has_ended: AtomicBool,
    mode: i32,
    thread: ThreadId,
}

/// A node of a graph.
#[derive(Clone)]
pub struct Node {
    pub(super) work: NodeWork,
    pub(super) needs: Vec<usize>,
}

/// What a node does at a replay. Which record an event node is about is settled when the graph is launched, not when the
/// node's turn comes: by then the host may have recorded what is queued behind the graph.
#[derive(Clone)]
pub(super) enum NodeWork {
    Task(Task),
    Record(Arc<Event>),
    Wait(Arc<Event>),
}

/// Modes of capture: forbids potentially unsafe calls to all threads, to this one, to none.
pub const GLOBAL: i32 = 0;
/// See [`GLOBAL`].
pub const RELAXED: i32 = 2;

static CAPTURES: AtomicU64 = AtomicU64::new(1);
static ACTIVE: Mutex<Vec<Arc<Session>>> = Mutex::new(Vec::new());

thread_local! {
    static MODE: Cell<i32> = const { Cell::new(GLOBAL) };
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
    pub(super) fn invalidate(&self, code: CuResult) -> CuResult {
        self.is_invalid.store(true, Ordering::Release);
        code
    }

    pub(super) fn add(&self, work: NodeWork, needs: Vec<usize>) -> usize {
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
    pub(super) fn capture_mut(&mut self) -> Result<Option<&mut Capturing>> {
        match &mut self.capture {
            Some(capturing) if capturing.session.is_invalid.load(Ordering::Acquire) => {
                Err(CuResult::STREAM_CAPTURE_INVALIDATED)
            }
            capture => Ok(capture.as_mut()),
        }
    }
}

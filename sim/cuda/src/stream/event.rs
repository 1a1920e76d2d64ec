//! Events: an event is a mark that a task of a stream completes, or a place in a capture.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use once_cell::sync::Lazy;
use parking_lot::{Condvar, Mutex, RwLock};

use super::capture::{Capturing, NodeWork, Session};
use super::{Kind, Stream, fresh_handle};
use crate::clock;
use crate::cu_result::{CuResult, Result};
use crate::device::Device;

/// What a record completes.
#[derive(Default)]
pub struct Mark {
    at: Mutex<Option<Time>>,
    done: Condvar,
}

/// When a mark was completed.
#[derive(Clone, Copy)]
struct Time {
    wall: Instant,
    virtual_ns: u64,
}

impl Time {
    /// Now, on the stream of this thread.
    fn now() -> Self {
        Time { wall: Instant::now(), virtual_ns: clock::current().now_ns() }
    }

    /// Milliseconds from here to `end`, virtual ones where time is.
    fn ms_to(self, end: Time) -> f32 {
        let (backward, nanoseconds) = match clock::is_virtual() {
            true => (end.virtual_ns < self.virtual_ns, u128::from(end.virtual_ns.abs_diff(self.virtual_ns))),
            false => {
                let (first, last) = (self.wall.min(end.wall), self.wall.max(end.wall));
                (end.wall < self.wall, (last - first).as_nanos())
            }
        };
        let ms = (nanoseconds as f64 / 1e6) as f32;
        if backward { -ms } else { ms }
    }
}

impl Mark {
    pub(super) fn complete(&self) {
        *self.at.lock() = Some(Time::now());
        self.done.notify_all();
    }

    /// Waits; no longer than the context is good, since in a lost one nothing completes any more.
    /// On a stream virtual time goes on from there.
    pub(super) fn wait(&self, device: &Device) {
        let mut at = self.at.lock();
        while at.is_none() && device.check().is_ok() {
            self.done.wait_for(&mut at, Duration::from_millis(100));
        }
        clock::raise(at.map_or(0, |at| at.virtual_ns));
    }
}

/// An event.
pub struct Event {
    pub(super) device: &'static Device,
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
        // Both are of one primary context, to which the green ones belong.
        if self.device.ordinal != stream.device.ordinal {
            return Err(CuResult::INVALID_HANDLE);
        }
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
    pub(super) fn next_mark(&self) -> Arc<Mark> {
        let mark = Arc::new(Mark::default());
        *self.state.lock() = EventState::Recorded(mark.clone());
        mark
    }

    /// The mark of the last record, if there is one.
    pub(super) fn last_mark(&self) -> Option<Arc<Mark>> {
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
                    if mark.at.lock().is_some() && !clock::is_virtual() {
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
        Ok(at(self)?.ms_to(at(end)?))
    }
}

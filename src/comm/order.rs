//! The order of a communicator's operations: one after the other, of whatever setup and on whatever stream.
//!
//! NCCL promises that, so it must hold for ours. An event marks the end of the last operation, and
//! the next one waits for it. Operations that are captured into graphs are in the same order: within
//! a graph by an edge, from graph to graph and to eager calls by event nodes that each replay passes.
//!
//! NCCL promises the latter only where graphs are *mixed* (`NCCL_GRAPH_MIXING_SUPPORT`, `graphUsageMode`). Where they are
//! not, it puts no such nodes into a graph, and neither does this: bodies of conditional nodes may not have them.

use parking_lot::Mutex;

use super::aside::Aside;
use crate::cuda::{self, Capture, CudaResult, Dependencies, Event, GraphNode, StreamHandle};

/// Chains the operations of a communicator.
pub(crate) struct Order {
    mixes_graphs: bool,
    events: Mutex<Events>,
    /// For operations that must not stand on the application's streams.
    pub aside: Aside,
}

struct Events {
    /// The end of the last operation, eager or replayed.
    last: Event,
    /// The last operation within the capture that was last seen.
    captured: Option<Captured>,
}

/// An operation that has been captured.
struct Captured {
    /// In the capture of this id.
    capture: u64,
    /// Its end.
    end: Event,
    /// The nodes that record [`Events::last`] at each replay.
    records: Vec<GraphNode>,
}

// SAFETY: the nodes are handles, used while their capture goes on and under the lock of the order.
unsafe impl Send for Captured {}

impl Events {
    /// Marks the end of a captured operation, for the next one of its graph only.
    ///
    /// # Safety
    /// As for [`Order::end`].
    unsafe fn end_in_graph(&mut self, stream: StreamHandle, id: u64) -> CudaResult<()> {
        let captured = match self.captured.take().filter(|captured| captured.capture == id) {
            Some(captured) => captured,
            None => Captured { capture: id, end: Event::new()?, records: Vec::new() },
        };
        let captured = self.captured.insert(captured);
        // SAFETY: as the caller vouches.
        unsafe { captured.end.record(stream, false) }
    }
}

impl Order {
    /// Without an operation yet, in the current context; `mixes_graphs`: whether captured ones are in order with those
    /// outside of their graph.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn new(mixes_graphs: bool) -> CudaResult<Self> {
        let events = Events { last: Event::new()?, captured: None };
        Ok(Self { mixes_graphs, events: Mutex::new(events), aside: Aside::new()? })
    }

    /// Starts an operation on `stream`: it will run after the communicator's previous one.
    ///
    /// # Safety
    /// `stream` is live and of the communicator's context, which is current.
    pub(crate) unsafe fn begin(&self, stream: StreamHandle, capture: Capture) -> CudaResult<()> {
        let events = self.events.lock();
        match capture {
            // SAFETY: the caller vouches for the stream.
            Capture::None => unsafe { events.last.make_wait(stream, false) },
            Capture::Active(id) => match &events.captured {
                // Within one graph the edge is drawn in the graph.
                // SAFETY: as above; the event was recorded in this very capture.
                Some(captured) if captured.capture == id => unsafe { captured.end.make_wait(stream, false) },
                // A graph's first operation waits, at each replay, for what was last before that replay.
                // SAFETY: as above.
                _ if self.mixes_graphs => unsafe { events.last.make_wait(stream, true) },
                _ => Ok(()),
            },
        }
    }

    /// Ends an operation on `stream`: the next one will run after it.
    ///
    /// # Safety
    /// As for [`Order::begin`].
    pub(crate) unsafe fn end(&self, stream: StreamHandle, capture: Capture) -> CudaResult<()> {
        let mut events = self.events.lock();
        let Capture::Active(id) = capture else {
            // SAFETY: the caller vouches for the stream.
            return unsafe { events.last.record(stream, false) };
        };
        if !self.mixes_graphs {
            // SAFETY: as the caller vouches.
            return unsafe { events.end_in_graph(stream, id) };
        }
        // Each replay records the end for whoever comes from outside of the graph. In the graph that stands beside the
        // operations, one record behind the other: no operation is held up by it.
        // SAFETY: as above.
        let mut operation = unsafe { cuda::capture_dependencies(stream)? };
        let same = events.captured.as_mut().filter(|captured| captured.capture == id);
        let (end, mut records) = match same {
            Some(captured) => (None, std::mem::take(&mut captured.records)),
            None => (Some(Event::new()?), Vec::new()),
        };
        // SAFETY: as above; the nodes are of this capture.
        unsafe { cuda::update_capture_dependencies(stream, &mut records, Dependencies::Add)? };
        // SAFETY: as above.
        unsafe { events.last.record(stream, true)? };
        // SAFETY: as above.
        let records = unsafe { cuda::capture_dependencies(stream)? };
        // SAFETY: as above.
        unsafe { cuda::update_capture_dependencies(stream, &mut operation, Dependencies::Set)? };
        match (&mut events.captured, end) {
            (Some(captured), None) => captured.records = records,
            (captured, end) => {
                let end = end.expect("made for a capture that is new");
                *captured = Some(Captured { capture: id, end, records });
            }
        }
        let captured = events.captured.as_ref().expect("set above");
        // SAFETY: as above.
        unsafe { captured.end.record(stream, false) }
    }

    /// Whether all operations have run.
    pub(crate) fn is_idle(&self) -> bool {
        // An error here means that the context is lost; nothing runs in it any more.
        self.events.lock().last.is_complete().unwrap_or(true)
    }
}

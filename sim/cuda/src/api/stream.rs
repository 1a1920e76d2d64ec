//! Streams, events, capture, graphs.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::Arc;

use flashcomm_sim_schedule as schedule;
use once_cell::sync::Lazy;
use parking_lot::RwLock;

use super::{driver, put, stream};
use crate::cu_result::{CuResult, Result};
use crate::device::{self, Current};
use crate::stream::{
    CaptureStatus, Event, Executable, Kind, Node, Stream, check_capture_allows, exchange_mode, fresh_handle,
};

static GRAPHS: Lazy<RwLock<HashMap<usize, Vec<Node>>>> = Lazy::new(Default::default);
static EXECUTABLES: Lazy<RwLock<HashMap<usize, Arc<Executable>>>> = Lazy::new(Default::default);

thread_local! {
    /// The nodes that this thread asked for last.
    static DEPENDENCIES: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// `CU_STREAM_SET_CAPTURE_DEPENDENCIES`.
const SET_DEPENDENCIES: u32 = 1;
/// `CU_EVENT_RECORD_EXTERNAL` and `CU_EVENT_WAIT_EXTERNAL`.
const EXTERNAL: u32 = 1;
/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: u32 = 1;
/// `CU_EVENT_DISABLE_TIMING`.
const DISABLE_TIMING: u32 = 2;

fn create(place: *mut usize, flags: u32) -> Result<()> {
    schedule::step();
    if schedule::fails("stream") {
        return Err(CuResult::OUT_OF_MEMORY);
    }
    let stream = match device::current_context()? {
        Current::Green(green) => Stream::new(green.device, Some(green), Kind::NonBlocking),
        Current::Primary(device) if flags & NON_BLOCKING != 0 => Stream::new(device, None, Kind::NonBlocking),
        Current::Primary(device) => Stream::new(device, None, Kind::Blocking),
    };
    put(place, stream.handle)
}

fn capture_info(handle: usize, status: *mut c_int, id: *mut u64) -> Result<()> {
    let (code, session) = match stream(handle)?.capture_status()? {
        CaptureStatus::None => (0, 0),
        CaptureStatus::Active(session) => (1, session),
        CaptureStatus::Invalidated => (2, 0),
    };
    put(status, code)?;
    if !id.is_null() && code == 1 {
        put(id, session)?;
    }
    Ok(())
}

fn instantiate(executable: *mut usize, graph: usize) -> Result<()> {
    let nodes = GRAPHS.read().get(&graph).cloned().ok_or(CuResult::INVALID_VALUE)?;
    let handle = fresh_handle();
    EXECUTABLES.write().insert(handle, Arc::new(Executable::new(nodes)));
    put(executable, handle)
}

driver! {
    fn cuStreamCreate(place: *mut usize, flags: u32) { create(place, flags) }
    fn cuStreamCreateWithPriority(place: *mut usize, flags: u32, _priority: c_int) { create(place, flags) }
    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) {
        put(least, 0)?;
        put(greatest, -5)
    }
    fn cuStreamDestroy_v2(handle: usize) {
        Stream::find(handle).ok_or(CuResult::INVALID_HANDLE)?.close();
        Ok(())
    }
    fn cuStreamSynchronize(handle: usize) {
        let stream = stream(handle)?;
        if !matches!(stream.capture_status(), Ok(CaptureStatus::Active(_))) {
            check_capture_allows()?;
        }
        stream.synchronize()
    }
    fn cuStreamQuery(handle: usize) {
        check_capture_allows()?;
        if stream(handle)?.is_idle()? { Ok(()) } else { Err(CuResult::NOT_READY) }
    }
    fn cuStreamGetFlags(handle: usize, flags: *mut u32) {
        put(flags, u32::from(stream(handle)?.kind == Kind::NonBlocking))
    }
    fn cuStreamGetDevice(handle: usize, device: *mut c_int) { put(device, stream(handle)?.device.ordinal) }
    fn cuStreamWaitEvent(handle: usize, event: usize, flags: u32) {
        Event::find(event)?.make_wait(&stream(handle)?, flags & EXTERNAL != 0)
    }
    fn cuStreamIsCapturing(handle: usize, status: *mut c_int) { capture_info(handle, status, std::ptr::null_mut()) }
    fn cuStreamGetCaptureInfo_v2(
        handle: usize, status: *mut c_int, id: *mut u64, graph: *mut *mut c_void, nodes: *mut *const c_void,
        n_nodes: *mut usize,
    ) {
        if !graph.is_null() {
            return Err(CuResult::NOT_SUPPORTED); // a graph in the making is not simulated
        }
        capture_info(handle, status, id)?;
        if !nodes.is_null() || !n_nodes.is_null() {
            let dependencies = stream(handle)?.dependencies()?;
            put(n_nodes, dependencies.len())?;
            // As in the driver, the array lives until the next call.
            DEPENDENCIES.with_borrow_mut(|kept| {
                *kept = dependencies.into_iter().map(|node| node + 1).collect();
                put(nodes, kept.as_ptr().cast())
            })?;
        }
        Ok(())
    }
    fn cuStreamUpdateCaptureDependencies(handle: usize, nodes: *const usize, n_nodes: usize, flags: u32) {
        let nodes = match n_nodes {
            0 => Vec::new(),
            // SAFETY: the caller vouches for so many nodes, which are those that we gave out.
            _ => unsafe { std::slice::from_raw_parts(nodes, n_nodes) }.iter().map(|node| node.wrapping_sub(1)).collect(),
        };
        stream(handle)?.update_dependencies(&nodes, flags & SET_DEPENDENCIES == 0)
    }
    fn cuStreamBeginCapture_v2(handle: usize, mode: c_int) { stream(handle)?.begin_capture(mode) }
    fn cuStreamEndCapture(handle: usize, graph: *mut usize) {
        put(graph, 0)?;
        let nodes = stream(handle)?.end_capture()?;
        let new = fresh_handle();
        GRAPHS.write().insert(new, nodes);
        put(graph, new)
    }
    fn cuThreadExchangeStreamCaptureMode(mode: *mut c_int) {
        if mode.is_null() {
            return Err(CuResult::INVALID_VALUE);
        }
        // SAFETY: not null, and the caller vouches for it.
        let wanted = unsafe { *mode };
        if !(0..=2).contains(&wanted) {
            return Err(CuResult::INVALID_VALUE);
        }
        put(mode, exchange_mode(wanted))
    }
    fn cuGraphInstantiateWithFlags(executable: *mut usize, graph: usize, _flags: u64) {
        instantiate(executable, graph)
    }
    fn cuGraphInstantiate_v2(
        executable: *mut usize, graph: usize, _error_node: *mut usize, _log: *mut c_void, _n_bytes: usize,
    ) { instantiate(executable, graph) }
    fn cuGraphUpload(executable: usize, handle: usize) {
        stream(handle)?;
        EXECUTABLES.read().get(&executable).map(|_| ()).ok_or(CuResult::INVALID_VALUE)
    }
    fn cuGraphLaunch(executable: usize, handle: usize) {
        schedule::step();
        let executable = EXECUTABLES.read().get(&executable).cloned().ok_or(CuResult::INVALID_VALUE)?;
        let stream = stream(handle)?;
        let launched = executable.launch();
        stream.issue(Arc::new(move || executable.run(&launched)))
    }
    fn cuGraphGetNodes(graph: usize, _nodes: *mut usize, n_nodes: *mut usize) {
        put(n_nodes, GRAPHS.read().get(&graph).ok_or(CuResult::INVALID_VALUE)?.len())
    }
    fn cuGraphExecDestroy(executable: usize) {
        let executable = EXECUTABLES.write().remove(&executable);
        executable.map(drop).ok_or(CuResult::INVALID_VALUE)
    }
    fn cuGraphDestroy(graph: usize) {
        let graph = GRAPHS.write().remove(&graph);
        graph.map(drop).ok_or(CuResult::INVALID_VALUE)
    }
    fn cuEventCreate(place: *mut usize, flags: u32) {
        if schedule::fails("event") {
            return Err(CuResult::OUT_OF_MEMORY);
        }
        put(place, Event::create(device::current()?, flags & DISABLE_TIMING == 0))
    }
    fn cuEventDestroy_v2(event: usize) { Event::destroy(event) }
    fn cuEventRecord(event: usize, handle: usize) { Event::find(event)?.record(&stream(handle)?, false) }
    fn cuEventRecordWithFlags(event: usize, handle: usize, flags: u32) {
        Event::find(event)?.record(&stream(handle)?, flags & EXTERNAL != 0)
    }
    fn cuEventQuery(event: usize) {
        check_capture_allows()?;
        if Event::find(event)?.is_complete()? { Ok(()) } else { Err(CuResult::NOT_READY) }
    }
    fn cuEventSynchronize(event: usize) {
        check_capture_allows()?;
        Event::find(event)?.synchronize()
    }
    fn cuEventElapsedTime(ms: *mut f32, start: usize, end: usize) {
        put(ms, Event::find(start)?.elapsed_ms(&*Event::find(end)?)?)
    }
    fn cuEventElapsedTime_v2(ms: *mut f32, start: usize, end: usize) {
        put(ms, Event::find(start)?.elapsed_ms(&*Event::find(end)?)?)
    }
}

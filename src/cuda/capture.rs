//! Graph capture: whether a stream captures, and the edges of the graph that it captures into.

use std::ffi::c_uint;
use std::ptr;

use cudarc::driver::sys;

use super::driver::{CudaError, CudaResult, check, log_drop};
use super::stream::StreamHandle;

/// Lets this thread allocate while some thread captures a graph in global mode, until dropped.
#[derive(Debug)]
pub(crate) struct RelaxedCapture {
    previous: sys::CUstreamCaptureMode,
}

impl RelaxedCapture {
    /// Switches this thread to the relaxed capture mode.
    pub(crate) fn enter() -> CudaResult<Self> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: `mode` is a valid place; the driver swaps in the previous mode.
        check(unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) })?;
        Ok(Self { previous: mode })
    }
}

impl Drop for RelaxedCapture {
    fn drop(&mut self) {
        // SAFETY: restores the mode that `enter` found.
        log_drop("capture mode", unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut self.previous) });
    }
}

/// Whether work issued to a stream now is captured, and into which graph.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Capture {
    /// It runs.
    None,
    /// It becomes part of the graph of this capture, by the driver's unique id.
    Active(u64),
}

/// What happens to work that is issued to `stream` now.
///
/// # Safety
/// `stream` is a live stream or one of the driver's special handles, of the current context.
pub(crate) unsafe fn capture_of(stream: StreamHandle) -> CudaResult<Capture> {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let mut id = 0;
    let (graph, dependencies, count) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
    // SAFETY: the caller vouches for the stream; null asks for no further answers.
    check(unsafe { sys::cuStreamGetCaptureInfo_v2(stream, &mut status, &mut id, graph, dependencies, count) })?;
    match status {
        sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => Ok(Capture::None),
        sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE => Ok(Capture::Active(id)),
        _ => Err(CudaError(sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)),
    }
}

/// A node of a graph that is being captured.
pub(crate) type GraphNode = sys::CUgraphNode;

/// The nodes that what is captured next from `stream` will depend on.
///
/// # Safety
/// `stream` is live, of the current context, and captures.
pub(crate) unsafe fn capture_dependencies(stream: StreamHandle) -> CudaResult<Vec<GraphNode>> {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let (mut nodes, mut n_nodes) = (ptr::null(), 0);
    let (id, graph) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: the caller vouches for the stream; null asks for no answer.
    check(unsafe { sys::cuStreamGetCaptureInfo_v2(stream, &mut status, id, graph, &mut nodes, &mut n_nodes) })?;
    if n_nodes == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the driver keeps the array until the next call on the stream.
    Ok(unsafe { std::slice::from_raw_parts(nodes, n_nodes) }.to_vec())
}

/// How [`update_capture_dependencies`] takes its nodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Dependencies {
    /// Beside those that there are.
    Add,
    /// Instead of them; they need not be joined.
    Set,
}

/// Makes what is captured next from `stream` depend on `nodes`.
///
/// # Safety
/// As for [`capture_dependencies`]; the nodes are of that capture.
pub(crate) unsafe fn update_capture_dependencies(
    stream: StreamHandle,
    nodes: &mut [GraphNode],
    how: Dependencies,
) -> CudaResult<()> {
    let flags = match how {
        Dependencies::Add => sys::CUstreamUpdateCaptureDependencies_flags::CU_STREAM_ADD_CAPTURE_DEPENDENCIES,
        Dependencies::Set => sys::CUstreamUpdateCaptureDependencies_flags::CU_STREAM_SET_CAPTURE_DEPENDENCIES,
    };
    // SAFETY: the caller vouches for the stream and the nodes; the driver copies them.
    check(unsafe { sys::cuStreamUpdateCaptureDependencies(stream, nodes.as_mut_ptr(), nodes.len(), flags as c_uint) })
}

//! An all-reduce as the application asked for it, and what is known of it alone.

use std::ffi::c_void;
use std::sync::Arc;

use flashcomm_wire::{Op, Plan};

use crate::comm::{Attached, Comm};
use crate::config::Config;
use crate::cuda::{Capture, Entered, StreamHandle};
use crate::element::ElementType;
use crate::error::{Error, Result};
use crate::nccl::{NcclResult, RedOp, StreamPtr};
use crate::nvtx::Ranges;
use crate::record::Input;
use crate::route::{self, Request, Route};
use crate::{real, thread};

/// An all-reduce as the application asked for it.
pub(crate) struct Operation {
    /// Its communicator.
    pub comm: Arc<Comm>,
    /// Input, `count` elements.
    pub input: *const c_void,
    /// Output; may be the input.
    pub output: *mut c_void,
    /// What is asked.
    pub request: Request,
    /// The storage type, of a request that is a candidate.
    pub element: ElementType,
    /// The application's stream.
    pub stream: StreamPtr,
    /// The communicator's own stream, where it runs beside other calls of its group.
    pub(super) aside: Option<StreamHandle>,
    /// Its number on the communicator, where its input is to be saved.
    recorded: Option<u64>,
    /// Set when its batch runs.
    pub(super) planned: Option<Planned>,
}

impl Operation {
    /// A call of the application's: `comm`'s all-reduce of `input` into `output`, both on its device.
    pub(crate) fn new(
        comm: Arc<Comm>,
        input: *const c_void,
        output: *mut c_void,
        request: Request,
        element: ElementType,
        stream: StreamPtr,
    ) -> Self {
        let recorded = if element.is_coded() { comm.recording.count() } else { None };
        Self { comm, input, output, request, element, stream, aside: None, recorded, planned: None }
    }

    /// Where it goes by what is known of its communicator now.
    pub(crate) fn route(&self) -> Route {
        route::route(self.element, &self.request, self.comm.verdict(), Config::global())
    }

    /// Saves its input, as it is when what was issued to the stream so far has run, if it is one of those to be saved.
    pub(crate) fn record(&self) {
        // Where a kernel has given up, the call will be refused, and the application may free its buffer.
        let has_failed = || self.comm.is_aborted() || self.comm.attached().is_some_and(|on| on.failure().is_some());
        if let Some(call) = self.recorded
            && !has_failed()
        {
            let count = self.request.count;
            let input = Input { call, at: self.input, count, element: self.element, stream: self.stream() };
            // SAFETY: the application vouches for its buffer and its stream.
            unsafe { self.comm.recording.take(&input) };
        }
    }

    /// Where it runs.
    pub(super) fn stream(&self) -> StreamHandle {
        self.aside.unwrap_or(self.stream.cast())
    }

    pub(super) fn is_of_same_comm(&self, other: &Operation) -> bool {
        Arc::ptr_eq(&self.comm, &other.comm)
    }

    pub(super) fn is_alike(&self, other: &Operation) -> bool {
        self.stream == other.stream && self.is_of_same_comm(other)
    }

    pub(super) fn attached(&self) -> Result<&Attached> {
        self.comm.attached().ok_or(Error::Aborted)
    }

    /// Its cut where staging memory of so many bytes bounds the slices.
    pub(super) fn plan(&self, attached: &Attached, buffer_bytes: usize) -> Result<Plan> {
        let count = self.request.count;
        let plan = Plan::new(count, attached.world, attached.legs, buffer_bytes)
            .map_err(|_| Error::BufferTooSmall { world: attached.world })?;
        thread::current()
            .counters(self.comm.handle())
            .count_compressed(self.request.n_bytes(), plan.wire_bytes() as u64);
        Ok(plan)
    }

    /// Whether it goes as it is.
    fn is_exact(&self) -> bool {
        matches!(self.route(), Route::Exact { .. })
    }

    /// What the sum is multiplied with.
    pub(super) fn scale(&self, attached: &Attached) -> f32 {
        let op = if self.request.op == RedOp::AVG { Op::Average } else { Op::Sum };
        op.scale(attached.world)
    }

    /// Opens a profiler's range about it.
    pub(super) fn mark(&self, attached: &Attached, ranges: &mut Ranges) {
        let Attached { legs, exchange, .. } = attached;
        ranges.push(self.request.n_bytes(), || {
            let (element, exchange) = (self.element.name(), exchange.kind().name());
            if self.is_exact() {
                format!("all-reduce {element}, exact, {exchange}")
            } else {
                format!("all-reduce {element}, {legs} bits, {exchange}")
            }
        });
    }

    /// Hands it to the real NCCL unchanged.
    pub(super) fn forward(&self) -> NcclResult {
        let Request { count, datatype, op } = self.request;
        // SAFETY: the application's own arguments.
        unsafe { real::all_reduce(self.input, self.output, count, datatype, op, self.comm.handle(), self.stream) }
    }
}

/// How an operation runs.
pub(super) struct Planned {
    pub(super) plan: Plan,
    pub(super) capture: Capture,
    /// The wave of its first slice; the others follow one by one.
    pub(super) first_wave: usize,
}

impl Planned {
    pub(super) fn end_wave(&self) -> usize {
        self.first_wave + self.plan.n_slices()
    }
}

/// Makes a communicator's context current.
pub(super) fn enter(attached: &Attached) -> Result<Entered> {
    attached.context.enter().map_err(Error::cuda("entering the context"))
}

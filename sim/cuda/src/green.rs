//! Green contexts: some multiprocessors of a device, with streams of their own, within its primary context.
//!
//! As in the driver, events and memory are the primary context's, and what is launched on a stream of a green context runs on
//! its multiprocessors only. A context that stands for it (`cuCtxFromGreenCtx`) has a default stream of its own, which does
//! not synchronize with the device's legacy stream and may capture.

use std::collections::HashMap;
use std::sync::Arc;

use once_cell::sync::{Lazy, OnceCell};
use parking_lot::Mutex;

use crate::cu_result::{CuResult, Result};
use crate::device::{Current, Device};
use crate::stream::{Kind, Stream, fresh_handle};

/// A green context. One that is destroyed stays in memory, for streams that outlive it.
pub struct Green {
    /// Its handle, the `CUgreenCtx`. The context that stands for it has another.
    pub handle: usize,
    /// Its device.
    pub device: &'static Device,
    /// Multiprocessors that it has.
    pub multiprocessors: i32,
    default_stream: OnceCell<Arc<Stream>>,
}

static ALL: Lazy<Mutex<HashMap<usize, &'static Green>>> = Lazy::new(Default::default);

impl Green {
    /// A new one.
    pub fn create(device: &'static Device, multiprocessors: i32) -> &'static Self {
        let handle = fresh_handle();
        let green = Box::leak(Box::new(Green { handle, device, multiprocessors, default_stream: OnceCell::new() }));
        ALL.lock().insert(handle, green);
        green
    }

    /// The one of a handle.
    pub fn find(handle: usize) -> Result<&'static Self> {
        ALL.lock().get(&handle).copied().ok_or(CuResult::INVALID_CONTEXT)
    }

    /// The one that a context stands for.
    pub fn of_context(context: usize) -> Result<&'static Self> {
        let all = ALL.lock();
        all.values().copied().find(|green| Current::Green(green).handle() == context).ok_or(CuResult::INVALID_CONTEXT)
    }

    /// Destroys it.
    pub fn destroy(handle: usize) -> Result<()> {
        ALL.lock().remove(&handle).map(drop).ok_or(CuResult::INVALID_CONTEXT)
    }

    /// What the special handles of streams mean where it is current.
    pub fn default_stream(&'static self) -> Arc<Stream> {
        self.default_stream.get_or_init(|| Stream::new(self.device, Some(self), Kind::NonBlocking)).clone()
    }
}

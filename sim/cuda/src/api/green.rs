//! Green contexts, and how many multiprocessors a context may use.

use std::collections::HashMap;
use std::ffi::c_int;

use once_cell::sync::Lazy;
use parking_lot::Mutex;

use super::{driver, put, stream};
use crate::cu_result::{CuResult, Result};
use crate::device::{self, Current};
use crate::green::Green;
use crate::stream::{Kind, Stream, fresh_handle};

/// `CU_DEV_RESOURCE_TYPE_SM`.
const MULTIPROCESSORS: c_int = 1;

/// `CUdevResource`: the SM resource is the only one here.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Resource {
    kind: c_int,
    internal: [u8; 92],
    multiprocessors: u32,
    rest: [u8; 44],
}

/// `CUexecAffinityParam`.
#[repr(C)]
pub struct ExecAffinity {
    kind: c_int,
    multiprocessors: u32,
}

/// Resources that were made ready for a green context: their multiprocessors.
static DESCRIPTORS: Lazy<Mutex<HashMap<usize, u32>>> = Lazy::new(Default::default);

fn resource(multiprocessors: i32) -> Resource {
    Resource { kind: MULTIPROCESSORS, internal: [0; 92], multiprocessors: multiprocessors as u32, rest: [0; 44] }
}

fn wants_multiprocessors(kind: c_int) -> Result<()> {
    if kind == MULTIPROCESSORS { Ok(()) } else { Err(CuResult::INVALID_VALUE) }
}

driver! {
    fn cuCtxGetExecAffinity(affinity: *mut ExecAffinity, kind: c_int) {
        device::current()?;
        if kind != 0 {
            return Err(CuResult::INVALID_VALUE);
        }
        put(affinity, ExecAffinity { kind, multiprocessors: device::affinity() as u32 })
    }
    fn cuDeviceGetDevResource(device: c_int, place: *mut Resource, kind: c_int) {
        device::of(device)?;
        wants_multiprocessors(kind)?;
        put(place, resource(device::affinity()))
    }
    fn cuDevSmResourceSplitByCount(
        place: *mut Resource, n_groups: *mut u32, input: *const Resource, remaining: *mut Resource, _flags: u32, least: u32,
    ) {
        if place.is_null() || n_groups.is_null() || input.is_null() {
            return Err(CuResult::INVALID_VALUE);
        }
        // SAFETY: not null, and the caller vouches for them.
        let (wanted, there) = unsafe { (*n_groups, (*input).multiprocessors) };
        let size = least.max(1);
        let n = wanted.min(there / size);
        for i in 0..n as usize {
            // SAFETY: the caller has room for as many as it wants.
            put(unsafe { place.add(i) }, resource(size as i32))?;
        }
        if !remaining.is_null() {
            put(remaining, resource((there - n * size) as i32))?;
        }
        put(n_groups, n)
    }
    fn cuDevResourceGenerateDesc(place: *mut usize, resources: *const Resource, n: u32) {
        if resources.is_null() || n != 1 {
            return Err(CuResult::INVALID_VALUE);
        }
        let descriptor = fresh_handle();
        // SAFETY: not null, and the caller vouches for one.
        DESCRIPTORS.lock().insert(descriptor, unsafe { (*resources).multiprocessors });
        put(place, descriptor)
    }
    fn cuGreenCtxCreate(place: *mut usize, descriptor: usize, device: c_int, _flags: u32) {
        let device = device::of(device)?;
        let multiprocessors = DESCRIPTORS.lock().get(&descriptor).copied().ok_or(CuResult::INVALID_VALUE)?;
        put(place, Green::create(device, multiprocessors as i32).handle)
    }
    fn cuGreenCtxDestroy(green: usize) { Green::destroy(green) }
    fn cuGreenCtxGetDevResource(green: usize, place: *mut Resource, kind: c_int) {
        wants_multiprocessors(kind)?;
        put(place, resource(Green::find(green)?.multiprocessors))
    }
    fn cuGreenCtxStreamCreate(place: *mut usize, green: usize, flags: u32, _priority: c_int) {
        let green = Green::find(green)?;
        if flags != 1 {
            return Err(CuResult::INVALID_VALUE); // CU_STREAM_NON_BLOCKING is required
        }
        put(place, Stream::new(green.device, Some(green), Kind::NonBlocking).handle)
    }
    fn cuCtxFromGreenCtx(context: *mut usize, green: usize) { put(context, Current::Green(Green::find(green)?).handle()) }
    fn cuStreamGetGreenCtx(handle: usize, green: *mut usize) {
        put(green, stream(handle)?.green.map_or(0, |green| green.handle))
    }
}

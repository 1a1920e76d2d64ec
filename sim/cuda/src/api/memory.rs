//! Allocation, registration, IPC, pointers, copies.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use flashcomm_sim_schedule as schedule;

use super::{driver, put, stream};
use crate::cu_result::{CuResult, Result};
use crate::memory::{self, IpcHandle, Kind};
use crate::stream::{CaptureStatus, Stream, Task, check_capture_allows};
use crate::{clock, device, durations};

fn may(kind: &str, code: CuResult) -> Result<()> {
    if schedule::fails(kind) { Err(code) } else { Ok(()) }
}

/// One end of a copy.
#[derive(Clone)]
enum Place {
    /// What devices may access, checked when the copy runs.
    Device(usize),
    /// The application's own memory.
    Host(usize),
    /// Bytes of it that were staged at the time of issue.
    Staged(Arc<Vec<u8>>),
}

impl Place {
    /// Of an address by itself.
    fn of(address: usize) -> Self {
        let is_devices = memory::is_fenced(address) || memory::allocation_of(address).is_some();
        if is_devices { Place::Device(address) } else { Place::Host(address) }
    }

    fn resolve(&self, n_bytes: usize) -> Result<*mut u8> {
        match self {
            Place::Device(address) => memory::resolve(*address, n_bytes),
            Place::Host(address) => Ok(*address as *mut u8),
            Place::Staged(bytes) => Ok(bytes.as_ptr().cast_mut()),
        }
    }

    /// Its address, where devices know it.
    fn address(&self) -> Option<usize> {
        match self {
            Place::Device(address) => Some(*address),
            Place::Host(_) | Place::Staged(_) => None,
        }
    }

    /// Whether the host has to be done with it when the call returns.
    fn is_pageable(&self) -> bool {
        matches!(self, Place::Host(_))
    }
}

fn copy_task(target: Place, source: Place, n_bytes: usize) -> Task {
    Arc::new(move || {
        let (from, to) = (source.resolve(n_bytes)?, target.resolve(n_bytes)?);
        // SAFETY: live allocations, or memory that the caller vouches for until the copy has run.
        unsafe { std::ptr::copy(from, to, n_bytes) };
        clock::take(|fabric| Ok(durations::of_copy(fabric, target.address(), source.address(), n_bytes)))
    })
}

/// Copies on a stream. Pageable sources are staged; with a pageable target it returns after the copy, as the driver's.
fn copy_async(target: Place, source: Place, n_bytes: usize, handle: usize) -> Result<()> {
    may("copy", CuResult::INVALID_VALUE)?;
    schedule::step();
    if n_bytes == 0 {
        return Ok(());
    }
    let stream = stream(handle)?;
    let source = match source {
        Place::Host(address) => {
            let mut bytes = vec![0u8; n_bytes];
            // SAFETY: the caller vouches for the source.
            unsafe { std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), n_bytes) };
            Place::Staged(Arc::new(bytes))
        }
        other => other,
    };
    let waits = target.is_pageable() && matches!(stream.capture_status()?, CaptureStatus::None);
    stream.issue(copy_task(target, source, n_bytes))?;
    if waits { stream.synchronize() } else { Ok(()) }
}

/// Copies on the legacy stream and waits. A wrong device pointer is answered, and harms nothing.
fn copy_now(target: Place, source: Place, n_bytes: usize) -> Result<()> {
    check_capture_allows()?;
    for place in [&target, &source] {
        if let Place::Device(address) = place {
            memory::resolve(*address, n_bytes).map_err(|_| CuResult::INVALID_VALUE)?;
        }
    }
    copy_async(target, source, n_bytes, 0)?;
    Stream::legacy(device::current()?).synchronize()
}

fn set_task(address: usize, value: Vec<u8>, count: usize) -> Task {
    Arc::new(move || {
        let target = memory::resolve(address, count * value.len())?;
        for i in 0..count {
            // SAFETY: within the range just resolved.
            unsafe { std::ptr::copy_nonoverlapping(value.as_ptr(), target.add(i * value.len()), value.len()) };
        }
        clock::take(|fabric| Ok(durations::of_fill(fabric, count * value.len())))
    })
}

fn set_now(address: usize, value: Vec<u8>, count: usize) -> Result<()> {
    check_capture_allows()?;
    let legacy = Stream::legacy(device::current()?);
    legacy.issue(set_task(address, value, count))?;
    legacy.synchronize()
}

fn allocate_pinned(place: *mut usize, n_bytes: usize) -> Result<()> {
    check_capture_allows()?;
    may("hostalloc", CuResult::OUT_OF_MEMORY)?;
    put(place, memory::allocate(n_bytes, Kind::Pinned, device::current()?)?)
}

/// One attribute of a pointer: how many bytes it has, and its value.
fn attribute(which: c_int, address: usize) -> Result<(usize, u64)> {
    let found = memory::allocation_of(address).ok_or(CuResult::INVALID_VALUE)?;
    let is_device = matches!(found.kind, Kind::Device | Kind::Imported);
    Ok(match which {
        2 => (4, if is_device { 2 } else { 1 }), // memory type: device or host
        3 => (8, address as u64),                // device pointer
        4 if is_device => return Err(CuResult::INVALID_VALUE),
        4 => (8, address as u64),                         // host pointer
        6 => (4, 1),                                      // synchronous operations
        7 => (8, found.address as u64),                   // buffer id
        8 => (4, 0),                                      // managed
        9 => (4, found.device as u64),                    // device ordinal
        10 => (4, u64::from(found.kind == Kind::Device)), // IPC capable
        11 => (8, found.address as u64),                  // start of the range
        12 => (8, found.n_bytes as u64),                  // its size
        13 => (4, 1),                                     // mapped
        _ => return Err(CuResult::INVALID_VALUE),
    })
}

driver! {
    fn cuMemAlloc_v2(address: *mut usize, n_bytes: usize) {
        check_capture_allows()?;
        schedule::step();
        may("alloc", CuResult::OUT_OF_MEMORY)?;
        put(address, memory::allocate(n_bytes, Kind::Device, device::current()?)?)
    }
    fn cuMemFree_v2(address: usize) {
        check_capture_allows()?;
        if address == 0 {
            return Ok(());
        }
        let device = device::current()?;
        if memory::allocation_of(address).is_none_or(|found| found.address != address || found.kind != Kind::Device) {
            return Err(CuResult::INVALID_VALUE);
        }
        // Freeing waits for all work of the device, which may wait for other ranks.
        Stream::synchronize_all(device)?;
        memory::free(address, Kind::Device)
    }
    fn cuMemAllocAsync(address: *mut usize, n_bytes: usize, handle: usize) {
        stream(handle)?;
        may("alloc", CuResult::OUT_OF_MEMORY)?;
        put(address, memory::allocate(n_bytes, Kind::Device, device::current()?)?)
    }
    fn cuMemFreeAsync(address: usize, handle: usize) {
        stream(handle)?.issue(Arc::new(move || memory::free(address, Kind::Device)))
    }
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let used = device::current()?.used_bytes.load(std::sync::atomic::Ordering::Relaxed);
        put(free, (device::total_bytes() - used) as usize)?;
        put(total, device::total_bytes() as usize)
    }
    fn cuMemGetAddressRange_v2(start: *mut usize, n_bytes: *mut usize, address: usize) {
        let found = memory::allocation_of(address).ok_or(CuResult::NOT_FOUND)?;
        if !start.is_null() {
            put(start, found.address)?;
        }
        if n_bytes.is_null() { Ok(()) } else { put(n_bytes, found.n_bytes) }
    }
    fn cuMemAllocHost_v2(place: *mut usize, n_bytes: usize) { allocate_pinned(place, n_bytes) }
    fn cuMemHostAlloc(place: *mut usize, n_bytes: usize, _flags: u32) { allocate_pinned(place, n_bytes) }
    fn cuMemFreeHost(address: usize) {
        check_capture_allows()?;
        Stream::synchronize_all(device::current()?)?;
        memory::free(address, Kind::Pinned)
    }
    fn cuMemHostRegister_v2(address: usize, n_bytes: usize, _flags: u32) {
        check_capture_allows()?;
        device::current()?;
        may("register", CuResult::OUT_OF_MEMORY)?;
        if address == 0 || n_bytes == 0 || memory::is_fenced(address) {
            return Err(CuResult::INVALID_VALUE);
        }
        memory::register(address, n_bytes)
    }
    fn cuMemHostUnregister(address: usize) {
        check_capture_allows()?;
        Stream::synchronize_all(device::current()?)?;
        memory::unregister(address)
    }
    fn cuMemHostGetDevicePointer_v2(device_address: *mut usize, address: usize, _flags: u32) {
        let found = memory::allocation_of(address).ok_or(CuResult::INVALID_VALUE)?;
        match found.kind {
            Kind::Pinned | Kind::Registered => put(device_address, address),
            Kind::Device | Kind::Imported => Err(CuResult::INVALID_VALUE),
        }
    }
    fn cuIpcGetMemHandle(handle: *mut IpcHandle, address: usize) {
        may("ipc", CuResult::OUT_OF_MEMORY)?;
        device::current()?;
        put(handle, memory::export(address)?)
    }
    fn cuIpcOpenMemHandle_v2(address: *mut usize, handle: IpcHandle, _flags: u32) {
        check_capture_allows()?;
        schedule::step();
        may("ipc", CuResult::INVALID_VALUE)?;
        put(address, memory::import(&handle, device::current()?)?)
    }
    fn cuIpcCloseMemHandle(address: usize) {
        check_capture_allows()?;
        Stream::synchronize_all(device::current()?)?;
        memory::close(address)
    }
    fn cuPointerGetAttribute(value: *mut c_void, which: c_int, address: usize) {
        let (n_bytes, attribute) = attribute(which, address)?;
        if n_bytes == 8 { put(value.cast(), attribute) } else { put(value.cast(), attribute as u32) }
    }
    fn cuPointerGetAttributes(count: u32, which: *const c_int, values: *const *mut c_void, address: usize) {
        for i in 0..count as usize {
            // SAFETY: the caller vouches for `count` attributes and places.
            let (which, value) = unsafe { (*which.add(i), *values.add(i)) };
            // What does not apply is zero here, not an error.
            match attribute(which, address) {
                Ok((8, attribute)) => put(value.cast(), attribute)?,
                Ok((_, attribute)) => put(value.cast(), attribute as u32)?,
                Err(_) => put(value.cast(), 0u32)?,
            }
        }
        Ok(())
    }
    fn cuMemcpyHtoD_v2(target: usize, source: usize, n_bytes: usize) {
        copy_now(Place::Device(target), Place::of(source), n_bytes)
    }
    fn cuMemcpyDtoH_v2(target: usize, source: usize, n_bytes: usize) {
        copy_now(Place::of(target), Place::Device(source), n_bytes)
    }
    fn cuMemcpyDtoD_v2(target: usize, source: usize, n_bytes: usize) {
        copy_now(Place::Device(target), Place::Device(source), n_bytes)
    }
    fn cuMemcpy(target: usize, source: usize, n_bytes: usize) {
        copy_now(Place::of(target), Place::of(source), n_bytes)
    }
    fn cuMemcpyHtoDAsync_v2(target: usize, source: usize, n_bytes: usize, stream: usize) {
        copy_async(Place::Device(target), Place::of(source), n_bytes, stream)
    }
    fn cuMemcpyDtoHAsync_v2(target: usize, source: usize, n_bytes: usize, stream: usize) {
        copy_async(Place::of(target), Place::Device(source), n_bytes, stream)
    }
    fn cuMemcpyDtoDAsync_v2(target: usize, source: usize, n_bytes: usize, stream: usize) {
        copy_async(Place::Device(target), Place::Device(source), n_bytes, stream)
    }
    fn cuMemcpyAsync(target: usize, source: usize, n_bytes: usize, stream: usize) {
        copy_async(Place::of(target), Place::of(source), n_bytes, stream)
    }
    fn cuMemsetD8_v2(address: usize, value: u8, count: usize) { set_now(address, vec![value], count) }
    fn cuMemsetD32_v2(address: usize, value: u32, count: usize) {
        set_now(address, value.to_le_bytes().to_vec(), count)
    }
    fn cuMemsetD8Async(address: usize, value: u8, count: usize, handle: usize) {
        stream(handle)?.issue(set_task(address, vec![value], count))
    }
    fn cuMemsetD32Async(address: usize, value: u32, count: usize, handle: usize) {
        stream(handle)?.issue(set_task(address, value.to_le_bytes().to_vec(), count))
    }
}

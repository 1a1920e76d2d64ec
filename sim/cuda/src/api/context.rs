//! Initialization, devices, contexts, error texts, function look-up.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

use super::{driver, put};
use crate::cu_result::{CuResult, Result};
use crate::device::{self, Current};
use crate::stream::{Stream, check_capture_allows};

static INITIALIZED: AtomicBool = AtomicBool::new(false);

fn initialized() -> Result<()> {
    if INITIALIZED.load(Ordering::Acquire) { Ok(()) } else { Err(CuResult::NOT_INITIALIZED) }
}

driver! {
    fn cuInit(flags: u32) {
        if flags != 0 {
            return Err(CuResult::INVALID_VALUE);
        }
        INITIALIZED.store(true, Ordering::Release);
        Ok(())
    }
    fn cuDriverGetVersion(version: *mut c_int) { put(version, 13000) }
    fn cuGetErrorString(code: c_int, text: *mut *const c_char) {
        let found = CuResult(code).texts();
        put(text, found.map_or(std::ptr::null(), |(_, text)| text.as_ptr()))?;
        found.map(drop).ok_or(CuResult::INVALID_VALUE)
    }
    fn cuGetErrorName(code: c_int, text: *mut *const c_char) {
        let found = CuResult(code).texts();
        put(text, found.map_or(std::ptr::null(), |(name, _)| name.as_ptr()))?;
        found.map(drop).ok_or(CuResult::INVALID_VALUE)
    }
    fn cuDeviceGetCount(count: *mut c_int) {
        initialized()?;
        put(count, device::count())
    }
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) {
        initialized()?;
        put(device, device::of(ordinal)?.ordinal)
    }
    fn cuDeviceGetName(name: *mut c_char, n_bytes: c_int, device: c_int) {
        device::of(device)?;
        let text = c"flashcomm simulated device".to_bytes_with_nul();
        if (n_bytes as usize) < text.len() {
            return Err(CuResult::INVALID_VALUE);
        }
        // SAFETY: the caller vouches for `n_bytes` bytes, which are enough.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, text.len()) };
        Ok(())
    }
    fn cuDeviceGetPCIBusId(id: *mut c_char, n_bytes: c_int, device: c_int) {
        let text = format!("0000:{:02x}:00.0\0", 1 + device::of(device)?.ordinal);
        if (n_bytes as usize) < text.len() {
            return Err(CuResult::INVALID_VALUE);
        }
        // SAFETY: the caller vouches for `n_bytes` bytes, which are enough.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr().cast(), id, text.len()) };
        Ok(())
    }
    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) {
        let device = device::of(device)?;
        let mut bytes = *b"flashcomm-sim-00";
        bytes[15] = device.ordinal as u8;
        put(uuid, bytes)
    }
    fn cuDeviceGetUuid(uuid: *mut [u8; 16], device: c_int) {
        // SAFETY: the caller's own arguments.
        match unsafe { cuDeviceGetUuid_v2(uuid, device) } {
            0 => Ok(()),
            code => Err(CuResult(code)),
        }
    }
    fn cuDeviceTotalMem_v2(n_bytes: *mut usize, device: c_int) {
        device::of(device)?;
        put(n_bytes, device::total_bytes() as usize)
    }
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) {
        let device = device::of(device)?;
        put(value, match attribute {
            1 => 1024,                       // threads per block
            8 => 48 << 10,                   // shared memory per block
            10 => 32,                        // warp size
            16 => device::MULTIPROCESSORS,   // multiprocessors
            33 => 1 + device.ordinal,        // PCI bus
            34 | 50 => 0,                    // PCI device, domain
            41 | 19 | 31 => 1,               // unified addressing, host memory mapping, concurrent kernels
            75 => 9,                         // compute capability, major
            76 => 0,                         // and minor
            91 | 99 => 1,                    // host pointers as they are, host registration
            95 => 1,                         // cooperative launch
            97 => 64 << 10,                  // shared memory per block at most
            115 => 1,                        // memory pools
            _ => 0,
        })
    }
    fn cuDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int) {
        let (device, peer) = (device::of(device)?, device::of(peer)?);
        put(can, c_int::from(device.ordinal != peer.ordinal && device::reach_each_other()))
    }
    fn cuDeviceGetP2PAttribute(value: *mut c_int, attribute: c_int, device: c_int, peer: c_int) {
        let (device, peer) = (device::of(device)?, device::of(peer)?);
        let reaches = device.ordinal != peer.ordinal && device::reach_each_other();
        put(value, match attribute {
            2 => c_int::from(reaches),                         // access
            3 => c_int::from(reaches && device::have_nvlink()), // native atomics
            _ => 0,
        })
    }
    fn cuCtxEnablePeerAccess(context: usize, flags: u32) {
        let current = device::current()?;
        match Current::of_handle(context)?.map(Current::device) {
            Some(_) if !device::reach_each_other() => Err(CuResult::PEER_ACCESS_UNSUPPORTED),
            Some(peer) if peer.ordinal != current.ordinal && flags == 0 => Ok(()),
            _ => Err(CuResult::INVALID_VALUE),
        }
    }
    fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) {
        initialized()?;
        let device = device::of(device)?;
        device.retain();
        put(context, Current::Primary(device).handle())
    }
    fn cuDevicePrimaryCtxRelease_v2(device: c_int) { device::of(device)?.release() }
    fn cuCtxGetCurrent(context: *mut usize) { put(context, device::peek().map_or(0, Current::handle)) }
    fn cuCtxSetCurrent(context: usize) {
        device::set(Current::of_handle(context)?);
        Ok(())
    }
    fn cuCtxPushCurrent_v2(context: usize) {
        device::push(Current::of_handle(context)?);
        Ok(())
    }
    fn cuCtxPopCurrent_v2(context: *mut usize) {
        let popped = device::pop()?;
        if context.is_null() { Ok(()) } else { put(context, popped.map_or(0, Current::handle)) }
    }
    fn cuCtxGetDevice(device: *mut c_int) { put(device, device::current()?.ordinal) }
    fn cuCtxSynchronize() {
        check_capture_allows()?;
        Stream::synchronize_all(device::current()?)
    }
    fn cuGetProcAddress_v2(
        symbol: *const c_char, function: *mut *mut c_void, _version: c_int, _flags: u64, status: *mut c_int,
    ) {
        // SAFETY: the caller gives a NUL-terminated name.
        let name = unsafe { CStr::from_ptr(symbol) };
        // The name without its version suffix means the newest that there is.
        let newest = |suffix: &str| std::ffi::CString::new(format!("{}{suffix}", name.to_string_lossy())).ok();
        let find = |name: std::ffi::CString| {
            // SAFETY: a NUL-terminated name.
            let found = unsafe { libc::dlsym(own_handle(), name.as_ptr()) };
            (!found.is_null()).then_some(found)
        };
        let found = ["_v2", ""].into_iter().filter_map(newest).find_map(find);
        if !status.is_null() {
            put(status, if found.is_some() { 0 } else { 1 })?;
        }
        put(function, found.unwrap_or(std::ptr::null_mut()))?;
        found.map(drop).ok_or(CuResult::NOT_FOUND)
    }
}

/// A handle of this very library.
fn own_handle() -> *mut c_void {
    let mut info = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    // SAFETY: an address of this library and a valid place.
    unsafe { libc::dladdr(own_handle as *const c_void, &mut info) };
    // SAFETY: the loader's own name of a library that is loaded.
    unsafe { libc::dlopen(info.dli_fname, libc::RTLD_NOW | libc::RTLD_NOLOAD) }
}

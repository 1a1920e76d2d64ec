//! Devices and their primary contexts, which the application and the real NCCL use, too.

use std::ffi::{CStr, c_int};
use std::ptr;

use cudarc::driver::sys;

use super::driver::{CudaError, CudaResult, check, log_drop};

/// The primary context of a device, retained while this lives.
#[derive(Debug)]
pub struct Context {
    device: c_int,
    handle: sys::CUcontext,
}

// SAFETY: a context handle may be used from any thread; the driver locks.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Retains the primary context of device `ordinal` (the runtime API's numbering).
    pub fn retain(ordinal: c_int) -> CudaResult<Self> {
        let (mut device, mut handle) = (0, ptr::null_mut());
        // SAFETY: `device` is a valid place.
        check(unsafe { sys::cuDeviceGet(&mut device, ordinal) })?;
        // SAFETY: `handle` is a valid place.
        check(unsafe { sys::cuDevicePrimaryCtxRetain(&mut handle, device) })?;
        Ok(Self { device, handle })
    }

    /// Makes the context current on this thread until the guard drops. Cheap where it is current already.
    pub fn enter(&self) -> CudaResult<Entered> {
        let mut current = ptr::null_mut();
        // SAFETY: `current` is a valid place.
        check(unsafe { sys::cuCtxGetCurrent(&mut current) })?;
        if current == self.handle {
            return Ok(Entered { pushed: false });
        }
        // SAFETY: the handle is retained while `self` lives.
        check(unsafe { sys::cuCtxPushCurrent_v2(self.handle) })?;
        Ok(Entered { pushed: true })
    }

    /// The device's number, as the driver has it.
    pub fn device(&self) -> c_int {
        self.device
    }

    /// An attribute of the device.
    pub fn attribute(&self, attribute: sys::CUdevice_attribute) -> CudaResult<usize> {
        let mut value = 0;
        // SAFETY: `value` is a valid place and the device came from the driver.
        check(unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, self.device) })?;
        Ok(usize::try_from(value).unwrap_or(0))
    }

    /// Multiprocessors that kernels of this, the current context may run on: those of the device (of its slice, with MIG), or
    /// fewer by MPS.
    pub fn multiprocessors(&self) -> CudaResult<usize> {
        let of_device = self.attribute(sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(self.affinity().map_or(of_device, |affinity| affinity.min(of_device)))
    }

    /// The NUMA node that the device hangs on, if the system tells.
    pub fn numa_node(&self) -> Option<u32> {
        let mut id: [std::ffi::c_char; 32] = [0; 32];
        // SAFETY: `id` has the room that it says, and the driver ends it by a NUL.
        check(unsafe { sys::cuDeviceGetPCIBusId(id.as_mut_ptr(), id.len() as c_int, self.device) }).ok()?;
        // SAFETY: NUL-terminated by the driver.
        let id = unsafe { CStr::from_ptr(id.as_ptr()) }.to_str().ok()?.to_lowercase();
        std::fs::read_to_string(format!("/sys/bus/pci/devices/{id}/numa_node")).ok()?.trim().parse().ok()
    }

    /// Lets kernels of this, the current context use the memory of `peer`, a context of this process.
    pub fn enable_peer(&self, peer: &Context) -> CudaResult<()> {
        if self.device == peer.device {
            return Ok(());
        }
        // SAFETY: a retained context.
        match check(unsafe { sys::cuCtxEnablePeerAccess(peer.handle, 0) }) {
            Err(CudaError(sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED)) => Ok(()),
            result => result,
        }
    }

    /// The 16 bytes that identify the physical device.
    pub fn device_uuid(&self) -> CudaResult<[u8; 16]> {
        uuid_of(self.device)
    }

    /// Whether this device can use the memory of device `ordinal`, as it can its own.
    pub fn reaches(&self, ordinal: c_int) -> CudaResult<bool> {
        let (mut device, mut can) = (0, 1);
        // SAFETY: `device` is a valid place.
        check(unsafe { sys::cuDeviceGet(&mut device, ordinal) })?;
        if device != self.device {
            // SAFETY: `can` is a valid place and the devices came from the driver.
            check(unsafe { sys::cuDeviceCanAccessPeer(&mut can, self.device, device) })?;
        }
        Ok(can != 0)
    }
}

/// The number of the device with that UUID, if this process sees it (`CUDA_VISIBLE_DEVICES`).
pub(crate) fn ordinal_of(uuid: &[u8; 16]) -> CudaResult<Option<c_int>> {
    let mut count = 0;
    // SAFETY: `count` is a valid place.
    check(unsafe { sys::cuDeviceGetCount(&mut count) })?;
    for ordinal in 0..count {
        let mut device = 0;
        // SAFETY: `device` is a valid place.
        check(unsafe { sys::cuDeviceGet(&mut device, ordinal) })?;
        if uuid_of(device)? == *uuid {
            return Ok(Some(ordinal));
        }
    }
    Ok(None)
}

fn uuid_of(device: sys::CUdevice) -> CudaResult<[u8; 16]> {
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: `uuid` is a valid place and the device came from the driver.
    check(unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, device) })?;
    Ok(uuid.bytes.map(|byte| byte as u8))
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained in `retain`, released once.
        log_drop("release of a context", unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) });
    }
}

/// Keeps a context current; see [`Context::enter`].
#[derive(Debug)]
pub struct Entered {
    pushed: bool,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = ptr::null_mut();
            // SAFETY: undoes the push of `enter`; `popped` is a valid place.
            log_drop("pop of a context", unsafe { sys::cuCtxPopCurrent_v2(&mut popped) });
        }
    }
}

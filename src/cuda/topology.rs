//! How far apart two GPUs are, as NCCL tells it: by NVLink, and by the way over PCIe.

use std::ffi::{CStr, c_int};
use std::fs;
use std::path::{Component, PathBuf};

use cudarc::driver::sys;

use super::context::Context;
use super::driver::{CudaResult, check};

/// The distance of two GPUs, nearest first; the names are those of `NCCL_P2P_LEVEL` and of `nvidia-smi topo`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Distance {
    /// One GPU.
    Same,
    /// NVLink.
    Nvl,
    /// One PCIe switch.
    Pix,
    /// PCIe switches, not through a host bridge.
    Pxb,
    /// The host bridge of a NUMA node.
    Phb,
    /// Between NUMA nodes.
    Sys,
}

impl Context {
    /// The distance to device `ordinal`.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn distance(&self, ordinal: c_int) -> CudaResult<Distance> {
        let mut device = 0;
        // SAFETY: `device` is a valid place.
        check(unsafe { sys::cuDeviceGet(&mut device, ordinal) })?;
        if device == self.device() {
            return Ok(Distance::Same);
        }
        // Atomics of one GPU on the memory of another are native over NVLink only.
        let native = sys::CUdevice_P2PAttribute_enum::CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED;
        let mut is_native = 0;
        // SAFETY: `is_native` is a valid place and the devices came from the driver.
        check(unsafe { sys::cuDeviceGetP2PAttribute(&mut is_native, native, self.device(), device) })?;
        if is_native != 0 {
            return Ok(Distance::Nvl);
        }
        Ok(over_pcie(pci_path(self.device()), pci_path(device)))
    }
}

/// Where the system has a device, from the root complex down, and its NUMA node; `None` where it does not tell.
fn pci_path(device: sys::CUdevice) -> Option<(PathBuf, Option<i32>)> {
    let mut id: [std::ffi::c_char; 32] = [0; 32];
    // SAFETY: `id` has the room that it says, and the driver ends it by a NUL.
    check(unsafe { sys::cuDeviceGetPCIBusId(id.as_mut_ptr(), id.len() as c_int, device) }).ok()?;
    // SAFETY: NUL-terminated by the driver.
    let id = unsafe { CStr::from_ptr(id.as_ptr()) }.to_str().ok()?.to_lowercase();
    let path = fs::canonicalize(format!("/sys/bus/pci/devices/{id}")).ok()?;
    let node = fs::read_to_string(path.join("numa_node")).ok().and_then(|node| node.trim().parse().ok());
    Some((path, node))
}

/// The distance by the ways from the root: `/sys/devices/pci0000:00/0000:00:01.0/.../0000:05:00.0`. Where the system does
/// not tell, as in many virtual machines, the host bridge.
fn over_pcie(one: Option<(PathBuf, Option<i32>)>, other: Option<(PathBuf, Option<i32>)>) -> Distance {
    let (Some((one, one_node)), Some((other, other_node))) = (one, other) else { return Distance::Phb };
    let bridges = |path: &PathBuf| -> Vec<String> {
        let parts = path.components().filter_map(|part| match part {
            Component::Normal(name) => name.to_str().map(String::from),
            _ => None,
        });
        parts.skip(2).collect() // "sys", "devices"
    };
    let (one, other) = (bridges(&one), bridges(&other));
    let shared = one.iter().zip(&other).take_while(|(a, b)| a == b).count();
    // The root complex is shared, and at least a bridge behind it.
    if shared >= 2 {
        // From the shared switch down: its port and the device.
        let is_one_switch = one.len() - shared <= 2 && other.len() - shared <= 2;
        return if is_one_switch { Distance::Pix } else { Distance::Pxb };
    }
    match (one_node, other_node) {
        (Some(one), Some(other)) if one != other => Distance::Sys,
        _ => Distance::Phb,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: &str, node: i32) -> Option<(PathBuf, Option<i32>)> {
        Some((path.into(), Some(node)))
    }

    #[test]
    fn ways_over_pcie_are_told_apart() {
        const SWITCH: &str = "/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0";
        let gpu = |port: &str, node| at(&format!("{SWITCH}/{port}"), node);
        for (one, other, expected) in [
            (gpu("0000:02:00.0/0000:03:00.0", 0), gpu("0000:02:01.0/0000:04:00.0", 0), Distance::Pix),
            (
                gpu("0000:02:00.0/0000:03:00.0/0000:04:00.0/0000:05:00.0", 0),
                gpu("0000:02:01.0/0000:06:00.0", 0),
                Distance::Pxb,
            ),
            (
                gpu("0000:02:00.0/0000:03:00.0", 0),
                at("/sys/devices/pci0000:00/0000:00:03.0/0000:09:00.0", 0),
                Distance::Phb,
            ),
            (
                gpu("0000:02:00.0/0000:03:00.0", 0),
                at("/sys/devices/pci0000:40/0000:40:01.0/0000:41:00.0", 0),
                Distance::Phb,
            ),
            (
                gpu("0000:02:00.0/0000:03:00.0", 0),
                at("/sys/devices/pci0000:80/0000:80:01.0/0000:81:00.0", 1),
                Distance::Sys,
            ),
            (None, gpu("0000:02:00.0/0000:03:00.0", 0), Distance::Phb),
        ] {
            assert_eq!(over_pcie(one.clone(), other.clone()), expected, "{one:?} {other:?}");
            assert_eq!(over_pcie(other, one), expected);
        }
    }
}

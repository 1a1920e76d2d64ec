//! NCCL's C types as they cross the boundary: transparent integers with constants, never closed enums, since NCCL
//! makes new operation values at run time and later versions add members.

use std::ffi::c_char;
use std::mem::offset_of;

/// Declares structures of which only the address is known here.
macro_rules! opaque {
    ($($(#[$doc:meta])* $visibility:vis $name:ident;)*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug)]
        $visibility struct $name {
            _private: [u8; 0],
        }
    )*};
}

opaque! {
    /// What an `ncclComm_t` points to.
    pub Comm;
    /// What a `cudaStream_t` points to.
    pub(crate) Stream;
    /// `ncclCollConfig_t`, passed through.
    pub(crate) CollConfig;
    /// `ncclSimInfo_t`, passed through.
    pub(crate) SimInfo;
}

/// The head of `ncclConfig_t`; later versions add members behind it.
#[repr(C)]
pub(crate) struct CommConfig {
    size: usize,
    magic_and_version: [u32; 2],
    blocking_cga_size_ctas: [i32; 4],
    net_name: *const c_char,
    split_share_traffic_class: [i32; 2],
    comm_name: *const c_char,
    collnet_policy_shrink_nvls_channels_scheduling: [i32; 6],
    graph_usage_mode: i32,
}

impl CommConfig {
    /// Whether calls that are captured keep their order with others: mode 2 of `graphUsageMode`. `None` where it is not
    /// set, or where the configuration is null or of a version that does not have it.
    ///
    /// # Safety
    /// `config` is null or points to as many bytes as its size says.
    pub(crate) unsafe fn mixes_graphs(config: *const Self) -> Option<bool> {
        let needed = offset_of!(Self, graph_usage_mode) + size_of::<i32>();
        // SAFETY: not null; the size is there whatever the version.
        if config.is_null() || unsafe { (*config).size } < needed {
            return None;
        }
        // SAFETY: it is large enough.
        match unsafe { (*config).graph_usage_mode } {
            0 | 1 => Some(false),
            2 => Some(true),
            _ => None,
        }
    }
}

/// `ncclComm_t`.
pub type CommPtr = *mut Comm;
/// `cudaStream_t`.
pub(crate) type StreamPtr = *mut Stream;

/// `ncclUniqueId`, which some functions take by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct UniqueId {
    internal: [u8; 128],
}

impl UniqueId {
    /// What it is; random.
    pub(crate) fn bytes(&self) -> [u8; 128] {
        self.internal
    }
}

#[cfg(test)]
impl From<[u8; 128]> for UniqueId {
    fn from(internal: [u8; 128]) -> Self {
        Self { internal }
    }
}

/// `ncclResult_t`.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NcclResult(pub i32);

#[allow(missing_docs, reason = "NCCL's names")]
impl NcclResult {
    pub const SUCCESS: Self = Self(0);
    pub const UNHANDLED_CUDA_ERROR: Self = Self(1);
    pub const SYSTEM_ERROR: Self = Self(2);
    pub const INTERNAL_ERROR: Self = Self(3);
    pub const INVALID_ARGUMENT: Self = Self(4);
    pub const INVALID_USAGE: Self = Self(5);
    pub const REMOTE_ERROR: Self = Self(6);
    pub const IN_PROGRESS: Self = Self(7);
}

/// `ncclDataType_t`.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct DataType(pub i32);

#[allow(missing_docs, reason = "NCCL's names")]
impl DataType {
    pub(crate) const UINT8: Self = Self(1);
    pub(crate) const FLOAT16: Self = Self(6);
    pub(crate) const FLOAT32: Self = Self(7);
    pub(crate) const BFLOAT16: Self = Self(9);

    /// Bytes of an element; 0 for a type that is not known.
    pub(crate) const fn n_bytes(self) -> u64 {
        match self.0 {
            0 | 1 | 10 | 11 => 1, // int8, uint8, float8e4m3, float8e5m2
            6 | 9 => 2,
            2 | 3 | 7 => 4,
            4 | 5 | 8 => 8,
            _ => 0,
        }
    }
}

/// `ncclRedOp_t`; user-defined operations are handles beyond the built-in ones.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct RedOp(pub i32);

#[allow(missing_docs, reason = "NCCL's names")]
impl RedOp {
    pub(crate) const SUM: Self = Self(0);
    /// `ncclAvg`.
    pub(crate) const AVG: Self = Self(4);
}

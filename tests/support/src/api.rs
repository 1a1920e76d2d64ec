//! The functions of the driver, of NCCL and of the shim, found by `dlopen` and `dlsym`, and what they take.
//!
//! NCCL's come from the shim, as an engine has them that opens it by name.

use std::ffi::{CStr, CString, c_int, c_void};
use std::path::{Path, PathBuf};

use once_cell::sync::OnceCell;

use crate::control::{Info, Stats, Way};
use crate::libraries::built;
use crate::{call, ok};

/// A handle or an address of C.
pub type Ptr = usize;

/// `ncclDataType_t`.
pub mod dtype {
    pub const UINT8: i32 = 1;
    pub const INT32: i32 = 2;
    pub const FP16: i32 = 6;
    pub const FP32: i32 = 7;
    pub const BF16: i32 = 9;
}

/// `ncclRedOp_t`.
pub const SUM: i32 = 0;
pub const AVG: i32 = 4;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId(pub [u8; 128]);

/// `ncclConfig_t` of NCCL 2.17, which every later version takes.
#[repr(C)]
pub struct Config {
    n_bytes: usize,
    magic: u32,
    version: u32,
    pub blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: usize,
    split_share: c_int,
}

impl Config {
    pub fn non_blocking() -> Self {
        let unset = c_int::MIN;
        Config {
            n_bytes: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 21700,
            blocking: 0,
            cga_cluster_size: unset,
            min_ctas: unset,
            max_ctas: unset,
            net_name: 0,
            split_share: unset,
        }
    }
}

struct Libraries {
    cuda: *mut c_void,
    nccl: *mut c_void,
}

macro_rules! libraries {
    ($($library:ident { $($name:ident($($type:ty),*);)* })*) => {
        #[allow(non_snake_case)]
        pub struct Api { $($(pub $name: unsafe extern "C" fn($($type),*) -> c_int,)*)* }

        impl Api {
            fn load(libraries: Libraries) -> Self {
                // SAFETY: functions of these names have these signatures.
                Api { $($($name: unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> c_int>(
                    symbol(libraries.$library, stringify!($name))) },)*)* }
            }
        }
    };
}

libraries! {
    cuda {
        cuInit(u32);
        flashcomm_sim_last_blocks(c_int);
        cuDeviceGetCount(*mut c_int);
        cuDevicePrimaryCtxRetain(*mut Ptr, c_int);
        cuCtxSetCurrent(Ptr);
        cuCtxGetCurrent(*mut Ptr);
        cuCtxSynchronize();
        cuStreamCreate(*mut Ptr, u32);
        cuStreamDestroy_v2(Ptr);
        cuStreamSynchronize(Ptr);
        cuStreamQuery(Ptr);
        cuStreamWaitEvent(Ptr, Ptr, u32);
        cuStreamBeginCapture_v2(Ptr, c_int);
        cuStreamEndCapture(Ptr, *mut Ptr);
        cuEventCreate(*mut Ptr, u32);
        cuEventRecord(Ptr, Ptr);
        cuEventDestroy_v2(Ptr);
        cuEventSynchronize(Ptr);
        cuEventElapsedTime(*mut f32, Ptr, Ptr);
        cuGraphInstantiateWithFlags(*mut Ptr, Ptr, u64);
        cuGraphUpload(Ptr, Ptr);
        cuGraphLaunch(Ptr, Ptr);
        cuGraphExecDestroy(Ptr);
        cuGraphDestroy(Ptr);
        cuMemAlloc_v2(*mut Ptr, usize);
        cuMemFree_v2(Ptr);
        cuMemAllocAsync(*mut Ptr, usize, Ptr);
        cuMemFreeAsync(Ptr, Ptr);
        cuMemGetInfo_v2(*mut usize, *mut usize);
        cuMemcpyHtoDAsync_v2(Ptr, *const u8, usize, Ptr);
        cuMemcpyDtoHAsync_v2(*mut u8, Ptr, usize, Ptr);
        cuMemsetD8Async(Ptr, u8, usize, Ptr);
        cuIpcGetMemHandle(*mut [u8; 64], Ptr);
        cuPointerGetAttribute(*mut c_void, c_int, Ptr);
        cuCtxPushCurrent_v2(Ptr);
        cuCtxPopCurrent_v2(*mut Ptr);
        cuDeviceGetDevResource(c_int, *mut [u64; 24], c_int);
        cuDevSmResourceSplitByCount(*mut [u64; 24], *mut u32, *const [u64; 24], *mut [u64; 24], u32, u32);
        cuDevResourceGenerateDesc(*mut Ptr, *const [u64; 24], u32);
        cuGreenCtxCreate(*mut Ptr, Ptr, c_int, u32);
        cuGreenCtxDestroy(Ptr);
        cuGreenCtxStreamCreate(*mut Ptr, Ptr, u32, c_int);
        cuCtxFromGreenCtx(*mut Ptr, Ptr);
    }
    nccl {
        ncclGetUniqueId(*mut UniqueId);
        ncclCommInitRank(*mut Ptr, c_int, UniqueId, c_int);
        ncclCommInitRankConfig(*mut Ptr, c_int, UniqueId, c_int, *const Config);
        ncclCommInitRankScalable(*mut Ptr, c_int, c_int, c_int, *const UniqueId, *const Config);
        ncclCommInitAll(*mut Ptr, c_int, *const c_int);
        ncclCommSplit(Ptr, c_int, c_int, *mut Ptr, *const Config);
        ncclCommShrink(Ptr, *const c_int, c_int, *mut Ptr, *const Config, c_int);
        ncclCommFinalize(Ptr);
        ncclCommDestroy(Ptr);
        ncclCommAbort(Ptr);
        ncclCommRevoke(Ptr, c_int);
        ncclCommGetAsyncError(Ptr, *mut c_int);
        ncclCommCount(Ptr, *mut c_int);
        ncclCommUserRank(Ptr, *mut c_int);
        ncclGroupStart();
        ncclGroupEnd();
        ncclGroupSimulateEnd(*mut [u32; 6]);
        ncclAllReduce(Ptr, Ptr, usize, c_int, c_int, Ptr, Ptr);
        ncclAllGather(Ptr, Ptr, usize, c_int, Ptr, Ptr);
        ncclReduceScatter(Ptr, Ptr, usize, c_int, c_int, Ptr, Ptr);
        ncclBroadcast(Ptr, Ptr, usize, c_int, c_int, Ptr, Ptr);
        ncclBcast(Ptr, usize, c_int, c_int, Ptr, Ptr);
        ncclReduce(Ptr, Ptr, usize, c_int, c_int, c_int, Ptr, Ptr);
        ncclSend(Ptr, usize, c_int, c_int, Ptr, Ptr);
        ncclRecv(Ptr, usize, c_int, c_int, Ptr, Ptr);
        ncclRedOpCreatePreMulSum(*mut c_int, *const u8, c_int, c_int, Ptr);
        ncclRedOpDestroy(c_int, Ptr);
        flashcommGetStats(*mut [u64; 6]);
        flashcommGetCommStats(Ptr, *mut Stats);
        flashcommGetCommInfo(Ptr, *mut Info);
        flashcommGetCommWay(Ptr, c_int, u64, *mut Way);
        flashcommSetCommBits(Ptr, c_int, c_int);
        flashcommSetCommEnabled(Ptr, c_int);
    }
}

pub fn open(path: &Path) -> *mut c_void {
    let path = CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: a NUL-terminated path.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    // SAFETY: after a failure there is a message.
    assert!(!handle.is_null(), "{:?}", unsafe { CStr::from_ptr(libc::dlerror()) });
    handle
}

pub fn symbol(library: *mut c_void, name: &str) -> *mut c_void {
    let c_name = CString::new(name).unwrap();
    // SAFETY: an open library and a NUL-terminated name.
    let address = unsafe { libc::dlsym(library, c_name.as_ptr()) };
    if address.is_null() && name.starts_with("flashcomm") {
        return answer_nothing as *mut c_void; // NCCL without the shim
    }
    assert!(!address.is_null(), "{name} is missing");
    address
}

extern "C" fn answer_nothing() -> c_int {
    4
}

/// The functions. NCCL's come from the shim, or, in a job that tests a rank without it, from NCCL itself.
pub fn api() -> &'static Api {
    static API: OnceCell<Api> = OnceCell::new();
    API.get_or_init(|| {
        let nccl = match std::env::var_os("WORLD_WITHOUT_SHIM") {
            Some(_) => PathBuf::from("libnccl.so.2"),
            None => built("libflashcomm.so"),
        };
        let api = Api::load(Libraries { cuda: open(Path::new("libcuda.so.1")), nccl: open(&nccl) });
        // SAFETY: takes no pointers.
        assert_eq!(unsafe { (api.cuInit)(0) }, 0);
        api
    })
}

pub fn unique_id() -> UniqueId {
    let mut id = UniqueId([0; 128]);
    ok!(ncclGetUniqueId(&mut id));
    id
}

pub fn init(world: usize, id: UniqueId, rank: usize) -> Ptr {
    let (comm, result) = try_init(world, id, rank);
    assert_eq!(result, 0, "ncclCommInitRank");
    comm
}

/// The handle, which may be one also where the result is an error.
pub fn try_init(world: usize, id: UniqueId, rank: usize) -> (Ptr, c_int) {
    let mut comm = 0;
    let result = call!(ncclCommInitRank(&mut comm, world as c_int, id, rank as c_int));
    (comm, result)
}

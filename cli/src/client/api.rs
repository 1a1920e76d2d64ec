//! The functions of the driver and of NCCL that a rank calls, found by `dlsym` on libraries of its own.

use std::ffi::{CStr, c_char, c_int};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flashcomm::tooling::control::{flashcommCommInfo_t, flashcommWay_t};
use flashcomm::tooling::stats::flashcommStats_t;
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

/// An address of the device, or a handle.
pub type Ptr = usize;

/// `ncclUniqueId`, which goes by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId(pub [u8; 128]);

macro_rules! table {
    ($(#[$about:meta])* $table:ident { $($name:ident($($type:ty),*) $(-> $answer:ty)?;)* }) => {
        $(#[$about])*
        #[allow(non_snake_case, reason = "C's names")]
        pub struct $table {
            $(pub $name: unsafe extern "C" fn($($type),*) -> table!(@ $($answer)?),)*
            library: Library,
        }

        impl $table {
            fn find_in(library: Library) -> Result<Self, libloading::Error> {
                Ok($table {
                    $(
                        // SAFETY: the function of this name has this signature, in every version that has it.
                        $name: *unsafe { library.get(stringify!($name)) }?,
                    )*
                    library,
                })
            }
        }
    };
    (@ $answer:ty) => { $answer };
    (@) => { c_int };
}

table! {
    /// `libcuda.so.1`.
    Cuda {
        cuInit(u32);
        cuDriverGetVersion(*mut c_int);
        cuGetErrorString(c_int, *mut *const c_char);
        cuDeviceGetCount(*mut c_int);
        cuDeviceGetName(*mut c_char, c_int, c_int);
        cuDeviceTotalMem_v2(*mut usize, c_int);
        cuDevicePrimaryCtxRetain(*mut Ptr, c_int);
        cuCtxSetCurrent(Ptr);
        cuMemAlloc_v2(*mut Ptr, usize);
        cuMemcpyHtoDAsync_v2(Ptr, *const u8, usize, Ptr);
        cuMemcpyDtoHAsync_v2(*mut u8, Ptr, usize, Ptr);
        cuStreamCreate(*mut Ptr, u32);
        cuStreamSynchronize(Ptr);
        cuStreamBeginCapture_v2(Ptr, c_int);
        cuStreamEndCapture(Ptr, *mut Ptr);
        cuGraphInstantiateWithFlags(*mut Ptr, Ptr, u64);
        cuGraphLaunch(Ptr, Ptr);
        cuGraphExecDestroy(Ptr);
        cuGraphDestroy(Ptr);
        cuEventCreate(*mut Ptr, u32);
        cuEventRecord(Ptr, Ptr);
        cuEventElapsedTime(*mut f32, Ptr, Ptr);
    }
}

table! {
    /// `libnccl.so.2`, or the shim in its place.
    Nccl {
        ncclGetVersion(*mut c_int);
        ncclGetErrorString(c_int) -> *const c_char;
        ncclGetLastError(Ptr) -> *const c_char;
        ncclGetUniqueId(*mut UniqueId);
        ncclCommInitRank(*mut Ptr, c_int, UniqueId, c_int);
        ncclCommDestroy(Ptr);
        ncclAllReduce(Ptr, Ptr, usize, c_int, c_int, Ptr, Ptr);
    }
}

/// Calls a function of a table and turns its code into a `Result`.
macro_rules! call {
    ($table:expr, $name:ident($($arg:expr),* $(,)?)) => {{
        let table = $table;
        // SAFETY: as NVIDIA documents the function. Pointers are to locals of the caller or to what it keeps until
        // the stream has come by; handles come from the same library and live as long as the process.
        let code = unsafe { (table.$name)($($arg),*) };
        table.check(code, stringify!($name))
    }};
}
pub(crate) use call;

fn open(path: &Path) -> Result<Library, libloading::Error> {
    // SAFETY: a library that programs of this kind load; its constructors run as they do there. Local, so that its
    // symbols do not get in anybody's way.
    unsafe { Library::open(Some(path.as_os_str()), RTLD_NOW | RTLD_LOCAL) }
}

impl Cuda {
    /// The driver, initialized.
    pub fn load() -> Result<Self> {
        let library = open(Path::new("libcuda.so.1")).context("no CUDA driver")?;
        let cuda = Cuda::find_in(library).context("the CUDA driver is too old; flashcomm wants 12.0 or newer")?;
        call!(&cuda, cuInit(0)).context("the CUDA driver finds no GPU that it can use; does nvidia-smi?")?;
        Ok(cuda)
    }

    /// Success, or what the driver says of its code.
    pub fn check(&self, code: c_int, name: &str) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let mut text = std::ptr::null();
        // SAFETY: takes a place for a pointer to a static string.
        unsafe { (self.cuGetErrorString)(code, &mut text) };
        bail!("{name} answers {code}: {}", in_words(text))
    }

    /// Brings a graph to the device before its first launch, which would otherwise do so while other ranks already
    /// wait on it. Drivers have this since 11.1; the simulated one needs no such thing and lacks it.
    pub fn upload(&self, graph: Ptr, stream: Ptr) -> Result<()> {
        type Upload = unsafe extern "C" fn(Ptr, Ptr) -> c_int;
        // SAFETY: the driver's function has this signature.
        let Ok(upload) = (unsafe { self.library.get::<Upload>("cuGraphUpload") }) else { return Ok(()) };
        // SAFETY: an executable graph and a stream of this driver.
        self.check(unsafe { upload(graph, stream) }, "cuGraphUpload")
    }

    /// Number of GPUs.
    pub fn device_count(&self) -> Result<usize> {
        let mut count = 0;
        call!(self, cuDeviceGetCount(&mut count))?;
        Ok(count as usize)
    }

    /// Name of a GPU.
    pub fn device_name(&self, ordinal: usize) -> Result<String> {
        let mut name = [0; 128];
        call!(self, cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, ordinal as c_int))?;
        Ok(in_words(name.as_ptr()))
    }
}

impl Nccl {
    /// An NCCL or the shim.
    pub fn load(path: &Path) -> Result<Self> {
        const CURE: &str = "install NCCL (for example pip install nvidia-nccl-cu13) and name its libnccl.so.2 by --nccl-lib \
                            or FLASHCOMM_NCCL_LIB, or put its directory into LD_LIBRARY_PATH";
        let library = open(path).with_context(|| format!("cannot open {}; {CURE}", path.display()))?;
        Nccl::find_in(library).with_context(|| format!("{} is no NCCL; {CURE}", path.display()))
    }

    /// Success, or what NCCL says of its code.
    pub fn check(&self, code: c_int, name: &str) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: takes any code, and any communicator or none.
        let (text, last) = unsafe { ((self.ncclGetErrorString)(code), (self.ncclGetLastError)(0)) };
        bail!("{name} answers {code}: {} ({})", in_words(text), in_words(last))
    }

    /// Its version, as in `NCCL_VERSION_CODE`.
    pub fn version(&self) -> Result<u32> {
        let mut version = 0;
        call!(self, ncclGetVersion(&mut version))?;
        Ok(version as u32)
    }

    /// What the shim has counted in this process; `None` where this is a plain NCCL.
    pub fn stats(&self) -> Option<flashcommStats_t> {
        type GetStats = unsafe extern "C" fn(*mut flashcommStats_t) -> c_int;
        // SAFETY: the shim's function has this signature; nobody else's has this name.
        let get_stats = unsafe { self.library.get::<GetStats>("flashcommGetStats") }.ok()?;
        // SAFETY: numbers, for which zeros will do.
        let mut stats: flashcommStats_t = unsafe { std::mem::zeroed() };
        stats.size = size_of::<flashcommStats_t>();
        // SAFETY: `size` is set.
        (unsafe { get_stats(&mut stats) } == 0).then_some(stats)
    }
}

impl Nccl {
    /// How the shim takes a sum of a communicator.
    pub fn way(&self, comm: Ptr, datatype: c_int, n_bytes: u64) -> Result<flashcommWay_t> {
        type GetWay = unsafe extern "C" fn(Ptr, c_int, u64, *mut flashcommWay_t) -> c_int;
        // SAFETY: the shim's function has this signature; nobody else's has this name.
        let get_way = unsafe { self.library.get::<GetWay>("flashcommGetCommWay") }.context("this is no shim")?;
        // SAFETY: numbers, for which zeros will do.
        let mut way: flashcommWay_t = unsafe { std::mem::zeroed() };
        way.size = size_of::<flashcommWay_t>();
        // SAFETY: `size` is set, and the communicator lives.
        ensure!(unsafe { get_way(comm, datatype, n_bytes, &mut way) } == 0, "flashcommGetCommWay does not answer");
        Ok(way)
    }

    /// The exchange of a communicator of the shim's; empty where it has none.
    pub fn exchange(&self, comm: Ptr) -> Result<String> {
        type GetInfo = unsafe extern "C" fn(Ptr, *mut flashcommCommInfo_t) -> c_int;
        // SAFETY: as above.
        let get_info = unsafe { self.library.get::<GetInfo>("flashcommGetCommInfo") }.context("this is no shim")?;
        // SAFETY: numbers and pointers, for which zeros will do.
        let mut info: flashcommCommInfo_t = unsafe { std::mem::zeroed() };
        info.size = size_of::<flashcommCommInfo_t>();
        // SAFETY: `size` is set, and the communicator lives.
        ensure!(unsafe { get_info(comm, &mut info) } == 0, "flashcommGetCommInfo does not answer");
        Ok(in_words(info.exchange))
    }
}

fn in_words(text: *const c_char) -> String {
    if text.is_null() {
        return "no words for it".into();
    }
    // SAFETY: not null, so a NUL-terminated string of a library or of a local.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().into()
}

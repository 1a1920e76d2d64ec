//! What the tests of whole jobs share: a rank's view of NCCL (through the shim) and of the driver, and jobs of threads
//! or processes.
//!
//! The tests start themselves again, with the shim's settings in the environment and, unless
//! `FLASHCOMM_TEST_REAL=1` asks for the machine's own driver and NCCL, with the simulators' directory in front of the
//! loader's path. Everything is found by `dlopen` and `dlsym`, so the same programs run on a GPU unchanged.

#![allow(dead_code, reason = "every test program uses a part")]

use std::ffi::{CStr, CString, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use flashcomm_wire::{Code, Element, GroupSize, Legs, Op, Width, reference};
use once_cell::sync::OnceCell;

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

type Ptr = usize;

/// `flashcommCommInfo_t`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Info {
    pub size: usize,
    pub state: c_int,
    pub enabled: c_int,
    pub reduce_bits: c_int,
    pub gather_bits: c_int,
    pub rank: c_int,
    pub n_ranks: c_int,
    pub min_bytes: u64,
    exchange: *const std::ffi::c_char,
    code: *const std::ffi::c_char,
}

impl Info {
    /// Of a communicator.
    pub fn of(comm: Ptr) -> Self {
        // SAFETY: numbers and a pointer, for which zeros will do.
        let mut info: Info = unsafe { std::mem::zeroed() };
        info.size = size_of::<Info>();
        // SAFETY: `size` is set.
        assert_eq!(unsafe { (api().flashcommGetCommInfo)(comm, &mut info) }, 0);
        info
    }

    pub fn code(&self) -> &str {
        // SAFETY: as below.
        unsafe { CStr::from_ptr(self.code) }.to_str().unwrap()
    }

    pub fn exchange(&self) -> &str {
        // SAFETY: a string of the shim's, which stays.
        unsafe { CStr::from_ptr(self.exchange) }.to_str().unwrap()
    }
}

/// `flashcommStats_t`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stats {
    pub size: usize,
    pub compressed: u64,
    pub forwarded: u64,
    pub others: u64,
    pub bytes_in: u64,
    pub bytes_wire: u64,
    pub bytes_forwarded: u64,
    pub because: [u64; 16],
    /// Compressed, bytes in, bytes on the wire, forwarded, bytes forwarded.
    pub sizes: [[u64; 5]; 24],
}

impl Stats {
    /// Nothing counted.
    pub const NONE: Stats = Stats {
        size: size_of::<Stats>(),
        compressed: 0,
        forwarded: 0,
        others: 0,
        bytes_in: 0,
        bytes_wire: 0,
        bytes_forwarded: 0,
        because: [0; 16],
        sizes: [[0; 5]; 24],
    };

    /// Of a communicator.
    pub fn of(comm: Ptr) -> Self {
        let mut stats = Stats::NONE;
        // SAFETY: `size` is set.
        assert_eq!(unsafe { (api().flashcommGetCommStats)(comm, &mut stats) }, 0);
        stats
    }

    /// All-reduces forwarded for a reason, by name.
    pub fn because(&self, name: &str) -> u64 {
        type ReasonName = unsafe extern "C" fn(c_int) -> *const std::ffi::c_char;
        let address = symbol(open(&built("libflashcomm.so")), "flashcommReasonName");
        // SAFETY: the function of this name has this signature; what it answers, if not null, is NUL-terminated.
        let name_of = |reason| unsafe {
            let text = std::mem::transmute::<*mut c_void, ReasonName>(address)(reason);
            (!text.is_null()).then(|| CStr::from_ptr(text).to_str().unwrap())
        };
        assert_eq!((name_of(-1), name_of(16)), (None, None));
        let reason = (0..16).find(|reason| name_of(*reason) == Some(name));
        self.because[reason.unwrap_or_else(|| panic!("no reason {name}")) as usize]
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
        cuDeviceGetCount(*mut c_int);
        cuDevicePrimaryCtxRetain(*mut Ptr, c_int);
        cuCtxSetCurrent(Ptr);
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
        flashcommSetCommBits(Ptr, c_int, c_int);
        flashcommSetCommEnabled(Ptr, c_int);
    }
}

fn open(path: &Path) -> *mut c_void {
    let path = CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: a NUL-terminated path.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    // SAFETY: after a failure there is a message.
    assert!(!handle.is_null(), "{:?}", unsafe { CStr::from_ptr(libc::dlerror()) });
    handle
}

fn symbol(library: *mut c_void, name: &str) -> *mut c_void {
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

/// `flashcommGetLastError` of a communicator, or of the process for 0.
pub fn last_error(comm: Ptr) -> String {
    let shim = open(&built("libflashcomm.so"));
    // SAFETY: a function of this name has this signature.
    let function = unsafe {
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(Ptr) -> *const std::ffi::c_char>(symbol(
            shim,
            "flashcommGetLastError",
        ))
    };
    // SAFETY: a communicator or 0; what it answers is NUL-terminated and stays until this thread asks again.
    unsafe { CStr::from_ptr(function(comm)) }.to_str().unwrap().to_string()
}

/// Calls a function of [`Api`] and wants success.
#[macro_export]
macro_rules! ok {
    ($name:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: as NVIDIA documents; the tests see to it.
        #[allow(unused_unsafe)]
        let result = unsafe { ($crate::world::api().$name)($($arg),*) };
        assert_eq!(result, 0, "{}", stringify!($name));
    }};
}

/// Calls a function of [`Api`].
#[macro_export]
macro_rules! call {
    ($name:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: as NVIDIA documents; the tests see to it.
        #[allow(unused_unsafe)]
        unsafe { ($crate::world::api().$name)($($arg),*) }
    }};
}

/// A library of this build: the nearest one above the test program. (Beside it are cargo's intermediate ones.)
pub fn built(name: &str) -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let places = program.ancestors().skip(1).filter(|dir| !dir.ends_with("deps")).map(|dir| dir.join(name));
    let found = places.into_iter().find(|library| library.exists());
    found.unwrap_or_else(|| panic!("{name} is missing; run ./scripts/test.sh, or cargo build --workspace"))
}

/// A directory with the simulators under the names that programs look for.
pub fn simulators() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    if is_real() {
        return dir;
    }
    for (name, file) in [
        ("libcuda.so.1", "libflashcomm_sim_cuda.so"),
        ("libcuda.so", "libflashcomm_sim_cuda.so"),
        ("libnccl.so.2", "libflashcomm_sim_nccl.so"),
    ] {
        std::os::unix::fs::symlink(built(file), dir.path().join(name)).unwrap();
    }
    dir
}

pub fn is_real() -> bool {
    std::env::var_os("FLASHCOMM_TEST_REAL").is_some_and(|value| value == "1")
}

/// Settings, name and value.
pub type Settings<'a> = &'a [(&'a str, &'a str)];

fn again(dir: &Path, settings: Settings<'_>) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let keep = text.starts_with("FLASHCOMM_TEST_") || text == "FLASHCOMM_SIM_SEED";
        if !keep && (text.starts_with("FLASHCOMM_") || text.starts_with("NCCL_") || text.starts_with("WORLD_")) {
            command.env_remove(&name);
        }
    }
    let test = std::thread::current().name().expect("tests are named").to_string();
    command.args(["--exact", &test, "--nocapture"]).env("NCCL_MULTI_RANK_GPU_ENABLE", "1").env("NCCL_MAX_CTAS", "8");
    // Ranks of one GPU must not wait for each other in a queue of the hardware that their streams happen to share.
    command.env("CUDA_DEVICE_MAX_CONNECTIONS", "32");
    // Nor for the driver to load one's first kernel, or to give it a stack, while another's waits.
    command.env("CUDA_MODULE_LOADING", "EAGER").env("NCCL_SET_STACK_SIZE", "1");
    command.env("FLASHCOMM_MIN_BYTES", "0").env("FLASHCOMM_BUFFER_MIB", "1");
    match (is_real(), std::env::var_os("FLASHCOMM_TEST_NCCL")) {
        (false, _) => {
            command.env("LD_LIBRARY_PATH", dir);
        }
        (true, Some(nccl)) => {
            command.env("FLASHCOMM_NCCL_LIB", nccl);
        }
        (true, None) => {}
    }
    if is_real() {
        command.env("CUDA_VISIBLE_DEVICES", "0"); // where `take_from_a_real_device` has its memory
    }
    command.envs(settings.iter().copied());
    command
}

/// Ends with the test.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait(children: &mut [Guard], limit: Duration) -> Vec<ExitStatus> {
    let end = Instant::now() + limit;
    let one = |child: &mut Guard| loop {
        if let Some(status) = child.0.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < end, "a rank hangs");
        std::thread::sleep(Duration::from_millis(2));
    };
    children.iter_mut().map(one).collect()
}

/// How long a job may take: 240 s, or `FLASHCOMM_TEST_LIMIT_S`.
fn limit() -> Duration {
    let set = std::env::var("FLASHCOMM_TEST_LIMIT_S").ok();
    Duration::from_secs(set.map_or(240, |text| text.parse().expect("FLASHCOMM_TEST_LIMIT_S is a number of seconds")))
}

/// Runs `body` in one process of its own, with these settings.
pub fn in_process(settings: Settings<'_>, body: impl FnOnce()) {
    if std::env::var_os("WORLD_INNER").is_some() {
        return body();
    }
    let dir = simulators();
    let child = again(dir.path(), settings).env("WORLD_INNER", "1").spawn().unwrap();
    let statuses = wait(&mut [Guard(child)], limit());
    assert!(statuses[0].success(), "{:?}", statuses[0]);
}

/// What a rank that is a process knows.
pub struct Process {
    pub rank: usize,
    pub world: usize,
    /// Where the ranks meet.
    pub dir: PathBuf,
}

impl Process {
    /// The same id on all ranks; `n` tells one from the next.
    pub fn unique_id(&self, n: usize) -> UniqueId {
        self.unique_id_by(n, 0)
    }

    /// An id made by rank `root`.
    pub fn unique_id_by(&self, n: usize, root: usize) -> UniqueId {
        let name = format!("id{n}");
        if self.rank == root {
            let id = unique_id();
            self.tell(&name, &id.0);
            return id;
        }
        UniqueId(self.hear(&name).try_into().unwrap())
    }

    /// Tells the other ranks something, by name.
    pub fn tell(&self, name: &str, what: &[u8]) {
        let part = self.dir.join(format!("{name}.part{}", self.rank));
        std::fs::write(&part, what).unwrap();
        std::fs::rename(&part, self.dir.join(name)).unwrap();
    }

    /// What has been told by that name so far.
    pub fn heard(&self, name: &str) -> Option<Vec<u8>> {
        std::fs::read(self.dir.join(name)).ok()
    }

    /// Waits for what is told by that name.
    pub fn hear(&self, name: &str) -> Vec<u8> {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(what) = self.heard(name) {
                return what;
            }
            assert!(Instant::now() < end, "nobody tells {name}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Starts a further rank of this job, with settings of its own; its stderr goes to `log`.
    pub fn start_rank(&self, rank: usize, settings: &[(&str, String)], log: &Path) -> Child {
        let simulators = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let mut command = again(Path::new(&simulators), &[]);
        command.envs(settings.iter().map(|(name, value)| (name, value)));
        command.env("WORLD_RANK", rank.to_string()).env("WORLD_DIR", &self.dir);
        command.stderr(std::fs::File::create(log).unwrap()).stdout(Stdio::null()).spawn().unwrap()
    }
}

/// A job of processes: `body` in each. `settings(rank)` are its own. Answers how each ended and what it wrote to stderr.
pub fn processes(
    world: usize,
    settings: impl Fn(usize) -> Vec<(&'static str, String)>,
    body: impl FnOnce(Process),
) -> Option<Vec<(ExitStatus, String)>> {
    if let Ok(rank) = std::env::var("WORLD_RANK") {
        let dir = PathBuf::from(std::env::var_os("WORLD_DIR").unwrap());
        body(Process { rank: rank.parse().unwrap(), world, dir });
        return None;
    }
    let (dir, meeting) = (simulators(), tempfile::tempdir().unwrap());
    let mut children: Vec<Guard> = (0..world)
        .map(|rank| {
            let stderr = std::fs::File::create(meeting.path().join(format!("stderr{rank}"))).unwrap();
            let mut command = again(dir.path(), &[]);
            command.envs(settings(rank)).env("WORLD_RANK", rank.to_string()).env("WORLD_DIR", meeting.path());
            Guard(command.stderr(stderr).stdout(Stdio::null()).spawn().unwrap())
        })
        .collect();
    let statuses = wait(&mut children, limit());
    let stderr = |rank: usize| std::fs::read_to_string(meeting.path().join(format!("stderr{rank}"))).unwrap();
    Some(statuses.into_iter().enumerate().map(|(rank, status)| (status, stderr(rank))).collect())
}

/// Wants every process to have succeeded.
pub fn all_succeed(ends: Option<Vec<(ExitStatus, String)>>) {
    for (rank, (status, stderr)) in ends.into_iter().flatten().enumerate() {
        assert!(status.success(), "rank {rank}: {status:?}\n{stderr}");
    }
}

/// A job of threads: `body(rank)` in each, each with its device current.
pub fn threads<T: Send>(world: usize, body: impl Fn(usize) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let body = &body;
        let run = move |rank| {
            use_device(rank);
            body(rank)
        };
        let threads: Vec<_> = (0..world).map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Makes the device of a rank current on this thread.
pub fn use_device(rank: usize) {
    let (mut count, mut context) = (0, 0);
    ok!(cuDeviceGetCount(&mut count));
    ok!(cuDevicePrimaryCtxRetain(&mut context, rank as c_int % count));
    ok!(cuCtxSetCurrent(context));
    if is_real() {
        take_from_a_real_device(0);
    }
}

pub fn unique_id() -> UniqueId {
    let mut id = UniqueId([0; 128]);
    ok!(ncclGetUniqueId(&mut id));
    id
}

pub fn init(world: usize, id: UniqueId, rank: usize) -> Ptr {
    let mut comm = 0;
    ok!(ncclCommInitRank(&mut comm, world as c_int, id, rank as c_int));
    comm
}

/// A stream that ends with this.
pub struct Stream(pub Ptr);

impl Stream {
    pub fn new() -> Self {
        let mut stream = 0;
        ok!(cuStreamCreate(&mut stream, 1));
        Stream(stream)
    }
    pub fn wait(&self) {
        ok!(cuStreamSynchronize(self.0));
    }
    /// Whether it becomes idle within the time.
    pub fn becomes_idle(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while call!(cuStreamQuery(self.0)) != 0 {
            if Instant::now() > end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
    /// Captures what `body` issues.
    pub fn capture(&self, body: impl FnOnce()) -> Graph {
        let (mut graph, mut executable) = (0, 0);
        ok!(cuStreamBeginCapture_v2(self.0, 1));
        body();
        ok!(cuStreamEndCapture(self.0, &mut graph));
        ok!(cuGraphInstantiateWithFlags(&mut executable, graph, 0));
        // Not at its first launch, when another rank of this device may wait for this one.
        ok!(cuGraphUpload(executable, self.0));
        self.wait();
        Graph { graph, executable }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        call!(cuStreamDestroy_v2(self.0));
    }
}

pub struct Graph {
    graph: Ptr,
    executable: Ptr,
}

impl Graph {
    pub fn launch(&self, stream: &Stream) {
        ok!(cuGraphLaunch(self.executable, stream.0));
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        call!(cuGraphExecDestroy(self.executable));
        call!(cuGraphDestroy(self.graph));
    }
}

/// Makes `later` wait for what `earlier` has now.
pub fn order(earlier: &Stream, later: &Stream) {
    let mut event = 0;
    ok!(cuEventCreate(&mut event, 2));
    ok!(cuEventRecord(event, earlier.0));
    ok!(cuStreamWaitEvent(later.0, event, 0));
    ok!(cuEventDestroy_v2(event));
}

/// Device memory that ends with this. To be dropped when the work on it is done.
pub struct Memory {
    pub at: Ptr,
    pub n_bytes: usize,
}

impl Memory {
    pub fn new(n_bytes: usize) -> Self {
        let mut at = 0;
        if is_real() {
            at = take_from_a_real_device(n_bytes);
        } else {
            ok!(cuMemAlloc_v2(&mut at, n_bytes.max(1)));
        }
        Memory { at, n_bytes }
    }
    pub fn of<E: Element>(elements: &[E], stream: &Stream) -> Self {
        let memory = Memory::new(elements.len() * 2);
        memory.write(elements, stream);
        memory
    }
    pub fn write<E: Element>(&self, elements: &[E], stream: &Stream) {
        let bytes: Vec<u8> = elements.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect();
        self.write_bytes(&bytes, stream);
    }
    pub fn write_bytes(&self, bytes: &[u8], stream: &Stream) {
        assert!(bytes.len() <= self.n_bytes);
        ok!(cuMemcpyHtoDAsync_v2(self.at, bytes.as_ptr(), bytes.len(), stream.0));
    }
    pub fn read<E: Element>(&self, count: usize, stream: &Stream) -> Vec<E> {
        let bytes = self.read_bytes(count * 2, stream);
        bytes.chunks_exact(2).map(|pair| E::from_bits(u16::from_le_bytes([pair[0], pair[1]]))).collect()
    }
    pub fn read_bytes(&self, n_bytes: usize, stream: &Stream) -> Vec<u8> {
        stream.wait(); // a copy to pageable memory may keep other ranks of this process out of the driver while it waits
        let mut bytes = vec![0; n_bytes];
        ok!(cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr(), self.at, n_bytes, stream.0));
        stream.wait();
        bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if !is_real() {
            ok!(cuMemFreeAsync(self.at, 2)); // the per-thread default stream
        }
    }
}

/// Bytes of memory of a real device, from what was allocated when the process first asked; never given back. To allocate
/// or to free may wait for another rank's work on the same device, which waits for this rank.
fn take_from_a_real_device(n_bytes: usize) -> Ptr {
    const ALL: usize = 4 << 30;
    static NEXT: Mutex<Option<(Ptr, usize)>> = Mutex::new(None);
    let mut next = NEXT.lock().unwrap();
    let (start, taken) = next.get_or_insert_with(|| {
        let mut start = 0;
        ok!(cuMemAlloc_v2(&mut start, ALL));
        (start, 0)
    });
    let at = *start + *taken;
    *taken += n_bytes.next_multiple_of(256);
    assert!(*taken <= ALL, "the tests need more memory");
    at
}

/// A small fast generator.
#[derive(Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 ^ (self.0 >> 29)) >> 16
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// A rank's input: bell-like values with an outlier now and then.
pub fn input<E: Element>(count: usize, seed: u64, rank: usize) -> Vec<E> {
    let mut random = Random(seed.wrapping_mul(1_000_003).wrapping_add(rank as u64 * 7919 + 1));
    let value = |_| {
        let bits = random.next();
        let unit = (0..4).map(|i| (bits >> (i * 8) & 0xff) as f32 / 128.0 - 1.0).sum::<f32>();
        E::from_f32_nearest(if bits >> 40 & 0xff == 0 { unit * 50.0 } else { unit })
    };
    (0..count).map(value).collect()
}

/// Everyone's input.
pub fn inputs<E: Element>(count: usize, seed: u64, world: usize) -> Vec<Vec<E>> {
    (0..world).map(|rank| input(count, seed, rank)).collect()
}

/// The codecs of `FLASHCOMM_BITS`, group 128 and the default code.
pub fn legs(reduce: u8, gather: u8) -> Legs {
    legs_of(None, reduce, gather, 128)
}

/// Those of `FLASHCOMM_CODE` and `FLASHCOMM_GROUP`, too.
pub fn legs_of(code: Option<Code>, reduce: u8, gather: u8, group: u16) -> Legs {
    let width = |bits| Width::new(bits).unwrap();
    Legs::choose(code, (width(reduce), width(gather)), GroupSize::new(group).unwrap()).unwrap()
}

/// What every rank must hold after a compressed all-reduce.
pub fn reference<E: Element>(inputs: &[Vec<E>], legs: Legs) -> Vec<E> {
    reference_of(Op::Sum, inputs, legs)
}

/// The same, of a sum or an average.
pub fn reference_of<E: Element>(op: Op, inputs: &[Vec<E>], legs: Legs) -> Vec<E> {
    let inputs: Vec<&[E]> = inputs.iter().map(Vec::as_slice).collect();
    reference::all_reduce(&inputs, op, legs)
}

/// One all-reduce's inputs and what must come out, shared by the ranks.
pub struct Case<E> {
    pub count: usize,
    pub inputs: Vec<Vec<E>>,
    pub expected: Vec<E>,
}

impl<E: Element> Case<E> {
    pub fn new(count: usize, seed: u64, world: usize, legs: Legs) -> Arc<Self> {
        let inputs = inputs(count, seed, world);
        let expected = reference(&inputs, legs);
        Arc::new(Case { count, inputs, expected })
    }
}

/// Wants two vectors to hold the same bits.
pub fn same_bits<E: Element>(got: &[E], expected: &[E], about: &str) {
    let differs = got.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    assert!(got.len() == expected.len() && differs.is_none(), "{about}: differs at element {differs:?}");
}

/// Small whole numbers, whose sums of up to 16 ranks are exact in every type.
pub fn whole_numbers(count: usize, seed: u64, rank: usize) -> Vec<half::f16> {
    let mut random = Random(seed.wrapping_mul(31).wrapping_add(rank as u64));
    (0..count).map(|_| half::f16::from_f32(random.below(17) as f32 - 8.0)).collect()
}

/// Their exact sum: what plain NCCL gives.
pub fn exact_sum(inputs: &[Vec<half::f16>]) -> Vec<half::f16> {
    let sum = |i: usize| half::f16::from_f32(inputs.iter().map(|input| input[i].to_f32()).sum());
    (0..inputs[0].len()).map(sum).collect()
}

pub fn type_of<E: Element>() -> c_int {
    // 1.0 tells the two apart.
    if E::from_f32_nearest(1.0).to_bits() == 0x3c00 { dtype::FP16 } else { dtype::BF16 }
}

/// Compressed all-reduces of this process so far.
pub fn n_compressed() -> u64 {
    let mut stats = [48, 0, 0, 0, 0, 0];
    ok!(flashcommGetStats(&mut stats));
    stats[1]
}

/// What this process holds, to see whether it grows.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    pub memory_kib: usize,
    pub files: usize,
    pub threads: usize,
    /// Of the current device; on a GPU, of everyone there.
    pub device_bytes: usize,
}

impl Held {
    pub fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let files = std::fs::read_dir("/proc/self/fd").unwrap().count();
        let (mut free, mut total) = (0, 0);
        ok!(cuMemGetInfo_v2(&mut free, &mut total));
        Held { memory_kib: field("VmRSS:"), files, threads: field("Threads:"), device_bytes: total - free }
    }
}

/// Names of the shim's shared memory on this machine, of whatever process.
pub fn shared_memory_names() -> Vec<String> {
    let names = std::fs::read_dir("/dev/shm").unwrap().map(|entry| entry.unwrap().file_name());
    names.filter_map(|name| name.into_string().ok()).filter(|name| name.starts_with("flashcomm-")).collect()
}

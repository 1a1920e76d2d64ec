//! The one unsafe edge to the CUDA driver: small owned types over `cudarc::driver::sys`, and nothing else.
//!
//! The driver is bound at run time, symbol by symbol, so that a machine without one can load the library. [`init`] comes
//! first: it finds out whether there is one.
//!
//! Streams and contexts of the application are borrowed as raw handles. Everything that allocates or waits here is
//! used in attach and at the end of a communicator only; the hot path launches kernels and records events.

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::fmt;
use std::ptr;

/// The driver's own names, for what has no type here. The version of these bindings is the one that the types below are over.
pub use cudarc::driver::sys;
use once_cell::sync::Lazy;

/// A stream of the application, or one of ours, borrowed.
pub type StreamHandle = sys::CUstream;

/// What the driver answered, kept raw.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CudaError(pub sys::CUresult);

/// The driver's answer or its error.
pub type CudaResult<T> = Result<T, CudaError>;

impl fmt::Display for CudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = ptr::null();
        // SAFETY: `text` is a valid place; the driver fills it with a static string or null.
        let mut found = || unsafe { sys::cuGetErrorString(self.0, &mut text) } == sys::CUresult::CUDA_SUCCESS;
        if !is_available() || !found() || text.is_null() {
            return write!(f, "CUDA driver error {}", self.0 as u32);
        }
        // SAFETY: not null, so a NUL-terminated string of static storage.
        let text = unsafe { CStr::from_ptr(text) };
        write!(f, "CUDA driver error {} ({})", self.0 as u32, text.to_string_lossy())
    }
}

impl fmt::Debug for CudaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for CudaError {}

fn check(result: sys::CUresult) -> CudaResult<()> {
    if result == sys::CUresult::CUDA_SUCCESS { Ok(()) } else { Err(CudaError(result)) }
}

/// Initializes the driver; idempotent.
///
/// # Errors
/// `CUDA_ERROR_NO_DEVICE` also where there is no driver at all.
pub fn init() -> CudaResult<()> {
    if !is_available() {
        return Err(CudaError(sys::CUresult::CUDA_ERROR_NO_DEVICE));
    }
    // SAFETY: takes no pointers.
    check(unsafe { sys::cuInit(0) })
}

/// Whether there is a CUDA driver. The bindings, which open it at their first call, panic where there is none.
fn is_available() -> bool {
    static IS_OPEN: Lazy<bool> = Lazy::new(|| {
        // SAFETY: only tries to open the driver library.
        let is_there = unsafe { sys::is_culib_present() };
        if is_there {
            // SAFETY: opens the library, which stays open.
            unsafe { sys::culib() };
        }
        is_there
    });
    *IS_OPEN
}

/// Number of devices the driver shows.
pub fn device_count() -> CudaResult<i32> {
    let mut count = 0;
    // SAFETY: `count` is a valid place.
    check(unsafe { sys::cuDeviceGetCount(&mut count) })?;
    Ok(count)
}

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
pub fn ordinal_of(uuid: &[u8; 16]) -> CudaResult<Option<c_int>> {
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

/// Lets this thread allocate while some thread captures a graph in global mode, until dropped.
#[derive(Debug)]
pub struct RelaxedCapture {
    previous: sys::CUstreamCaptureMode,
}

impl RelaxedCapture {
    /// Switches this thread to the relaxed capture mode.
    pub fn enter() -> CudaResult<Self> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: `mode` is a valid place; the driver swaps in the previous mode.
        check(unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) })?;
        Ok(Self { previous: mode })
    }
}

impl Drop for RelaxedCapture {
    fn drop(&mut self) {
        // SAFETY: restores the mode that `enter` found.
        log_drop("capture mode", unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut self.previous) });
    }
}

/// Whether work issued to a stream now is captured, and into which graph.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Capture {
    /// It runs.
    None,
    /// It becomes part of the graph of this capture, by the driver's unique id.
    Active(u64),
}

/// What happens to work that is issued to `stream` now.
///
/// # Safety
/// `stream` is a live stream or one of the driver's special handles, of the current context.
pub unsafe fn capture_of(stream: StreamHandle) -> CudaResult<Capture> {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let mut id = 0;
    let (graph, dependencies, count) = (ptr::null_mut(), ptr::null_mut(), ptr::null_mut());
    // SAFETY: the caller vouches for the stream; null asks for no further answers.
    check(unsafe { sys::cuStreamGetCaptureInfo_v2(stream, &mut status, &mut id, graph, dependencies, count) })?;
    match status {
        sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => Ok(Capture::None),
        sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE => Ok(Capture::Active(id)),
        _ => Err(CudaError(sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)),
    }
}

/// A node of a graph that is being captured.
pub type GraphNode = sys::CUgraphNode;

/// The nodes that what is captured next from `stream` will depend on.
///
/// # Safety
/// `stream` is live, of the current context, and captures.
pub unsafe fn capture_dependencies(stream: StreamHandle) -> CudaResult<Vec<GraphNode>> {
    let mut status = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let (mut nodes, mut n_nodes) = (ptr::null(), 0);
    let (id, graph) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: the caller vouches for the stream; null asks for no answer.
    check(unsafe { sys::cuStreamGetCaptureInfo_v2(stream, &mut status, id, graph, &mut nodes, &mut n_nodes) })?;
    if n_nodes == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the driver keeps the array until the next call on the stream.
    Ok(unsafe { std::slice::from_raw_parts(nodes, n_nodes) }.to_vec())
}

/// How [`update_capture_dependencies`] takes its nodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dependencies {
    /// Beside those that there are.
    Add,
    /// Instead of them; they need not be joined.
    Set,
}

/// Makes what is captured next from `stream` depend on `nodes`.
///
/// # Safety
/// As for [`capture_dependencies`]; the nodes are of that capture.
pub unsafe fn update_capture_dependencies(
    stream: StreamHandle,
    nodes: &mut [GraphNode],
    how: Dependencies,
) -> CudaResult<()> {
    let flags = match how {
        Dependencies::Add => sys::CUstreamUpdateCaptureDependencies_flags::CU_STREAM_ADD_CAPTURE_DEPENDENCIES,
        Dependencies::Set => sys::CUstreamUpdateCaptureDependencies_flags::CU_STREAM_SET_CAPTURE_DEPENDENCIES,
    };
    // SAFETY: the caller vouches for the stream and the nodes; the driver copies them.
    check(unsafe { sys::cuStreamUpdateCaptureDependencies(stream, nodes.as_mut_ptr(), nodes.len(), flags as c_uint) })
}

/// A stream of ours, for attach. It does not synchronize with the legacy default stream.
#[derive(Debug)]
pub struct Stream(StreamHandle);

impl Stream {
    /// A new stream in the current context.
    pub fn new() -> CudaResult<Self> {
        let mut handle = ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: `handle` is a valid place.
        check(unsafe { sys::cuStreamCreate(&mut handle, flags) })?;
        Ok(Self(handle))
    }

    /// The raw handle.
    pub fn handle(&self) -> StreamHandle {
        self.0
    }

    /// Waits for its work, and for that of no other stream.
    pub fn synchronize(&self) -> CudaResult<()> {
        // SAFETY: the stream lives.
        check(unsafe { sys::cuStreamSynchronize(self.0) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once; the driver finishes its work first.
        log_drop("destruction of a stream", unsafe { sys::cuStreamDestroy_v2(self.0) });
    }
}

/// An event without timing.
#[derive(Debug)]
pub struct Event(sys::CUevent);

// SAFETY: an event handle may be used from any thread; the driver locks.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// A new event in the current context.
    pub fn new() -> CudaResult<Self> {
        let mut handle = ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
        // SAFETY: `handle` is a valid place.
        check(unsafe { sys::cuEventCreate(&mut handle, flags) })?;
        Ok(Self(handle))
    }

    /// Records the work of `stream` so far. `external` makes it a node of the graph being captured, so that the
    /// replay, not the capture, records.
    ///
    /// # Safety
    /// `stream` is live and of the event's context.
    pub unsafe fn record(&self, stream: StreamHandle, external: bool) -> CudaResult<()> {
        let external_flag = sys::CUevent_record_flags::CU_EVENT_RECORD_EXTERNAL as c_uint;
        // SAFETY: the caller vouches for the stream; the event lives.
        check(unsafe { sys::cuEventRecordWithFlags(self.0, stream, if external { external_flag } else { 0 }) })
    }

    /// Makes `stream` wait for the event; `external` as in [`Event::record`].
    ///
    /// # Safety
    /// As for [`Event::record`].
    pub unsafe fn make_wait(&self, stream: StreamHandle, external: bool) -> CudaResult<()> {
        let external_flag = sys::CUevent_wait_flags::CU_EVENT_WAIT_EXTERNAL as c_uint;
        // SAFETY: the caller vouches for the stream; the event lives.
        check(unsafe { sys::cuStreamWaitEvent(stream, self.0, if external { external_flag } else { 0 }) })
    }

    /// Whether everything recorded has finished (also when nothing was recorded).
    pub fn is_complete(&self) -> CudaResult<bool> {
        // SAFETY: the event lives.
        match unsafe { sys::cuEventQuery(self.0) } {
            sys::CUresult::CUDA_SUCCESS => Ok(true),
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            error => Err(CudaError(error)),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        log_drop("destruction of an event", unsafe { sys::cuEventDestroy_v2(self.0) });
    }
}

/// Device memory. Freed when dropped, in the context that allocated it.
#[derive(Debug)]
pub struct DeviceMemory {
    address: sys::CUdeviceptr,
    n_bytes: usize,
}

impl DeviceMemory {
    /// Allocates `n_bytes` in the current context; 256-byte aligned.
    pub fn new(n_bytes: usize) -> CudaResult<Self> {
        let mut address = 0;
        // SAFETY: `address` is a valid place.
        check(unsafe { sys::cuMemAlloc_v2(&mut address, n_bytes) })?;
        Ok(Self { address, n_bytes })
    }

    /// Address of byte `offset`.
    pub fn at(&self, offset: usize) -> *mut c_void {
        debug_assert!(offset <= self.n_bytes);
        (self.address as usize + offset) as *mut c_void
    }

    /// Bytes allocated.
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// Copies `bytes` to `offset` on `stream`; `bytes` may be used again on return.
    pub fn write(&self, offset: usize, bytes: &[u8], stream: &Stream) -> CudaResult<()> {
        assert!(offset + bytes.len() <= self.n_bytes);
        let target = self.address + offset as u64;
        // SAFETY: the range lies in the allocation, the source in `bytes`; pageable memory is staged before return.
        check(unsafe { sys::cuMemcpyHtoDAsync_v2(target, bytes.as_ptr().cast(), bytes.len(), stream.0) })?;
        stream.synchronize()
    }

    /// Copies from `offset` into `bytes` on `stream`, finished on return.
    pub fn read(&self, offset: usize, bytes: &mut [u8], stream: &Stream) -> CudaResult<()> {
        assert!(offset + bytes.len() <= self.n_bytes);
        let source = self.address + offset as u64;
        // SAFETY: the range lies in the allocation, the target in `bytes`, which outlives the synchronization.
        check(unsafe { sys::cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr().cast(), source, bytes.len(), stream.0) })?;
        stream.synchronize()
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`, freed once; the driver waits for work that uses it.
        log_drop("free of device memory", unsafe { sys::cuMemFree_v2(self.address) });
    }
}

/// What another process needs to map device memory of this one.
pub type IpcHandle = [u8; 64];

impl DeviceMemory {
    /// Sets every byte to 0 on `stream`, finished on return.
    pub fn clear(&self, stream: &Stream) -> CudaResult<()> {
        // SAFETY: the range is the allocation.
        check(unsafe { sys::cuMemsetD8Async(self.address, 0, self.n_bytes, stream.0) })?;
        stream.synchronize()
    }

    /// A handle for [`open_ipc`] in another process.
    pub fn export(&self) -> CudaResult<IpcHandle> {
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: `handle` is a valid place, the address that of a live allocation.
        check(unsafe { sys::cuIpcGetMemHandle(&mut handle, self.address) })?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }
}

/// Maps the device memory of another process, with peer access to its device. It stays mapped while the process lives:
/// whoever exported it may be gone before its memory is.
pub fn open_ipc(handle: &IpcHandle) -> CudaResult<*mut c_void> {
    let mut address = 0;
    let handle = sys::CUipcMemHandle { reserved: handle.map(|byte| byte as std::ffi::c_char) };
    let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as c_uint;
    // SAFETY: `address` is a valid place; a handle that is none is refused.
    check(unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, handle, flags) })?;
    Ok(address as *mut c_void)
}

/// Zeroed host memory that kernels of every context read and write.
#[derive(Debug)]
pub struct PinnedMemory(*mut c_void);

// SAFETY: an allocation; whoever uses it synchronizes.
unsafe impl Send for PinnedMemory {}
// SAFETY: as above.
unsafe impl Sync for PinnedMemory {}

impl PinnedMemory {
    /// Allocates `n_bytes`, page-aligned.
    pub fn new(n_bytes: usize) -> CudaResult<Self> {
        let mut address = ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: `address` is a valid place.
        check(unsafe { sys::cuMemHostAlloc(&mut address, n_bytes, flags) })?;
        // SAFETY: that many bytes have just been allocated.
        unsafe { ptr::write_bytes(address.cast::<u8>(), 0, n_bytes) };
        Ok(Self(address))
    }

    /// Copies `n_bytes` of device memory to byte `offset` on `stream`, and does not wait.
    ///
    /// # Safety
    /// Both ranges are good until the copy has run; `stream` is live and of the current context.
    pub unsafe fn read_later(
        &self,
        offset: usize,
        source: *const c_void,
        n_bytes: usize,
        stream: StreamHandle,
    ) -> CudaResult<()> {
        let target = self.0.wrapping_byte_add(offset);
        // SAFETY: as the caller vouches.
        check(unsafe { sys::cuMemcpyDtoHAsync_v2(target, source as sys::CUdeviceptr, n_bytes, stream) })
    }

    /// Its address, the same for the host and for kernels.
    pub fn address(&self) -> *mut c_void {
        self.0
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`, freed once.
        log_drop("free of host memory", unsafe { sys::cuMemFreeHost(self.0) });
    }
}

/// Host memory of the caller's, made known to every context; forgotten when dropped.
#[derive(Debug)]
pub struct Registered {
    host: *mut c_void,
    device: *mut c_void,
}

// SAFETY: two addresses.
unsafe impl Send for Registered {}
// SAFETY: as above.
unsafe impl Sync for Registered {}

impl Registered {
    /// Registers `n_bytes` at `host`, both whole pages.
    ///
    /// # Safety
    /// The range stays mapped until this is dropped.
    pub unsafe fn new(host: *mut c_void, n_bytes: usize) -> CudaResult<Self> {
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: as the caller vouches.
        check(unsafe { sys::cuMemHostRegister_v2(host, n_bytes, flags) })?;
        let mut registered = Self { host, device: ptr::null_mut() };
        let mut address = 0;
        // SAFETY: `address` is a valid place, the range has just been registered.
        check(unsafe { sys::cuMemHostGetDevicePointer_v2(&mut address, host, 0) })?;
        registered.device = address as *mut c_void;
        Ok(registered)
    }

    /// Its address for kernels.
    pub fn device_address(&self) -> *mut c_void {
        self.device
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: registered in `new`, once.
        log_drop("unregistering host memory", unsafe { sys::cuMemHostUnregister(self.host) });
    }
}

/// A loaded module, never unloaded (its functions live as long as the process).
#[derive(Debug)]
pub struct Module(sys::CUmodule);

// SAFETY: a module handle may be used from any thread; the driver locks.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    /// Loads a fatbin into the current context.
    pub fn load(image: &'static [u8]) -> CudaResult<Self> {
        let mut handle = ptr::null_mut();
        // SAFETY: `image` is a whole fatbin, whose header says how long it is.
        check(unsafe { sys::cuModuleLoadData(&mut handle, image.as_ptr().cast()) })?;
        Ok(Self(handle))
    }

    /// The kernel of this name.
    pub fn function(&self, name: &CStr) -> CudaResult<Function> {
        let mut handle = ptr::null_mut();
        // SAFETY: `name` is NUL-terminated, the module lives.
        check(unsafe { sys::cuModuleGetFunction(&mut handle, self.0, name.as_ptr()) })?;
        Ok(Function(handle))
    }
}

/// The extent of a launch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// Blocks, x and y.
    pub grid: (u32, u32),
    /// Threads of a block, x and y.
    pub block: (u32, u32),
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

/// A kernel of a [`Module`].
#[derive(Clone, Copy, Debug)]
pub struct Function(sys::CUfunction);

// SAFETY: a function handle may be used from any thread; the driver locks.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// Lets blocks of the kernel have `n_bytes` of dynamic shared memory. Loads the kernel, too, where the driver puts that
    /// off to the first use.
    pub fn allow_shared(self, n_bytes: usize) -> CudaResult<()> {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a function of a loaded module.
        check(unsafe { sys::cuFuncSetAttribute(self.0, attribute, n_bytes as c_int) })
    }

    /// Threads that a block may have.
    pub fn max_threads(self) -> CudaResult<usize> {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
        let mut n_threads = 0;
        // SAFETY: `n_threads` is a valid place, and this a function of a loaded module.
        check(unsafe { sys::cuFuncGetAttribute(&mut n_threads, attribute, self.0) })?;
        Ok(usize::try_from(n_threads).unwrap_or(0))
    }

    /// Blocks of so many threads and so much shared memory that a multiprocessor holds at once.
    pub fn occupancy(self, n_threads: u32, shared_bytes: usize) -> CudaResult<usize> {
        let mut n_blocks = 0;
        // SAFETY: `n_blocks` is a valid place.
        check(unsafe {
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut n_blocks, self.0, n_threads as c_int, shared_bytes)
        })?;
        Ok(usize::try_from(n_blocks).unwrap_or(0))
    }

    /// Launches the kernel with one by-value argument.
    ///
    /// # Safety
    /// `args` is what the kernel takes, its pointers are good for what the kernel does with them until it has run,
    /// and `stream` is live and of the current context.
    pub unsafe fn launch<A>(self, shape: Shape, stream: StreamHandle, args: &A) -> CudaResult<()> {
        let mut params = [ptr::from_ref(args).cast_mut().cast::<c_void>()];
        // SAFETY: the caller vouches for the arguments; the driver copies them before it returns.
        check(unsafe {
            sys::cuLaunchKernel(
                self.0,
                shape.grid.0,
                shape.grid.1,
                1,
                shape.block.0,
                shape.block.1,
                1,
                shape.shared_bytes,
                stream,
                params.as_mut_ptr(),
                ptr::null_mut(),
            )
        })
    }
}

/// A destructor cannot answer; what went wrong is logged (at process exit the driver may be gone already).
fn log_drop(what: &str, result: sys::CUresult) {
    if result != sys::CUresult::CUDA_SUCCESS && result != sys::CUresult::CUDA_ERROR_DEINITIALIZED {
        log::debug!("{what}: {}", CudaError(result));
    }
}

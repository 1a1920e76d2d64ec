//! A rank's device: streams, graphs and memory that end with their owner.
//!
//! On a real device that ranks share, what allocates or frees may wait for another rank's kernels, which wait for this
//! rank. Memory of a real device is therefore taken once and never given back. They share the first one, or have one each of
//! those that `CUDA_VISIBLE_DEVICES` names.

use std::collections::BTreeMap;
use std::ffi::c_int;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use flashcomm_wire::Element;

use crate::api::Ptr;
use crate::libraries::is_real;
use crate::{call, ok};

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

impl Default for Stream {
    fn default() -> Self {
        Self::new()
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

/// An event that tells times, and ends with this.
pub struct Event(Ptr);

impl Event {
    /// Of what the stream has now.
    pub fn of(stream: &Stream) -> Self {
        let mut event = 0;
        ok!(cuEventCreate(&mut event, 0));
        ok!(cuEventRecord(event, stream.0));
        Event(event)
    }

    /// Makes a stream wait for it.
    pub fn hold(&self, stream: &Stream) {
        ok!(cuStreamWaitEvent(stream.0, self.0, 0));
    }

    /// Milliseconds since another one; waits for both.
    pub fn ms_since(&self, start: &Event) -> f32 {
        let mut ms = 0.0;
        ok!(cuEventSynchronize(start.0));
        ok!(cuEventSynchronize(self.0));
        ok!(cuEventElapsedTime(&mut ms, start.0, self.0));
        ms
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        call!(cuEventDestroy_v2(self.0));
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

/// Bytes of memory of the current, real device, from what was allocated when the process first asked; never given back. To
/// allocate or to free may wait for another rank's work on the same device, which waits for this rank.
fn take_from_a_real_device(n_bytes: usize) -> Ptr {
    const ALL: usize = 4 << 30;
    /// By context: what it has, and how much of that is taken.
    static POOLS: Mutex<BTreeMap<Ptr, (Ptr, usize)>> = Mutex::new(BTreeMap::new());
    let mut context = 0;
    ok!(cuCtxGetCurrent(&mut context));
    let mut pools = POOLS.lock().unwrap();
    let (start, taken) = pools.entry(context).or_insert_with(|| {
        let mut start = 0;
        ok!(cuMemAlloc_v2(&mut start, ALL));
        (start, 0)
    });
    let at = *start + *taken;
    *taken += n_bytes.next_multiple_of(256);
    assert!(*taken <= ALL, "the tests need more memory");
    at
}

/// A green context of the current device, with so many multiprocessors.
pub struct Green {
    green: Ptr,
    context: Ptr,
}

impl Green {
    pub fn new(rank: usize, multiprocessors: u32) -> Self {
        let (mut count, mut green, mut context, mut descriptor) = (0, 0, 0, 0);
        ok!(cuDeviceGetCount(&mut count));
        let (device, mut all, mut part, mut n_parts) = (rank as c_int % count, [0u64; 24], [0u64; 24], 1);
        ok!(cuDeviceGetDevResource(device, &mut all, 1));
        ok!(cuDevSmResourceSplitByCount(&mut part, &mut n_parts, &all, std::ptr::null_mut(), 0, multiprocessors));
        ok!(cuDevResourceGenerateDesc(&mut descriptor, &part, 1));
        ok!(cuGreenCtxCreate(&mut green, descriptor, device, 1));
        ok!(cuCtxFromGreenCtx(&mut context, green));
        Green { green, context }
    }

    /// A stream of it.
    pub fn stream(&self) -> Stream {
        let mut stream = 0;
        ok!(cuGreenCtxStreamCreate(&mut stream, self.green, 1, 0));
        Stream(stream)
    }

    /// Does something while it is this thread's current context.
    pub fn current<T>(&self, body: impl FnOnce() -> T) -> T {
        let mut popped = 0;
        ok!(cuCtxPushCurrent_v2(self.context));
        let result = body();
        ok!(cuCtxPopCurrent_v2(&mut popped));
        assert_eq!(popped, self.context, "whoever was called has left another context");
        result
    }
}

impl Drop for Green {
    fn drop(&mut self) {
        ok!(cuGreenCtxDestroy(self.green));
    }
}

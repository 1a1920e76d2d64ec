//! Modules, functions, occupancy, launches.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use flashcomm_sim_schedule as schedule;
use once_cell::sync::Lazy;
use parking_lot::RwLock;

use super::{driver, put, stream};
use crate::cu_result::{CuResult, Result};
use crate::kernels::{self, Kernel, Shape};
use crate::stream::{Stream, check_capture_allows, fresh_handle};
use crate::{clock, device, durations};

/// What a fatbin begins with.
const FATBIN_MAGIC: u32 = 0xba55_ed50;
/// Threads that a multiprocessor holds at once, in blocks of multiples of 128.
const THREADS_PER_MULTIPROCESSOR: u32 = 1024;

static MODULES: Lazy<RwLock<HashMap<usize, ()>>> = Lazy::new(Default::default);
static FUNCTIONS: Lazy<RwLock<HashMap<usize, Arc<Kernel>>>> = Lazy::new(Default::default);

fn load(module: *mut usize, image: *const c_void) -> Result<()> {
    check_capture_allows()?;
    schedule::step();
    let device = device::current()?;
    // SAFETY: the caller gives an image, which has at least a header.
    if schedule::fails("module") || image.is_null() || unsafe { image.cast::<u32>().read_unaligned() } != FATBIN_MAGIC {
        return Err(CuResult::INVALID_IMAGE);
    }
    // Loading may wait for all work of the device, which may wait for other ranks.
    Stream::synchronize_all(device)?;
    let handle = fresh_handle();
    MODULES.write().insert(handle, ());
    put(module, handle)
}

fn function(handle: usize) -> Result<Arc<Kernel>> {
    FUNCTIONS.read().get(&handle).cloned().ok_or(CuResult::INVALID_HANDLE)
}

fn launch(handle: usize, grid: [u32; 3], block: [u32; 3], on: usize, params: *mut *mut c_void) -> Result<()> {
    schedule::step();
    let kernel = function(handle)?;
    if schedule::fails("launch") {
        return Err(CuResult::LAUNCH_FAILED);
    }
    let [threads, rows, 1] = block else { return Err(CuResult::INVALID_VALUE) };
    if grid.contains(&0) || !kernel.takes([threads, rows]) || params.is_null() {
        return Err(CuResult::INVALID_VALUE);
    }
    // SAFETY: the caller gives a pointer to each argument; these kernels have one.
    let source = unsafe { *params }.cast::<u8>();
    let mut args = vec![0u8; kernel.arg_bytes];
    // SAFETY: the argument that the kernel takes.
    unsafe { std::ptr::copy_nonoverlapping(source, args.as_mut_ptr(), args.len()) };
    let stream = stream(on)?;
    let resident = (stream.multiprocessors() * occupancy(&kernel, (threads * rows) as c_int)) as u32;
    stream.device.last_blocks.store((grid[0] * grid[1] * grid[2]) as i32, Ordering::Relaxed);
    let shape = Shape { grid, block, resident, from_back: stream.device.ordinal % 2 != 0 };
    stream.issue(Arc::new(move || {
        kernel.run(&args, shape)?;
        clock::take(|fabric| durations::of_kernel(fabric, &kernel, &args, shape))
    }))
}

/// Blocks of so many threads that a multiprocessor holds at once.
fn occupancy(kernel: &Kernel, n_threads: c_int) -> c_int {
    let n_threads = n_threads as u32;
    let n_blocks = (THREADS_PER_MULTIPROCESSOR / n_threads.next_multiple_of(128)).max(1);
    if n_threads <= kernel.max_threads { n_blocks as c_int } else { 0 }
}

driver! {
    fn cuModuleLoadData(module: *mut usize, image: *const c_void) { load(module, image) }
    fn cuModuleLoadDataEx(
        module: *mut usize, image: *const c_void, _n: u32, _options: *mut c_int, _values: *mut *mut c_void,
    ) { load(module, image) }
    fn cuModuleUnload(module: usize) { MODULES.write().remove(&module).ok_or(CuResult::INVALID_HANDLE) }
    fn cuModuleGetFunction(place: *mut usize, module: usize, name: *const c_char) {
        if !MODULES.read().contains_key(&module) {
            return Err(CuResult::INVALID_HANDLE);
        }
        // SAFETY: the caller gives a NUL-terminated name.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        let kernel = kernels::find(&name).ok_or(CuResult::NOT_FOUND)?;
        let mut functions = FUNCTIONS.write();
        let known = functions.iter().find(|(_, known)| known.name == kernel.name).map(|(handle, _)| *handle);
        let handle = known.unwrap_or_else(fresh_handle);
        functions.entry(handle).or_insert_with(|| Arc::new(kernel));
        put(place, handle)
    }
    fn cuFuncGetAttribute(value: *mut c_int, attribute: c_int, handle: usize) {
        let kernel = function(handle)?;
        put(value, match attribute {
            0 => kernel.max_threads as c_int, // threads per block
            4 => 32,   // registers
            5 | 6 => 90, // PTX and binary version
            _ => 0,
        })
    }
    fn cuFuncSetAttribute(handle: usize, _attribute: c_int, _value: c_int) { function(handle).map(drop) }
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        n_blocks: *mut c_int, handle: usize, n_threads: c_int, _shared_bytes: usize,
    ) {
        put(n_blocks, occupancy(&*function(handle)?, n_threads))
    }
    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        n_blocks: *mut c_int, handle: usize, n_threads: c_int, _shared_bytes: usize, _flags: u32,
    ) {
        put(n_blocks, occupancy(&*function(handle)?, n_threads))
    }
    fn cuLaunchKernel(
        handle: usize, grid_x: u32, grid_y: u32, grid_z: u32, block_x: u32, block_y: u32, block_z: u32,
        _shared_bytes: u32, on: usize, params: *mut *mut c_void, _extra: *mut *mut c_void,
    ) { launch(handle, [grid_x, grid_y, grid_z], [block_x, block_y, block_z], on, params) }
    fn cuLaunchCooperativeKernel(
        handle: usize, grid_x: u32, grid_y: u32, grid_z: u32, block_x: u32, block_y: u32, block_z: u32,
        _shared_bytes: u32, on: usize, params: *mut *mut c_void,
    ) {
        // All blocks must be resident together.
        if grid_x * grid_y * grid_z > THREADS_PER_MULTIPROCESSOR / 128 * device::MULTIPROCESSORS as u32 {
            return Err(CuResult(720));
        }
        launch(handle, [grid_x, grid_y, grid_z], [block_x, block_y, block_z], on, params)
    }
    fn cuLaunchHostFunc(on: usize, function: extern "C" fn(*mut c_void), data: *mut c_void) {
        let data = data as usize;
        stream(on)?.issue(Arc::new(move || {
            function(data as *mut c_void);
            Ok(())
        }))
    }
}

//! NVTX ranges (domain `flashcomm`) around compressed all-reduces, for Nsight Systems and its like. `FLASHCOMM_NVTX=1`.
//!
//! NVTX has no library of its own: a program looks for a tool's in `NVTX_INJECTION64_PATH`, which the tool sets, and
//! lets it put its functions into tables of slots. NVIDIA's crate for that compiles C and wants libclang to build; what is
//! needed of it is here, after `nvtx3/nvtxDetail/nvtxTypes.h`. Where no tool is, or the setting is 0, nothing is loaded.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use once_cell::sync::Lazy;

use crate::config::Config;

/// Ranges of this thread, which end with this, the last one first.
#[derive(Default)]
pub(crate) struct Ranges {
    open: usize,
}

impl Ranges {
    /// Opens one about an operation of `n_bytes`, inside those that are open. `message` is asked where a tool listens.
    pub(crate) fn push(&mut self, n_bytes: u64, message: impl FnOnce() -> String) {
        let Some(tool) = tool() else { return };
        let message = CString::new(message()).unwrap_or_default();
        let attributes = EventAttributes {
            version: VERSION as u16,
            size: size_of::<EventAttributes>() as u16,
            category: 0,
            color_type: 0,
            color: 0,
            payload_type: 1, // NVTX_PAYLOAD_TYPE_UNSIGNED_INT64
            reserved: 0,
            payload: n_bytes,
            message_type: 1, // NVTX_MESSAGE_TYPE_ASCII
            message: message.as_ptr(),
        };
        // SAFETY: the tool's function and domain; the attributes live throughout the call.
        unsafe { (tool.push)(tool.domain, &attributes) };
        self.open += 1;
    }
}

impl Drop for Ranges {
    fn drop(&mut self) {
        if self.open > 0
            && let Some(tool) = tool()
        {
            // SAFETY: the tool's function and domain.
            (0..self.open).for_each(|_| _ = unsafe { (tool.pop)(tool.domain) });
        }
    }
}

/// `NVTX_VERSION`.
const VERSION: u32 = 3;

/// `nvtxEventAttributes_t`.
#[repr(C)]
struct EventAttributes {
    version: u16,
    size: u16,
    category: u32,
    color_type: i32,
    color: u32,
    payload_type: i32,
    reserved: i32,
    payload: u64,
    message_type: i32,
    message: *const c_char,
}

type Create = unsafe extern "C" fn(*const c_char) -> *mut c_void;
type Push = unsafe extern "C" fn(*mut c_void, *const EventAttributes) -> c_int;
type Pop = unsafe extern "C" fn(*mut c_void) -> c_int;

/// A tool that listens.
struct Tool {
    domain: *mut c_void,
    push: Push,
    pop: Pop,
}

// SAFETY: a tool's functions may be called from any thread.
unsafe impl Send for Tool {}
// SAFETY: as above.
unsafe impl Sync for Tool {}

#[inline]
fn tool() -> Option<&'static Tool> {
    static TOOL: Lazy<Option<Tool>> = Lazy::new(Tool::load);
    if Config::global().nvtx { TOOL.as_ref() } else { None }
}

impl Tool {
    fn load() -> Option<Self> {
        let path = std::env::var_os("NVTX_INJECTION64_PATH")?;
        let c_path = CString::new(path.into_encoded_bytes()).ok()?;
        // SAFETY: a NUL-terminated path.
        let library = unsafe { libc::dlopen(c_path.as_ptr(), libc::RTLD_LAZY) };
        if library.is_null() {
            log::warn!("FLASHCOMM_NVTX=1: cannot open NVTX_INJECTION64_PATH={}", c_path.to_string_lossy());
            return None;
        }
        // SAFETY: an open library and a NUL-terminated name.
        let initialize = unsafe { libc::dlsym(library, c"InitializeInjectionNvtx2".as_ptr()) };
        if initialize.is_null() {
            log::warn!("FLASHCOMM_NVTX=1: {} has no InitializeInjectionNvtx2", c_path.to_string_lossy());
            return None;
        }
        type Initialize = unsafe extern "C" fn(unsafe extern "C" fn(u32) -> *const c_void) -> c_int;
        // SAFETY: the function of this name has this signature.
        let initialize = unsafe { std::mem::transmute::<*mut c_void, Initialize>(initialize) };
        // SAFETY: as NVTX has it.
        if unsafe { initialize(export_table) } == 0 {
            log::warn!("FLASHCOMM_NVTX=1: the tool at {} does not want to listen", c_path.to_string_lossy());
            return None;
        }
        let slot = |id: usize| {
            let function = SLOTS[CORE2][id].load(Ordering::Acquire);
            (!function.is_null()).then_some(function)
        };
        let (create, push, pop) = (slot(DOMAIN_CREATE_A)?, slot(DOMAIN_RANGE_PUSH_EX)?, slot(DOMAIN_RANGE_POP)?);
        // SAFETY: what the tool puts into this slot has this signature.
        let create = unsafe { std::mem::transmute::<*mut c_void, Create>(create) };
        // SAFETY: as above.
        let push = unsafe { std::mem::transmute::<*mut c_void, Push>(push) };
        // SAFETY: as above.
        let pop = unsafe { std::mem::transmute::<*mut c_void, Pop>(pop) };
        let name: &CStr = c"flashcomm";
        // SAFETY: a NUL-terminated name, which stays.
        let domain = unsafe { create(name.as_ptr()) };
        Some(Tool { domain, push, pop })
    }
}

/// `NvtxCallbackModule`: from 1 on core, CUDA, OpenCL, the CUDA runtime, core 2, sync. A tool asks for all of them, and
/// all but core 2 are there to be filled only.
const MODULES: usize = 7;
const CORE2: usize = 5;
/// Slots of each module, the unused first one included.
const MODULE_SLOTS: [usize; MODULES] = [0, 16, 9, 15, 7, 16, 7];
const MAX_SLOTS: usize = 16;
// `NvtxCallbackIdCore2`.
const DOMAIN_RANGE_PUSH_EX: usize = 4;
const DOMAIN_RANGE_POP: usize = 5;
const DOMAIN_CREATE_A: usize = 12;

/// Where a tool puts its functions.
static SLOTS: [[AtomicPtr<c_void>; MAX_SLOTS]; MODULES] =
    [const { [const { AtomicPtr::new(ptr::null_mut()) }; MAX_SLOTS] }; MODULES];

/// Addresses of the slots, as a module's table has them: a null pointer in the first place and behind the last.
struct Tables([[*const AtomicPtr<c_void>; MAX_SLOTS + 1]; MODULES]);

// SAFETY: addresses of static atomics.
unsafe impl Send for Tables {}
// SAFETY: as above.
unsafe impl Sync for Tables {}

static TABLES: Lazy<Tables> = Lazy::new(|| {
    let mut tables = [[ptr::null(); MAX_SLOTS + 1]; MODULES];
    for (module, table) in tables.iter_mut().enumerate() {
        for (id, place) in table.iter_mut().enumerate().take(MODULE_SLOTS[module]).skip(1) {
            *place = &raw const SLOTS[module][id];
        }
    }
    Tables(tables)
});

/// `NvtxExportTableCallbacks`.
#[repr(C)]
struct Callbacks {
    size: usize,
    function_table: unsafe extern "C" fn(c_uint, *mut *const *const AtomicPtr<c_void>, *mut c_uint) -> c_int,
}

/// `NvtxExportTableVersionInfo`.
#[repr(C)]
struct VersionInfo {
    size: usize,
    version: u32,
    reserved: u32,
    set_tool_version: extern "C" fn(u32),
}

unsafe extern "C" fn export_table(id: u32) -> *const c_void {
    static CALLBACKS: Callbacks = Callbacks { size: size_of::<Callbacks>(), function_table };
    static VERSION_INFO: VersionInfo =
        VersionInfo { size: size_of::<VersionInfo>(), version: VERSION, reserved: 0, set_tool_version };
    match id {
        1 => (&raw const CALLBACKS).cast(),
        3 => (&raw const VERSION_INFO).cast(),
        _ => ptr::null(),
    }
}

extern "C" fn set_tool_version(_version: u32) {}

unsafe extern "C" fn function_table(
    module: c_uint,
    table: *mut *const *const AtomicPtr<c_void>,
    size: *mut c_uint,
) -> c_int {
    let module = module as usize;
    if !(1..MODULES).contains(&module) {
        return 0;
    }
    if !size.is_null() {
        // SAFETY: not null, and so valid, as NVTX has it.
        unsafe { size.write(MODULE_SLOTS[module] as c_uint) };
    }
    if !table.is_null() {
        // SAFETY: as above.
        unsafe { table.write(TABLES.0[module].as_ptr()) };
    }
    1
}

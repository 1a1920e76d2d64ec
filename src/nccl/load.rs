//! Finds and opens the real libnccl, once.
//!
//! In order: `FLASHCOMM_NCCL_LIB`; the first library in symbol lookup, if that is not ourselves; the next one after us; a
//! `libnccl.so.2` that the process has loaded already (Python extensions bring theirs in locally, where the lookup does
//! not see it); what the process' libraries would find ([`search_path`]), for when the loader finds *us* under that name;
//! and the `libnccl.so.2` that the loader finds. A candidate that is ourselves, or another flashcomm, is refused. So is
//! `libflashcomm_soname.so`, which has NCCL's name and our functions.
//!
//! So an NCCL that the user has preloaded, before us or behind us, is the one: the lookup is the loader's own record of
//! `LD_PRELOAD`. One before us may as well be a tool's layer, which calls the next library, us; to call it would be a
//! circle. It is told by its `ncclGetVersion`, which then comes to us while we ask ([`is_candidate_calling`]). A layer that
//! answers that by itself and passes other calls on is not told, and must stand behind us or have `FLASHCOMM_NCCL_LIB` set.

use std::cell::Cell;
use std::env;
use std::ffi::{CStr, CString, OsStr, OsString, c_char, c_int, c_void};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::ptr;

use once_cell::sync::OnceCell;

use super::search_path::{self, SONAME};
use super::symbols::Version;

/// The real library, open for good.
#[derive(Debug)]
pub struct RealLibrary {
    handle: *mut c_void,
    path: PathBuf,
    version: Version,
}

// SAFETY: a handle of dlopen may be used from any thread.
unsafe impl Send for RealLibrary {}
// SAFETY: as above.
unsafe impl Sync for RealLibrary {}

impl RealLibrary {
    /// The library of this path, or of this name where the loader finds it.
    ///
    /// # Errors
    /// The reason, where it cannot be opened or is no NCCL.
    pub fn open(path: &OsStr) -> Result<Self, String> {
        open(path, 0).and_then(identify).map_err(|refusal| refusal.to_string())
    }

    /// The library that is found without being named.
    ///
    /// # Errors
    /// What was tried, each with the reason.
    pub fn search() -> Result<Self, Vec<String>> {
        let in_lookup = |start| match symbol(start, c"ncclGetVersion") {
            Some(function) => open(holder(function).as_os_str(), libc::RTLD_NOLOAD).and_then(identify),
            None => Err(Refusal::NotLoaded("no library there has it".into())),
        };
        let name = OsStr::from_bytes(SONAME.to_bytes());
        let ways: [(&str, &dyn Fn() -> Result<RealLibrary, Refusal>); 3] = [
            ("the first library in symbol lookup", &|| in_lookup(libc::RTLD_DEFAULT)),
            ("the next library in symbol lookup", &|| in_lookup(libc::RTLD_NEXT)),
            ("libnccl.so.2, already loaded", &|| open(name, libc::RTLD_NOLOAD).and_then(identify)),
        ];
        let mut tried = Vec::new();
        for (way, candidate) in ways {
            match candidate() {
                Ok(library) => return Ok(library),
                Err(refusal) => tried.push(format!("{way}: {refusal}")),
            }
        }
        for path in search_path::candidates().into_iter().chain([name.into()]) {
            match open(path.as_os_str(), 0).and_then(identify) {
                Ok(library) => return Ok(library),
                Err(refusal) => tried.push(format!("{}: {refusal}", path.display())),
            }
        }
        Err(tried)
    }

    /// Address of one of its functions.
    pub fn find(&self, name: &str) -> Option<*const ()> {
        symbol(self.handle, &CString::new(name).ok()?).map(|address| address.cast())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.version
    }
}

/// Why a candidate is not the one.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Refusal {
    /// The loader's words.
    NotLoaded(String),
    /// It has no `ncclGetVersion`.
    NotNccl(PathBuf),
    /// It is this library, or another copy of it.
    Ourselves(PathBuf),
    /// A layer before us in symbol lookup.
    CallsUs(PathBuf),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::NotLoaded(why) => f.write_str(why),
            Refusal::NotNccl(path) => write!(f, "{} is not an NCCL: it has no ncclGetVersion", path.display()),
            Refusal::Ourselves(path) => write!(f, "{} is flashcomm itself", path.display()),
            Refusal::CallsUs(path) => write!(f, "{} calls flashcomm in its turn", path.display()),
        }
    }
}

/// The real library; `None`, logged once, where none is found.
pub(crate) fn real_library() -> Option<&'static RealLibrary> {
    static REAL: OnceCell<Option<RealLibrary>> = OnceCell::new();
    REAL.get_or_init(|| {
        let library = find()?;
        log::info!("NCCL {} at {}", library.version, library.path.display());
        Some(library)
    })
    .as_ref()
}

fn find() -> Option<RealLibrary> {
    let mut tried = Vec::new();
    if let Some(path) = env::var_os("FLASHCOMM_NCCL_LIB").filter(|path| !path.is_empty()) {
        match RealLibrary::open(&path) {
            Ok(library) => return Some(library),
            Err(refusal) => {
                let path = path.to_string_lossy();
                log::error!("FLASHCOMM_NCCL_LIB={path} cannot be used: {refusal}. Looking elsewhere");
                tried.push(format!("FLASHCOMM_NCCL_LIB={path}: {refusal}"));
            }
        }
    }
    match RealLibrary::search() {
        Ok(library) => return Some(library),
        Err(elsewhere) => tried.extend(elsewhere),
    }
    log::error!(
        "no real NCCL found; every NCCL call answers ncclSystemError. Set FLASHCOMM_NCCL_LIB to the path of \
         libnccl.so.2. Tried: {}",
        tried.join("; ")
    );
    None
}

/// Keeps this library loaded whatever the application closes, for a thread that runs in it.
pub(crate) fn stay_loaded() {
    let path = holder(stay_loaded as *const c_void);
    // A program that holds the library itself is not found by its path, and stays anyway.
    let _ = open(path.as_os_str(), libc::RTLD_NOLOAD | libc::RTLD_NODELETE);
}

/// Opens a library; `RTLD_NOLOAD` in `flags` finds only what is loaded.
fn open(path: &OsStr, flags: c_int) -> Result<*mut c_void, Refusal> {
    let path = CString::new(path.as_bytes()).map_err(|_| Refusal::NotLoaded("the path holds a NUL".into()))?;
    // SAFETY: `path` is NUL-terminated. The library's constructors run, as those of any NCCL user's do.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL | flags) };
    if !handle.is_null() {
        return Ok(handle);
    }
    // SAFETY: asks for this thread's last error.
    let error = unsafe { libc::dlerror() };
    Err(Refusal::NotLoaded(if error.is_null() {
        "not loaded".into()
    } else {
        // SAFETY: not null, so a NUL-terminated string that lasts until the next call of its family.
        unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned()
    }))
}

/// Checks that an open library is an NCCL, and none of ours.
fn identify(handle: *mut c_void) -> Result<RealLibrary, Refusal> {
    let Some(function) = symbol(handle, c"ncclGetVersion") else {
        return Err(Refusal::NotNccl(path_of_handle(handle)));
    };
    let path = holder(function);
    let base = base_of(function);
    let is_flashcomm = symbol(handle, c"flashcommGetVersion").is_some_and(|ours| base_of(ours) == base);
    if base == base_of(identify as *const c_void) || is_flashcomm {
        return Err(Refusal::Ourselves(path));
    }
    let mut code = 0;
    // SAFETY: NCCL's function of this signature, in every version.
    let version = unsafe { std::mem::transmute::<*const c_void, extern "C" fn(*mut c_int) -> c_int>(function) };
    ASKED.set(Asked::Candidate);
    let result = version(&mut code);
    if ASKED.replace(Asked::Nobody) == Asked::Ourselves {
        return Err(Refusal::CallsUs(path));
    }
    if result != 0 {
        return Err(Refusal::NotNccl(path));
    }
    Ok(RealLibrary { handle, path, version: Version::from_code(code as u32) })
}

/// Who is being asked for its version by this thread.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    Nobody,
    Candidate,
    /// By the candidate.
    Ourselves,
}

thread_local! {
    static ASKED: Cell<Asked> = const { Cell::new(Asked::Nobody) };
}

/// Whether the call that this thread is in comes from a candidate, of which we are asking whether it does that.
pub(crate) fn is_candidate_calling() -> bool {
    let is_candidate = ASKED.get() != Asked::Nobody;
    if is_candidate {
        ASKED.set(Asked::Ourselves);
    }
    is_candidate
}

/// Address of a symbol.
fn symbol(handle: *mut c_void, name: &CStr) -> Option<*const c_void> {
    // SAFETY: a handle of dlopen or RTLD_NEXT, and a NUL-terminated name.
    let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
    (!address.is_null()).then_some(address.cast_const())
}

/// What the loader knows of an address.
fn info_of(address: *const c_void) -> libc::Dl_info {
    let mut info = libc::Dl_info {
        dli_fname: ptr::null(),
        dli_fbase: ptr::null_mut(),
        dli_sname: ptr::null(),
        dli_saddr: ptr::null_mut(),
    };
    // SAFETY: `info` is a valid place; an unknown address leaves it as it is.
    unsafe { libc::dladdr(address, &mut info) };
    info
}

fn base_of(address: *const c_void) -> *mut c_void {
    info_of(address).dli_fbase
}

/// Path of the library that holds an address.
fn holder(address: *const c_void) -> PathBuf {
    path_from(info_of(address).dli_fname)
}

fn path_of_handle(handle: *mut c_void) -> PathBuf {
    let mut map: *const LinkMap = ptr::null();
    // SAFETY: a handle of dlopen; the place takes a pointer to its link map.
    let failed = unsafe { libc::dlinfo(handle, libc::RTLD_DI_LINKMAP, (&raw mut map).cast()) } != 0;
    if failed || map.is_null() {
        return PathBuf::from("the library");
    }
    // SAFETY: the link map of an open library.
    path_from(unsafe { (*map).name })
}

/// The public head of glibc's `struct link_map`.
#[repr(C)]
struct LinkMap {
    address: usize,
    name: *const c_char,
}

fn path_from(name: *const c_char) -> PathBuf {
    if name.is_null() {
        return PathBuf::new();
    }
    // SAFETY: the loader's own NUL-terminated string, kept while the library is loaded.
    OsString::from_vec(unsafe { CStr::from_ptr(name) }.to_bytes().to_vec()).into()
}

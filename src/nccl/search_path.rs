//! Where the libraries of this process would find an NCCL.
//!
//! Where `libflashcomm_soname.so` is loaded, the loader answers the name `libnccl.so.2` with us,
//! and has loaded no other. So we look where it would have looked for whoever needs NCCL. First
//! comes an NCCL that somebody has opened by its path all the same, as JAX does. Then come, in the
//! loader's order: `DT_RPATH`, `LD_LIBRARY_PATH`, `DT_RUNPATH`, and the loader's cache. PyTorch
//! finds the NCCL of its packages by such an entry (`$ORIGIN/../../nvidia/nccl/lib`).
//!
//! Which library has called is not known. Those that say they need `libnccl.so.2` come first, then
//! all others, since who opens it with `dlopen` does not say so; each in the order in which they
//! were loaded. The loader's own list says what is in their files, so nothing is read or opened for
//! it but the cache.

use std::collections::BTreeSet;
use std::env;
use std::ffi::{CStr, OsStr, OsString, c_char, c_int, c_void};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::slice;

/// The name that NCCL goes by.
pub(super) const SONAME: &CStr = c"libnccl.so.2";

/// Files that may be the real NCCL, each once, the best first. Among them may be this library.
pub(super) fn candidates() -> Vec<PathBuf> {
    let mut objects = objects();
    objects.sort_by_key(|object| !object.needs_nccl);
    let is_nccl = |path: &&Path| path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"libnccl.so"));
    let loaded = objects.iter().map(|object| object.path.as_path()).filter(is_nccl).map(PathBuf::from);

    let from_environment = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let rpaths = objects.iter().flat_map(|object| object.directories(&object.rpath));
    let runpaths = objects.iter().flat_map(|object| object.directories(&object.runpath));
    let directories = rpaths.chain(env::split_paths(&from_environment)).chain(runpaths);
    let in_directories = directories.map(|directory| directory.join(OsStr::from_bytes(SONAME.to_bytes())));

    let mut seen = BTreeSet::new();
    let all = loaded.chain(in_directories).chain(in_cache(&fs::read("/etc/ld.so.cache").unwrap_or_default()));
    all.filter(|path| path.is_absolute() && path.exists() && seen.insert(path.clone())).collect()
}

/// The paths of NCCLs in a cache of the loader's. Whatever its form, it has them as strings that
/// end with a NUL.
fn in_cache(cache: &[u8]) -> Vec<PathBuf> {
    let texts = cache.split(|byte| *byte == 0).filter(|text| text.starts_with(b"/"));
    let paths = texts.map(|text| Path::new(OsStr::from_bytes(text)));
    paths
        .filter(|path| path.file_name().is_some_and(|name| name.as_bytes() == SONAME.to_bytes()))
        .map(PathBuf::from)
        .collect()
}

/// A loaded library, or the program.
#[derive(Default, Debug)]
struct Object {
    path: PathBuf,
    needs_nccl: bool,
    /// As the file has it; empty where there is a `DT_RUNPATH`, which turns it off.
    rpath: OsString,
    runpath: OsString,
}

impl Object {
    /// The directories of a `DT_RPATH` or a `DT_RUNPATH`.
    fn directories(&self, list: &OsStr) -> Vec<PathBuf> {
        let origin = self.path.parent().unwrap_or(Path::new("/")).as_os_str().as_bytes();
        let entries = list.as_bytes().split(|byte| *byte == b':').filter(|entry| !entry.is_empty());
        entries.map(|entry| PathBuf::from(OsString::from_vec(expand(entry, origin)))).collect()
    }
}

/// An entry with the object's directory for `$ORIGIN`. What else may be in one (`$LIB`,
/// `$PLATFORM`) nobody uses for NCCL.
fn expand(entry: &[u8], origin: &[u8]) -> Vec<u8> {
    for token in [&b"${ORIGIN}"[..], b"$ORIGIN"] {
        if let Some(at) = entry.windows(token.len()).position(|part| part == token) {
            return [&entry[..at], origin, &entry[at + token.len()..]].concat();
        }
    }
    entry.to_vec()
}

/// All that is loaded, in the loader's order.
fn objects() -> Vec<Object> {
    // The loader holds its lock while it tells of them. `note` frees nothing meanwhile: ThreadSanitizer, and whoever else
    // looks at each free, may wait for that lock under one that a free takes.
    let mut objects: Vec<Object> = Vec::with_capacity(1024);
    // SAFETY: `note` takes the pointer that it is given for what it is, and keeps none.
    unsafe { libc::dl_iterate_phdr(Some(note), (&raw mut objects).cast()) };
    // The program has no name there.
    for program in objects.iter_mut().filter(|object| object.path.as_os_str().is_empty()) {
        program.path = env::current_exe().unwrap_or_default();
    }
    objects
}

extern "C" fn note(info: *mut libc::dl_phdr_info, _: usize, objects: *mut c_void) -> c_int {
    // SAFETY: the loader's own, for as long as this call.
    let info = unsafe { &*info };
    // SAFETY: what `objects` passes, and nobody else has.
    let objects = unsafe { &mut *objects.cast::<Vec<Object>>() };
    let mut object = dynamic(info);
    object.path = owned(string(info.dlpi_name)).into();
    objects.push(object);
    0
}

/// An entry of a dynamic section (`Elf64_Dyn`).
#[repr(C)]
struct Entry {
    tag: i64,
    value: u64,
}

// From <elf.h>.
const DT_NULL: i64 = 0;
const DT_NEEDED: i64 = 1;
const DT_STRTAB: i64 = 5;
const DT_RPATH: i64 = 15;
const DT_RUNPATH: i64 = 29;

/// What an object's dynamic section says; no path.
fn dynamic(info: &libc::dl_phdr_info) -> Object {
    let mut object = Object::default();
    // SAFETY: the program headers of a loaded object.
    let headers = unsafe { slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    let Some(header) = headers.iter().find(|header| header.p_type == libc::PT_DYNAMIC) else { return object };
    let start = (info.dlpi_addr + header.p_vaddr) as *const Entry;
    // SAFETY: a loaded object has its dynamic section where its header says.
    let entries = unsafe { slice::from_raw_parts(start, header.p_memsz as usize / size_of::<Entry>()) };
    let entries = || entries.iter().take_while(|entry| entry.tag != DT_NULL);
    let Some(strings) = entries().find(|entry| entry.tag == DT_STRTAB) else { return object };
    // glibc writes the address over the offset, unless the section is read-only.
    let is_offset = strings.value < info.dlpi_addr;
    let strings = if is_offset { info.dlpi_addr + strings.value } else { strings.value };
    for Entry { tag, value } in entries() {
        let text = || string((strings + value) as *const c_char);
        match *tag {
            DT_NEEDED => object.needs_nccl |= text() == SONAME.to_bytes(),
            DT_RPATH => object.rpath = owned(text()),
            DT_RUNPATH => object.runpath = owned(text()),
            _ => {}
        }
    }
    if !object.runpath.is_empty() {
        object.rpath.clear();
    }
    object
}

/// Not to be kept: of an object that the loader has as long as it holds its lock.
fn string<'a>(text: *const c_char) -> &'a [u8] {
    if text.is_null() {
        return &[];
    }
    // SAFETY: the loader's, or a loaded object's, NUL-terminated string.
    unsafe { CStr::from_ptr(text) }.to_bytes()
}

fn owned(text: &[u8]) -> OsString {
    OsString::from_vec(text.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_seen_from_the_directory_of_its_library() {
        let object = Object { path: "/a/torch/lib/libtorch_cuda.so".into(), ..Object::default() };
        let directories = object.directories(OsStr::new("$ORIGIN/../../nvidia/nccl/lib::${ORIGIN}:/opt/lib"));
        assert_eq!(directories, ["/a/torch/lib/../../nvidia/nccl/lib", "/a/torch/lib", "/opt/lib"].map(PathBuf::from));
    }

    #[test]
    fn a_cache_tells_the_paths_of_nccl_and_of_nothing_else() {
        let cache =
            b"glibc-ld.so.cache1.1\0\x03libnccl.so.2\0/lib/libnccl.so.2\0/lib/libnccl.so\0libm.so\0/x/libnccl.so.2\0";
        assert_eq!(in_cache(cache), ["/lib/libnccl.so.2", "/x/libnccl.so.2"].map(PathBuf::from));
        assert!(in_cache(b"").is_empty());
    }

    #[test]
    fn this_program_is_among_what_is_loaded_and_needs_no_nccl() {
        let objects = objects();
        assert_eq!(objects[0].path, env::current_exe().unwrap());
        assert!(objects.len() > 2 && objects.iter().all(|object| !object.needs_nccl), "{objects:?}");
        assert!(objects.iter().any(|object| object.path.to_string_lossy().contains("libc.so")));
    }
}

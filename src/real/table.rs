//! The jump table: a slot for each function, through which every call to the real library goes.
//!
//! A slot starts at a stub that resolves the function, patches the slot and goes on to the function with every argument
//! register as it came. So no signature is needed and none can be wrong: `ncclUniqueId` travels by value on the stack,
//! some functions return structures. A function that the loaded library lacks gets an answer of ours.

use std::arch::naked_asm;
use std::ffi::{c_char, c_int};
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::nccl::symbols::{Kind, SYMBOLS, Symbol, for_each_symbol};
use crate::nccl::{NcclResult, load};
use crate::{logging, stats};

/// Address of each function, or of its stub.
pub(crate) static TABLE: [AtomicPtr<()>; SYMBOLS.len()] = initial_table();

/// The real function of this symbol, as a function pointer: `real!(ncclCommCount, fn(CommPtr, *mut c_int))`.
macro_rules! real {
    ($symbol:ident, fn($($arg:ty),*)) => {
        $crate::real::table::real!($symbol, fn($($arg),*) -> $crate::nccl::NcclResult)
    };
    ($symbol:ident, fn($($arg:ty),*) -> $answer:ty) => {{
        let slot = $crate::real::table::TABLE[$crate::nccl::Symbol::$symbol as usize].load(std::sync::atomic::Ordering::Relaxed);
        #[allow(unused_unsafe, reason = "callers mostly are in an unsafe block, to call it")]
        // SAFETY: the slot holds a function of this C signature or a stub that passes everything on to it.
        let function = unsafe {
            std::mem::transmute::<*mut (), unsafe extern "C" fn($($arg),*) -> $answer>(slot)
        };
        function
    }};
}
pub(crate) use real;

macro_rules! define_stubs {
    ($($how:ident $name:ident $twin:ident $kind:ident $major:literal $minor:literal $patch:literal;)*) => {
        #[allow(non_snake_case, reason = "NCCL's names")]
        mod stubs {
            use super::*;
            $(
                define_stubs!(@stub $name);
                define_stubs!(@stub $twin);
            )*
        }

        const fn initial_table() -> [AtomicPtr<()>; SYMBOLS.len()] {
            [$(
                AtomicPtr::new(stubs::$name as *const () as *mut ()),
                AtomicPtr::new(stubs::$twin as *const () as *mut ()),
            )*]
        }
    };
    (@stub $name:ident) => {
        #[cfg(target_arch = "x86_64")]
        #[unsafe(naked)]
        pub(super) unsafe extern "C" fn $name() {
            naked_asm!("endbr64", "mov r11d, {i}", "jmp {go}", i = const Symbol::$name as usize, go = sym resolve_and_go)
        }
        #[cfg(target_arch = "aarch64")]
        #[unsafe(naked)]
        pub(super) unsafe extern "C" fn $name() {
            naked_asm!("hint #34", "mov w17, #{i}", "b {go}", i = const Symbol::$name as usize, go = sym resolve_and_go)
        }
    };
}
for_each_symbol!(define_stubs);

/// Saves what may hold arguments, resolves the symbol in r11, restores, and goes there.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
unsafe extern "C" fn resolve_and_go() {
    naked_asm!(
        "push rbp",
        "mov rbp, rsp",
        "and rsp, -16",
        "sub rsp, 192",
        "mov [rsp], rdi",
        "mov [rsp + 8], rsi",
        "mov [rsp + 16], rdx",
        "mov [rsp + 24], rcx",
        "mov [rsp + 32], r8",
        "mov [rsp + 40], r9",
        "mov [rsp + 48], rax", // how many vector registers a variadic call uses
        "movups [rsp + 64], xmm0",
        "movups [rsp + 80], xmm1",
        "movups [rsp + 96], xmm2",
        "movups [rsp + 112], xmm3",
        "movups [rsp + 128], xmm4",
        "movups [rsp + 144], xmm5",
        "movups [rsp + 160], xmm6",
        "movups [rsp + 176], xmm7",
        "mov edi, r11d",
        "call {resolve}",
        "mov r11, rax",
        "mov rdi, [rsp]",
        "mov rsi, [rsp + 8]",
        "mov rdx, [rsp + 16]",
        "mov rcx, [rsp + 24]",
        "mov r8, [rsp + 32]",
        "mov r9, [rsp + 40]",
        "mov rax, [rsp + 48]",
        "movups xmm0, [rsp + 64]",
        "movups xmm1, [rsp + 80]",
        "movups xmm2, [rsp + 96]",
        "movups xmm3, [rsp + 112]",
        "movups xmm4, [rsp + 128]",
        "movups xmm5, [rsp + 144]",
        "movups xmm6, [rsp + 160]",
        "movups xmm7, [rsp + 176]",
        "mov rsp, rbp",
        "pop rbp",
        "jmp r11",
        resolve = sym resolve,
    )
}

/// Saves what may hold arguments, resolves the symbol in w17, restores, and goes there.
#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
unsafe extern "C" fn resolve_and_go() {
    naked_asm!(
        "stp x29, x30, [sp, #-224]!",
        "mov x29, sp",
        "stp x0, x1, [sp, #16]",
        "stp x2, x3, [sp, #32]",
        "stp x4, x5, [sp, #48]",
        "stp x6, x7, [sp, #64]",
        "str x8, [sp, #80]", // where a structure is to be returned
        "stp q0, q1, [sp, #96]",
        "stp q2, q3, [sp, #128]",
        "stp q4, q5, [sp, #160]",
        "stp q6, q7, [sp, #192]",
        "mov w0, w17",
        "bl {resolve}",
        "mov x16, x0",
        "ldp q6, q7, [sp, #192]",
        "ldp q4, q5, [sp, #160]",
        "ldp q2, q3, [sp, #128]",
        "ldp q0, q1, [sp, #96]",
        "ldr x8, [sp, #80]",
        "ldp x6, x7, [sp, #64]",
        "ldp x4, x5, [sp, #48]",
        "ldp x2, x3, [sp, #32]",
        "ldp x0, x1, [sp, #16]",
        "ldp x29, x30, [sp], #224",
        "br x16",
        resolve = sym resolve,
    )
}

/// Finds the function of a slot, or the answer in its place, and patches the slot.
extern "C" fn resolve(slot: u32) -> *const () {
    let (name, kind, _) = SYMBOLS[slot as usize];
    if load::is_candidate_calling() {
        return missing(kind); // for this time; the search for the real library goes on
    }
    // The first call of NCCL in this process comes through here, whichever it is.
    let address = catch_unwind(|| {
        logging::init();
        stats::report::init();
        let (_, _, since) = SYMBOLS[slot as usize];
        match load::real_library() {
            None => absent(name, kind),
            Some(library) => library.find(name).unwrap_or_else(|| {
                log::error!(
                    "{name} appeared in NCCL {since}, the loaded {} ({}) lacks it; it answers ncclInvalidUsage",
                    library.version(),
                    library.path().display()
                );
                missing(kind)
            }),
        }
    })
    .unwrap_or_else(|_| absent(name, kind));
    TABLE[slot as usize].store(address.cast_mut(), Ordering::Relaxed);
    address
}

/// `ncclTeam_t`.
#[repr(C)]
struct Team {
    ranks_rank_stride: [c_int; 3],
}

extern "C" fn answer_nothing() {}
extern "C" fn answer_minus_one() -> c_int {
    -1
}
extern "C" fn answer_no_team() -> Team {
    Team { ranks_rank_stride: [0; 3] }
}
extern "C" fn answer_invalid_usage() -> NcclResult {
    NcclResult::INVALID_USAGE
}
extern "C" fn answer_system_error() -> NcclResult {
    NcclResult::SYSTEM_ERROR
}
extern "C" fn answer_lacking() -> *const c_char {
    c"the loaded NCCL lacks this function".as_ptr()
}
extern "C" fn answer_no_nccl() -> *const c_char {
    c"flashcomm found no real NCCL; set FLASHCOMM_NCCL_LIB to its libnccl.so.2".as_ptr()
}
extern "C" fn error_string(result: NcclResult) -> *const c_char {
    match result {
        NcclResult::SUCCESS => c"no error",
        NcclResult::SYSTEM_ERROR => c"flashcomm found no real NCCL; set FLASHCOMM_NCCL_LIB to its libnccl.so.2",
        _ => c"unknown result code",
    }
    .as_ptr()
}

/// What answers for a function that the loaded library lacks.
fn missing(kind: Kind) -> *const () {
    match kind {
        Kind::Result => answer_invalid_usage as *const (),
        other => by_kind(other, answer_lacking),
    }
}

/// What answers where there is no library at all.
fn absent(name: &str, kind: Kind) -> *const () {
    match kind {
        Kind::Result => answer_system_error as *const (),
        Kind::String if name.ends_with("GetErrorString") => error_string as *const (),
        other => by_kind(other, answer_no_nccl),
    }
}

fn by_kind(kind: Kind, text: extern "C" fn() -> *const c_char) -> *const () {
    match kind {
        Kind::Result => answer_invalid_usage as *const (),
        Kind::String => text as *const (),
        Kind::Void => answer_nothing as *const (),
        Kind::Int => answer_minus_one as *const (),
        Kind::Team => answer_no_team as *const (),
    }
}

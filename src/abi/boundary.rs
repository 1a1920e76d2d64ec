//! What holds for every exported function.
//!
//! * **One guard** (invariant I4). Each body runs in [`guarded`]: nothing unwinds into the caller, and nothing exits. A panic
//!   is a bug of ours; it is logged and answered with `ncclInternalError`.
//! * **NULL is the real library's to answer.** A function of NCCL's forwards a null communicator or buffer as it came. One of
//!   flashcomm's own answers `FLASHCOMM_INVALID_ARGUMENT` where it needs what is null.
//! * **Re-entered calls go straight through.** NCCL calls its own public functions, which land here again
//!   ([`in_real_nccl`]).
//! * **Each function of NCCL's has a twin** for its profiling interface, `pncclX`. It does the same, so that a profiler's
//!   layer above us does not lose the compression, and calls the twin of the real library ([`nccl_exports`]).

use std::ffi::c_char;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::nccl::NcclResult;
use crate::thread::{self, Thread};

/// Defines exported functions with NCCL's names and arguments, written as in nccl.h; behind the slash the name of the twin.
/// The first name in the parentheses is what the body calls the real function by, which gets the arguments as they came.
/// Without an arrow it answers `ncclResult_t`.
macro_rules! nccl_exports {
    ($(
        $(#[$doc:meta])*
        pub fn $name:ident / $twin:ident($real:ident; $($arg:ident: $type:ty),* $(,)?) $(-> $answer:ty)? $body:block
    )*) => {$(
        $crate::abi::boundary::nccl_exports!(@one [$(#[$doc])*] $name $real ($($arg: $type),*) [$($answer)?] $body);
        $crate::abi::boundary::nccl_exports!(
            @one [#[doc = concat!("The twin of [`", stringify!($name), "`].")]]
            $twin $real ($($arg: $type),*) [$($answer)?] $body
        );
    )*};
    (@one [$(#[$doc:meta])*] $name:ident $real:ident ($($arg:ident: $type:ty),*) [] $body:block) => {
        $crate::abi::boundary::nccl_exports!(
            @one [$(#[$doc])*] $name $real ($($arg: $type),*) [$crate::nccl::NcclResult] $body
        );
    };
    (@one [$(#[$doc:meta])*] $name:ident $real:ident ($($arg:ident: $type:ty),*) [$answer:ty] $body:block) => {
        $(#[$doc])*
        ///
        /// # Safety
        /// As NCCL documents.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> $answer {
            // SAFETY: the caller's own arguments.
            let $real = || unsafe { $crate::real::real!($name, fn($($type),*) -> $answer)($($arg),*) };
            $crate::abi::boundary::guarded(stringify!($name), || $body)
        }
    };
}
pub(super) use nccl_exports;

/// What an export of NCCL's answers.
pub(super) trait Answer {
    /// Where it has panicked.
    const AFTER_PANIC: Self;
}

impl Answer for NcclResult {
    const AFTER_PANIC: Self = NcclResult::INTERNAL_ERROR;
}

impl Answer for *const c_char {
    const AFTER_PANIC: Self = c"an internal error of flashcomm".as_ptr();
}

/// Runs the body of an export.
#[inline]
pub(super) fn guarded<T: Answer>(function: &'static str, body: impl FnOnce() -> T) -> T {
    guarded_or(function, T::AFTER_PANIC, body)
}

/// As [`guarded`], of one that answers something else.
#[inline]
pub(super) fn guarded_or<T>(function: &'static str, after_panic: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        log::error!("{function}: an internal error of flashcomm; please report it. FLASHCOMM_ENABLE=0 avoids it");
        after_panic
    })
}

/// Whether this thread is inside the real library, called by one of our exports.
pub(super) fn is_reentered() -> bool {
    thread::current().is_in_real_nccl()
}

/// Calls the real library such that calls it makes back to us are recognized.
pub(super) fn in_real_nccl(call: impl FnOnce() -> NcclResult) -> NcclResult {
    thread::current().in_real_nccl(false, |_| {}, call)
}

/// As [`in_real_nccl`], to forward a call of the application's; after `first` where this is no re-entered one.
#[inline]
pub(super) fn forward_after(first: impl FnOnce(&Thread), call: impl FnOnce() -> NcclResult) -> NcclResult {
    thread::current().in_real_nccl(true, first, call)
}

//! The C functions, by the names and signatures of NVIDIA's `cuda.h`.

#![allow(non_snake_case, reason = "the driver's names")]
#![allow(clippy::missing_safety_doc, reason = "every function is as NVIDIA documents it")]

pub mod context;
pub mod green;
pub mod launch;
pub mod memory;
pub mod sim;
pub mod stream;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::cu_result::{CuResult, Result};
use crate::device::{self, Current};
use crate::stream::Stream;

/// Runs the body of an export; a panic is a bug of the simulator, and is told as an unspecified failure.
fn answer(body: impl FnOnce() -> Result<()>) -> i32 {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => CuResult::SUCCESS.0,
        Ok(Err(code)) => code.0,
        Err(_) => CuResult::LAUNCH_FAILED.0,
    }
}

/// Defines exports of the driver.
macro_rules! driver {
    ($(fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        #[doc = concat!("`", stringify!($name), "`.")]
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> i32 {
            $crate::api::answer(|| $body)
        }
    )*};
}
use driver;

/// Writes an answer where the caller wants it.
fn put<T>(place: *mut T, value: T) -> Result<()> {
    if place.is_null() {
        return Err(CuResult::INVALID_VALUE);
    }
    // SAFETY: not null, and the caller of the driver vouches for the place.
    unsafe { place.write(value) };
    Ok(())
}

/// The stream of a handle, special ones included.
fn stream(handle: usize) -> Result<Arc<Stream>> {
    match handle {
        0..=2 => Ok(match (device::current_context()?, handle) {
            (Current::Green(green), _) => green.default_stream(),
            (Current::Primary(device), 2) => Stream::per_thread(device),
            (Current::Primary(device), _) => Stream::legacy(device),
        }),
        _ => Stream::find(handle).ok_or(CuResult::INVALID_HANDLE),
    }
}

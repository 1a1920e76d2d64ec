//! What the tests of whole jobs share: a rank's view of NCCL (through the shim) and of the driver, jobs of threads and
//! of processes, and what must come out of an all-reduce.
//!
//! The tests start themselves again, with the shim's settings in the environment and, unless
//! `FLASHCOMM_TEST_REAL=1` asks for the machine's own driver and NCCL, with the simulators' directory in front of the
//! loader's path. Everything is found by `dlopen` and `dlsym`, so the same programs run on a GPU unchanged.
//!
//! Nothing here depends on the library: a job sees it as an application does.

#![allow(missing_docs, reason = "most names here are NCCL's, the driver's, or those of include/flashcomm.h")]

mod api;
mod control;
mod device;
mod held;
mod jobs;
mod libraries;
mod values;

pub use api::{AVG, Api, Config, SUM, UniqueId, api, dtype, init, try_init, unique_id};
pub use control::{Info, Stats, Way, last_error, n_compressed, n_exact, nccl_last_error, pnccl_last_error};
pub use device::{Event, Graph, Green, Memory, Stream, order, use_device};
pub use held::{Held, open_files, shared_memory_names};
pub use jobs::{Process, Settings, all_succeed, in_process, processes, threads};
pub use libraries::{built, is_real, root};
pub use values::{
    Case, Random, exact_sum, input, inputs, legs, legs_of, reference, reference_of, same_bits, type_of, whole_numbers,
};

/// Calls a function of [`Api`] and wants success.
#[macro_export]
macro_rules! ok {
    ($name:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: as NVIDIA documents; the tests see to it.
        #[allow(unused_unsafe, clippy::macro_metavars_in_unsafe, reason = "what tests pass to C is theirs to get right")]
        let result = unsafe { ($crate::api().$name)($($arg),*) };
        assert_eq!(result, 0, "{}", stringify!($name));
    }};
}

/// Calls a function of [`Api`].
#[macro_export]
macro_rules! call {
    ($name:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: as NVIDIA documents; the tests see to it.
        #[allow(unused_unsafe, clippy::macro_metavars_in_unsafe, reason = "what tests pass to C is theirs to get right")]
        unsafe { ($crate::api().$name)($($arg),*) }
    }};
}

//! NCCL's name for `libflashcomm.so`. There is no code here: all of it is in how `build.rs` links.
//!
//! A preloaded shim wins the lookup of symbols. It is not met by who opens NCCL by name and asks
//! that handle, as XLA does (JAX) and CuPy. But the loader has one library of a SONAME: where one
//! called `libnccl.so.2` is loaded, every later `dlopen("libnccl.so.2")` is answered with it, and so
//! is every `DT_NEEDED` of that name. `libflashcomm_soname.so` is called so, and is preloaded behind
//! the shim by `flashcomm run`.
//!
//! The shim cannot have that name itself: who links `-lflashcomm` would get NVIDIA's library. A
//! link or a copy of the shim under another name would be a second shim, which knows nothing of the
//! first one's communicators.
//!
//! What is looked up in it comes from `libflashcomm.so`, of which it is an auxiliary filter
//! (`DT_AUXILIARY`). glibc takes the shim that is preloaded, by its SONAME, and otherwise the one
//! beside this file (`DT_RUNPATH $ORIGIN`). A `DT_NEEDED` would do as well, since `dlsym` searches
//! a handle's dependencies; it would want the shim at link time, which cargo cannot say, and would
//! refuse to load without it.
//!
//! Where it is loaded the real NCCL is loaded by nobody: the shim looks where the process would
//! have found it (`src/nccl/search_path.rs`).

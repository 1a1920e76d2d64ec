//! Names the library as programs know it. It is never unloaded: its streams have threads.

fn main() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1,-z,nodelete");
    println!("cargo:rerun-if-changed=build.rs");
}

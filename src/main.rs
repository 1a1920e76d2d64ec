//! The `flashcomm` command: sees, proves and measures what the shim does, on a machine with GPUs or without.
//!
//! It calls NCCL as an application would, never from inside: its ranks live in child processes that open the shim, the
//! real NCCL and the driver with `dlopen(RTLD_LOCAL)` and call what `dlsym` finds on those handles. Of the library's own
//! code it uses the settings (`config`) and, for `bench --kernels`, the kernels. That code comes with our definitions of
//! `ncclAllReduce` and its like, but an executable exports nothing to the libraries it opens, so the real NCCL is
//! never shadowed by them; a test looks at the command's dynamic symbols.

mod cli;

fn main() -> std::process::ExitCode {
    cli::main()
}

//! The functions that src/abi defines, and those of the real NCCL that the shim calls, have the prototypes of nccl.h.
//!
//! Rust names the type of each function; written as a C declaration behind `#include <nccl.h>`, a compiler refuses it
//! where it differs.

use std::any::type_name_of_val;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::collectives::*;
use super::creation::*;
use super::group::*;
use super::lifecycle::*;
use crate::real;

/// `$function` as a function pointer of as many arguments as there are underscores.
macro_rules! declarations {
    ($($name:ident = $function:path: ($($arg:tt)*);)*) => {
        vec![$({
            let pointer: unsafe extern "C" fn($($arg),*) -> _ = $function;
            (stringify!($name), type_name_of_val(&pointer))
        }),*]
    };
}

/// The same for the calls in src/real, which are Rust functions.
macro_rules! called {
    ($($name:ident = $function:path: ($($arg:tt)*);)*) => {
        vec![$({
            let pointer: unsafe fn($($arg),*) -> _ = $function;
            (stringify!($name), type_name_of_val(&pointer))
        }),*]
    };
}

fn own() -> Vec<(&'static str, &'static str)> {
    declarations! {
        ncclAllGather = ncclAllGather: (_ _ _ _ _ _);
        ncclAllGatherConfig = ncclAllGatherConfig: (_ _ _ _ _ _ _);
        ncclAllReduce = ncclAllReduce: (_ _ _ _ _ _ _);
        ncclAllReduceConfig = ncclAllReduceConfig: (_ _ _ _ _ _ _ _);
        ncclAlltoAll = ncclAlltoAll: (_ _ _ _ _ _);
        ncclAlltoAllConfig = ncclAlltoAllConfig: (_ _ _ _ _ _ _);
        ncclBcast = ncclBcast: (_ _ _ _ _ _);
        ncclBroadcast = ncclBroadcast: (_ _ _ _ _ _ _);
        ncclBroadcastConfig = ncclBroadcastConfig: (_ _ _ _ _ _ _ _);
        ncclCommAbort = ncclCommAbort: (_);
        ncclCommDestroy = ncclCommDestroy: (_);
        ncclCommGetAsyncError = ncclCommGetAsyncError: (_ _);
        ncclCommGrow = ncclCommGrow: (_ _ _ _ _ _);
        ncclCommInitAll = ncclCommInitAll: (_ _ _);
        ncclCommInitRank = ncclCommInitRank: (_ _ _ _);
        ncclCommInitRankConfig = ncclCommInitRankConfig: (_ _ _ _ _);
        ncclCommInitRankScalable = ncclCommInitRankScalable: (_ _ _ _ _ _);
        ncclCommRevoke = ncclCommRevoke: (_ _);
        ncclCommShrink = ncclCommShrink: (_ _ _ _ _ _);
        ncclCommSplit = ncclCommSplit: (_ _ _ _ _);
        ncclGather = ncclGather: (_ _ _ _ _ _ _);
        ncclGatherConfig = ncclGatherConfig: (_ _ _ _ _ _ _ _);
        ncclGetLastError = ncclGetLastError: (_);
        ncclGroupEnd = ncclGroupEnd: ();
        ncclGroupSimulateEnd = ncclGroupSimulateEnd: (_);
        ncclGroupStart = ncclGroupStart: ();
        ncclRecv = ncclRecv: (_ _ _ _ _ _);
        ncclReduce = ncclReduce: (_ _ _ _ _ _ _ _);
        ncclReduceConfig = ncclReduceConfig: (_ _ _ _ _ _ _ _ _);
        ncclReduceScatter = ncclReduceScatter: (_ _ _ _ _ _ _);
        ncclReduceScatterConfig = ncclReduceScatterConfig: (_ _ _ _ _ _ _ _);
        ncclScatter = ncclScatter: (_ _ _ _ _ _ _);
        ncclScatterConfig = ncclScatterConfig: (_ _ _ _ _ _ _ _);
        ncclSend = ncclSend: (_ _ _ _ _ _);
    }
}

fn the_real_ones_called() -> Vec<(&'static str, &'static str)> {
    called! {
        ncclGroupStart = real::group_start: ();
        ncclGroupEnd = real::group_end: ();
        ncclAllReduce = real::all_reduce: (_ _ _ _ _ _ _);
        ncclAllGather = real::all_gather: (_ _ _ _ _ _);
        ncclSend = real::send: (_ _ _ _ _ _);
        ncclRecv = real::recv: (_ _ _ _ _ _);
        ncclCommCount = real::comm_count: (_ _);
        ncclCommUserRank = real::comm_user_rank: (_ _);
        ncclCommCuDevice = real::comm_cu_device: (_ _);
        ncclCommGetAsyncError = real::comm_get_async_error: (_ _);
    }
}

/// `name` with the Rust type `signature` as a C declaration.
fn in_c(name: &str, signature: &str) -> String {
    let (_, rest) = signature.split_once("fn(").expect(signature);
    let (arguments, result) = rest.rsplit_once(") -> ").expect(signature);
    let arguments: Vec<String> = arguments.split(", ").filter(|argument| !argument.is_empty()).map(type_in_c).collect();
    let arguments = if arguments.is_empty() { "void".to_string() } else { arguments.join(", ") };
    format!("{} {name}({arguments});\n", type_in_c(result))
}

fn type_in_c(rust: &str) -> String {
    if let Some(pointee) = rust.strip_prefix("*const ") {
        return format!("const {}*", type_in_c(pointee));
    }
    if let Some(pointee) = rust.strip_prefix("*mut ") {
        return match pointee {
            "flashcomm::nccl::types::Comm" => "ncclComm_t".into(),
            "flashcomm::nccl::types::Stream" => "cudaStream_t".into(),
            _ => format!("{}*", type_in_c(pointee)),
        };
    }
    match rust {
        "i8" | "u8" => "char", // C's is signed or not
        "i32" => "int",
        "usize" => "size_t",
        "core::ffi::c_void" => "void",
        "flashcomm::nccl::types::NcclResult" => "ncclResult_t",
        "flashcomm::nccl::types::DataType" => "ncclDataType_t",
        "flashcomm::nccl::types::RedOp" => "ncclRedOp_t",
        "flashcomm::nccl::types::CollConfig" => "ncclCollConfig_t",
        "flashcomm::nccl::types::CommConfig" => "ncclConfig_t",
        "flashcomm::nccl::types::SimInfo" => "ncclSimInfo_t",
        "flashcomm::nccl::types::UniqueId" => "ncclUniqueId",
        other => panic!("no C type is known for {other}"),
    }
    .into()
}

/// What the compiler says of `declarations` behind the real nccl.h; nothing when it takes them.
fn compile(declarations: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let nccl = PathBuf::from(std::env::var_os("FLASHCOMM_TEST_NCCL").expect("run ./scripts/test.sh, which sets it"));
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let cuda = homes
        .chain([root.join(".toolkit/cuda")])
        .find(|home| home.join("include/cuda_runtime.h").exists())
        .expect("CUDA's headers; run ./scripts/setup.sh");
    let file = tempfile::Builder::new().suffix(".c").tempfile().unwrap();
    std::fs::write(file.path(), format!("#include <nccl.h>\n{declarations}")).unwrap();
    let output = Command::new("cc")
        .args(["-std=c11", "-fsyntax-only", "-Werror", "-isystem"])
        .arg(nccl.parent().unwrap().join("../include"))
        .arg("-isystem")
        .arg(cuda.join("include"))
        .arg(file.path())
        .output()
        .expect("cc");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn prototypes_are_those_of_nccl_h() {
    let all: String = own().iter().chain(&the_real_ones_called()).map(|(name, rust)| in_c(name, rust)).collect();
    assert_eq!(compile(&all), "", "{all}");
}

#[test]
fn a_prototype_that_differs_is_refused() {
    let swapped = "ncclResult_t ncclSend(const void*, size_t, ncclDataType_t, int, cudaStream_t, ncclComm_t);";
    assert!(compile(swapped).contains("conflicting types"));
}

#[test]
fn every_function_of_our_own_is_compared() {
    let listed: Vec<&str> = own().iter().map(|(name, _)| *name).collect();
    let rows = include_str!("../nccl/symbols.rs").lines().map(str::trim);
    let defined: Vec<&str> =
        rows.filter_map(|row| row.strip_prefix("own ")).map(|row| row.split_whitespace().next().unwrap()).collect();
    assert_eq!(listed, defined);
}

//! `include/flashcomm.h` is what cbindgen makes of src/abi/control.rs and way.rs, and it compiles alone and beside the real nccl.h.

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn header() -> PathBuf {
    root().join("include/flashcomm.h")
}

/// Compiles `source` without making anything of it; the compiler's words where it does not.
fn compile(compiler: &str, flags: &[&str], extension: &str, source: &str) {
    let file = tempfile::Builder::new().suffix(extension).tempfile().unwrap();
    std::fs::write(file.path(), source).unwrap();
    let output = Command::new(compiler)
        .args(["-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I"])
        .arg(root().join("include"))
        .args(flags)
        .arg(file.path())
        .output()
        .unwrap_or_else(|error| panic!("{compiler}: {error}; run ./scripts/setup.sh"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

const PROGRAM: &str = "#include <flashcomm.h>\n\
    int main(void) { int version; flashcommStats_t stats; stats.size = sizeof stats;\n\
    return flashcommGetVersion(&version) || *flashcommGetLastError(0) || flashcommGetStats(&stats) == FLASHCOMM_SUCCESS ||\n\
    flashcommGetCommStats(0, &stats) == FLASHCOMM_INVALID_ARGUMENT || !flashcommReasonName(0) ||\n\
    flashcommGetCommInfo(0, 0) == FLASHCOMM_INVALID_USAGE || flashcommSetCommBits(0, 4, 8) == FLASHCOMM_REMOTE_ERROR ||\n\
    flashcommGetCommWay(0, 0, FLASHCOMM_WAY_COMPRESSED, 0) || flashcommSetCommEnabled(0, FLASHCOMM_ON); }\n";

#[test]
fn the_header_is_up_to_date() {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).expect("cbindgen.toml");
    let bindings = cbindgen::Builder::new()
        .with_config(config)
        .with_src(root().join("src/abi/control.rs"))
        .with_src(root().join("src/abi/way.rs"))
        .generate()
        .expect("control.rs and way.rs");
    let mut generated = Vec::new();
    bindings.write(&mut generated);
    if std::env::var_os("FLASHCOMM_UPDATE_HEADER").is_some() {
        std::fs::write(header(), &generated).unwrap();
    }
    let committed = std::fs::read(header()).expect("include/flashcomm.h");
    assert!(
        committed == generated,
        "run FLASHCOMM_UPDATE_HEADER=1 cargo nextest run --test cpu header; it is to be:\n{}",
        String::from_utf8_lossy(&generated)
    );
}

#[test]
fn the_header_compiles_alone_as_c99() {
    compile("cc", &["-std=c99", "-pedantic"], ".c", PROGRAM);
}

#[test]
fn the_header_compiles_alone_as_cxx17() {
    compile("c++", &["-std=c++17", "-pedantic"], ".cpp", PROGRAM);
}

#[test]
fn the_header_compiles_beside_the_real_nccl_h() {
    let nccl = PathBuf::from(std::env::var_os("FLASHCOMM_TEST_NCCL").expect("run ./scripts/test.sh, which sets it"));
    let nccl_include = nccl.parent().unwrap().join("../include");
    let cuda_include = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(std::env::var_os)
        .map(PathBuf::from)
        .chain([root().join(".toolkit/cuda")])
        .map(|home| home.join("include"))
        .find(|include| include.join("cuda_runtime.h").exists())
        .expect("CUDA's headers; run ./scripts/setup.sh");
    let flags = ["-isystem", nccl_include.to_str().unwrap(), "-isystem", cuda_include.to_str().unwrap()];
    let beside = format!("#include <nccl.h>\n{PROGRAM}");
    compile("cc", &[&["-std=c11"], &flags[..]].concat(), ".c", &beside);
    compile("c++", &[&["-std=c++17"], &flags[..]].concat(), ".cpp", &beside);
}

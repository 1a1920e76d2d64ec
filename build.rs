//! Compiles `kernels/*.cu` to one fatbin, `$OUT_DIR/flashcomm.fatbin`, and nothing else.
//!
//! What Rust and CUDA both know is written in Rust: `src/kernels/shared.rs` and `src/kernels/instances.rs`. Here it becomes
//! `$OUT_DIR/shared.cuh`, which the kernels include: constants, structs, and a list of kernels for each verb.
//!
//! The compiler is `$NVCC`, or that of `$CUDA_HOME` or `$CUDA_PATH`, or the project's own (`scripts/setup.sh`), or that
//! on the PATH. It is one translation unit, because a fatbin holds one program per architecture. The architectures never
//! depend on the machine that builds: `FLASHCOMM_CUDA_ARCHS` ("90" or "80,90") narrows the fixed list.

use std::env;
use std::fmt::Write;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

use self::element::ElementType;
use self::instances::{Instance, Verb};
use self::shared::{CONSTANTS, FLOAT_CONSTANTS, LAYOUTS};

#[path = "src/element.rs"]
#[allow(dead_code, reason = "the library uses the rest")]
mod element;
#[path = "src/kernels/instances.rs"]
#[allow(dead_code, reason = "the library and the simulator use the rest")]
mod instances;
#[path = "src/kernels/shared.rs"]
#[allow(dead_code, reason = "the library and the simulator use the rest")]
mod shared;

/// Compute capabilities times ten; 8.6 and 8.9 run the code of 8.0. The last is also embedded as PTX, for GPUs to come.
const ARCHS: &str = "80,90,100,120";

fn main() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libflashcomm.so");
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "FLASHCOMM_CUDA_ARCHS"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed=build.rs");

    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let (unit, shared) = (out.join("all.cu"), shared_header());
    fs::write(&unit, includes(&root.join("kernels"))).expect("OUT_DIR is writable");
    fs::write(out.join("shared.cuh"), &shared).expect("OUT_DIR is writable");

    let mut nvcc = Command::new(find_nvcc(&root));
    // Hundreds of kernels that differ in little: compressed for size they take a twentieth of the room.
    nvcc.args(["-std=c++17", "-O3", "-fatbin", "--compress-mode=size", "--threads", "2", "-I"])
        .arg(root.join("kernels"))
        .arg("-I")
        .arg(&out);
    nvcc.args(architectures()).arg(&unit);
    let fatbin = out.join("flashcomm.fatbin");
    let kept = Kept::of(&root, &nvcc, &shared);
    if kept.as_ref().is_some_and(|kept| kept.bring(&fatbin)) {
        return;
    }
    match nvcc.arg("-o").arg(&fatbin).output() {
        Ok(output) if output.status.success() => kept.iter().for_each(|kept| kept.keep(&fatbin)),
        Ok(output) => fail(&format!(
            "nvcc failed: {nvcc:?}\n{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )),
        Err(error) => fail(&format!("cannot run {nvcc:?}: {error}\nrun ./scripts/setup.sh, which installs a compiler")),
    }
}

/// The fatbin of the last build, in the folder that `scripts/setup.sh` has made: minutes saved in another profile, under clippy
/// and under a sanitizer. One for each list of architectures.
struct Kept {
    fatbin: PathBuf,
    key: PathBuf,
    now: String,
}

impl Kept {
    /// None where there is no such folder, or something cannot be read.
    fn of(root: &Path, nvcc: &Command, shared: &str) -> Option<Self> {
        let folder = root.join(".toolkit");
        if !folder.is_dir() {
            return None;
        }
        let version = Command::new(nvcc.get_program()).arg("--version").output().ok()?.stdout;
        let flags = architectures();
        let mut now = format!("{version:?} {flags:?} {:?}\n{shared}", fs::read(root.join("build.rs")).ok()?);
        add_sources(&root.join("kernels"), &mut now).ok()?;
        let name = flags.iter().filter_map(|flag| flag.rsplit_once("code=")).map(|(_, code)| code).collect::<Vec<_>>();
        let at = folder.join(format!("kernels-{}", name.join("-")));
        Some(Self { fatbin: at.with_extension("fatbin"), key: at.with_extension("key"), now })
    }

    fn bring(&self, to: &Path) -> bool {
        fs::read_to_string(&self.key).is_ok_and(|kept| kept == self.now) && fs::copy(&self.fatbin, to).is_ok()
    }

    /// The key goes first and comes last: what is beside a key is always its own.
    fn keep(&self, from: &Path) {
        let _ = fs::remove_file(&self.key);
        if fs::copy(from, &self.fatbin).is_ok() {
            let _ = fs::write(&self.key, &self.now);
        }
    }
}

/// Names and texts of everything below a folder, in an order that is always the same.
fn add_sources(folder: &Path, to: &mut String) -> io::Result<()> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    paths.sort();
    for path in &paths {
        *to += &format!("{:?}\n", path.file_name());
        if path.is_dir() { add_sources(path, to)? } else { *to += &fs::read_to_string(path)? }
    }
    Ok(())
}

/// `shared.cuh`: what Rust and CUDA both know.
fn shared_header() -> String {
    let mut header = String::from(
        "// Written by build.rs from src/kernels/shared.rs and src/kernels/instances.rs, which explain it.\n#pragma once\n\n\
         #include <cstddef>\n#include <cstdint>\n\nnamespace flashcomm {\n\n",
    );
    for (type_, name, value) in CONSTANTS {
        let _ = writeln!(header, "constexpr {type_} {name} = {value};");
    }
    for (name, value) in FLOAT_CONSTANTS {
        let _ = writeln!(header, "constexpr float {name} = {value:e}f;");
    }
    for layout in LAYOUTS {
        let name = layout.name;
        let _ = writeln!(header, "\nstruct {name} {{");
        for (field, type_, _) in layout.fields {
            let _ = writeln!(header, "  {};", declared(field, type_));
        }
        let _ = writeln!(header, "}};\nstatic_assert(sizeof({name}) == {}, \"as Rust has it\");", layout.n_bytes);
        for (field, _, offset) in layout.fields {
            let _ = writeln!(header, "static_assert(offsetof({name}, {field}) == {offset}, \"as Rust has it\");");
        }
    }
    let instances = Instance::all();
    for verb in Verb::ALL {
        // X(name, type, code, widths...), or X(name, type) where nothing is coded
        let _ = write!(header, "\n#define FLASHCOMM_EACH_{}(X)", verb.name().to_uppercase());
        for instance in instances.iter().filter(|instance| instance.verb() == verb) {
            let type_ = match instance.element() {
                ElementType::Fp16 => "__half",
                ElementType::Bf16 => "__nv_bfloat16",
                ElementType::Fp32 => "float",
            };
            let code = instance.codings().first().map_or(String::new(), |(code, _)| format!(", {}", code.name()));
            let widths: String = instance.codings().iter().map(|(_, width)| format!(", {}", width.bits())).collect();
            let _ = write!(header, " \\\n  X({}, {type_}{code}{widths})", instance.name());
        }
        header.push('\n');
    }
    header + "\n}  // namespace flashcomm\n"
}

/// A field of a struct, as CUDA declares it.
fn declared(field: &str, rust: &str) -> String {
    match rust.strip_prefix('[').and_then(|array| array.strip_suffix("; MAX_WORLD]")) {
        Some(each) => format!("{} {field}[kMaxWorld]", cuda_type(each)),
        None => format!("{} {field}", cuda_type(rust)),
    }
}

fn cuda_type(rust: &str) -> String {
    if let Some(target) = rust.strip_prefix("*const ") {
        return format!("const {}*", cuda_type(target));
    }
    if let Some(target) = rust.strip_prefix("*mut ") {
        return format!("{}*", cuda_type(target));
    }
    match rust {
        "c_void" => "void".into(),
        "u8" => "uint8_t".into(),
        "u32" => "uint32_t".into(),
        "u64" => "uint64_t".into(),
        "f32" => "float".into(),
        name if LAYOUTS.iter().any(|layout| layout.name == name) => name.into(),
        _ => fail(&format!("src/kernels/shared.rs has a field of type {rust}, which build.rs cannot say in CUDA")),
    }
}

/// A unit that includes every kernel file, and asks for every kernel of the list.
fn includes(kernels: &Path) -> String {
    let entries = fs::read_dir(kernels).expect("kernels/ is there");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("readable").path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "cu"));
    files.sort();
    let includes = files.iter().map(|file| format!("#include \"{}\"\n", file.display()));
    let asked = Instance::all().into_iter().map(|instance| {
        let name = instance.name();
        format!("static_assert(sizeof(decltype(&flashcomm::{name})) > 0, \"in src/kernels/instances.rs\");\n")
    });
    includes.chain(asked).collect()
}

fn find_nvcc(root: &Path) -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC").filter(|nvcc| !nvcc.is_empty()) {
        return nvcc.into();
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(PathBuf::from);
    let candidates = homes.chain([root.join(".toolkit/cuda")]).map(|home| home.join("bin/nvcc"));
    candidates.into_iter().find(|nvcc| nvcc.exists()).unwrap_or_else(|| "nvcc".into())
}

fn architectures() -> Vec<String> {
    let chosen = env::var("FLASHCOMM_CUDA_ARCHS").ok().filter(|chosen| !chosen.is_empty());
    let chosen = chosen.unwrap_or_else(|| ARCHS.into());
    let archs: Vec<&str> = chosen.split(',').map(str::trim).collect();
    if let Some(bad) = archs.iter().find(|arch| arch.parse::<u32>().is_err() || arch.len() > 3) {
        fail(&format!("FLASHCOMM_CUDA_ARCHS has {bad:?}; it takes compute capabilities such as \"90\" or {ARCHS:?}"));
    }
    let mut flags: Vec<String> =
        archs.iter().flat_map(|a| ["-gencode".into(), format!("arch=compute_{a},code=sm_{a}")]).collect();
    let last = archs.last().expect("split gives at least one");
    flags.extend(["-gencode".into(), format!("arch=compute_{last},code=compute_{last}")]);
    flags
}

fn fail(message: &str) -> ! {
    for line in message.lines() {
        println!("cargo:warning={line}");
    }
    eprintln!("{message}");
    exit(1);
}

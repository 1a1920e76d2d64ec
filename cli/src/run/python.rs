//! The Python that a command runs, and what of NCCL it has installed.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

use super::elf::{self, NcclOf};

/// What a Python has installed.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub struct Packages {
    /// The directory of the package torch.
    pub torch: Option<PathBuf>,
    /// The libnccl.so.2 of the package nvidia-nccl.
    pub nccl: Option<PathBuf>,
}

/// Imports nothing that it finds: an import of torch takes seconds, and a driver.
const LOOK: &str = r#"
import importlib.util, json, os, sys
sys.path = [path for path in sys.path if path]
spec = importlib.util.find_spec("torch")
torch = list(spec.submodule_search_locations or [None])[0] if spec else None
nccl = [os.path.join(path, "nvidia/nccl/lib/libnccl.so.2") for path in sys.path]
nccl = next(filter(os.path.exists, nccl), None)
print(json.dumps({"torch": torch, "nccl": nccl}))
"#;

/// Asks a Python what it has; `None` where it does not run.
pub fn packages_of(python: &Path) -> Option<Packages> {
    let asked = Command::new(python).args(["-c", LOOK]).stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    // What a sitecustomize prints comes first.
    serde_json::from_str(String::from_utf8(asked.stdout).ok()?.lines().last()?).ok()
}

/// The NCCL of a Python: that which its PyTorch loads, or else that of its package nvidia-nccl.
pub fn nccl_of(python: &Path) -> Option<PathBuf> {
    let packages = packages_of(python)?;
    let torch = packages.torch.map(|torch| torch.join(TORCH_CUDA)).filter(|torch| torch.exists());
    match torch.and_then(|torch| elf::nccl_of(&torch).ok()) {
        Some(NcclOf::Loader(Some(path))) => Some(path),
        _ => packages.nccl,
    }
}

/// The library that calls NCCL, in the directory of the package torch.
pub const TORCH_CUDA: &str = "lib/libtorch_cuda.so";

/// The Python that `command` runs, as far as its words tell: itself, a script of Python's, or one that is started by
/// another program (`mpirun -n 2 python3 x.py`).
pub fn of_command(command: &[OsString]) -> Option<PathBuf> {
    command.iter().filter_map(|word| find(word)).find_map(|path| interpreter_of(&path))
}

/// The program that a word of a command names, as a shell finds it.
pub fn find(word: &OsStr) -> Option<PathBuf> {
    let is_program =
        |path: &PathBuf| path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0);
    if word.is_empty() {
        return None;
    }
    if word.as_bytes().contains(&b'/') {
        return Some(PathBuf::from(word)).filter(is_program);
    }
    let directories = env::var_os("PATH")?;
    env::split_paths(&directories).map(|directory| directory.join(word)).find(is_program)
}

/// `path` if it is a Python, or the one that its first line asks for.
fn interpreter_of(path: &Path) -> Option<PathBuf> {
    if is_python(path) {
        return Some(path.into());
    }
    let mut start = [0; 1024];
    let n_bytes = File::open(path).ok()?.read(&mut start).ok()?;
    let text = String::from_utf8_lossy(&start[..n_bytes]);
    let mut lines = text.lines();
    let first = lines.next()?.strip_prefix("#!")?.trim();
    let mut words = first.split_whitespace();
    let named = match Path::new(words.next()?).file_name()?.to_str()? {
        "env" => words.find(|word| !word.starts_with('-') && !word.contains('='))?.to_string(),
        // pip's way around paths that are too long for a first line, or hold spaces.
        "sh" => lines.next()?.strip_prefix("'''exec' ")?.trim_start_matches('"').split(['"', ' ']).next()?.to_string(),
        _ => first.split_whitespace().next()?.to_string(),
    };
    find(OsStr::new(&named)).filter(|path| is_python(path))
}

fn is_python(path: &Path) -> bool {
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    name.strip_prefix("python").is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.'))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn program(path: &Path, text: &str) {
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn the_python_of_a_command_is_found_in_its_words_and_first_lines() {
        let dir = tempfile::tempdir().unwrap();
        let [python, plain, long, other] = ["python3.11", "serve", "long", "other"].map(|name| dir.path().join(name));
        program(&python, "");
        program(&plain, &format!("#!{} -s\nprint()\n", python.display()));
        program(&long, &format!("#!/bin/sh\n'''exec' \"{}\" \"$0\" \"$@\"\n' '''\n", python.display()));
        program(&other, "#!/bin/bash\npython3 x.py\n");
        let of = |words: &[&Path]| of_command(&words.iter().map(|word| word.as_os_str().into()).collect::<Vec<_>>());
        let (mpirun, flag) = (Path::new("/bin/true"), Path::new("-n"));
        assert_eq!(of(&[&python, Path::new("x.py")]), Some(python.clone()));
        assert_eq!(of(&[mpirun, flag, &plain]), Some(python.clone()));
        assert_eq!(of(&[&long]), Some(python));
        assert_eq!(of(&[&other, Path::new("/nowhere/python3")]), None);
    }
}

//! What a job preloads: the shim, its other name behind it, and what the user has preloaded.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::{Refusal, elf};
use crate::client::machine::{self, RealNccl};

/// What stands in `LD_PRELOAD`.
pub struct Preload {
    shim: String,
    /// `libflashcomm_soname.so`, with which who opens `libnccl.so.2` by its name meets the shim.
    soname: Option<PathBuf>,
    by_user: Vec<String>,
}

impl Preload {
    /// The shim in front.
    ///
    /// # Errors
    /// Where the shim cannot be preloaded, or another one is already.
    pub fn new(shim: &Path) -> Result<Self> {
        let Some(text) = shim.to_str().filter(|text| !text.contains([':', ' '])) else {
            bail!(
                "LD_PRELOAD takes no path with a space or a colon, as {} has. Install flashcomm elsewhere",
                shim.display()
            );
        };
        let [by_user, by_system] = preloaded(shim);
        let foreign = by_user.iter().chain(&by_system).find(|path| is_flashcomm(Path::new(path)));
        if let Some(path) = foreign {
            let reason = format!("another flashcomm is preloaded already: {path}; this one is {text}");
            let cure =
                "Take it out of LD_PRELOAD (or /etc/ld.so.preload), or start the job by its own flashcomm".into();
            bail!("{}", Refusal { reason, cure });
        }
        Ok(Preload { shim: text.into(), soname: machine::soname_of(shim), by_user })
    }

    /// Leaves the other name out where it would do harm, or is not there: what is to be told of
    /// that. With it nobody loads the real NCCL but the shim, so a function that the shim has not
    /// got would be had by nobody.
    pub fn without_soname(&mut self, nccl: Option<&RealNccl>) -> Option<String> {
        const LOST: &str = "Who opens NCCL by its name, as JAX does, does not meet the shim";
        let file = machine::SONAME_FILE;
        if self.soname.is_none() {
            return Some(format!("no {file} beside the shim. {LOST}"));
        }
        let nccl = nccl?;
        let unknown = elf::functions_of_nccl(&nccl.path).into_iter().find(|name| !machine::is_known(name))?;
        self.soname = None;
        let at = nccl.path.display();
        Some(format!(
            "the NCCL at {at} is newer than this flashcomm, which lacks {unknown}: {file} is left out. {LOST}"
        ))
    }

    /// The value of `LD_PRELOAD`.
    pub fn value(&self) -> String {
        let soname = self.soname.iter().map(|path| path.to_string_lossy().into_owned());
        [self.shim.clone()].into_iter().chain(soname).chain(self.by_user.iter().cloned()).collect::<Vec<_>>().join(":")
    }
}

/// What else a text as of `LD_PRELOAD` has the loader load first.
fn others(preloads: &str, shim: &Path) -> Vec<String> {
    let soname = machine::soname_of(shim);
    let is_ours = |path: &&str| {
        let path = Path::new(path);
        is_same(path, shim) || soname.as_ref().is_some_and(|soname| is_same(path, soname))
    };
    preloads.split([':', ' ', '\n']).filter(|path| !path.is_empty() && !is_ours(path)).map(String::from).collect()
}

/// All that is preloaded beside the shim: by the user, and by the system.
fn preloaded(shim: &Path) -> [Vec<String>; 2] {
    let by_user = env::var("LD_PRELOAD").unwrap_or_default();
    let by_system = std::fs::read_to_string("/etc/ld.so.preload").unwrap_or_default();
    [by_user, by_system].map(|preloads| others(&preloads, shim))
}

/// Whether `path` is the file at `canonical`.
pub fn is_same(path: &Path, canonical: &Path) -> bool {
    path.canonicalize().is_ok_and(|path| path == canonical)
}

/// Whether a file is a shim, or one's other name.
pub fn is_flashcomm(path: &Path) -> bool {
    let is_named = |file: &str| path.file_name().is_some_and(|name| name == file);
    is_named(machine::SHIM_FILE) || is_named(machine::SONAME_FILE) || elf::defines(path, "flashcommGetVersion")
}

/// The NCCL, or the layer over one, that is preloaded. The shim finds it behind itself.
pub fn preloaded_nccl(shim: &Path) -> Option<RealNccl> {
    preloaded(shim).concat().into_iter().map(PathBuf::from).find_map(|path| {
        let opened = || machine::real_nccl(Some(&path)).ok().and_then(Result::ok);
        // What a name without a slash means is the loader's to say.
        if !path.to_string_lossy().contains('/') {
            return opened();
        }
        // A layer tells no version where there is nothing under it.
        let untold = || RealNccl { path: path.clone(), version: "of LD_PRELOAD".into(), lacks: vec![] };
        elf::defines(&path, "ncclGetVersion").then(|| opened().unwrap_or_else(untold))
    })
}

//! Bakes the commit into the command, as `FLASHCOMM_COMMIT`: what a file of measurements was made
//! with.
//!
//! It is the short hash of HEAD, `-dirty` behind it where a file that the command or the library is
//! made of differs from that commit, and `unknown` where there is no git or this is no checkout of
//! it, as in an unpacked archive. Nothing fails for want of it. It is asked again when HEAD moves
//! or one of those files changes, which compiles the command anyway.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What the command and the library are made of, seen from the root.
const SOURCES: [&str; 8] =
    ["Cargo.toml", "Cargo.lock", "build.rs", "src", "kernels", "wire/src", "cli/src", "cli/build.rs"];

fn main() {
    let here = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let root = here.parent().expect("a member of the workspace");
    for source in SOURCES.map(|source| root.join(source)) {
        watch(&source);
    }
    let commit = commit(root).unwrap_or_else(|| "unknown".into());
    println!("cargo:rustc-env=FLASHCOMM_COMMIT={commit}");
}

/// `None` where git has no answer.
fn commit(root: &Path) -> Option<String> {
    // An archive that is unpacked inside of another project's checkout is not that project's
    // commit.
    let top = PathBuf::from(git(root, &["rev-parse", "--show-toplevel"])?);
    if top.canonicalize().ok()? != root.canonicalize().ok()? {
        return None;
    }
    // HEAD names a branch; the branch's file, or that of all packed ones, names the commit. The log
    // has every move of HEAD.
    let branch = git(root, &["symbolic-ref", "--quiet", "HEAD"]).unwrap_or_default();
    for file in ["HEAD", "logs/HEAD", "packed-refs", &branch].into_iter().filter(|file| !file.is_empty()) {
        watch(&root.join(git(root, &["rev-parse", "--git-path", file])?));
    }
    let hash = git(root, &["rev-parse", "--short", "HEAD"])?;
    let changed = git(root, &[&["status", "--porcelain", "--"], &SOURCES[..]].concat())?;
    Some(if changed.is_empty() { hash } else { hash + "-dirty" })
}

/// Runs this again when a file changes. One that is missing would run it always.
fn watch(file: &Path) {
    if file.exists() {
        println!("cargo:rerun-if-changed={}", file.display());
    }
}

/// What git writes, without the end of the line.
fn git(root: &Path, arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(["--no-optional-locks", "-C"]).arg(root).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| text.trim_end().to_string())
}

//! What a library says of itself in its file: nothing is loaded for that.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use object::read::elf::ElfFile64;
use object::read::{Object, ObjectSymbol, ReadCache};
use object::{Endianness, elf};

/// NCCL, as libraries name it among those that they need.
const NCCL: &str = "libnccl.so.2";

/// How a library comes by its NCCL.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NcclOf {
    /// By the loader; a file where the library itself says in which directory.
    Loader(Option<PathBuf>),
    /// Not by the loader: it holds a copy, or has none.
    Itself,
}

/// How the library at `path` comes by its NCCL.
pub fn nccl_of(path: &Path) -> Result<NcclOf> {
    let cache = ReadCache::new(File::open(path).with_context(|| format!("cannot open {}", path.display()))?);
    let read = || -> object::Result<NcclOf> {
        let file = ElfFile64::<Endianness, _>::parse(&cache)?;
        let table = file.elf_dynamic_table()?;
        let (mut needed, mut directories) = (false, Vec::new());
        for entry in &table {
            match entry.tag {
                elf::DT_NEEDED => needed |= table.string(entry)? == NCCL.as_bytes(),
                elf::DT_RPATH | elf::DT_RUNPATH => {
                    directories.extend(String::from_utf8_lossy(table.string(entry)?).split(':').map(String::from));
                }
                _ => {}
            }
        }
        if !needed {
            return Ok(NcclOf::Itself);
        }
        let origin = path.canonicalize().unwrap_or_else(|_| path.into()).parent().unwrap_or(Path::new("/")).to_owned();
        let origin = origin.to_string_lossy();
        let expand = |directory: &String| directory.replace("$ORIGIN", &origin).replace("${ORIGIN}", &origin);
        let candidates = directories.iter().map(|directory| Path::new(&expand(directory)).join(NCCL));
        Ok(NcclOf::Loader(candidates.filter_map(|path| path.canonicalize().ok()).next()))
    };
    read().with_context(|| format!("{} is no library that can be read", path.display()))
}

/// Whether the file at `path` is a library that defines `symbol` for others.
pub fn defines(path: &Path, symbol: &str) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let cache = ReadCache::new(file);
    let Ok(file) = ElfFile64::<Endianness, _>::parse(&cache) else { return false };
    file.dynamic_symbols().any(|known| known.is_definition() && known.name() == Ok(symbol))
}

/// NCCL's functions that the library at `path` defines; none where it cannot be read.
pub fn functions_of_nccl(path: &Path) -> Vec<String> {
    let Ok(file) = File::open(path) else { return vec![] };
    let cache = ReadCache::new(file);
    let Ok(file) = ElfFile64::<Endianness, _>::parse(&cache) else { return vec![] };
    let is_nccls = |name: &&str| {
        let rest = name.strip_prefix('p').unwrap_or(name).strip_prefix("nccl");
        rest.is_some_and(|rest| rest.starts_with(char::is_uppercase))
    };
    let names = file.dynamic_symbols().filter(ObjectSymbol::is_definition).filter_map(|known| known.name().ok());
    names.filter(is_nccls).map(String::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_program_brings_no_nccl_and_defines_none() {
        let program = std::env::current_exe().unwrap();
        assert_eq!(nccl_of(&program).unwrap(), NcclOf::Itself);
        assert!(!defines(&program, "ncclAllReduce"));
        assert!(nccl_of(Path::new("/etc/passwd")).is_err() && !defines(Path::new("/nowhere"), "x"));
    }
}

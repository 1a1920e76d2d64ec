//! What was measured once is known from then on: to the other communicators of a process, and by a
//! file in the user's cache folder to the next ones.
//!
//! A file is for one [`Key`], of all that matters. Who finds none, or one that is damaged or somebody
//! else's, has nothing.
//!
//! Something else may use the GPUs or the links while ranks measure, and that makes sums slower, never
//! faster. So the first [`STARTS`] starts measure, and the least of each figure counts.

use std::collections::HashMap;
use std::env;
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use once_cell::sync::Lazy;
use parking_lot::Mutex;

use super::figures::{Figures, Measured, Row, SIZES};
use crate::config::ExchangeKind;
use crate::negotiation::identity::hash;

/// What a file begins with.
const TITLE: &str = "flashcomm tuning 4";

/// A file is no longer than this.
const MAX_BYTES: u64 = 16 << 10;

/// So many starts measure.
const STARTS: u32 = 3;

/// What was measured, and by how many starts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Known {
    pub measured: Measured,
    n_starts: u32,
}

impl Known {
    /// By the start of a process, after what was known before it; `is_asked_for`: it is not to be measured again.
    pub(super) fn after(before: Option<Self>, measured: Measured, is_asked_for: bool) -> Self {
        match before {
            _ if is_asked_for => Known { measured, n_starts: STARTS },
            None => Known { measured, n_starts: 1 },
            Some(before) => Known { measured: before.measured.least(&measured), n_starts: before.n_starts + 1 },
        }
    }

    /// Whether it holds without measuring again.
    pub(super) fn is_settled(&self) -> bool {
        self.n_starts >= STARTS
    }
}

/// All on which what was measured depends.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Key(pub Vec<u8>);

/// Of this process, by key.
static KNOWN: Lazy<Mutex<HashMap<Key, Known>>> = Lazy::new(Default::default);

/// What is known for a key: to this process, or with `reads_file` by a file.
pub(super) fn find(key: &Key, reads_file: bool) -> Option<Known> {
    let known = KNOWN.lock().get(key).cloned();
    known.or_else(|| reads_file.then(|| read(&file(&folder()?, key), key))?)
}

/// Keeps it: in a file, where that can be written, and for this process, which does not measure again.
pub(super) fn keep(key: &Key, known: &Known) {
    KNOWN.lock().insert(key.clone(), Known { n_starts: STARTS, ..known.clone() });
    let Some(folder) = folder() else { return };
    if let Err(error) = write(&folder, key, known) {
        // The next start measures again.
        log::info!("what was measured cannot be kept in {}: {error}", folder.display());
    }
}

/// A number of what was measured, by which ranks see whether they know the same; never 0.
pub(super) fn digest(known: &Known) -> u64 {
    hash(text(known).as_bytes()) | 1
}

/// `$XDG_CACHE_HOME/flashcomm`, or `~/.cache/flashcomm`.
fn folder() -> Option<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(cache.join("flashcomm"))
}

fn file(folder: &Path, key: &Key) -> PathBuf {
    folder.join(format!("tuning-{:016x}", hash(&key.0)))
}

/// The number of starts, and a line for each exchange and size, with the nanoseconds of each way.
fn text(Known { measured, n_starts }: &Known) -> String {
    let mut text = format!("{n_starts}\n");
    for (kind, Figures(rows)) in &measured.0 {
        for (size, row) in SIZES.iter().zip(rows) {
            let row: Vec<String> = row.iter().map(u32::to_string).collect();
            let _ = writeln!(text, "{} {size} {}", kind.name(), row.join(" "));
        }
    }
    text
}

fn parse(text: &str) -> Option<Known> {
    let mut measured = Measured::default();
    let mut lines = text.lines();
    let n_starts = lines.next()?.parse().ok()?;
    for line in lines {
        let mut words = line.split(' ');
        let kind = ExchangeKind::by_name(words.next()?)?;
        let size: u64 = words.next()?.parse().ok()?;
        let row: Vec<u32> = words.map(|word| word.parse().ok()).collect::<Option<_>>()?;
        if measured.0.last().is_none_or(|(last, _)| *last != kind) {
            measured.0.push((kind, Figures::default()));
        }
        let (_, Figures(rows)) = measured.0.last_mut()?;
        if SIZES.get(rows.len()) != Some(&size) {
            return None;
        }
        rows.push(Row::try_from(row).ok()?);
    }
    Some(Known { measured, n_starts })
}

fn read(path: &Path, key: &Key) -> Option<Known> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path).ok()?;
    let about = file.metadata().ok()?;
    // SAFETY: takes nothing.
    if !about.is_file() || about.uid() != unsafe { libc::geteuid() } {
        return None;
    }
    let mut found = String::new();
    file.take(MAX_BYTES).read_to_string(&mut found).ok()?;
    let body = found.strip_prefix(TITLE)?.strip_prefix('\n')?;
    let (head, text) = body.split_once('\n')?;
    (head == seal(key, text)).then(|| parse(text))?
}

/// What tells a whole file, of this very key.
fn seal(key: &Key, text: &str) -> String {
    format!("{:016x}", hash(&[&key.0, text.as_bytes()].concat()))
}

/// Whole or not at all.
fn write(folder: &Path, key: &Key, known: &Known) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let (path, text) = (file(folder, key), text(known));
    // Ranks of one process write the same file.
    // SAFETY: takes nothing.
    let fresh = path.with_extension(format!("{}-{}", std::process::id(), unsafe { libc::gettid() }));
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?;
        file.write_all(format!("{TITLE}\n{}\n{text}", seal(key, &text)).as_bytes())?;
        fs::rename(&fresh, &path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&fresh);
    }
    written
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn key(text: &str) -> Key {
        Key(text.into())
    }

    fn some() -> Known {
        let figures = |ns| Figures(vec![[ns, 0, 7, u32::MAX, 1, 2]; 3]);
        let measured = Measured(vec![(ExchangeKind::Peer, figures(5)), (ExchangeKind::Host, figures(6))]);
        Known { measured, n_starts: 2 }
    }

    #[test]
    fn some_starts_measure_before_the_least_holds_and_one_is_enough_that_was_asked_for() {
        let of = |ns| Measured(vec![(ExchangeKind::Peer, Figures(vec![[ns, 0, 0, 2 * ns, 0, 0]; 2]))]);
        let mut known = Known::after(None, of(500), false);
        for (ns, is_settled) in [(700, false), (300, true)] {
            assert!(!known.is_settled());
            known = Known::after(Some(known), of(ns), false);
            assert_eq!(known.is_settled(), is_settled);
        }
        assert_eq!(known.measured, of(300));
        let asked_for = Known::after(Some(known), of(900), true);
        assert!(asked_for.is_settled() && asked_for.measured == of(900), "whatever was known");
    }

    #[test]
    fn what_is_kept_is_found_under_its_key_alone() {
        let folder = tempfile::tempdir().unwrap();
        let nested = folder.path().join("a/b");
        write(&nested, &key("this"), &some()).unwrap();
        assert_eq!(read(&file(&nested, &key("this")), &key("this")), Some(some()));
        assert_eq!(read(&file(&nested, &key("that")), &key("that")), None);
        // Two keys of one hash do not take each other's.
        assert_eq!(read(&file(&nested, &key("this")), &key("that")), None);
        let entries: Vec<_> = fs::read_dir(&nested).unwrap().collect();
        assert_eq!(entries.len(), 1, "nothing else is left: {entries:?}");
    }

    #[test]
    fn damage_is_nothing() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &key("this"), &some()).unwrap();
        let path = file(folder.path(), &key("this"));
        let whole = fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(read(&path, &key("this")), None, "cut at {cut}");
        }
        for at in 0..whole.len() {
            let mut other = whole.clone();
            other[at] ^= 1;
            fs::write(&path, &other).unwrap();
            assert_eq!(read(&path, &key("this")), None, "another byte at {at}");
        }
        fs::write(&path, vec![b'x'; 1 << 20]).unwrap();
        assert_eq!(read(&path, &key("this")), None);
    }

    #[test]
    fn what_is_no_file_of_ours_is_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path(), &key("this"));
        fs::create_dir(&path).unwrap();
        assert_eq!(read(&path, &key("this")), None, "a folder");
        assert!(write(folder.path(), &key("this"), &some()).is_err());
        fs::remove_dir(&path).unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        write(elsewhere.path(), &key("this"), &some()).unwrap();
        symlink(file(elsewhere.path(), &key("this")), &path).unwrap();
        assert_eq!(read(&path, &key("this")), None, "a link");
    }

    #[test]
    fn who_knows_the_same_has_the_same_number() {
        let mut other = some();
        other.measured.0[1].1.0[2][3] -= 1;
        assert_eq!(digest(&some()), digest(&some()));
        assert_ne!(digest(&some()), digest(&other));
        assert_ne!(digest(&some()), digest(&Known { n_starts: 3, ..some() }));
    }
}

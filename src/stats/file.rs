//! The file of `FLASHCOMM_STATS_FILE`, as one process writes it: again and again, whole each time.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::config::with_process_id;

/// The file of a process.
pub(super) struct StatsFile {
    /// As it is set, with its directory, since the process may go to another.
    pattern: Option<PathBuf>,
    written: Option<Written>,
    has_failed: bool,
    is_closed: bool,
}

/// What was written last.
struct Written {
    path: PathBuf,
    text: String,
    /// Device and inode, by which it is told from a file of the same name that another process wrote since.
    identity: (u64, u64),
}

impl StatsFile {
    /// The one that is named so, with `%p` and `%r`.
    pub(super) fn new(pattern: Option<&Path>) -> Self {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.into());
        StatsFile { pattern: pattern.map(absolute), written: None, has_failed: false, is_closed: false }
    }

    /// Whether the last state has been written.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// Writes what has changed. `rank` may have become known since the last time, and so the name.
    pub(super) fn update(&mut self, text: String, rank: Option<usize>) {
        let Some(path) = self.path(rank) else { return };
        let is_as_it_was = |last: &Written| last.path == path && last.text == text && path.exists();
        if is_special(&path) || self.written.as_ref().is_some_and(is_as_it_was) {
            return;
        }
        match replace(&path, &text) {
            Ok(identity) => self.forget_earlier(Written { path, text, identity }),
            Err(error) => self.tell(&path, &error),
        }
    }

    /// Writes the last state, come what may.
    pub(super) fn close(&mut self, text: String, rank: Option<usize>) {
        self.is_closed = true;
        let Some(path) = self.path(rank) else { return };
        if !is_special(&path)
            && let Ok(identity) = replace(&path, &text)
        {
            return self.forget_earlier(Written { path, text, identity });
        }
        // A file in a directory that takes no other, or mounted into a container by itself, can be written in place only.
        if let Err(error) = fs::write(&path, text) {
            self.tell(&path, &error);
        }
    }

    /// `%p` is the process id, `%r` the rank, `none` where no communicator has been used.
    fn path(&self, rank: Option<usize>) -> Option<PathBuf> {
        let path = with_process_id(self.pattern.as_deref()?);
        let rank = rank.map_or("none".into(), |rank| rank.to_string());
        Some(path.to_str().map(|text| text.replace("%r", &rank).into()).unwrap_or(path))
    }

    /// Removes the file under the name that it had before, unless another process has put its own there.
    fn forget_earlier(&mut self, now: Written) {
        let earlier = self.written.take().filter(|earlier| earlier.path != now.path);
        self.written = Some(now);
        if let Some(Written { path, identity, .. }) = earlier
            && fs::symlink_metadata(&path).is_ok_and(|file| (file.dev(), file.ino()) == identity)
        {
            let _ = fs::remove_file(path);
        }
    }

    /// Says once that it cannot be written.
    fn tell(&mut self, path: &Path, error: &io::Error) {
        if !std::mem::replace(&mut self.has_failed, true) {
            log::error!("FLASHCOMM_STATS_FILE={}: {error}", path.display());
        }
    }
}

/// Whether this is a pipe, a device or a link, which a new file must not replace.
fn is_special(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|file| !file.is_file())
}

/// Puts a file in the place of another at once, so that no reader sees half of it; its device and inode.
fn replace(path: &Path, text: &str) -> io::Result<(u64, u64)> {
    let mut part = path.as_os_str().to_owned();
    part.push(format!(".{}.part", std::process::id()));
    let written = fs::write(&part, text).and_then(|()| {
        let file = fs::metadata(&part)?;
        fs::rename(&part, path)?;
        Ok((file.dev(), file.ino()))
    });
    if written.is_err() {
        let _ = fs::remove_file(&part);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_changes_leaves_no_file_but_that_of_another_process() {
        let dir = tempfile::tempdir().unwrap();
        let names = || fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
        let mut file = StatsFile::new(Some(&dir.path().join("stats.%r")));
        file.update("a".into(), None);
        assert_eq!(names(), ["stats.none"]);
        file.update("b".into(), Some(0));
        assert_eq!(names(), ["stats.0"]);
        // Another process finds that it has this name.
        replace(&dir.path().join("stats.0"), "another's").unwrap();
        file.close("c".into(), Some(1));
        assert_eq!(fs::read_to_string(dir.path().join("stats.0")).unwrap(), "another's");
        assert_eq!(fs::read_to_string(dir.path().join("stats.1")).unwrap(), "c");
        assert_eq!(names().len(), 2);
    }

    #[test]
    fn a_file_that_is_gone_is_written_again_and_a_link_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("stats"), dir.path().join("link"));
        let mut file = StatsFile::new(Some(&path));
        file.update("a".into(), None);
        fs::remove_file(&path).unwrap();
        file.update("a".into(), None);
        assert_eq!(fs::read_to_string(&path).unwrap(), "a");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let mut file = StatsFile::new(Some(&link));
        file.update("b".into(), None);
        file.close("c".into(), None);
        assert!(link.is_symlink() && fs::read_to_string(&path).unwrap() == "c");
    }
}

//! Logging, set up at the first NCCL call: `FLASHCOMM_LOG` and `FLASHCOMM_LOG_FILE`. Nothing is printed uninvited but
//! warnings and errors.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use env_logger::{Builder, Target};
use parking_lot::Once;

use crate::config::{Config, with_process_id};

/// Sets up the log and reports what was malformed in the settings; later calls do nothing.
pub(crate) fn init() {
    static INIT: Once = Once::new();
    INIT.call_once(|| {
        let (config, malformed) = Config::global_with_warnings();
        let mut builder = Builder::new();
        builder.filter_level(config.log_level).format(|out, record| {
            let level = record.level();
            writeln!(out, "flashcomm [{}] {level}: {}", std::process::id(), record.args())
        });
        let mut unopened = None;
        if let Some(path) = &config.log_file {
            match LogFile::open(path) {
                Ok(file) => drop(builder.target(Target::Pipe(Box::new(file)))),
                Err(error) => unopened = Some((path, error)),
            }
        }
        // Our own copy of the log crate has no other logger, so this cannot fail.
        let _ = builder.try_init();
        if let Some((path, error)) = unopened {
            log::warn!("FLASHCOMM_LOG_FILE={}: {error}; logging to stderr", path.display());
        }
        for setting in malformed {
            log::warn!("{setting}");
        }
    });
}

/// The log's file. A fork opens its own: `%p` in the name is the process that writes.
struct LogFile {
    /// With its directory, since the process may go to another.
    pattern: PathBuf,
    process: u32,
    /// Absent where a fork cannot open it, and logs to stderr.
    file: Option<File>,
}

impl LogFile {
    fn open(pattern: &Path) -> io::Result<Self> {
        let pattern = std::path::absolute(pattern)?;
        let file = Some(append_to(&pattern)?);
        Ok(LogFile { pattern, process: std::process::id(), file })
    }
}

fn append_to(pattern: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(with_process_id(pattern))
}

impl Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.process != std::process::id() {
            self.process = std::process::id();
            self.file = append_to(&self.pattern).ok();
        }
        match &mut self.file {
            Some(file) => file.write(bytes),
            None => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

//! Logging, set up at the first NCCL call: `FLASHCOMM_LOG` and `FLASHCOMM_LOG_FILE`. Nothing is printed uninvited but
//! warnings and errors.

use std::fs::OpenOptions;
use std::io::Write;

use env_logger::{Builder, Target};
use parking_lot::Once;

use crate::config::Config;

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
            match OpenOptions::new().create(true).append(true).open(path) {
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

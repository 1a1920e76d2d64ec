//! What made a file of results, and when: a number that cannot be traced to its code is worth
//! little.

use std::time::SystemTime;

use serde::Serialize;

/// Fields of every JSON that this command writes.
#[derive(Clone, Debug, Serialize)]
pub struct Provenance {
    /// The version.
    pub flashcomm: &'static str,
    /// Hash of the commit that this command was built from, with `-dirty` where files differed;
    /// `unknown` without git.
    commit: &'static str,
    /// RFC 3339, UTC.
    date: String,
}

impl Provenance {
    /// Of this command, for what begins at this time.
    pub fn at(time: SystemTime) -> Self {
        Provenance {
            flashcomm: env!("CARGO_PKG_VERSION"),
            commit: env!("FLASHCOMM_COMMIT"), // from build.rs
            date: humantime::format_rfc3339_seconds(time).to_string(),
        }
    }
}

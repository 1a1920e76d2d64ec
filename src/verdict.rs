//! What the ranks of a communicator have agreed on: the same on every one of them.

/// Whether a communicator compresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// The ranks have not met.
    Open,
    /// Every rank compresses operations of this many bytes and more.
    On {
        /// The threshold.
        min_bytes: u64,
    },
    /// Every rank forwards.
    Off,
    /// Every rank forwards until an engine switches it on again.
    SwitchedOff,
}

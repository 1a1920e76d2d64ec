//! What the ranks of a communicator have agreed on: the same on every one of them.

/// Which sums are ours, by their bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ranges {
    /// Those of so many bytes and less are exact, unless they are compressed; 0: none is.
    pub exact_max: u64,
    /// Those of so many bytes and more are compressed, where their type is to be; `u64::MAX`: none is.
    pub compress_min: u64,
}

/// Whether sums of a communicator are ours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    /// The ranks have not met.
    Open,
    /// Every rank takes the sums of these sizes.
    On(Ranges),
    /// Every rank forwards.
    Off,
    /// Every rank forwards until an engine switches it on again.
    SwitchedOff,
}

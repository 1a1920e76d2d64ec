//! `FLASHCOMM_TUNE`.

/// Whether the ranks measure how sums go best.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tune {
    /// They take what was measured on other machines.
    Off,
    /// Where they have not done so before.
    Cache,
    /// Whenever a process starts.
    Always,
}

impl Tune {
    /// Every one.
    pub(crate) const ALL: [Tune; 3] = [Tune::Off, Tune::Cache, Tune::Always];

    /// As in settings.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Tune::Off => "off",
            Tune::Cache => "cache",
            Tune::Always => "always",
        }
    }

    /// That of a name.
    pub(super) fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|tune| tune.name() == name)
    }
}

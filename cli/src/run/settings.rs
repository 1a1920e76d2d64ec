//! An option for each setting of the shim, made from the table that documents them.

use std::ffi::OsString;

use anyhow::{Result, bail};
use clap::{Arg, ArgMatches, Command, FromArgMatches};
use flashcomm::config::{Config, SETTINGS, Setting};

/// The settings that were given as options.
#[derive(Clone, Default, Debug)]
pub struct Settings(Vec<(&'static str, String)>);

impl Settings {
    /// Variables and values.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(name, value)| (*name, value.as_str()))
    }

    /// A setting's value: the option's, or else that of the environment.
    pub fn value(&self, name: &str) -> Option<OsString> {
        let given = self.0.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into());
        given.or_else(|| std::env::var_os(name)).filter(|value: &OsString| !value.is_empty())
    }

    /// Parses all of them as the shim will, so that no job starts with a setting that would only be warned about.
    pub fn check(&self) -> Result<Config> {
        let (config, malformed) = Config::parse(|name| self.value(name));
        match malformed.first() {
            None => Ok(config),
            Some(malformed) => bail!(
                "{}={:?} is not allowed; it takes {}",
                malformed.name,
                malformed.value,
                SETTINGS.iter().find(|setting| setting.name == malformed.name).map_or("", |setting| setting.allowed)
            ),
        }
    }
}

/// `FLASHCOMM_MIN_BYTES` is `--min-bytes`.
fn option(setting: &Setting) -> String {
    setting.name.trim_start_matches("FLASHCOMM_").to_lowercase().replace('_', "-")
}

impl clap::Args for Settings {
    fn augment_args(command: Command) -> Command {
        SETTINGS.iter().fold(command, |command, setting| {
            let default = if setting.default.is_empty() { "none" } else { setting.default };
            let help = format!("{} ({}) [default: {default}]", setting.effect, setting.allowed);
            let value = if setting.allowed.starts_with("a path") { "FILE" } else { "VALUE" };
            command.arg(
                Arg::new(setting.name)
                    .long(option(setting))
                    .value_name(value)
                    .help(help)
                    .help_heading("Settings of the shim, each that of the variable FLASHCOMM_... which it sets"),
            )
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Settings {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |setting: &Setting| Some((setting.name, matches.get_one::<String>(setting.name)?.clone()));
        Ok(Settings(SETTINGS.iter().filter_map(given).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

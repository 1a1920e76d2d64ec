//! The environment of a job, as text for what starts it elsewhere.

use anyhow::{Result, bail};
use clap::ValueEnum;

/// Who is to read it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Format {
    /// A POSIX shell: eval "$(flashcomm run --print-env)"
    Shell,
    /// docker run --env-file
    Docker,
    /// EnvironmentFile= of a systemd unit
    Systemd,
}

/// One line for each variable.
///
/// # Errors
/// Where the format has no way to say a value.
pub fn lines(format: Format, variables: &[(String, String)]) -> Result<String> {
    let mut text = String::new();
    for (name, value) in variables {
        if value.contains('\n') && format != Format::Shell {
            bail!("{name} holds a line break, which this format cannot say");
        }
        text += &match format {
            Format::Shell => format!("export {name}='{}'\n", value.replace('\'', r"'\''")),
            // Docker takes everything behind the equals sign as it is, quotes too.
            Format::Docker => format!("{name}={value}\n"),
            Format::Systemd => format!("{name}=\"{}\"\n", value.replace('\\', r"\\").replace('"', "\\\"")),
        };
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reader_gets_its_own_quotes() {
        let variables = [("A".to_string(), "/a b/it's\"$x\"".to_string())];
        assert_eq!(lines(Format::Shell, &variables).unwrap(), "export A='/a b/it'\\''s\"$x\"'\n");
        assert_eq!(lines(Format::Docker, &variables).unwrap(), "A=/a b/it's\"$x\"\n");
        assert_eq!(lines(Format::Systemd, &variables).unwrap(), "A=\"/a b/it's\\\"$x\\\"\"\n");
        assert!(lines(Format::Docker, &[("A".into(), "a\nb".into())]).is_err());
    }
}

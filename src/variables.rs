//! What NCCL's own variables say of the machine. Who has set them knows something: that a driver claims peer access which
//! loses stores, that containers share no memory, which processes are to count as one host. The shim obeys them as NCCL
//! does.
//!
//! Like NCCL it reads the environment first, then `~/.nccl.conf` (or the file of `NCCL_CONF_FILE`), then
//! `/etc/nccl.conf`: lines of `NAME=VALUE`.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use once_cell::sync::OnceCell;

use crate::cuda::Distance;

/// The variables that say something of the machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Variables {
    /// `NCCL_P2P_DISABLE` and `NCCL_P2P_LEVEL`: peers up to this distance may reach each other's memory; `None`: NCCL's own
    /// choice.
    pub p2p_level: Option<Distance>,
    /// `NCCL_SHM_DISABLE`.
    pub shm_disabled: bool,
    /// `NCCL_HOSTID`.
    pub host_id: Option<String>,
    /// `NCCL_GRAPH_MIXING_SUPPORT`: whether captured calls keep their order with others.
    pub graph_mixing: bool,
}

impl Variables {
    /// The process's, read at the first call.
    pub(crate) fn global() -> &'static Variables {
        static GLOBAL: OnceCell<Variables> = OnceCell::new();
        GLOBAL.get_or_init(|| {
            let texts: Vec<String> = files().iter().filter_map(|path| fs::read_to_string(path).ok()).collect();
            Variables::parse(|name| {
                let set = env::var(name).ok();
                set.or_else(|| texts.iter().find_map(|text| in_file(text, name)))
            })
        })
    }

    /// What `lookup` knows of each variable. NCCL takes what is no number for its default, and so does this.
    pub(crate) fn parse(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let number = |name| lookup(name).and_then(|value| value.trim().parse::<i64>().ok());
        let is_set = |name| number(name).is_some_and(|value| value != 0);
        let p2p_level = match is_set("NCCL_P2P_DISABLE") {
            true => Some(Distance::Same),
            false => lookup("NCCL_P2P_LEVEL").and_then(|level| parse_level(level.trim())),
        };
        Self {
            p2p_level,
            shm_disabled: is_set("NCCL_SHM_DISABLE"),
            host_id: lookup("NCCL_HOSTID").filter(|id| !id.is_empty()),
            graph_mixing: number("NCCL_GRAPH_MIXING_SUPPORT").is_none_or(|value| value != 0),
        }
    }
}

/// Every variable of NCCL's that is set, with its value, and what its files say: what may change how fast it is. Not those that
/// only log, or that are another with every start.
pub(crate) fn of_nccl() -> Vec<u8> {
    let matters =
        |name: &str| name.starts_with("NCCL_") && !name.starts_with("NCCL_DEBUG") && !["NCCL_COMM_ID"].contains(&name);
    let mut lines: Vec<String> = env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .filter(|(name, _)| matters(name))
        .map(|(name, value)| format!("{name}={}\n", value.to_string_lossy()))
        .collect();
    lines.sort_unstable();
    lines.extend(files().iter().filter_map(|path| fs::read_to_string(path).ok()));
    lines.concat().into_bytes()
}

/// A level by name, or by the number that it had before NCCL 2.5 gave it one.
fn parse_level(level: &str) -> Option<Distance> {
    match level.to_ascii_uppercase().as_str() {
        "LOC" | "0" => Some(Distance::Same),
        "NVL" => Some(Distance::Nvl),
        "PIX" | "1" => Some(Distance::Pix),
        "PXB" | "2" => Some(Distance::Pxb),
        "PHB" | "3" | "4" => Some(Distance::Phb),
        "SYS" | "5" => Some(Distance::Sys),
        _ => None,
    }
}

/// Where NCCL looks, the first that it believes first.
fn files() -> Vec<PathBuf> {
    [user_file(), Some(PathBuf::from("/etc/nccl.conf"))].into_iter().flatten().collect()
}

fn user_file() -> Option<PathBuf> {
    match env::var_os("NCCL_CONF_FILE").filter(|path| !path.is_empty()) {
        Some(path) => Some(path.into()),
        None => Some(Path::new(&env::var_os("HOME")?).join(".nccl.conf")),
    }
}

/// The value of a variable in a configuration file. `#` begins a comment line; the first line of a name counts.
fn in_file(text: &str, name: &str) -> Option<String> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let mut values = lines.filter_map(|line| line.split_once('=')).filter(|(key, _)| key.trim() == name);
    values.next().map(|(_, value)| value.trim().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(variables: &[(&str, &str)]) -> Variables {
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string());
        Variables::parse(find)
    }

    #[test]
    fn unset_is_nccls_own_choice() {
        let nothing = parse(&[]);
        assert_eq!(nothing, Variables { p2p_level: None, shm_disabled: false, host_id: None, graph_mixing: true });
        // What NCCL does not understand it takes for unset.
        let odd =
            [("NCCL_P2P_DISABLE", "yes"), ("NCCL_P2P_LEVEL", "near"), ("NCCL_SHM_DISABLE", ""), ("NCCL_HOSTID", "")];
        assert_eq!(parse(&odd), nothing);
    }

    #[test]
    fn each_variable_is_heard() {
        assert_eq!(parse(&[("NCCL_P2P_DISABLE", "1")]).p2p_level, Some(Distance::Same));
        assert_eq!(parse(&[("NCCL_P2P_DISABLE", "0")]).p2p_level, None);
        for (level, distance) in [
            ("LOC", Distance::Same),
            ("nvl", Distance::Nvl),
            ("PIX", Distance::Pix),
            ("PXB", Distance::Pxb),
            ("PHB", Distance::Phb),
            ("SYS", Distance::Sys),
            ("0", Distance::Same),
            ("3", Distance::Phb),
            ("5", Distance::Sys),
        ] {
            assert_eq!(parse(&[("NCCL_P2P_LEVEL", level)]).p2p_level, Some(distance), "{level}");
        }
        assert_eq!(parse(&[("NCCL_P2P_LEVEL", "SYS"), ("NCCL_P2P_DISABLE", "1")]).p2p_level, Some(Distance::Same));
        assert!(parse(&[("NCCL_SHM_DISABLE", "1")]).shm_disabled);
        assert_eq!(parse(&[("NCCL_HOSTID", "a")]).host_id, Some("a".into()));
        assert!(!parse(&[("NCCL_GRAPH_MIXING_SUPPORT", "0")]).graph_mixing);
    }

    #[test]
    fn a_file_is_lines_of_name_and_value() {
        let text = "# NCCL_P2P_DISABLE=0\n NCCL_P2P_DISABLE = 1 \nNCCL_P2P_DISABLE=0\nNCCL_HOSTID=x=y\n";
        assert_eq!(in_file(text, "NCCL_P2P_DISABLE"), Some("1".into()));
        assert_eq!(in_file(text, "NCCL_HOSTID"), Some("x=y".into()));
        assert_eq!(in_file(text, "NCCL_P2P_LEVEL"), None);
    }
}

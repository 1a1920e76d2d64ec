//! What makes an inference engine hand its all-reduces to NCCL.
//!
//! Engines have kernels of their own for them, and pick those first. Environment variables turn some off, and are set;
//! the rest takes options of the engine, which are added where the command is clearly the engine's own, and told where
//! it is not. The names are checked against the engines' published source by `tests/engines.rs`.

use std::ffi::OsString;
use std::path::Path;

use clap::ValueEnum;

/// The engines that are known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Engine {
    /// vLLM
    Vllm,
    /// SGLang
    Sglang,
    /// Programs that use torch.distributed
    Torch,
}

impl Engine {
    /// As people write it.
    pub const fn name(self) -> &'static str {
        match self {
            Engine::Vllm => "vLLM",
            Engine::Sglang => "SGLang",
            Engine::Torch => "torch.distributed",
        }
    }

    /// Its environment variables.
    pub const fn variables(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Engine::Vllm => &[
                ("VLLM_ALLREDUCE_USE_SYMM_MEM", "0"),
                ("VLLM_ALLREDUCE_USE_FLASHINFER", "0"),
                ("VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC", "0"),
                ("VLLM_USE_NCCL_SYMM_MEM", "0"),
            ],
            Engine::Sglang => &[("SGLANG_ENABLE_PCIE_IPC_ALLREDUCE", "0")],
            Engine::Torch => &[],
        }
    }

    /// Lists in its environment, to which something is to be added: what it carries to workers that Ray starts.
    pub const fn lists(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Engine::Vllm => &[
                ("VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", "FLASHCOMM_"),
                ("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "LD_PRELOAD"),
            ],
            Engine::Sglang | Engine::Torch => &[],
        }
    }

    /// Its options that no variable stands for.
    pub const fn options(self) -> &'static [&'static str] {
        match self {
            Engine::Vllm => &["--disable-custom-all-reduce", "-cc.pass_config.fuse_allreduce_rms=false"],
            Engine::Sglang => &["--disable-custom-all-reduce", "--enforce-disable-flashinfer-allreduce-fusion"],
            Engine::Torch => &[],
        }
    }

    /// Options that must not be given, since they bring other all-reduces back.
    pub const fn unwanted(self) -> &'static [&'static str] {
        match self {
            Engine::Sglang => &["--enable-mscclpp", "--enable-torch-symm-mem", "--enable-symm-mem"],
            Engine::Vllm | Engine::Torch => &[],
        }
    }

    /// Whether the command is the engine's own server, which takes its options.
    fn is_served_by(self, command: &[OsString]) -> bool {
        let words: Vec<&str> = command.iter().map(|word| word.to_str().unwrap_or_default()).collect();
        let program = words.first().and_then(|word| Path::new(word).file_name()).and_then(|name| name.to_str());
        let module = |name: &str| words.windows(2).any(|pair| pair == ["-m", name]);
        let is_python = program.is_some_and(|name| name.starts_with("python"));
        match self {
            Engine::Vllm => {
                program == Some("vllm") && words.get(1) == Some(&"serve")
                    || is_python && module("vllm.entrypoints.openai.api_server")
            }
            Engine::Sglang => {
                program == Some("sglang") && words.get(1) == Some(&"serve")
                    || is_python && module("sglang.launch_server")
            }
            Engine::Torch => false,
        }
    }

    /// The options that are to be added to the command, and those that its user must add.
    pub fn missing_options(self, command: &[OsString]) -> (Vec<&'static str>, Vec<&'static str>) {
        let given = |name: &str| {
            command.iter().filter_map(|word| word.to_str()).any(|word| word.split('=').next() == Some(name))
        };
        let is_missing = |option: &&&'static str| !given(option.split('=').next().unwrap_or(option));
        let missing = self.options().iter().filter(is_missing).copied();
        let is_served = self.is_served_by(command);
        // A whole compilation configuration on the command line would replace the one option, or be replaced by it.
        let has_configuration = ["-cc", "--compilation-config", "--compilation_config"].iter().any(|name| given(name));
        missing.partition(|option| is_served && !(option.starts_with("-cc.") && has_configuration))
    }
}

/// A list of words with commas between them, and `word` in it.
pub fn with_word(list: &str, word: &str) -> String {
    match list.split(',').map(str::trim).filter(|known| !known.is_empty()).collect::<Vec<_>>() {
        known if known.contains(&word) => list.into(),
        known => [known, vec![word]].concat().join(","),
    }
}

/// What asks for results that do not depend on the batch, if something does: vLLM's and SGLang's variables, or an option
/// of SGLang's.
pub fn asks_for_batch_invariance(command: &[OsString], variable: impl Fn(&str) -> Option<OsString>) -> Option<String> {
    let is_on = |name: &str| variable(name).is_some_and(|value| !["", "0", "false"].iter().any(|off| value == *off));
    let option = "--enable-deterministic-inference";
    let variables = ["VLLM_BATCH_INVARIANT", "SGLANG_ENABLE_DETERMINISTIC_INFERENCE"];
    match variables.iter().copied().find(|name| is_on(name)) {
        Some(name) => Some(format!("{name}={}", variable(name)?.to_string_lossy())),
        None => command.iter().any(|word| word == option).then(|| option.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_keeps_what_its_user_has_put_in() {
        assert_eq!(with_word("", "X"), "X");
        assert_eq!(with_word("A_, B_,", "X"), "A_,B_,X");
        assert_eq!(with_word("A_, X", "X"), "A_, X");
    }

    fn missing(engine: Engine, command: &str) -> (Vec<&'static str>, Vec<&'static str>) {
        engine.missing_options(&command.split(' ').map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn options_are_added_to_the_engines_own_servers_only() {
        let all = Engine::Vllm.options().to_vec();
        assert_eq!(missing(Engine::Vllm, "vllm serve model -tp 2"), (all.clone(), vec![]));
        assert_eq!(missing(Engine::Vllm, "/venv/bin/vllm serve m"), (all.clone(), vec![]));
        assert_eq!(missing(Engine::Vllm, "python3 -m vllm.entrypoints.openai.api_server"), (all.clone(), vec![]));
        assert_eq!(missing(Engine::Vllm, "python3 my_server.py"), (vec![], all.clone()));
        assert_eq!(missing(Engine::Vllm, "vllm bench latency"), (vec![], all));
        let all = Engine::Sglang.options().to_vec();
        assert_eq!(missing(Engine::Sglang, "python -m sglang.launch_server --tp 2"), (all.clone(), vec![]));
        assert_eq!(missing(Engine::Sglang, "vllm serve m"), (vec![], all));
        assert_eq!(missing(Engine::Torch, "torchrun x.py"), (vec![], vec![]));
    }

    #[test]
    fn what_asks_for_batch_invariance_is_named() {
        let asks = |command: &str, name: &str, value: &str| {
            let command: Vec<_> = command.split(' ').map(OsString::from).collect();
            asks_for_batch_invariance(&command, |asked| (asked == name).then(|| value.into()))
        };
        assert_eq!(asks("vllm serve m", "VLLM_BATCH_INVARIANT", "1").as_deref(), Some("VLLM_BATCH_INVARIANT=1"));
        assert_eq!(asks("vllm serve m", "VLLM_BATCH_INVARIANT", "0"), None);
        let option = "--enable-deterministic-inference";
        assert_eq!(asks(&format!("sglang serve m {option}"), "", "").as_deref(), Some(option));
        assert_eq!(asks("sglang serve m", "", ""), None);
    }

    #[test]
    fn options_that_the_command_has_are_not_added_again() {
        let fusion = "-cc.pass_config.fuse_allreduce_rms=false";
        assert_eq!(missing(Engine::Vllm, "vllm serve m --disable-custom-all-reduce"), (vec![fusion], vec![]));
        let mine = "vllm serve m -cc.pass_config.fuse_allreduce_rms=true --disable-custom-all-reduce";
        assert_eq!(missing(Engine::Vllm, mine), (vec![], vec![]));
        let whole = "vllm serve m --compilation-config={} --disable-custom-all-reduce";
        assert_eq!(missing(Engine::Vllm, whole), (vec![], vec![fusion]));
    }
}

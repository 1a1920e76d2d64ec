//! The table of the settings: the one place that documents them. That of docs/tuning.md and the options of `flashcomm run`
//! are held to it.

use std::fmt;

/// One environment variable.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Its name.
    pub name: &'static str,
    /// The value that holds when it is unset or malformed.
    pub default: &'static str,
    /// The values it takes.
    pub allowed: &'static str,
    /// What it does.
    pub effect: &'static str,
    /// Whether all ranks of a communicator must have the same value.
    pub same_on_all_ranks: bool,
}

/// Every setting.
pub const SETTINGS: [Setting; 24] = [
    setting("FLASHCOMM_ENABLE", "1", "0 or 1", "0: every call goes to the real NCCL", true),
    setting(
        "FLASHCOMM_BITS",
        "8",
        "2 to 8, or reduce:gather as in 4:8, the second no less, or 16",
        "bits per element on the wire; 16: as they are",
        true,
    ),
    setting("FLASHCOMM_GROUP", "64", "32, 64 or 128", "elements that share a scale", true),
    setting(
        "FLASHCOMM_CODE",
        "auto",
        "auto or plain, or blocks where the legs have one width, or 4:8",
        "what the bits say; auto: blocks where it can, else plain",
        true,
    ),
    setting(
        "FLASHCOMM_MIN_BYTES",
        "auto",
        "auto, or a number of bytes, K, M or G allowed behind it",
        "smaller all-reduces go to the real NCCL",
        true,
    ),
    setting(
        "FLASHCOMM_EXACT_MAX_BYTES",
        "auto",
        "auto, or a number of bytes, K, M or G allowed behind it",
        "all-reduces up to there that are not compressed are summed exactly; 0: none",
        true,
    ),
    setting(
        "FLASHCOMM_BATCH_INVARIANT",
        "0",
        "0 or 1",
        "1: a row's sum does not depend on the rest of its batch",
        true,
    ),
    setting("FLASHCOMM_DTYPES", "fp16,bf16", "fp16, bf16 or both", "element types that are compressed", true),
    setting("FLASHCOMM_EXCHANGE", "auto", "auto, peer, host or nccl", "what carries the payloads", true),
    setting("FLASHCOMM_BUFFER_MIB", "64", "1 to 16384", "staging memory of a communicator, MiB of GPU memory", true),
    setting("FLASHCOMM_MAX_CTAS", "0", "0 to 1024", "blocks of a waiting kernel at most; 0: its own choice", true),
    setting(
        "FLASHCOMM_P2P_READ",
        "auto",
        "auto, 0 or 1",
        "1: ranks read payloads from their peers' GPUs; 0: they write them there; auto: as measured, else 0",
        true,
    ),
    setting(
        "FLASHCOMM_HOST_COPY",
        "auto",
        "auto, 0 or 1",
        "1: copy engines carry payloads over host memory; 0: kernels do; auto: as measured, else 0",
        true,
    ),
    setting(
        "FLASHCOMM_TUNE",
        "off",
        "off, cache or always",
        "whether the ranks measure how each size goes best; cache: the first three starts on a machine do",
        true,
    ),
    setting("FLASHCOMM_PLUGIN", "0", "0 or 1", "1: vLLM's and SGLang's plugins route all-reduces by size", true),
    setting("FLASHCOMM_TIMEOUT_S", "0", "0 to 86400", "seconds a kernel waits for peers; 0: until aborted", false),
    setting("FLASHCOMM_ATTACH_TIMEOUT_S", "300", "1 to 86400", "seconds to wait for the other ranks' shim", false),
    setting("FLASHCOMM_NCCL_LIB", "", "a path", "the real libnccl.so.2, where it is not found by itself", false),
    setting("FLASHCOMM_LOG", "warn", "off, error, warn, info, debug or trace", "what is logged", false),
    setting("FLASHCOMM_LOG_FILE", "", "a path; %p is the process id", "where the log goes; unset: stderr", false),
    setting(
        "FLASHCOMM_STATS_FILE",
        "",
        "a path; %p is the process id, %r the rank",
        "counts as JSON, written every second and at exit",
        false,
    ),
    setting("FLASHCOMM_NVTX", "0", "0 or 1", "1: NVTX ranges around compressed calls, for profilers", false),
    setting("FLASHCOMM_RECORD", "0", "0 to 64", "inputs to save of each communicator, for flashcomm codec", false),
    setting("FLASHCOMM_RECORD_DIR", "flashcomm-record", "a path, made where it is missing", "where they go", false),
];

const fn setting(
    name: &'static str,
    default: &'static str,
    allowed: &'static str,
    effect: &'static str,
    same_on_all_ranks: bool,
) -> Setting {
    Setting { name, default, allowed, effect, same_on_all_ranks }
}

/// A value that a setting does not take.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Malformed {
    /// The variable.
    pub name: &'static str,
    /// What it was set to.
    pub value: String,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let setting = find(self.name);
        let default = if setting.default.is_empty() { "unset" } else { setting.default };
        write!(f, "{}={:?} is not allowed; it takes {}. {} holds.", self.name, self.value, setting.allowed, default)
    }
}

/// The setting of a name.
pub(super) fn find(name: &str) -> &'static Setting {
    SETTINGS.iter().find(|setting| setting.name == name).expect("only documented settings are read")
}

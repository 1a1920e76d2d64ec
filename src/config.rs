//! The settings: environment variables, parsed once into typed values.
//!
//! [`SETTINGS`] is the one place that documents them. A malformed value
//! never stops anybody's server: it gives one warning, which names the variable, the value and what is allowed, and
//! the default holds.

pub(crate) mod table;
mod tune;

use std::env;
use std::ffi::{CStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use flashcomm_wire::{Code, GroupSize, Legs, Width};
use log::LevelFilter;
use once_cell::sync::OnceCell;

use crate::element::ElementType;
pub(crate) use table::Malformed;
use table::find;
pub use tune::Tune;

/// What carries the payloads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExchangeKind {
    /// GPU memory that peers write.
    Peer,
    /// Pinned host memory that all ranks of a host share.
    Host,
    /// The real NCCL's send, receive and all-gather.
    Nccl,
}

impl ExchangeKind {
    /// Every kind, the best first.
    pub const ALL: [ExchangeKind; 3] = [ExchangeKind::Peer, ExchangeKind::Host, ExchangeKind::Nccl];

    /// The kind of a name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// As in settings and in the log.
    pub const fn name(self) -> &'static str {
        match self.c_name().to_str() {
            Ok(name) => name,
            Err(_) => unreachable!(),
        }
    }

    /// The same for C.
    pub const fn c_name(self) -> &'static CStr {
        match self {
            ExchangeKind::Peer => c"peer",
            ExchangeKind::Host => c"host",
            ExchangeKind::Nccl => c"nccl",
        }
    }
}

/// The settings, typed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// `FLASHCOMM_ENABLE`.
    pub enable: bool,
    /// `FLASHCOMM_BITS`, `FLASHCOMM_GROUP`, `FLASHCOMM_CODE` and `FLASHCOMM_BATCH_INVARIANT`.
    pub legs: Legs,
    /// `FLASHCOMM_CODE`; `None`: the default one for the widths.
    pub code: Option<Code>,
    /// `FLASHCOMM_MIN_BYTES`; `None`: the exchange's measured default, or 0 where the legs are batch invariant.
    pub min_bytes: Option<u64>,
    /// `FLASHCOMM_EXACT_MAX_BYTES`; `None`: the exchange's measured default.
    pub exact_max: Option<u64>,
    /// `FLASHCOMM_DTYPES`: whether fp16 is compressed.
    pub fp16: bool,
    /// `FLASHCOMM_DTYPES`: whether bf16 is compressed.
    pub bf16: bool,
    /// `FLASHCOMM_EXCHANGE`; `None`: auto, the best that all ranks can.
    pub exchange: Option<ExchangeKind>,
    /// `FLASHCOMM_BUFFER_MIB`, in bytes.
    pub buffer_bytes: usize,
    /// `FLASHCOMM_MAX_CTAS`.
    pub max_ctas: u32,
    /// `FLASHCOMM_P2P_READ`: whether payloads over `peer` are read, not written; `None`: auto, as measured.
    pub p2p_read: Option<bool>,
    /// `FLASHCOMM_HOST_COPY`: whether copy engines carry payloads over `host`, not kernels; `None`: auto, as measured.
    pub host_copy: Option<bool>,
    /// `FLASHCOMM_TUNE`.
    pub tune: Tune,
    /// `FLASHCOMM_PLUGIN`: whether a plugin of the engine routes all-reduces here by size, so all ranks' must.
    pub plugin: bool,
    /// `FLASHCOMM_TIMEOUT_S`; `None`: until aborted.
    pub timeout: Option<Duration>,
    /// `FLASHCOMM_ATTACH_TIMEOUT_S`.
    pub attach_timeout: Duration,
    /// `FLASHCOMM_LOG`.
    pub log_level: LevelFilter,
    /// `FLASHCOMM_LOG_FILE`.
    pub log_file: Option<PathBuf>,
    /// `FLASHCOMM_STATS_FILE`; `%p` and `%r` are replaced when it is written.
    pub stats_file: Option<PathBuf>,
    /// `FLASHCOMM_NVTX`.
    pub nvtx: bool,
    /// `FLASHCOMM_RECORD`.
    pub record: usize,
    /// `FLASHCOMM_RECORD_DIR`.
    pub record_dir: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        let (config, malformed) = Config::parse(|_| None);
        debug_assert!(malformed.is_empty());
        config
    }
}

impl Config {
    /// The process's settings, parsed at the first call.
    pub fn global() -> &'static Config {
        &Self::global_with_warnings().0
    }

    /// As [`Config::global`], with what was malformed.
    pub fn global_with_warnings() -> &'static (Config, Vec<Malformed>) {
        static GLOBAL: OnceCell<(Config, Vec<Malformed>)> = OnceCell::new();
        GLOBAL.get_or_init(|| Config::parse(|name| env::var_os(name)))
    }

    /// Parses what `lookup` knows of each variable. An empty value counts as unset.
    pub fn parse(lookup: impl Fn(&str) -> Option<OsString>) -> (Config, Vec<Malformed>) {
        let mut reader = Reader { lookup, malformed: Vec::new() };
        let widths = reader.read("FLASHCOMM_BITS", parse_bits);
        let group = reader.read("FLASHCOMM_GROUP", |text| GroupSize::new(text.parse().ok()?));
        let (code, legs) = reader.read("FLASHCOMM_CODE", |text| {
            let code = if text == "auto" { None } else { Some(Code::by_name(text)?) };
            Some((code, Legs::choose(code, widths, group)?))
        });
        let (fp16, bf16) = reader.read("FLASHCOMM_DTYPES", parse_dtypes);
        let legs = legs.with_batch_invariant(reader.read("FLASHCOMM_BATCH_INVARIANT", parse_switch));
        let config = Config {
            enable: reader.read("FLASHCOMM_ENABLE", parse_switch),
            legs,
            code,
            min_bytes: reader.read("FLASHCOMM_MIN_BYTES", parse_bytes),
            exact_max: reader.read("FLASHCOMM_EXACT_MAX_BYTES", parse_bytes),
            fp16,
            bf16,
            exchange: reader.read("FLASHCOMM_EXCHANGE", |text| match text {
                "auto" => Some(None),
                name => ExchangeKind::by_name(name).map(Some),
            }),
            buffer_bytes: reader.read("FLASHCOMM_BUFFER_MIB", |text| parse_within(text, 1, 16384)) as usize * (1 << 20),
            max_ctas: reader.read("FLASHCOMM_MAX_CTAS", |text| parse_within(text, 0, 1024)) as u32,
            p2p_read: reader.read("FLASHCOMM_P2P_READ", parse_auto_or_switch),
            host_copy: reader.read("FLASHCOMM_HOST_COPY", parse_auto_or_switch),
            tune: reader.read("FLASHCOMM_TUNE", Tune::by_name),
            plugin: reader.read("FLASHCOMM_PLUGIN", parse_switch),
            timeout: match reader.read("FLASHCOMM_TIMEOUT_S", |text| parse_within(text, 0, 86400)) {
                0 => None,
                seconds => Some(Duration::from_secs(seconds)),
            },
            attach_timeout: Duration::from_secs(
                reader.read("FLASHCOMM_ATTACH_TIMEOUT_S", |text| parse_within(text, 1, 86400)),
            ),
            log_level: reader.read("FLASHCOMM_LOG", |text| text.parse().ok()),
            log_file: reader.path("FLASHCOMM_LOG_FILE"),
            stats_file: reader.path("FLASHCOMM_STATS_FILE"),
            nvtx: reader.read("FLASHCOMM_NVTX", parse_switch),
            record: reader.read("FLASHCOMM_RECORD", |text| parse_within(text, 0, 64)) as usize,
            record_dir: reader.read("FLASHCOMM_RECORD_DIR", |text| Some(PathBuf::from(text))),
        };
        (config, reader.malformed)
    }

    /// Whether all-reduces of this element type are compressed.
    pub fn compresses(&self, element: ElementType) -> bool {
        match element {
            ElementType::Fp16 => self.fp16,
            ElementType::Bf16 => self.bf16,
            ElementType::Fp32 => false,
        }
    }
}

struct Reader<L> {
    lookup: L,
    malformed: Vec<Malformed>,
}

impl<L: Fn(&str) -> Option<OsString>> Reader<L> {
    /// The variable's value, or its default with a note where it does not parse.
    fn read<T>(&mut self, name: &'static str, parse: impl Fn(&str) -> Option<T>) -> T {
        if let Some(value) = (self.lookup)(name).filter(|value| !value.is_empty()) {
            if let Some(parsed) = value.to_str().and_then(|text| parse(text.trim())) {
                return parsed;
            }
            self.malformed.push(Malformed { name, value: value.to_string_lossy().into_owned() });
        }
        parse(find(name).default).expect("defaults parse")
    }

    fn path(&self, name: &'static str) -> Option<PathBuf> {
        (self.lookup)(name).filter(|value| !value.is_empty()).map(PathBuf::from)
    }
}

/// The path with `%p` replaced, by the process that writes there: a fork has its parent's settings and its own id.
pub(crate) fn with_process_id(path: &Path) -> PathBuf {
    match path.to_str() {
        Some(text) => text.replace("%p", &std::process::id().to_string()).into(),
        None => path.into(),
    }
}

fn parse_switch(text: &str) -> Option<bool> {
    match text {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}

/// `auto` is `None`.
fn parse_auto_or_switch(text: &str) -> Option<Option<bool>> {
    if text == "auto" { Some(None) } else { parse_switch(text).map(Some) }
}

fn parse_bits(text: &str) -> Option<(Width, Width)> {
    let width = |text: &str| Width::new(text.parse().ok()?);
    match text.split_once(':') {
        Some((reduce, gather)) => {
            Some((width(reduce)?, width(gather)?)).filter(|(a, b)| a <= b && a.is_uncompressed() == b.is_uncompressed())
        }
        None => width(text).map(|width| (width, width)),
    }
}

fn parse_dtypes(text: &str) -> Option<(bool, bool)> {
    let (mut fp16, mut bf16) = (false, false);
    for name in text.split(',') {
        match name.trim() {
            "fp16" => fp16 = true,
            "bf16" => bf16 = true,
            _ => return None,
        }
    }
    Some((fp16, bf16))
}

/// `auto` is `Some(None)`: allowed, and no number.
fn parse_bytes(text: &str) -> Option<Option<u64>> {
    if text == "auto" {
        return Some(None);
    }
    let digits = text.trim_end_matches(['K', 'M', 'G']);
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return None,
    };
    let number: u64 = digits.parse().ok()?;
    Some(Some(number.checked_mul(1 << shift)?))
}

fn parse_within(text: &str, min: u64, max: u64) -> Option<u64> {
    text.parse().ok().filter(|number| (min..=max).contains(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_one(name: &str, value: &str) -> (Config, Vec<Malformed>) {
        Config::parse(|asked| (asked == name).then(|| value.into()))
    }

    #[test]
    fn defaults_are_what_the_table_says() {
        let config = Config::default();
        assert!(config.enable && config.fp16 && config.bf16);
        assert_eq!(config.legs.to_string(), "8");
        assert_eq!((config.legs.reduce.group.n_elems(), config.code, config.legs.code()), (64, None, Code::Blocks));
        assert_eq!((config.min_bytes, config.exact_max, config.exchange), (None, None, None));
        assert_eq!(config.buffer_bytes, 64 << 20);
        assert_eq!((config.max_ctas, config.timeout), (0, None));
        assert_eq!(config.attach_timeout, Duration::from_secs(300));
        assert_eq!((config.log_level, config.log_file, config.stats_file), (LevelFilter::Warn, None, None));
        assert!(!config.nvtx && !config.plugin);
        assert_eq!((config.record, config.record_dir), (0, "flashcomm-record".into()));
    }

    #[test]
    fn every_setting_takes_its_values() {
        assert!(!parse_one("FLASHCOMM_ENABLE", "0").0.enable);
        assert!(parse_one("FLASHCOMM_NVTX", "1").0.nvtx);
        assert!(parse_one("FLASHCOMM_PLUGIN", "1").0.plugin);
        assert_eq!(parse_one("FLASHCOMM_BITS", "4:8").0.legs.to_string(), "4:8");
        assert_eq!(parse_one("FLASHCOMM_BITS", " 5 ").0.legs.to_string(), "5");
        assert_eq!(parse_one("FLASHCOMM_BITS", "16").0.legs.to_string(), "16");
        assert_eq!(parse_one("FLASHCOMM_GROUP", "32").0.legs.gather.group.n_elems(), 32);
        for code in Code::ALL {
            let config = parse_one("FLASHCOMM_CODE", code.name()).0;
            assert_eq!((config.code, config.legs.code()), (Some(code), code));
        }
        assert_eq!(parse_one("FLASHCOMM_BITS", "3:8").0.legs.code(), Code::Plain);
        assert_eq!(parse_one("FLASHCOMM_BITS", "4:8").0.legs.code(), Code::Blocks);
        assert_eq!(parse_one("FLASHCOMM_MIN_BYTES", "0").0.min_bytes, Some(0));
        assert_eq!(parse_one("FLASHCOMM_MIN_BYTES", "3M").0.min_bytes, Some(3 << 20));
        assert_eq!(parse_one("FLASHCOMM_MIN_BYTES", "auto").0.min_bytes, None);
        assert_eq!(parse_one("FLASHCOMM_EXACT_MAX_BYTES", "512K").0.exact_max, Some(512 << 10));
        let bf16_only = parse_one("FLASHCOMM_DTYPES", "bf16").0;
        assert!(!bf16_only.compresses(ElementType::Fp16) && bf16_only.compresses(ElementType::Bf16));
        assert_eq!(parse_one("FLASHCOMM_EXCHANGE", "auto").0.exchange, None);
        for (name, kind) in [("peer", ExchangeKind::Peer), ("host", ExchangeKind::Host), ("nccl", ExchangeKind::Nccl)] {
            assert_eq!(parse_one("FLASHCOMM_EXCHANGE", name).0.exchange, Some(kind));
        }
        assert_eq!(parse_one("FLASHCOMM_BUFFER_MIB", "2").0.buffer_bytes, 2 << 20);
        assert_eq!(parse_one("FLASHCOMM_MAX_CTAS", "16").0.max_ctas, 16);
        assert_eq!(parse_one("FLASHCOMM_TIMEOUT_S", "5").0.timeout, Some(Duration::from_secs(5)));
        assert_eq!(parse_one("FLASHCOMM_ATTACH_TIMEOUT_S", "5").0.attach_timeout, Duration::from_secs(5));
        assert_eq!(parse_one("FLASHCOMM_LOG", "debug").0.log_level, LevelFilter::Debug);
        assert_eq!(parse_one("FLASHCOMM_STATS_FILE", "x.%r.json").0.stats_file, Some("x.%r.json".into()));
        assert_eq!(parse_one("FLASHCOMM_RECORD", "16").0.record, 16);
        assert_eq!(parse_one("FLASHCOMM_RECORD_DIR", "a/b").0.record_dir, PathBuf::from("a/b"));
        assert_eq!(parse_one("FLASHCOMM_LOG_FILE", "y.%p.log").0.log_file, Some("y.%p.log".into()));
        assert_eq!(with_process_id(Path::new("y.%p")), Path::new(&format!("y.{}", std::process::id())));
    }

    #[test]
    fn a_malformed_value_warns_by_name_and_keeps_the_default() {
        for (name, value) in [
            ("FLASHCOMM_ENABLE", "yes"),
            ("FLASHCOMM_BITS", "9"),
            ("FLASHCOMM_BITS", "4:"),
            ("FLASHCOMM_BITS", "4:8:8"),
            ("FLASHCOMM_BITS", "4:16"),
            ("FLASHCOMM_BITS", "8:4"),
            ("FLASHCOMM_GROUP", "100"),
            ("FLASHCOMM_CODE", "morse"),
            ("FLASHCOMM_CODE", "spikes"),
            ("FLASHCOMM_MIN_BYTES", "-1"),
            ("FLASHCOMM_MIN_BYTES", "1T"),
            ("FLASHCOMM_MIN_BYTES", "1KM"),
            ("FLASHCOMM_MIN_BYTES", "99999999999999G"),
            ("FLASHCOMM_EXACT_MAX_BYTES", "small"),
            ("FLASHCOMM_DTYPES", "fp32"),
            ("FLASHCOMM_EXCHANGE", "pigeon"),
            ("FLASHCOMM_BUFFER_MIB", "0"),
            ("FLASHCOMM_MAX_CTAS", "many"),
            ("FLASHCOMM_TIMEOUT_S", "1.5"),
            ("FLASHCOMM_ATTACH_TIMEOUT_S", "0"),
            ("FLASHCOMM_LOG", "loud"),
            ("FLASHCOMM_NVTX", "yes"),
            ("FLASHCOMM_PLUGIN", "yes"),
            ("FLASHCOMM_RECORD", "65"),
        ] {
            let (config, malformed) = parse_one(name, value);
            assert_eq!(config, Config::default(), "{name}={value}");
            assert_eq!(malformed, [Malformed { name: find(name).name, value: value.into() }]);
            let text = malformed[0].to_string();
            assert!(text.contains(name) && text.contains(value) && text.contains(find(name).allowed), "{text}");
        }
    }

    #[test]
    fn an_empty_value_counts_as_unset() {
        let (config, malformed) = Config::parse(|_| Some("".into()));
        assert_eq!((config, malformed), (Config::default(), vec![]));
    }

    #[test]
    fn a_code_without_kernels_for_the_widths_warns_and_the_default_holds() {
        let lookup = |name: &str| match name {
            "FLASHCOMM_BITS" => Some("3:8".into()),
            "FLASHCOMM_CODE" => Some("blocks".into()),
            _ => None,
        };
        let (config, malformed) = Config::parse(lookup);
        assert_eq!((config.legs.to_string().as_str(), config.legs.code()), ("3:8", Code::Plain));
        assert_eq!(malformed[0].name, "FLASHCOMM_CODE");
    }
}

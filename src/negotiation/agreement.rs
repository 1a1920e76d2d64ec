//! The settings that all ranks must share: the same everywhere, or nothing is the shim's.

use flashcomm_wire::Legs;

use crate::config::{Config, ExchangeKind, Tune};

/// The settings that all ranks must share, as one rank has them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Agreement {
    /// `FLASHCOMM_BITS`, `FLASHCOMM_GROUP`, `FLASHCOMM_CODE` and `FLASHCOMM_BATCH_INVARIANT`.
    pub legs: Legs,
    /// `FLASHCOMM_MIN_BYTES`.
    pub min_bytes: Option<u64>,
    /// `FLASHCOMM_EXACT_MAX_BYTES`.
    pub exact_max: Option<u64>,
    /// `FLASHCOMM_DTYPES`: fp16, bf16.
    pub dtypes: (bool, bool),
    /// `FLASHCOMM_EXCHANGE`; `None`: auto.
    pub exchange: Option<ExchangeKind>,
    /// `FLASHCOMM_BUFFER_MIB`, in bytes.
    pub buffer_bytes: usize,
    /// `FLASHCOMM_MAX_CTAS`.
    pub max_ctas: u32,
    /// `FLASHCOMM_P2P_READ`; `None`: auto.
    pub p2p_read: Option<bool>,
    /// `FLASHCOMM_TUNE`.
    pub tune: Tune,
    /// `FLASHCOMM_PLUGIN`.
    pub plugin: bool,
    /// Whether the engine wants it off.
    pub switched_off: bool,
}

impl From<&Config> for Agreement {
    fn from(config: &Config) -> Self {
        Self {
            legs: config.legs,
            min_bytes: config.min_bytes,
            exact_max: config.exact_max,
            dtypes: (config.fp16, config.bf16),
            exchange: config.exchange,
            buffer_bytes: config.buffer_bytes,
            max_ctas: config.max_ctas,
            p2p_read: config.p2p_read,
            tune: config.tune,
            plugin: config.plugin,
            switched_off: false,
        }
    }
}

/// The first setting that differs, with both values.
pub(super) fn difference(theirs: Agreement, first: Agreement) -> Option<(&'static str, String, String)> {
    let rows: [(&str, fn(&Agreement) -> String); 14] = [
        ("FLASHCOMM_BITS", |a| a.legs.to_string()),
        ("FLASHCOMM_GROUP", |a| a.legs.reduce.group.n_elems().to_string()),
        ("FLASHCOMM_CODE", |a| a.legs.code().name().into()),
        ("FLASHCOMM_BATCH_INVARIANT", |a| u8::from(a.legs.batch_invariant).to_string()),
        ("FLASHCOMM_MIN_BYTES", |a| a.min_bytes.map_or("auto".into(), |n_bytes| n_bytes.to_string())),
        ("FLASHCOMM_EXACT_MAX_BYTES", |a| a.exact_max.map_or("auto".into(), |n_bytes| n_bytes.to_string())),
        ("FLASHCOMM_DTYPES", |a| match a.dtypes {
            (true, true) => "fp16,bf16".into(),
            (true, false) => "fp16".into(),
            _ => "bf16".into(),
        }),
        ("FLASHCOMM_EXCHANGE", |a| a.exchange.map_or("auto", ExchangeKind::name).into()),
        ("FLASHCOMM_BUFFER_MIB", |a| (a.buffer_bytes >> 20).to_string()),
        ("FLASHCOMM_MAX_CTAS", |a| a.max_ctas.to_string()),
        ("FLASHCOMM_P2P_READ", |a| a.p2p_read.map_or("auto".into(), |reads| u8::from(reads).to_string())),
        ("FLASHCOMM_TUNE", |a| a.tune.name().into()),
        ("FLASHCOMM_PLUGIN", |a| u8::from(a.plugin).to_string()),
        ("flashcommSetCommEnabled", |a| u8::from(!a.switched_off).to_string()),
    ];
    rows.into_iter()
        .map(|(setting, value)| (setting, value(&theirs), value(&first)))
        .find(|(_, theirs, first)| theirs != first)
}

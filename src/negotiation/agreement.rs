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
    /// `FLASHCOMM_HOST_COPY`; `None`: auto.
    pub host_copy: Option<bool>,
    /// `FLASHCOMM_TUNE`.
    pub tune: Tune,
    /// `FLASHCOMM_PLUGIN`.
    pub plugin: bool,
    /// Whether the engine wants it off.
    pub switched_off: bool,
}

impl Agreement {
    /// Whether something may be done that has this setting, of `auto`, 0 and 1: where the ranks measure, `auto` may.
    pub(super) fn may(&self, setting: Option<bool>) -> bool {
        setting.unwrap_or(self.tune != Tune::Off)
    }
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
            host_copy: config.host_copy,
            tune: config.tune,
            plugin: config.plugin,
            switched_off: false,
        }
    }
}

/// The first setting that differs, with both values.
pub(super) fn difference(theirs: Agreement, first: Agreement) -> Option<(&'static str, String, String)> {
    let rows: [(&str, fn(&Agreement) -> String); 15] = [
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
        ("FLASHCOMM_P2P_READ", |a| auto_or_switch(a.p2p_read)),
        ("FLASHCOMM_HOST_COPY", |a| auto_or_switch(a.host_copy)),
        ("FLASHCOMM_TUNE", |a| a.tune.name().into()),
        ("FLASHCOMM_PLUGIN", |a| u8::from(a.plugin).to_string()),
        ("flashcommSetCommEnabled", |a| u8::from(!a.switched_off).to_string()),
    ];
    rows.into_iter()
        .map(|(setting, value)| (setting, value(&theirs), value(&first)))
        .find(|(_, theirs, first)| theirs != first)
}

fn auto_or_switch(value: Option<bool>) -> String {
    value.map_or("auto".into(), |value| u8::from(value).to_string())
}

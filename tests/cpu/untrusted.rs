//! What comes from outside: settings of whoever starts the process, blobs of peers of whatever version. Nothing of it may
//! panic, and what is accepted is within the documented bounds.
//!
//! `PROPTEST_CASES` raises the number of cases. `fuzz/` looks for more, guided by coverage.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use flashcomm::tooling::negotiation::{Agreement, BLOB_BYTES, Blob, Location, agree};
use flashcomm::tooling::settings::{Config, SETTINGS};
use proptest::prelude::*;

/// Pieces of values that are nearly right, and anything.
fn value() -> impl Strategy<Value = OsString> {
    let piece = prop_oneof![
        proptest::sample::select(vec![
            "0",
            "1",
            "2",
            "4",
            "8",
            "9",
            "16384",
            "16385",
            "86400",
            "86401",
            "18446744073709551615",
            "auto",
            "nccl",
            "peer",
            "host",
            "fp16",
            "bf16",
            "warn",
            "trace",
            ":",
            ",",
            "-",
            "+",
            " ",
            "K",
            "M",
            "G",
            ".5",
            "é",
            "%p",
        ])
        .prop_map(|text| text.as_bytes().to_vec()),
        proptest::collection::vec(1u8..=255, 0..4),
    ];
    proptest::collection::vec(piece, 0..5).prop_map(|pieces| OsString::from_vec(pieces.concat()))
}

/// A value that a setting takes, of those where many do.
fn good_settings() -> impl Strategy<Value = Config> {
    let group = proptest::sample::select(vec!["32", "64", "128"]);
    let exchange = proptest::sample::select(vec!["auto", "peer", "host", "nccl"]);
    let dtypes = proptest::sample::select(vec!["fp16", "bf16", "fp16,bf16"]);
    (2u8..=8, 2u8..=8, group, proptest::option::of(any::<u32>()), exchange, dtypes, 1u32..=16384).prop_map(
        |(reduce, gather, group, min_bytes, exchange, dtypes, mib)| {
            let (config, malformed) = Config::parse(|name| {
                Some(OsString::from(match name {
                    "FLASHCOMM_BITS" => format!("{}:{}", reduce.min(gather), reduce.max(gather)),
                    "FLASHCOMM_GROUP" => group.into(),
                    "FLASHCOMM_MIN_BYTES" => min_bytes.map_or("auto".into(), |n| n.to_string()),
                    "FLASHCOMM_EXCHANGE" => exchange.into(),
                    "FLASHCOMM_DTYPES" => dtypes.into(),
                    "FLASHCOMM_BUFFER_MIB" => mib.to_string(),
                    _ => return None,
                }))
            });
            assert_eq!(malformed, []);
            config
        },
    )
}

/// What can become of bytes on their way.
#[derive(Clone, Debug)]
enum Damage {
    Flip(usize, u8),
    Set(usize, Vec<u8>),
    Truncate(usize),
    Repeat(usize),
    Swap(usize, usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        (any::<usize>(), 0u8..8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        (any::<usize>(), proptest::collection::vec(any::<u8>(), 1..16)).prop_map(|(at, bytes)| Damage::Set(at, bytes)),
        any::<usize>().prop_map(Damage::Truncate),
        any::<usize>().prop_map(Damage::Repeat),
        (any::<usize>(), any::<usize>()).prop_map(|(a, b)| Damage::Swap(a, b)),
    ]
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let (n, n_blobs) = (bytes.len().max(1), (bytes.len() / BLOB_BYTES).max(1));
        match self {
            Damage::Flip(at, bit) => bytes.get_mut(at % n).into_iter().for_each(|byte| *byte ^= 1 << bit),
            Damage::Set(at, with) => {
                let at = at % n;
                bytes.iter_mut().skip(at).zip(with).for_each(|(byte, with)| *byte = *with);
            }
            Damage::Truncate(to) => bytes.truncate(to % n),
            Damage::Repeat(from) => bytes.extend_from_within(from % n..),
            Damage::Swap(a, b) => {
                let (a, b) = (a % n_blobs * BLOB_BYTES, b % n_blobs * BLOB_BYTES);
                if a != b && a.max(b) + BLOB_BYTES <= bytes.len() {
                    (0..BLOB_BYTES).for_each(|i| bytes.swap(a + i, b + i));
                }
            }
        }
    }
}

fn config() -> ProptestConfig {
    // Unless the environment asks for more.
    let cases = ProptestConfig::default().cases.max(20_000);
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_settings_give_a_config_within_bounds(values in proptest::collection::vec(proptest::option::of(value()), SETTINGS.len())) {
        let of = |name: &str| SETTINGS.iter().position(|setting| setting.name == name).expect("a documented setting");
        let (config, malformed) = Config::parse(|name| values[of(name)].clone());
        prop_assert!((1 << 20..=16384 << 20).contains(&config.buffer_bytes));
        prop_assert!(config.max_ctas <= 1024 && (1..=86400).contains(&config.attach_timeout.as_secs()));
        prop_assert!(config.timeout.is_none_or(|timeout| (1..=86400).contains(&timeout.as_secs())));
        prop_assert!(config.fp16 || config.bf16);
        for width in [config.legs.reduce.width, config.legs.gather.width] {
            prop_assert!(matches!(width.bits(), 2..=8 | 16));
        }
        for bad in &malformed {
            prop_assert!(values[of(bad.name)].as_ref().is_some_and(|value| !value.is_empty()), "{}", bad.name);
            prop_assert!(bad.to_string().contains(bad.name));
        }
        // A malformed value is as if it were unset.
        let is_bad = |name: &str| malformed.iter().any(|bad| bad.name == name);
        let (again, none) = Config::parse(|name| values[of(name)].clone().filter(|_| !is_bad(name)));
        prop_assert_eq!((again, none), (config, vec![]));
    }

    #[test]
    fn damaged_blobs_are_refused_or_mean_what_they_say(
        config in good_settings(),
        world in 1usize..9,
        damages in proptest::collection::vec(damage(), 0..5),
    ) {
        let all: Vec<_> = (0..world as u32).map(|rank| blob(rank, &config)).collect();
        let whole: Vec<u8> = all.iter().flat_map(Blob::encode).collect();
        let mut bytes = whole.clone();
        damages.iter().for_each(|damage| damage.apply(&mut bytes));
        match agree(&bytes) {
            Ok(blobs) => {
                // Accepted: every rank where it says, with the same settings, and what is read is what was written.
                prop_assert_eq!(blobs.len(), bytes.len() / BLOB_BYTES);
                for (rank, blob) in blobs.iter().enumerate() {
                    prop_assert_eq!(blob.rank as usize, rank);
                    prop_assert!(blob.ready && blob.agreement == blobs[0].agreement);
                    prop_assert_eq!(Blob::decode(&blob.encode()), Ok(*blob));
                }
            }
            Err(disagreement) => {
                prop_assert!(bytes != whole, "{}", disagreement);
                prop_assert!(!disagreement.to_string().is_empty());
            }
        }
    }
}

fn blob(rank: u32, config: &Config) -> Blob {
    let location = Location {
        boot: 6,
        host: 7,
        nccl_host: 17,
        shared_memory: 18,
        process: 8,
        device: 3,
        device_uuid: [9; 16],
        multiprocessors: 132,
        block_channels: 7,
        family: 19,
    };
    let offer = std::array::from_fn(|i| i as u8);
    let (agreement, ready) = (Agreement::from(config), true);
    Blob { rank, agreement, location, reaches: 3, forbids: 4, nvlinks: 5, attach: 9, ready, offer }
}

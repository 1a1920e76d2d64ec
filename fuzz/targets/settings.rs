//! Settings, one after the other, with a zero byte between (an environment variable holds none).

#![no_main]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use flashcomm::tooling::settings::{Config, SETTINGS};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let values: Vec<&[u8]> = data.split(|byte| *byte == 0).collect();
    let value = |name: &str| {
        let i = SETTINGS.iter().position(|setting| setting.name == name).expect("a documented setting");
        values.get(i).map(|value| OsStr::from_bytes(value).to_owned())
    };
    let (config, malformed) = Config::parse(value);
    assert!((1 << 20..=16384 << 20).contains(&config.buffer_bytes) && config.max_ctas <= 1024);
    assert!((1..=86400).contains(&config.attach_timeout.as_secs()) && (config.fp16 || config.bf16));
    // A malformed value is as if it were unset.
    let is_bad = |name: &str| malformed.iter().any(|bad| bad.name == name);
    assert!(malformed.iter().all(|bad| bad.to_string().contains(bad.name)));
    assert_eq!(Config::parse(|name| value(name).filter(|_| !is_bad(name))), (config, vec![]));
});

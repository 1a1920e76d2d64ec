//! What peers send in attach. The input is written over the blobs of ranks that agree, so that most of it stays good:
//! first the number of ranks, then, again and again, a place and a byte for it; an odd end truncates.

#![no_main]

use flashcomm::tooling::negotiation::{Agreement, BLOB_BYTES, Blob, Location, agree};
use flashcomm::tooling::settings::Config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let [world, changes @ ..] = data else { return };
    let agreement = Agreement::from(&Config::default());
    let location = Location {
        host: 7,
        process: 8,
        device: 3,
        device_uuid: [9; 16],
        multiprocessors: 132,
        block_channels: 7,
        is_first: true,
    };
    let blob = |rank| Blob { rank, agreement, location, reaches: 3, attach: 9, ready: true, offer: std::array::from_fn(|i| i as u8) };
    let mut bytes: Vec<u8> = (0..u32::from(world % 8) + 1).flat_map(|rank| blob(rank).encode()).collect();
    let n_bytes = bytes.len();
    let changes = changes.chunks_exact(3);
    if let [last] = changes.remainder() {
        bytes.truncate(usize::from(*last) * n_bytes / 256);
    }
    for change in changes {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]])) % n_bytes;
        bytes.get_mut(at).into_iter().for_each(|byte| *byte = change[2]);
    }
    match agree(&bytes) {
        Ok(blobs) => {
            assert_eq!(blobs.len(), bytes.len() / BLOB_BYTES);
            for (rank, blob) in blobs.iter().enumerate() {
                assert!(blob.rank as usize == rank && blob.ready && blob.agreement == blobs[0].agreement);
                assert_eq!(Blob::decode(&blob.encode()), Ok(*blob));
            }
        }
        Err(disagreement) => assert!(!disagreement.to_string().is_empty()),
    }
});

//! How many blocks a kernel that waits may have (invariant I6).
//!
//! What waits must be resident at once, beside the kernels of the other ranks that share the device,
//! those of other communicators and those of the real NCCL, which wait, too. So the grid never
//! follows the size of the message: it comes from here.
//!
//! What a rank has of the device is what MIG and MPS leave it ([`crate::cuda::Context::multiprocessors`]). A stream that has
//! less, that of a green context, never gets such a kernel (`src/comm/aside.rs`).

use std::collections::HashMap;

use once_cell::sync::Lazy;
use parking_lot::Mutex;

/// Multiprocessors that are left to the kernels of the real NCCL, which fill one with each block and wait, too.
const NCCL_MULTIPROCESSORS: usize = 32;

/// The same for each of several ranks that share a device, of few: they have to cap NCCL's blocks by `NCCL_MAX_CTAS` anyway.
const NCCL_MULTIPROCESSORS_SHARING: usize = 8;

/// Blocks that a rank's kernel may have. Each may fill a multiprocessor.
///
/// `multiprocessors` that the rank with the fewest has of its device, which `sharing` ranks of the communicator use; `is_first`: whether every rank's
/// [`Seat`] is; `max_ctas`: the setting, 0 for none. By default the first communicator of a device, a later one and a
/// kernel of the real NCCL fit on it together. Most engines have large sums on one communicator only, so it gets more.
pub(crate) fn block_limit(multiprocessors: usize, sharing: usize, is_first: bool, max_ctas: u32) -> usize {
    match max_ctas as usize {
        0 => {
            let left = multiprocessors.saturating_sub(nccl_multiprocessors(sharing)).max(multiprocessors / 2);
            let share = match (sharing, is_first) {
                (1, true) => left * 2 / 3,
                (1, false) => left / 3,
                (sharing, _) => left / sharing,
            };
            share.max(1)
        }
        max_ctas => max_ctas.min(multiprocessors / sharing).max(1),
    }
}

/// Multiprocessors of a device that are left to NCCL where so many ranks share it.
fn nccl_multiprocessors(sharing: usize) -> usize {
    if sharing == 1 { NCCL_MULTIPROCESSORS } else { NCCL_MULTIPROCESSORS.min(sharing * NCCL_MULTIPROCESSORS_SHARING) }
}

/// Communicators of this process with a fused exchange, or on the way to one, by device.
static SEATED: Lazy<Mutex<HashMap<i32, usize>>> = Lazy::new(Default::default);

/// A communicator's place among those of a device.
#[derive(Debug)]
pub struct Seat {
    device: i32,
    /// Whether the device had no other when it was taken.
    pub is_first: bool,
}

impl Seat {
    /// Takes one, until it is dropped.
    pub fn take(device: i32) -> Self {
        let mut seated = SEATED.lock();
        let n_seated = seated.entry(device).or_default();
        *n_seated += 1;
        Self { device, is_first: *n_seated == 1 }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(n_seated) = SEATED.lock().get_mut(&self.device) {
            *n_seated -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_default_two_communicators_and_nccl_fit_together() {
        for multiprocessors in [28, 64, 84, 108, 132, 148, 188] {
            for sharing in 1..=16 {
                let [first, later] = [true, false].map(|is_first| block_limit(multiprocessors, sharing, is_first, 0));
                assert!(first >= later && later >= 1);
                if multiprocessors >= 64 && later > 1 {
                    let all = if sharing == 1 { first + later } else { sharing * first };
                    assert!(all + nccl_multiprocessors(sharing) <= multiprocessors, "{multiprocessors} {sharing}");
                }
            }
        }
        assert_eq!([true, false].map(|is_first| block_limit(132, 1, is_first, 0)), [66, 33]);
        assert_eq!([2, 4, 8].map(|sharing| block_limit(132, sharing, true, 0)), [58, 25, 12]);
    }

    #[test]
    fn a_device_has_one_first_communicator_at_a_time() {
        let (device, other) = (-1, -2); // no test has such devices
        let first = Seat::take(device);
        let second = Seat::take(device);
        assert!(first.is_first && !second.is_first && Seat::take(other).is_first);
        drop(first);
        assert!(!Seat::take(device).is_first, "the second is still there");
        drop(second);
        assert!(Seat::take(device).is_first);
    }

    #[test]
    fn the_setting_bounds_the_blocks_but_never_beyond_the_device() {
        assert_eq!(block_limit(132, 2, true, 66), 66);
        assert_eq!(block_limit(132, 4, true, 66), 33);
        assert_eq!(block_limit(132, 1, false, 1), 1);
        assert_eq!(block_limit(132, 1, false, 1024), 132);
    }
}

//! How many blocks a kernel that waits may have (invariant I6).
//!
//! What waits must be resident at once, beside the kernels of the other ranks that share the device,
//! those of other communicators and those of the real NCCL, which wait, too. So the grid never
//! follows the size of the message: it comes from here.
//!
//! What a rank has of the device is what MIG and MPS leave it ([`crate::cuda::Context::multiprocessors`]). A stream that has
//! less, that of a green context, never gets such a kernel (`src/comm/aside.rs`).
//!
//! Most engines have large sums on one communicator only. So one of a device's has a *large* share of it, and all others
//! the *usual* one. It is the first that is used (`src/comm/share.rs`). A device keeps its large share for the communicators of one
//! *family*, those of the same ranks: then one rank of them can lease it for all.

use std::collections::HashMap;

use once_cell::sync::Lazy;
use parking_lot::Mutex;

/// Multiprocessors that are left to the kernels of the real NCCL, which fill one with each block and wait, too.
const NCCL_MULTIPROCESSORS: usize = 32;

/// The same for each of several ranks that share a device, of few: they have to cap NCCL's blocks by `NCCL_MAX_CTAS` anyway.
const NCCL_MULTIPROCESSORS_SHARING: usize = 8;

/// Blocks of a rank's kernel. Each may fill a multiprocessor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Blocks {
    /// In the usual share.
    pub usual: usize,
    /// In the large one.
    pub large: usize,
}

/// Blocks that a rank's kernel may have.
///
/// `multiprocessors` that the rank with the fewest has of its device, which `sharing` ranks of the communicator use; `max_ctas`: the setting, 0 for none. By
/// default a communicator with the large share, another one and a kernel of the real NCCL fit on the device together.
pub(crate) fn blocks(multiprocessors: usize, sharing: usize, max_ctas: u32) -> Blocks {
    let alike = |n_blocks: usize| Blocks { usual: n_blocks.max(1), large: n_blocks.max(1) };
    match max_ctas as usize {
        0 => {
            let left = multiprocessors.saturating_sub(nccl_multiprocessors(sharing)).max(multiprocessors / 2);
            match sharing {
                1 => Blocks { usual: (left / 3).max(1), large: (left * 2 / 3).max(1) },
                sharing => alike(left / sharing),
            }
        }
        max_ctas => alike(max_ctas.min(multiprocessors / sharing)),
    }
}

/// Multiprocessors of a device that are left to NCCL where so many ranks share it.
fn nccl_multiprocessors(sharing: usize) -> usize {
    if sharing == 1 { NCCL_MULTIPROCESSORS } else { NCCL_MULTIPROCESSORS.min(sharing * NCCL_MULTIPROCESSORS_SHARING) }
}

/// For whom a device keeps its large share. One that is not in the table keeps it for nobody.
enum Kept {
    /// For a communicator whose ranks are meeting: what comes of that shows for which family.
    Claimed,
    /// For a family, of which the device has so many communicators. One of them may have it.
    Family { family: u64, n_members: usize, is_leased: bool },
}

static KEPT: Lazy<Mutex<HashMap<i32, Kept>>> = Lazy::new(Default::default);

/// [`Seat::family`] of one that has claimed the large share for whatever family it turns out to have.
pub(crate) const ANY_FAMILY: u64 = 0;
/// The same where the device keeps it for a communicator that is still meeting.
const NO_FAMILY: u64 = 1;

/// A communicator's place among those of a device.
#[derive(Debug)]
pub struct Seat {
    device: i32,
    standing: Mutex<Standing>,
}

#[derive(Clone, Copy, Debug)]
struct Standing {
    family: u64,
    has_lease: bool,
}

impl Seat {
    /// Takes one, until it is dropped.
    pub fn take(device: i32) -> Self {
        let mut kept = KEPT.lock();
        let family = match kept.get_mut(&device) {
            None => {
                kept.insert(device, Kept::Claimed);
                ANY_FAMILY
            }
            Some(Kept::Claimed) => NO_FAMILY,
            Some(Kept::Family { family, n_members, .. }) => {
                *n_members += 1;
                *family
            }
        };
        Self { device, standing: Mutex::new(Standing { family, has_lease: false }) }
    }

    /// The family for which the device keeps its large share, as far as this communicator is concerned.
    pub fn family(&self) -> u64 {
        self.standing.lock().family
    }

    /// The communicator is of that family, for which all of its devices keep the large share; or of one for which not all do.
    pub(crate) fn settle(&self, family: Option<u64>) {
        let mut standing = self.standing.lock();
        match family {
            Some(family) if standing.family == ANY_FAMILY => {
                KEPT.lock().insert(self.device, Kept::Family { family, n_members: 1, is_leased: false });
                standing.family = family;
            }
            Some(_) => {}
            None => leave(self.device, std::mem::replace(&mut standing.family, NO_FAMILY), false),
        }
    }

    /// Takes the device's large share, unless another one of the family has it.
    pub(crate) fn lease(&self) -> bool {
        let mut standing = self.standing.lock();
        if let Some(Kept::Family { family, is_leased, .. }) = KEPT.lock().get_mut(&self.device)
            && *family == standing.family
            && !*is_leased
        {
            (*is_leased, standing.has_lease) = (true, true);
        }
        standing.has_lease
    }

    /// A kernel may still wait for ever: nobody else may have the large share, if this has it.
    pub(crate) fn lose(&self) {
        self.standing.lock().has_lease = false;
    }
}

/// One less has a seat there.
fn leave(device: i32, family: u64, has_lease: bool) {
    if family == NO_FAMILY {
        return;
    }
    let mut kept = KEPT.lock();
    if let Some(Kept::Family { n_members, is_leased, .. }) = kept.get_mut(&device) {
        *n_members -= 1;
        *is_leased &= !has_lease;
        if *n_members > 0 {
            return;
        }
    }
    kept.remove(&device);
}

impl Drop for Seat {
    fn drop(&mut self) {
        let Standing { family, has_lease } = *self.standing.get_mut();
        leave(self.device, family, has_lease);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_default_two_communicators_and_nccl_fit_together() {
        for multiprocessors in [28, 64, 84, 108, 132, 148, 188] {
            for sharing in 1..=16 {
                let Blocks { usual, large } = blocks(multiprocessors, sharing, 0);
                assert!(large >= usual && usual >= 1);
                if multiprocessors >= 64 && usual > 1 {
                    let all = if sharing == 1 { large + usual } else { sharing * large };
                    assert!(all + nccl_multiprocessors(sharing) <= multiprocessors, "{multiprocessors} {sharing}");
                }
            }
        }
        assert_eq!(blocks(132, 1, 0), Blocks { usual: 33, large: 66 });
        assert_eq!([2, 4, 8].map(|sharing| blocks(132, sharing, 0).large), [58, 25, 12]);
    }

    #[test]
    fn a_device_keeps_its_large_share_for_one_family_and_one_of_it_has_it() {
        let (device, other) = (-1, -2); // no test has such devices
        let first = Seat::take(device);
        assert_eq!(first.family(), ANY_FAMILY);
        assert!(Seat::take(device).family() == NO_FAMILY && Seat::take(other).family() == ANY_FAMILY);
        first.settle(Some(77));
        let [second, third] = [(); 2].map(|()| Seat::take(device));
        assert_eq!([&first, &second, &third].map(Seat::family), [77; 3]);
        second.settle(Some(77));
        third.settle(None); // some rank of it has another family's
        assert!(second.lease() && !first.lease() && second.lease() && !third.lease());
        drop(second);
        assert!(first.lease(), "its turn has come");
        drop(first);
        let next = Seat::take(device);
        assert_eq!(next.family(), ANY_FAMILY, "nobody of the family is left");
        next.settle(None);
        assert_eq!(Seat::take(device).family(), ANY_FAMILY, "the claim is given up");
    }

    #[test]
    fn a_large_share_whose_kernels_may_not_end_is_nobodys() {
        let device = -3;
        let [first, second] = [(); 2].map(|()| Seat::take(device));
        first.settle(Some(5));
        let third = Seat::take(device);
        assert!(first.lease());
        first.lose();
        drop(first);
        assert!(!third.lease() && !second.lease());
    }

    #[test]
    fn the_setting_bounds_the_blocks_but_never_beyond_the_device() {
        assert_eq!(blocks(132, 2, 66).large, 66);
        assert_eq!(blocks(132, 4, 66).usual, 33);
        assert_eq!(blocks(132, 1, 1), Blocks { usual: 1, large: 1 });
        assert_eq!(blocks(132, 1, 1024).large, 132);
    }
}

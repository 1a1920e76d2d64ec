//! A name that all ranks of a communicator know from the call that made it, and nobody else.

use std::sync::atomic::{AtomicU64, Ordering};

use flashcomm_wire::WIRE_VERSION;

use super::identity::{hash, process};
use crate::exchange::shared::Name;
use crate::nccl::UniqueId;

/// Names the page at which the ranks of a communicator meet ([`super::page`]).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Key(Name);

/// How ranks make a communicator of another one.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Birth {
    /// `ncclCommSplit`, which all of its ranks call.
    Split,
    /// `ncclCommShrink` without these, in order, which do not call it.
    Shrink(Vec<i32>),
}

impl Key {
    /// Of ranks that were given these ids, which are random.
    pub(crate) fn of_ids(ids: &[UniqueId]) -> Self {
        Self::of(&[b"id", &ids.iter().flat_map(UniqueId::bytes).collect::<Vec<u8>>()])
    }

    /// Of ranks that one call of this process makes.
    pub(crate) fn of_process() -> Self {
        static CALLS: AtomicU64 = AtomicU64::new(0);
        let call = CALLS.fetch_add(1, Ordering::Relaxed);
        Self::of(&[b"process", &process().to_le_bytes(), &call.to_le_bytes()])
    }

    /// Of the ranks that did it for the `n`-th time on the communicator of this key, with one color.
    pub(crate) fn child(&self, birth: &Birth, n: u32, color: i32) -> Self {
        let without: Vec<u8> = match birth {
            Birth::Split => b"split".to_vec(),
            Birth::Shrink(ranks) => ranks.iter().flat_map(|rank| rank.to_le_bytes()).collect(),
        };
        Self::of(&[b"child", &self.0, &n.to_le_bytes(), &color.to_le_bytes(), &without])
    }

    /// Of other versions of the rounds it is another key.
    fn of(parts: &[&[u8]]) -> Self {
        let half = |salt: u8| {
            let version = WIRE_VERSION.to_le_bytes();
            hash(&[&[salt], &version[..], &parts.concat()].concat())
        };
        let mut name = Name::default();
        name[..8].copy_from_slice(&half(1).to_le_bytes());
        name[8..].copy_from_slice(&half(2).to_le_bytes());
        Self(name)
    }

    /// The name of the page.
    pub(crate) fn name(&self) -> Name {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_communicator_has_a_key_of_its_own() {
        let id = |n: u8| UniqueId::from([n; 128]);
        let roots = [Key::of_ids(&[id(1)]), Key::of_ids(&[id(2)]), Key::of_ids(&[id(1), id(2)]), Key::of_process()];
        let births = [Birth::Split, Birth::Shrink(vec![1]), Birth::Shrink(vec![1, 2])];
        let children = roots.iter().flat_map(|root| {
            births
                .iter()
                .flat_map(|birth| [(0, 0), (0, 1), (1, 0), (1, -7)].map(|(n, color)| root.child(birth, n, color)))
        });
        let all: Vec<Key> = roots.into_iter().chain(children).collect();
        let distinct: std::collections::HashSet<Key> = all.iter().copied().collect();
        assert_eq!(distinct.len(), 4 + 4 * 12);
        assert_eq!(all[0], Key::of_ids(&[id(1)]), "the same for all ranks");
    }
}

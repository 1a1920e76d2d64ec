//! Bytes per second of an all-reduce, as nccl-tests counts them, so that the numbers stand beside
//! those of its `all_reduce_perf`. The source of both formulas is doc/PERFORMANCE.md of
//! <https://github.com/NVIDIA/nccl-tests>.
//!
//! The bytes are those of the caller, before compression. So the shim's bus bandwidth says which
//! link NCCL would need to be as fast, and may lie above that of the link there is.

use serde::{Deserialize, Serialize};

/// In 10^9 bytes per second.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Bandwidth {
    /// Algorithm bandwidth: bytes that a rank sums, over the time.
    pub algbw_gb_s: f64,
    /// Bus bandwidth: what an optimal all-reduce of n ranks moves over the slowest link in that
    /// time, 2(n-1)/n of those bytes. It compares between numbers of ranks, and with what the
    /// hardware is said to do.
    pub busbw_gb_s: f64,
}

impl Bandwidth {
    /// Of `world` ranks that sum `n_bytes` each.
    pub fn of(world: usize, n_bytes: usize, us: f64) -> Self {
        let algbw_gb_s = n_bytes as f64 / (us * 1e3);
        Bandwidth { algbw_gb_s, busbw_gb_s: algbw_gb_s * 2.0 * (world - 1) as f64 / world as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidths_are_those_of_nccl_tests() {
        for (world, busbw_gb_s) in [(2, 4.0), (4, 6.0), (8, 7.0)] {
            assert_eq!(Bandwidth::of(world, 4_000_000, 1000.0), Bandwidth { algbw_gb_s: 4.0, busbw_gb_s });
        }
    }
}

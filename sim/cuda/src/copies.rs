//! What orders copies of an all-reduce: the protocol of `kernels/copies.cu`.

use std::sync::atomic::Ordering;

use flashcomm_wire::rings::MAX_WORLD;

use crate::access::args;
use crate::cu_result::Result;
use crate::kernels::Kernel;
use crate::kernels::Shape;
use crate::shared::{SignalArgs, WaitArgs};
use crate::turns::{self, Part, Patience, Progress, word};

/// Tells the other ranks.
pub fn signal(_: &Kernel, bytes: &[u8], _: [u32; 3]) -> Result<()> {
    let args: SignalArgs = args(bytes);
    let counter = word(args.count as usize)?;
    let count = counter.load(Ordering::Relaxed).wrapping_add(args.step);
    for told in args.words.into_iter().filter(|told| !told.is_null()) {
        word(told as usize)?.store(count, Ordering::Release);
    }
    counter.store(count, Ordering::Relaxed);
    Ok(())
}

/// A wait.
struct Waiting {
    count: u32,
    /// The rank that is waited for next.
    rank: usize,
}

/// Waits for the other ranks, or gives up.
pub fn wait(_: &Kernel, bytes: &[u8], shape: Shape) -> Result<()> {
    let args: WaitArgs = args(bytes);
    let counter = word(args.count as usize)?;
    let count = counter.load(Ordering::Relaxed).wrapping_add(args.step);
    turns::take(&args, shape, |_| Ok(vec![Waiting { count, rank: 0 }]))?;
    counter.store(count, Ordering::Relaxed);
    Ok(())
}

impl Part for Waiting {
    type Launch = WaitArgs;

    fn block(&self, _: &WaitArgs) -> usize {
        0
    }

    fn step(&mut self, args: &WaitArgs) -> Result<Progress> {
        while self.rank < MAX_WORLD {
            let told = args.words[self.rank];
            let least = self.count.wrapping_sub(args.lag);
            if !told.is_null() && (word(told as usize)?.load(Ordering::Acquire).wrapping_sub(least) as i32) < 0 {
                return Ok(Progress::Waits(self.rank));
            }
            self.rank += 1;
        }
        Ok(Progress::Done)
    }

    fn place(&self) -> (usize, usize) {
        (0, self.count as usize)
    }

    fn patience(args: &WaitArgs) -> Patience {
        Patience { abort: args.abort, gave_up: args.gave_up, timeout_ns: args.timeout_ns }
    }
}

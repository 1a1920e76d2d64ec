//! Kernels whose blocks wait for other ranks: the parts of a launch that are resident take turns, each goes on until it would
//! have to wait.
//!
//! Resident are those of as many blocks as the multiprocessors of the stream hold; another block begins when one of them has
//! ended. In which order is not promised, so devices of odd number begin with the last: ranks that both lack room wait for each
//! other for ever.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use flashcomm_sim_schedule as schedule;

use crate::cu_result::Result;
use crate::device::{self, Stores};
use crate::kernels::Shape;
use crate::memory::{self, Kind};
use crate::shared::{ABORTED, DEADLINE_PASSED, GaveUp};

/// What came of a step.
pub enum Progress {
    /// The part has ended.
    Done,
    /// It goes on.
    Advanced,
    /// It waits for this rank.
    Waits(usize),
}

/// A part of a launch.
pub trait Part: Sized {
    /// What all parts of a launch share.
    type Launch;
    /// The block that it belongs to.
    fn block(&self, launch: &Self::Launch) -> usize;
    /// Goes on until it would have to wait.
    fn step(&mut self, launch: &Self::Launch) -> Result<Progress>;
    /// What a part that waits says of where it is: channel and iteration.
    fn place(&self) -> (usize, usize);
    /// What ends its waits.
    fn patience(launch: &Self::Launch) -> Patience;
}

/// Runs all blocks of a launch to their end, or until they give up. `begin`: the parts of a block.
pub fn take<P: Part>(launch: &P::Launch, shape: Shape, begin: impl Fn(usize) -> Result<Vec<P>>) -> Result<()> {
    let mut blocks: Vec<usize> = (0..shape.grid[0] as usize).collect();
    if !shape.from_back {
        blocks.reverse(); // they are taken from the end
    }
    // Those of a block are neighbours.
    let n_resident =
        |parts: &[(P, Option<Instant>)]| parts.chunk_by(|(a, _), (b, _)| a.block(launch) == b.block(launch)).count();
    // Each with the time since when it waits.
    let mut parts: Vec<(P, Option<Instant>)> = Vec::new();
    let mut idle_turns = 0;
    loop {
        while n_resident(&parts) < shape.resident as usize
            && let Some(block) = blocks.pop()
        {
            parts.extend(begin(block)?.into_iter().map(|part| (part, None)));
        }
        if parts.is_empty() {
            return Ok(());
        }
        let mut left = Vec::with_capacity(parts.len());
        let mut has_advanced = false;
        for (mut part, since) in parts {
            schedule::point();
            match part.step(launch)? {
                Progress::Done => has_advanced = true,
                Progress::Advanced => {
                    has_advanced = true;
                    left.push((part, None));
                }
                Progress::Waits(peer) => {
                    let since = since.unwrap_or_else(Instant::now);
                    let (channel, iteration) = part.place();
                    if !P::patience(launch).ends(since, (peer, channel, iteration))? {
                        left.push((part, Some(since)));
                    }
                }
            }
        }
        parts = left;
        idle_turns = if has_advanced { 0 } else { idle_turns + 1 };
        match idle_turns {
            0 => {}
            1..50 => std::thread::yield_now(),
            _ => std::thread::sleep(Duration::from_micros(50)),
        }
    }
}

/// What ends a wait, of the kernel's arguments.
pub struct Patience {
    /// Host memory: not 0 once the communicator is aborted.
    pub abort: *const u32,
    /// Host memory.
    pub gave_up: *mut GaveUp,
    /// Nanoseconds that a wait may last; 0: no bound.
    pub timeout_ns: u64,
}

impl Patience {
    /// Whether a wait that began at `since` ends now; says so to the host, once for all.
    pub fn ends(&self, since: Instant, (peer, channel, iteration): (usize, usize, usize)) -> Result<bool> {
        let at = |offset: usize| word(self.gave_up as usize + offset);
        let gave_up = at(offset_of!(GaveUp, why))?;
        let why = match () {
            () if word(self.abort as usize)?.load(Ordering::Relaxed) != 0 => ABORTED,
            () if self.timeout_ns != 0 && since.elapsed().as_nanos() > u128::from(self.timeout_ns) => DEADLINE_PASSED,
            () => gave_up.load(Ordering::Relaxed),
        };
        if why == 0 {
            return Ok(false);
        }
        if at(offset_of!(GaveUp, claimed))?.swap(1, Ordering::AcqRel) == 0 {
            at(offset_of!(GaveUp, peer))?.store(peer as u32, Ordering::Relaxed);
            at(offset_of!(GaveUp, channel))?.store(channel as u32, Ordering::Relaxed);
            at(offset_of!(GaveUp, iteration))?.store(iteration as u32, Ordering::Relaxed);
            gave_up.store(why, Ordering::Release);
        }
        Ok(true)
    }
}

/// A word of memory that ranks share.
pub fn word(address: usize) -> Result<&'static AtomicU32> {
    let word = memory::resolve(address, 4)?;
    // SAFETY: four live bytes, aligned as the areas are; it is used before the allocation can be freed.
    Ok(unsafe { AtomicU32::from_ptr(word.cast()) })
}

/// What becomes of what this device writes to another rank's area at `address`: host memory is not behind the link that may be
/// bad.
pub fn stores_to(address: usize) -> Stores {
    let kind = memory::allocation_of(address).map(|found| found.kind);
    if matches!(kind, Some(Kind::Device | Kind::Imported)) { device::stores() } else { Stores::Arrive }
}

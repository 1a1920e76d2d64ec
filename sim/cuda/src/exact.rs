//! The exact all-reduce: the protocol of `kernels/exact.cu`.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};

use flashcomm_sim_schedule as schedule;
use flashcomm_wire::mailboxes::{VEC_BYTES, renews};
use flashcomm_wire::{Mailboxes, Summand};

use crate::access::{args, load, store};
use crate::cu_result::{CuResult, Result};
use crate::device::Stores;
use crate::kernels::{Kernel, Shape};
use crate::memory;
use crate::shared::ExactArgs;
use crate::turns::{self, Part, Patience, Progress, stores_to, word};

/// A type that is summed as it is.
pub trait Stored: Summand {
    /// From its bytes, as many as it has.
    fn read(bytes: &[u8]) -> Self;
    /// To its bytes.
    fn write(self) -> Vec<u8>;
}

macro_rules! stored {
    ($($type:ty),*) => { $(impl Stored for $type {
        fn read(bytes: &[u8]) -> Self {
            Self::from_le_bytes(bytes.try_into().expect("as many"))
        }
        fn write(self) -> Vec<u8> {
            self.to_le_bytes().to_vec()
        }
    })* };
}
stored!(half::f16, half::bf16, f32);

/// What the blocks of a launch share.
struct Launch {
    args: ExactArgs,
    mailboxes: Mailboxes,
}

struct Block<S> {
    number: usize,
    epoch: u32,
    /// Vectors of this block.
    n_vecs: usize,
    has_sent: bool,
    /// The next vector to be summed.
    next: usize,
    element: PhantomData<S>,
}

/// Runs the operation to its end, or until it gives up.
pub fn run<S: Stored>(_: &Kernel, bytes: &[u8], shape: Shape) -> Result<()> {
    let args: ExactArgs = args(bytes);
    let (world, blocks) = (args.world as usize, args.max_blocks as usize);
    let mailboxes = Mailboxes { world, blocks, block_vecs: args.max_block_vecs as usize };
    if args.block_vecs > args.max_block_vecs || shape.grid[0] > args.max_blocks {
        return Err(CuResult::ILLEGAL_ADDRESS); // would write past the mailboxes
    }
    let n_vecs = (args.count as usize * size_of::<S>()).div_ceil(VEC_BYTES);
    let launch = Launch { args, mailboxes };
    turns::take(&launch, shape, |number| {
        let n_vecs = n_vecs.saturating_sub(number * args.block_vecs as usize).min(args.block_vecs as usize);
        if n_vecs == 0 {
            return Ok(Vec::new());
        }
        let epoch = word(args.epochs as usize + number * 4)?.load(Ordering::Relaxed).wrapping_add(1);
        let (has_sent, next, element) = (false, 0, PhantomData::<S>);
        Ok(vec![Block { number, epoch, n_vecs, has_sent, next, element }])
    })
}

impl Launch {
    /// Half a packet: data and flag.
    fn place(
        &self,
        at_rank: usize,
        from: usize,
        block: &Block<impl Stored>,
        vec: usize,
        i: usize,
    ) -> Result<&AtomicU64> {
        let packet = self.mailboxes.packet(block.epoch, from, block.number, vec, i / 2);
        let place = memory::resolve(self.args.mailboxes[at_rank] as usize + packet + i % 2 * 8, 8)?;
        // SAFETY: eight live bytes, aligned as mailboxes are; it is used before the allocation can be freed.
        Ok(unsafe { AtomicU64::from_ptr(place.cast()) })
    }
}

impl<S: Stored> Block<S> {
    /// The caller's bytes of a vector: where they are, and how many.
    fn extent(&self, launch: &Launch, vec: usize) -> (usize, usize) {
        let start = (self.number * launch.args.block_vecs as usize + vec) * VEC_BYTES;
        (start, (launch.args.count as usize * size_of::<S>()).saturating_sub(start).min(VEC_BYTES))
    }

    /// A vector of the input; zeros behind its end.
    fn input(&self, launch: &Launch, vec: usize) -> Result<Vec<u8>> {
        let (start, n_bytes) = self.extent(launch, vec);
        let mut bytes = if vec < self.n_vecs { load(launch.args.input as usize + start, n_bytes)? } else { Vec::new() };
        bytes.resize(VEC_BYTES, 0);
        Ok(bytes)
    }

    fn send(&self, launch: &Launch) -> Result<()> {
        let (rank, world) = (launch.args.rank as usize, launch.mailboxes.world);
        let n_sent = if renews(self.epoch) { launch.mailboxes.block_vecs } else { self.n_vecs };
        for vec in 0..n_sent {
            if vec % 32 == 0 {
                schedule::step(); // what comes next may never
            }
            let bytes = self.input(launch, vec)?;
            for peer in (1..world).map(|step| (rank + step) % world) {
                for (i, data) in bytes.chunks_exact(4).enumerate() {
                    let data = u32::from_le_bytes(data.try_into().expect("4 bytes"));
                    let data = match stores_to(launch.args.mailboxes[peer] as usize) {
                        Stores::Arrive => data,
                        Stores::Lost => continue,
                        Stores::Garbled => data ^ 0x1111_1111,
                    };
                    let packed = u64::from(self.epoch) << 32 | u64::from(data);
                    launch.place(peer, rank, self, vec, i)?.store(packed, Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }

    /// A peer's vector, once it is there.
    fn receive(&self, launch: &Launch, from: usize, vec: usize) -> Result<Option<Vec<u8>>> {
        let mut bytes = Vec::with_capacity(VEC_BYTES);
        for i in 0..VEC_BYTES / 4 {
            let packed = launch.place(launch.args.rank as usize, from, self, vec, i)?.load(Ordering::Relaxed);
            if (packed >> 32) as u32 != self.epoch {
                return Ok(None);
            }
            bytes.extend((packed as u32).to_le_bytes());
        }
        Ok(Some(bytes))
    }
}

impl<S: Stored> Part for Block<S> {
    type Launch = Launch;

    fn block(&self, _: &Launch) -> usize {
        self.number
    }

    /// All that it sends, or a vector of its sums.
    fn step(&mut self, launch: &Launch) -> Result<Progress> {
        if !self.has_sent {
            self.send(launch)?;
            self.has_sent = true;
            return Ok(Progress::Advanced);
        }
        if self.next == self.n_vecs {
            word(launch.args.epochs as usize + self.number * 4)?.store(self.epoch, Ordering::Relaxed);
            return Ok(Progress::Done);
        }
        let mut sum = vec![-0.0f32; VEC_BYTES / size_of::<S>()];
        for rank in 0..launch.mailboxes.world {
            let bytes = match rank == launch.args.rank as usize {
                true => self.input(launch, self.next)?,
                false => match self.receive(launch, rank, self.next)? {
                    Some(bytes) => bytes,
                    None => return Ok(Progress::Waits(rank)),
                },
            };
            let terms = bytes.chunks_exact(size_of::<S>()).map(|bytes| S::read(bytes).widen());
            sum.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
        }
        let bytes: Vec<u8> = sum.iter().flat_map(|sum| S::round(sum * launch.args.scale).write()).collect();
        let (start, n_bytes) = self.extent(launch, self.next);
        store(launch.args.output as usize + start, &bytes[..n_bytes])?;
        self.next += 1;
        Ok(Progress::Advanced)
    }

    fn place(&self) -> (usize, usize) {
        (self.number, self.next)
    }

    fn patience(launch: &Launch) -> Patience {
        let ExactArgs { abort, gave_up, timeout_ns, .. } = launch.args;
        Patience { abort, gave_up, timeout_ns }
    }
}

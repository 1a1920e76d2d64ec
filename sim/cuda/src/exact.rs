//! The exact all-reduce: the protocol of `kernels/exact.cu`.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, Ordering};

use flashcomm_sim_schedule as schedule;
use flashcomm_wire::mailboxes::{LANE_PACKETS, LANE_VECS, LANES, PACKET_BYTES, STRIPE_VECS, VEC_BYTES, owner, renews};
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
    /// Stripes of this block.
    n_stripes: usize,
    two_hops: bool,
    has_sent: bool,
    /// The stripes in the order in which they are done: in two hops first those that this rank owns.
    order: Vec<usize>,
    /// How many of them are.
    n_done: usize,
    element: PhantomData<S>,
}

/// Words of a stripe's data, and those of each of its vectors.
const STRIPE_WORDS: usize = STRIPE_VECS * VEC_WORDS;
const VEC_WORDS: usize = VEC_BYTES / 4;

/// Runs the operation to its end, or until it gives up.
pub fn run<S: Stored>(_: &Kernel, bytes: &[u8], shape: Shape) -> Result<()> {
    let args: ExactArgs = args(bytes);
    let (world, blocks) = (args.world as usize, args.max_blocks as usize);
    let mailboxes = Mailboxes { world, blocks, block_stripes: args.max_block_stripes as usize };
    if args.block_stripes > args.max_block_stripes || shape.grid[0] > args.max_blocks {
        return Err(CuResult::ILLEGAL_ADDRESS); // would write past the mailboxes
    }
    let n_stripes = (args.count as usize * size_of::<S>()).div_ceil(STRIPE_VECS * VEC_BYTES);
    let launch = Launch { args, mailboxes };
    turns::take(&launch, shape, |number| {
        let each = args.block_stripes as usize;
        let n_stripes = n_stripes.saturating_sub(number * each).min(each);
        if n_stripes == 0 {
            return Ok(Vec::new());
        }
        let epoch = word(args.epochs as usize + number * 4)?.load(Ordering::Relaxed).wrapping_add(1);
        let (two_hops, element) = (launch.args.two_hops != 0 && !renews(epoch), PhantomData::<S>);
        let mut block =
            Block { number, epoch, n_stripes, two_hops, has_sent: false, order: Vec::new(), n_done: 0, element };
        let (mine, others): (Vec<_>, Vec<_>) = (0..n_stripes).partition(|stripe| block.owns(&launch, *stripe));
        block.order = if two_hops { [mine, others].concat() } else { (0..n_stripes).collect() };
        Ok(vec![block])
    })
}

/// Where the words of a lane's packet are in a stripe's data.
fn words_of(packet: usize, lane: usize) -> [usize; LANE_VECS] {
    let vec = |i: usize| (i * LANES + lane) * VEC_WORDS;
    match packet {
        0..LANE_VECS => [0, 1, 2].map(|word| vec(packet) + word),
        _ => [0, 1, 2].map(|i| vec(i) + VEC_WORDS - 1),
    }
}

impl Launch {
    /// A lane's packet: data, and the flag behind. On the GPU it arrives as a whole; here the flag comes last, and is read first.
    fn packet(
        &self,
        (at, from): (usize, usize),
        block: &Block<impl Stored>,
        stripe: usize,
        (packet, lane): (usize, usize),
    ) -> Result<&[AtomicU32; PACKET_BYTES / 4]> {
        let packets = self.mailboxes.packet(block.epoch, (at, from), block.number, stripe, packet);
        let place = self.args.mailboxes[at] as usize + packets + lane * PACKET_BYTES;
        let place = memory::resolve(place, PACKET_BYTES)?;
        // SAFETY: so many live bytes, aligned as mailboxes are; they are used before the allocation can be freed.
        Ok(unsafe { &*place.cast() })
    }
}

impl<S: Stored> Block<S> {
    /// The caller's bytes of a stripe: where they are, and how many.
    fn extent(&self, launch: &Launch, stripe: usize) -> (usize, usize) {
        let start = (self.number * launch.args.block_stripes as usize + stripe) * STRIPE_VECS * VEC_BYTES;
        (start, (launch.args.count as usize * size_of::<S>()).saturating_sub(start).min(STRIPE_VECS * VEC_BYTES))
    }

    /// A stripe of the input; zeros behind its end.
    fn input(&self, launch: &Launch, stripe: usize) -> Result<Vec<u8>> {
        let (start, n_bytes) = self.extent(launch, stripe);
        let is_ours = stripe < self.n_stripes;
        let mut bytes = if is_ours { load(launch.args.input as usize + start, n_bytes)? } else { Vec::new() };
        bytes.resize(STRIPE_VECS * VEC_BYTES, 0);
        Ok(bytes)
    }

    fn owner(&self, launch: &Launch, stripe: usize) -> usize {
        owner(self.number * launch.args.block_stripes as usize + stripe, launch.mailboxes.world)
    }

    fn owns(&self, launch: &Launch, stripe: usize) -> bool {
        self.owner(launch, stripe) == launch.args.rank as usize
    }

    fn send(&self, launch: &Launch) -> Result<()> {
        let n_sent = if renews(self.epoch) { launch.mailboxes.block_stripes } else { self.n_stripes };
        for stripe in 0..n_sent {
            schedule::step(); // what comes next may never
            let bytes = self.input(launch, stripe)?;
            if !self.two_hops {
                self.send_to_peers(launch, stripe, &bytes)?;
            } else if !self.owns(launch, stripe) {
                self.send_to(self.owner(launch, stripe), launch, stripe, &bytes)?;
            }
        }
        Ok(())
    }

    fn send_to_peers(&self, launch: &Launch, stripe: usize, bytes: &[u8]) -> Result<()> {
        let (rank, world) = (launch.args.rank as usize, launch.mailboxes.world);
        (1..world).try_for_each(|step| self.send_to((rank + step) % world, launch, stripe, bytes))
    }

    fn send_to(&self, peer: usize, launch: &Launch, stripe: usize, bytes: &[u8]) -> Result<()> {
        let word = |i: usize| u32::from_le_bytes(bytes[i * 4..][..4].try_into().expect("4 bytes"));
        let garbled = match stores_to(launch.args.mailboxes[peer] as usize) {
            Stores::Arrive => 0,
            Stores::Lost => return Ok(()),
            Stores::Garbled => 0x1111_1111,
        };
        for (i, lane) in (0..LANE_PACKETS).flat_map(|i| (0..LANES).map(move |lane| (i, lane))) {
            let [data @ .., flag] = launch.packet((peer, launch.args.rank as usize), self, stripe, (i, lane))?;
            for (place, at) in data.iter().zip(words_of(i, lane)) {
                place.store(word(at) ^ garbled, Ordering::Relaxed);
            }
            flag.store(self.epoch, Ordering::Release);
        }
        Ok(())
    }

    /// The sum of a stripe, once all peers' are there; until then the peer that it waits for.
    fn sum_up(&self, launch: &Launch, stripe: usize) -> Result<std::result::Result<Vec<u8>, usize>> {
        let mut sum = vec![-0.0f32; STRIPE_VECS * VEC_BYTES / size_of::<S>()];
        for rank in 0..launch.mailboxes.world {
            let bytes = match rank == launch.args.rank as usize {
                true => self.input(launch, stripe)?,
                false => match self.receive(launch, rank, stripe)? {
                    Some(bytes) => bytes,
                    None => return Ok(Err(rank)),
                },
            };
            let terms = bytes.chunks_exact(size_of::<S>()).map(|bytes| S::read(bytes).widen());
            sum.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
        }
        Ok(Ok(sum.iter().flat_map(|sum| S::round(sum * launch.args.scale).write()).collect()))
    }

    /// A peer's stripe, once it is there.
    fn receive(&self, launch: &Launch, from: usize, stripe: usize) -> Result<Option<Vec<u8>>> {
        let mut words = [0; STRIPE_WORDS];
        for (i, lane) in (0..LANE_PACKETS).flat_map(|i| (0..LANES).map(move |lane| (i, lane))) {
            let [data @ .., flag] = launch.packet((launch.args.rank as usize, from), self, stripe, (i, lane))?;
            if flag.load(Ordering::Acquire) != self.epoch {
                return Ok(None);
            }
            for (place, at) in data.iter().zip(words_of(i, lane)) {
                words[at] = place.load(Ordering::Relaxed);
            }
        }
        Ok(Some(words.iter().flat_map(|word| word.to_le_bytes()).collect()))
    }
}

impl<S: Stored> Part for Block<S> {
    type Launch = Launch;

    fn block(&self, _: &Launch) -> usize {
        self.number
    }

    /// All that it sends, or a stripe of its sums.
    fn step(&mut self, launch: &Launch) -> Result<Progress> {
        if !self.has_sent {
            self.send(launch)?;
            self.has_sent = true;
            return Ok(Progress::Advanced);
        }
        let Some(&stripe) = self.order.get(self.n_done) else {
            word(launch.args.epochs as usize + self.number * 4)?.store(self.epoch, Ordering::Relaxed);
            return Ok(Progress::Done);
        };
        let sum = match self.two_hops && !self.owns(launch, stripe) {
            true => {
                let owner = self.owner(launch, stripe);
                self.receive(launch, owner, stripe)?.ok_or(owner)
            }
            false => self.sum_up(launch, stripe)?,
        };
        let sum = match sum {
            Ok(sum) => sum,
            Err(peer) => return Ok(Progress::Waits(peer)),
        };
        if self.two_hops && self.owns(launch, stripe) {
            schedule::step();
            self.send_to_peers(launch, stripe, &sum)?;
        }
        let (start, n_bytes) = self.extent(launch, stripe);
        store(launch.args.output as usize + start, &sum[..n_bytes])?;
        self.n_done += 1;
        Ok(Progress::Advanced)
    }

    fn place(&self) -> (usize, usize) {
        (self.number, self.n_done)
    }

    fn patience(launch: &Launch) -> Patience {
        let ExactArgs { abort, gave_up, timeout_ns, .. } = launch.args;
        Patience { abort, gave_up, timeout_ns }
    }
}

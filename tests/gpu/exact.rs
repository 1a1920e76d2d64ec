//! The exact kernel by itself, two ranks on one GPU: its bits, and its epochs where they wrap around.

use flashcomm::tooling::cuda::{DeviceMemory, PinnedMemory, Stream};
use flashcomm::tooling::kernels::{ElementType, ExactArgs, Kernels};
use flashcomm_wire::mailboxes::{LANE_PACKETS, LANES, PACKET_BYTES, RENEWAL};
use flashcomm_wire::{Code, Mailboxes, Op, reference};
use half::f16;

use super::kernels::{elements, gpu, legs};

const WORLD: usize = 2;
const MAILBOXES: Mailboxes = Mailboxes { world: WORLD, blocks: 4, block_stripes: 3 };

/// What a rank has.
struct Rank {
    stream: Stream,
    mailboxes: DeviceMemory,
    epochs: DeviceMemory,
    user: DeviceMemory,
    control: PinnedMemory,
}

impl Rank {
    fn new(first_epoch: u32) -> Self {
        let stream = Stream::new().unwrap();
        let [mailboxes, epochs, user] = [MAILBOXES.area_bytes(), MAILBOXES.blocks * 4, MAILBOXES.max_bytes()]
            .map(|n| DeviceMemory::new(n).unwrap());
        mailboxes.clear(&stream).unwrap();
        epochs.write(0, &first_epoch.wrapping_sub(1).to_le_bytes().repeat(MAILBOXES.blocks), &stream).unwrap();
        let control = PinnedMemory::new(4096).unwrap();
        Self { stream, mailboxes, epochs, user, control }
    }

    fn bytes(&self, memory: &DeviceMemory) -> Vec<u8> {
        let mut bytes = vec![0; memory.n_bytes()];
        memory.read(0, &mut bytes, &self.stream).unwrap();
        bytes
    }
}

/// An all-reduce of `count` elements in place by all blocks, `block_stripes` stripes each.
fn reduce(kernels: &Kernels, ranks: &[Rank; WORLD], count: usize, block_stripes: usize, seed: u64) {
    let inputs: Vec<Vec<f16>> = (0..WORLD as u64).map(|rank| elements(count, seed + rank)).collect();
    let bytes = |elements: &[f16]| elements.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect::<Vec<u8>>();
    for (rank, input) in ranks.iter().zip(&inputs) {
        rank.user.write(0, &bytes(input), &rank.stream).unwrap();
        rank.stream.synchronize().unwrap();
    }
    let mut mailboxes = [std::ptr::null_mut(); 16];
    (0..WORLD).for_each(|rank| mailboxes[rank] = ranks[rank].mailboxes.at(0).cast());
    for (i, rank) in ranks.iter().enumerate() {
        let args = ExactArgs {
            input: rank.user.at(0),
            output: rank.user.at(0),
            count: count as u64,
            mailboxes,
            epochs: rank.epochs.at(0).cast(),
            abort: rank.control.address().cast(),
            gave_up: rank.control.address().wrapping_byte_add(128).cast(),
            timeout_ns: 10_000_000_000,
            took: std::ptr::null_mut(),
            rank: i as u32,
            world: WORLD as u32,
            block_stripes: block_stripes as u32,
            max_blocks: MAILBOXES.blocks as u32,
            max_block_stripes: MAILBOXES.block_stripes as u32,
            two_hops: u32::from(seed.is_multiple_of(3)),
            scale: 1.0,
        };
        let shape = (MAILBOXES.blocks, block_stripes);
        // SAFETY: memory of the mailboxes' sizes, waited for below; a few blocks fit on any GPU.
        unsafe { kernels.exact(ElementType::Fp16, shape, &args, rank.stream.handle()) }.unwrap();
    }
    ranks.iter().for_each(|rank| rank.stream.synchronize().unwrap());
    let expected = bytes(&reference::exact(&inputs.iter().map(Vec::as_slice).collect::<Vec<_>>(), Op::Sum));
    for (i, rank) in ranks.iter().enumerate() {
        let got = rank.bytes(&rank.user);
        let difference = (0..count * 2).find(|at| got[*at] != expected[*at]);
        assert_eq!(difference, None, "first byte of {count} elements, seed {seed}, rank {i}");
    }
}

#[test]
fn no_flag_is_old_when_epochs_wrap_around() {
    let Some((context, _alone)) = gpu() else { return };
    let _entered = context.enter().unwrap();
    let kernels = Kernels::load(0, legs(Code::Plain, 16, 16, 64), WORLD).unwrap();
    for first_epoch in [1, RENEWAL - 4, u32::MAX - 4] {
        let ranks = [(); WORLD].map(|()| Rank::new(first_epoch));
        // A large one, small ones, and a large one again: of a stripe each block, or all that there is room for.
        let whole = MAILBOXES.max_bytes() / 2;
        for i in 0..10 {
            let (count, block_stripes) = if i == 0 || i == 9 { (whole - 5, 3) } else { (whole / 3 - 3, 1) };
            reduce(&kernels, &ranks, count, block_stripes, u64::from(first_epoch) + 2 * i);
        }
        let last = first_epoch.wrapping_add(9);
        for (i, rank) in ranks.iter().enumerate() {
            let epochs = rank.bytes(&rank.epochs);
            assert!(epochs.chunks_exact(4).all(|epoch| epoch == last.to_le_bytes()), "{epochs:?}");
            if first_epoch == 1 {
                continue;
            }
            // Every place of the other rank's was written anew when the epochs were.
            let bytes = rank.bytes(&rank.mailboxes);
            let stripes = (0..MAILBOXES.blocks).flat_map(|block| (0..MAILBOXES.block_stripes).map(move |i| (block, i)));
            for (turn, (block, stripe)) in (0..2).flat_map(|turn| stripes.clone().map(move |place| (turn, place))) {
                for packet in 0..LANE_PACKETS {
                    let at = MAILBOXES.packet(turn, (i, 1 - i), block, stripe, packet);
                    for packet in bytes[at..at + LANES * PACKET_BYTES].chunks_exact(PACKET_BYTES) {
                        let flag = u32::from_le_bytes(packet[PACKET_BYTES - 4..].try_into().unwrap());
                        assert!(last.wrapping_sub(flag) < 9, "{turn} {block} {stripe}: {flag}");
                    }
                }
            }
        }
    }
}

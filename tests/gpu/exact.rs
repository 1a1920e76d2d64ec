//! The exact kernel by itself, two ranks on one GPU: its bits, and its epochs where they wrap around.

use flashcomm::tooling::cuda::{DeviceMemory, PinnedMemory, Stream};
use flashcomm::tooling::kernels::{ElementType, ExactArgs, Kernels};
use flashcomm_wire::mailboxes::{PACKET_BYTES, RENEWAL};
use flashcomm_wire::{Code, Mailboxes, Op, reference};
use half::f16;

use super::kernels::{elements, gpu, legs};

const WORLD: usize = 2;
const MAILBOXES: Mailboxes = Mailboxes { world: WORLD, blocks: 4, block_vecs: 64 };

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

/// An all-reduce of `count` elements in place by all blocks, `block_vecs` vectors each.
fn reduce(kernels: &Kernels, ranks: &[Rank; WORLD], count: usize, block_vecs: usize, seed: u64) {
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
            rank: i as u32,
            world: WORLD as u32,
            block_vecs: block_vecs as u32,
            max_blocks: MAILBOXES.blocks as u32,
            max_block_vecs: MAILBOXES.block_vecs as u32,
            scale: 1.0,
        };
        // SAFETY: memory of the mailboxes' sizes, waited for below; a few blocks fit on any GPU.
        unsafe { kernels.exact(ElementType::Fp16, MAILBOXES.blocks, &args, rank.stream.handle()) }.unwrap();
    }
    ranks.iter().for_each(|rank| rank.stream.synchronize().unwrap());
    let expected = bytes(&reference::exact(&inputs.iter().map(Vec::as_slice).collect::<Vec<_>>(), Op::Sum));
    for (i, rank) in ranks.iter().enumerate() {
        assert!(rank.bytes(&rank.user)[..count * 2] == expected, "{count} elements, seed {seed}, rank {i}");
    }
}

#[test]
fn no_flag_is_old_when_epochs_wrap_around() {
    let Some(context) = gpu() else { return };
    let _entered = context.enter().unwrap();
    let kernels = Kernels::load(0, legs(Code::Plain, 16, 16, 64)).unwrap();
    for first_epoch in [1, RENEWAL - 4, u32::MAX - 4] {
        let ranks = [(); WORLD].map(|()| Rank::new(first_epoch));
        // A large one, small ones, and a large one again: of a vector each block, or all that there is room for.
        let whole = MAILBOXES.max_bytes() / 2;
        for i in 0..10 {
            let (count, block_vecs) = if i == 0 || i == 9 { (whole - 5, 64) } else { (MAILBOXES.blocks * 8 - 3, 1) };
            reduce(&kernels, &ranks, count, block_vecs, u64::from(first_epoch) + 2 * i);
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
            for (turn, block, vec) in (0..2).flat_map(|turn| {
                (0..MAILBOXES.blocks).flat_map(move |b| (0..MAILBOXES.block_vecs).map(move |v| (turn, b, v)))
            }) {
                for half in 0..2 {
                    let at = MAILBOXES.packet(turn, 1 - i, block, vec, half);
                    let packet = &bytes[at..at + PACKET_BYTES];
                    let flags = [4, 12].map(|at| u32::from_le_bytes(packet[at..at + 4].try_into().unwrap()));
                    assert!(flags.iter().all(|flag| last.wrapping_sub(*flag) < 9), "{turn} {block} {vec}: {flags:?}");
                }
            }
        }
    }
}

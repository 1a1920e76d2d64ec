// The whole all-reduce in one kernel: quantize, hop 1, decode-sum-requantize, hop 2, decode, over memory that every rank
// of the host can write (a peer's GPU memory, or pinned host memory).
//
//   grid   (blocks), all resident at once, beside those of every rank that shares the GPU (invariant I6)
//   block  (128 threads, channels): each row is a channel    dynamic shared memory: a ChannelMemory for each
//   reads  input   count elements of T, 2-byte aligned       writes  output  the same; may be the input
//   both   areas   one of each rank, 128-byte aligned: signals, then rings of slots
//
// Channel c serves tiles c, c + channels, ... of every chunk, one a round, and talks only to channel c of the other
// ranks. The channels of a block know nothing of each other; they share one so that a multiprocessor is filled by one
// block of a kernel, and blocks of other kernels find others. A channel works in iterations; iteration i
//
//     pushes    tile i of every other rank's chunk, quantized, to its owner,
//     reduces   tile i - lag of its own chunk, pushes the sum to everyone, decodes it to the output,
//     decodes   tile i - 2 lag of every other chunk to the output.
//
// With a lag of 1 it signals once in an iteration, after it has reduced: each peer then knows that its tile i is there,
// and the sum of tile i - 1. It waits for its peers' signals of the iteration before when it has pushed, so decoding and
// pushing hide the way of a signal. A ring of three slots takes a hop's tiles from each peer: when a channel pushes tile i it
// has heard that its peers reduced tile i - 3, and when it pushes the sum of tile i - 1 that they decoded that of tile i - 4.
//
// With a lag of 0 it signals after each hop and waits at once; only the other channels hide that. But one slot a hop and
// peer will do, and what is under way between many ranks that share a GPU, in proportion to the square of their number,
// stays in its L2: at 8 ranks and 4 bits 22 MB instead of 66.
//
// Payloads are pushed: written to the area of who reads them. Or they are pulled: written to the own area, whence the
// reader reads them. On some machines GPUs write to many others at once much slower than they read. The signals are the
// same, and who may overwrite what, too.
//
// Where the result is to be batch invariant, a channel pushes the tile of its own chunk, too, to its own area, and adds
// what that decodes to instead of its input.
//
// No credits travel. A test in wire/src/rings.rs goes through every interleaving of the steps. signals.cuh has the signals
// and their memory order.
//
// Bytes through memory per element: 2 read, 2 written, and the payloads, (b/8 + 4/g) written and read in each hop, which
// stay in L2 where the ring is small. 64 MiB of fp16 over 2 ranks of one GPU: 268 MB, 68 us at 3.94 TB/s.

#include <type_traits>

#include "channel.cuh"
#include "watch.cuh"

namespace flashcomm {

template <class T, class Reduce, class Gather, bool kBundles>
struct AllReduce {
  const AllReduceArgs& args;
  T* output;
  uint32_t slot_bytes;
  unsigned channel;
  unsigned n_rounds;
  Caller<T, ChannelMemory> caller;

  // Another rank: the step-th after this one, so that not all ranks turn to the same one at once.
  __device__ unsigned other(unsigned step) const {
    const unsigned rank = args.rank + 1 + step;
    return rank < args.world ? rank : rank - args.world;
  }

  // 1 where this rank's own tile goes through the code, too. Elements that travel as they are come out the same either way.
  __device__ unsigned batch_invariant() const {
    if constexpr (std::is_same_v<Reduce, Stored<T>>) {
      return 0;
    } else {
      return args.batch_invariant;
    }
  }

  // Tiles that are pushed in a round: the last one is this rank's own, if that is pushed at all.
  __device__ unsigned n_pushes() const { return args.world - 1 + batch_invariant(); }

  // Recomputed where it is needed, it takes no register elsewhere.
  __device__ static unsigned n_channels() { return gridDim.x * blockDim.y; }

  // Iterations from a push to the use of what was pushed. Worked out where it is asked for: kept, it takes a register.
  __device__ unsigned lag() const {
    unsigned world = args.world;
    asm volatile("" : "+r"(world));
    return world <= kLaggingWorld ? 1 : 0;
  }

  // ---- where things are -----------------------------------------------------------------------------------------

  // The tile of the chunk of rank owner that this channel serves in round.
  __device__ Tile tile(unsigned owner, unsigned round) const {
    const uint64_t in_chunk = uint64_t(round) * n_channels() + channel;
    const uint64_t start = (owner * args.chunk_tiles + in_chunk) * kTileElems;
    if (round >= n_rounds || start >= args.count) return {0, 0};
    const uint64_t rest = args.count - start;
    return {size_t(start), rest < kTileElems ? int(rest) : kTileElems};
  }

  // Behind the signals an area has, for each channel, hop and peer, a ring: in the area of who reads it, or, where
  // payloads are pulled, of who writes it.
  __device__ uint8_t* slot(unsigned reader, unsigned hop, unsigned writer, unsigned round) const {
    const unsigned at_rank = args.pulls ? writer : reader, peer = args.pulls ? reader : writer;
    const uint32_t ring = (channel * 2 + hop) * args.world + peer;
    const uint32_t slot = lag() == 0 ? ring : ring * kLaggingSlots + round % kLaggingSlots;
    return args.areas[at_rank] + (args.max_channels * kSignalWords * 4 + slot * slot_bytes);
  }

  // ---- the output -----------------------------------------------------------------------------------------------

  __device__ void write(const typename Gather::Thread& encoded, const Tile& t) const {
    if (is_aligned16(args.output) && caller.is_whole(t)) {
      decode_to(encoded, output + t.start, kTileElems, true);
    } else {
      write_slowly(encoded, output + t.start, t.n_elems);
    }
  }
  __device__ static void decode_to(const typename Gather::Thread& encoded, T* tile_ptr, int n_elems, bool is_vectors) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const Vec16 elems = Gather::decode_row(encoded, row);
      if (is_vectors) {
        store_vec16_streaming(tile_ptr + lane_first(row), elems);
      } else {
        store_lane(tile_ptr, lane_first(row), n_elems, false, elems);
      }
    }
  }
  __device__ __noinline__ static void write_slowly(typename Gather::Thread encoded, T* tile_ptr, int n_elems) {
    decode_to(encoded, tile_ptr, n_elems, false);
  }

  // ---- payloads -------------------------------------------------------------------------------------------------

  template <class C>
  __device__ void send(uint8_t* payload, const typename C::Thread& encoded) const {
    Payloads<C, ChannelMemory, kBundles>::send(payload, args.group_shift, encoded);
  }
  template <class C>
  __device__ typename C::Thread receive(const uint8_t* payload) const {
    return Payloads<C, ChannelMemory, kBundles>::receive(payload, args.group_shift);
  }

  // ---- phase 1, push: this rank's tiles of the chunks, to their owners ------------------------------------------

  __device__ void push(unsigned round) {
#pragma unroll 1
    for (unsigned step = 0; step < n_pushes(); ++step) {
      caller.fetch(step + 1 < n_pushes() ? tile(other(step + 1), round) : after_pushes(round));
      const unsigned owner = other(step);
      const Tile t = tile(owner, round);
      if (t.n_elems != 0) {
        caller.take(t);
        ThreadVecs x;
        caller.rows(x);
        send<Reduce>(slot(owner, 0, args.rank, round), Reduce::encode_input(x, args.group_shift));
      }
    }
  }

  // The tile of the input that is taken after those of a round.
  __device__ Tile after_pushes(unsigned round) const {
    return batch_invariant() != 0 ? tile(other(0), round + 1) : tile(args.rank, round - lag());
  }

  // ---- phase 2, reduce: the tile of this rank's chunk, its sum to everyone --------------------------------------

  __device__ void reduce(unsigned round) {
    if (batch_invariant() == 0) caller.fetch(tile(other(0), round + lag() + 1));
    const Tile t = tile(args.rank, round);
    if (t.n_elems != 0) {
      ThreadElems sum;
      start_sum(sum);
      if constexpr (kBundles) {
        add_all_overlapped(round, t, sum);
      } else {
#pragma unroll 1
        for (unsigned rank = 0; rank < args.rank + batch_invariant(); ++rank) add_hop1(rank, round, sum);
        if (batch_invariant() == 0) add_own(t, sum);
#pragma unroll 1
        for (unsigned rank = args.rank + 1; rank < args.world; ++rank) add_hop1(rank, round, sum);
      }
      scale_sum(args.scale, sum);
      const typename Gather::Thread encoded = Gather::encode(sum, args.group_shift);
#pragma unroll 1
      for (unsigned step = 0; step + 1 < args.world; ++step) {
        send<Gather>(slot(other(step), 1, args.rank, round), encoded);
      }
      if constexpr (kBundles) {
        asm volatile("" : "+r"(round));  // worked out anew, the tile takes no registers from the sum
        write(encoded, tile(args.rank, round));
      } else {
        write(encoded, t);
      }
    }
  }

  __device__ void add_hop1(unsigned rank, unsigned round, ThreadElems& sum) const {
    Reduce::add(receive<Reduce>(slot(args.rank, 0, rank, round)), sum);
  }

  __device__ void add_own(const Tile& t, ThreadElems& sum) const {
    caller.take(t);
#pragma unroll
    for (int row = 0; row < kRows; ++row) Reduce::add_input(caller.row(row), sum[row]);
  }

  // The same sum. The next payload is on its way while one is added: from memory of the host it comes late.
  __device__ void add_all_overlapped(unsigned round, const Tile& t, ThreadElems& sum) const {
    const unsigned n_terms = n_pushes();
    auto sender = [&](unsigned term) { return term + (batch_invariant() == 0 && term >= args.rank ? 1 : 0); };
    typename Reduce::Thread next = receive<Reduce>(slot(args.rank, 0, sender(0), round));
#pragma unroll 1
    for (unsigned term = 0; term < n_terms; ++term) {
      if (batch_invariant() == 0 && term == args.rank) add_own(t, sum);
      const typename Reduce::Thread encoded = next;
      if (term + 1 < n_terms) next = receive<Reduce>(slot(args.rank, 0, sender(term + 1), round));
      Reduce::add(encoded, sum);
    }
    if (batch_invariant() == 0 && args.rank == n_terms) add_own(t, sum);
  }

  // ---- phase 3, decode: the other chunks' sums ------------------------------------------------------------------

  // The next payload is on its way while one is decoded.
  __device__ void decode(unsigned round) const {
    typename Gather::Thread next = receive<Gather>(slot(args.rank, 1, other(0), round));
#pragma unroll 1
    for (unsigned step = 0; step + 1 < args.world; ++step) {
      const typename Gather::Thread encoded = next;
      if (step + 2 < args.world) next = receive<Gather>(slot(args.rank, 1, other(step + 1), round));
      const Tile t = tile(other(step), round);
      if (t.n_elems != 0) write(encoded, t);
    }
  }

  // ---- the operation --------------------------------------------------------------------------------------------

  __device__ void run() {
    const Signals signals = {args, channel};
    uint32_t n_signals = args.signals[channel];
    caller.fetch(tile(other(0), 0));
#pragma unroll 1
    for (unsigned i = 0; i < n_rounds + 2 * lag(); ++i) {
      push(i);
      if (lag() == 0) signals.tell(++n_signals);
      if (i >= lag() && !signals.hear(n_signals, i)) return;
      // With a lag, nobody waits for a signal of the last iteration, and it would come when the area may serve another
      // communicator already.
      if (i < n_rounds + lag()) {
        reduce(i - lag());
        signals.tell(++n_signals);
      }
      if (lag() == 0 && !signals.hear(n_signals, i)) return;
      if (i >= 2 * lag()) decode(i - 2 * lag());
    }
    if (threadIdx.x == 0) args.signals[channel] = n_signals;
  }
};

template <class T, class Reduce, class Gather, bool kBundles>
__device__ __forceinline__ void all_reduce(const AllReduceArgs& args) {
  const uint32_t slot_bytes =
      slot_bytes_of(max(payload_bytes<Reduce>(args.group_shift), payload_bytes<Gather>(args.group_shift)));
  using Self = AllReduce<T, Reduce, Gather, kBundles>;
  const unsigned channel = blockIdx.x * blockDim.y + threadIdx.y;
  if (channel >= args.chunk_tiles) return;
  Self self = {
      args,
      static_cast<T*>(args.output),
      slot_bytes,
      channel,
      unsigned((args.chunk_tiles + Self::n_channels() - 1 - channel) / Self::n_channels()),
      {args}};
  self.run();
}

// Channels of a block at most: as many as share the registers of an SM without spilling. (Tried out
// on sm_90; on every other architecture 5 leave the plain code enough room, and 4 blocks and
// elements that travel as they are.)
constexpr unsigned block_channels([[maybe_unused]] Code code, [[maybe_unused]] int bits) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  return code == Code::blocks ? 7 : 6;
#else
  return code == Code::plain && bits < 16 ? 5 : 4;
#endif
}

#define FLASHCOMM_ENTRY(name, T, code, in, out, bundles, channels)                             \
  extern "C" __global__ void __launch_bounds__(kTileThreads * (channels), 1)                    \
      name(const __grid_constant__ AllReduceArgs args) {                                       \
    const Watch watch(args.took);                                                              \
    all_reduce<T, Codec<T, Code::code, in>, Codec<T, Code::code, out>, bundles>(args);         \
    watch.end();                                                                               \
  }

// One entry for each pair of widths, for any world size: specialized ones gained 1% at 2 ranks and nothing at 4 and 8.
#define FLASHCOMM_GPU_ENTRY(name, T, code, in, out) \
  FLASHCOMM_ENTRY(name, T, code, in, out, false, block_channels(Code::code, in))
FLASHCOMM_EACH_ALLREDUCE(FLASHCOMM_GPU_ENTRY)
#undef FLASHCOMM_GPU_ENTRY

// For areas in host memory. It goes through shared memory at the price of registers and barriers, which the link hides.
#define FLASHCOMM_HOST_ENTRY(name, T, code, in, out) FLASHCOMM_ENTRY(name, T, code, in, out, true, kHostChannels)
FLASHCOMM_EACH_HOSTALLREDUCE(FLASHCOMM_HOST_ENTRY)
#undef FLASHCOMM_HOST_ENTRY
#undef FLASHCOMM_ENTRY

}  // namespace flashcomm

// The whole all-reduce of two ranks in one kernel and one hop, over memory that both can write:
// each quantizes its input for the other, and both decode the two payloads and add them.
//
//   grid   (blocks), all resident at once, beside the other rank's if it shares the GPU (I6)
//   block  (128 threads, channels): each row is a channel
//   shared a OneHopMemory for each channel
//   reads  input   count elements of T, 2-byte aligned
//   writes output  the same; may be the input
//   both   areas   one of each rank, 128-byte aligned: signals, then rings of slots
//
// Channels are as in all_reduce.cu. A channel serves round_tiles tiles in a row, one or two, in a
// round. It works in iterations; iteration i
//
//     pushes    the tiles of round i to the peer, and keeps what it has pushed,
//     signals   that they are there, having heard that the peer's of round i - 1 are,
//     decodes   the tiles of round i - 1, the peer's and its own.
//
// So the work of an iteration hides the way of a signal, and two tiles share a signal and its fence
// where there are enough of them. A ring has four turns: when a channel pushes round i it has heard
// the signal of round i - 2, which the peer gave when it had decoded round i - 4. Rounds take turns
// by the count of signals. That goes on from operation to operation: when one begins, the peer may
// not have decoded the last round of the one before.
//
// Payloads are pushed or pulled, as in all_reduce.cu.
//
// No credits travel. A test in wire/src/rings.rs goes through every interleaving of the steps.
// signals.cuh has the signals and their memory order.
//
// Bytes through memory per element: 2 read, 2 written, and the payload, b/8 and the parameters,
// written and read, which stays in L2 where the ring is small. 64 MiB of fp16 at 4 bits: 20 MB each
// way over the link, 50 us at the 400 GB/s of an H100's NVLink.

#include <type_traits>

#include "channel.cuh"
#include "watch.cuh"

namespace flashcomm {

// What a channel has pushed, until the peer's is there. Each thread has its own words.
template <class C>
struct OneHopMemory : ChannelMemory {
  static constexpr int kWords = sizeof(typename C::Thread) / 4;
  uint32_t own[2][kRoundTiles][kWords][kTileThreads];  // by turn and tile
};

template <class T, class C, bool kBundles>
struct OneHop {
  using Memory = OneHopMemory<C>;
  using Thread = typename C::Thread;
  static constexpr int kWords = Memory::kWords;

  const AllReduceArgs& args;
  T* output;
  uint32_t slot_bytes;
  unsigned channel;
  unsigned n_rounds;
  Caller<T, Memory> caller;

  __device__ static unsigned n_channels() { return gridDim.x * blockDim.y; }

  // Tile part of a round of this channel.
  __device__ Tile tile(unsigned round, unsigned part) const {
    const uint64_t number = (uint64_t(round) * n_channels() + channel) * args.round_tiles + part;
    if (round >= n_rounds || part >= args.round_tiles || number * kTileElems >= args.count) return {0, 0};
    const uint64_t rest = args.count - number * kTileElems;
    return {size_t(number * kTileElems), rest < kTileElems ? int(rest) : kTileElems};
  }

  // Behind the signals an area has, for each channel, a ring.
  __device__ uint8_t* slot(unsigned at_rank, uint32_t n_signals, unsigned part) const {
    const uint32_t slot = (channel * kRingTurns + n_signals % kRingTurns) * kRoundTiles + part;
    return args.areas[at_rank] + (args.max_channels * kSignalWords * 4 + slot * slot_bytes);
  }

  // ---- phase 1, push: this rank's tiles of a round, which begins after so many signals ----------

  __device__ void push(unsigned round, uint32_t n_signals) {
#pragma unroll
    for (unsigned part = 0; part < kRoundTiles; ++part) {
      caller.fetch(part + 1 < kRoundTiles ? tile(round, part + 1) : tile(round + 1, 0));
      const Tile t = tile(round, part);
      if (t.n_elems != 0) {
        caller.take(t);
        ThreadVecs x;
        caller.rows(x);
        const Thread encoded = C::encode_input(x, args.group_shift);
        Payloads<C, Memory, kBundles>::send(slot(args.pulls ? args.rank : 1 - args.rank, n_signals, part), args.group_shift, encoded);
        keep(encoded, round, part);
      }
    }
  }

  __device__ static void keep(const Thread& encoded, unsigned round, unsigned part) {
    uint32_t words[kWords];
    memcpy(words, &encoded, sizeof encoded);
#pragma unroll
    for (int w = 0; w < kWords; ++w) memory<Memory>().own[round % 2][part][w][threadIdx.x] = words[w];
  }
  __device__ static Thread kept(unsigned round, unsigned part) {
    uint32_t words[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) words[w] = memory<Memory>().own[round % 2][part][w][threadIdx.x];
    Thread encoded;
    memcpy(&encoded, words, sizeof encoded);
    return encoded;
  }

  // ---- phase 2, decode: both ranks' tiles of a round --------------------------------------------

  __device__ void decode(unsigned round, uint32_t n_signals) const {
#pragma unroll
    for (unsigned part = 0; part < kRoundTiles; ++part) {
      const Tile t = tile(round, part);
      if (t.n_elems != 0) {
        const Thread theirs =
            Payloads<C, Memory, kBundles>::receive(slot(args.pulls ? 1 - args.rank : args.rank, n_signals, part), args.group_shift);
        // (To choose one of two structs would put them into memory.)
        Thread first = kept(round, part), second = theirs;
        if (args.rank != 0) {
          second = first;
          first = theirs;
        }
        write(first, second, t);
      }
    }
  }

  __device__ void write(const Thread& first, const Thread& second, const Tile& t) const {
    const bool is_vectors = is_aligned16(args.output) && caller.is_whole(t);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const Vec16 elems = C::decode_both_row(first, second, row, args.scale);
      if (is_vectors) {
        store_vec16_streaming(output + t.start + lane_first(row), elems);
      } else {
        store_lane(output + t.start, lane_first(row), t.n_elems, false, elems);
      }
    }
  }

  // ---- the operation ----------------------------------------------------------------------------

  __device__ void run() {
    const Signals signals = {args, channel};
    uint32_t n_signals = args.signals[channel];
    caller.fetch(tile(0, 0));
#pragma unroll 1
    for (unsigned i = 0; i <= n_rounds; ++i) {
      const bool pushes = i < n_rounds;
      if (pushes) push(i, n_signals);
      if (!signals.hear_and_tell(i > 0, pushes, n_signals, i)) return;
      if (i > 0) decode(i - 1, n_signals - 1);
      if (pushes) ++n_signals;
    }
    if (threadIdx.x == 0) args.signals[channel] = n_signals;
  }
};

template <class T, Code kCode, int kBits, bool kBundles>
__device__ __forceinline__ void one_hop(const AllReduceArgs& args) {
  using C = Codec<T, kCode, kBits>;
  using Self = OneHop<T, C, kBundles>;
  static_assert(Self::kWords == kBits + (kCode == Code::plain ? kPlainWords : kBlocksWords), "the host asks for as much");
  const unsigned channel = blockIdx.x * blockDim.y + threadIdx.y;
  const uint64_t n_tiles = (args.count + kTileElems - 1) / kTileElems;
  const uint64_t all_rounds = (n_tiles + args.round_tiles - 1) / args.round_tiles;
  if (channel >= all_rounds) return;
  Self self = {
      args,
      static_cast<T*>(args.output),
      slot_bytes_of(payload_bytes<C>(args.group_shift)),
      channel,
      unsigned((all_rounds + Self::n_channels() - 1 - channel) / Self::n_channels()),
      {args}};
  self.run();
}

// Channels of a block at most: as many as share the registers of an SM without spilling, and its
// memory. (Tried out on sm_90.)
constexpr unsigned one_hop_channels([[maybe_unused]] Code code, [[maybe_unused]] int bits) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  return bits == 8 ? 5 : bits <= 4 && code == Code::blocks ? 7 : 6;
#else
  return 4;
#endif
}

#define FLASHCOMM_ENTRY(name, T, code, bits, bundles, channels)                                \
  extern "C" __global__ void __launch_bounds__(kTileThreads * (channels), 1)                    \
      name(const __grid_constant__ AllReduceArgs args) {                                       \
    const Watch watch(args.took);                                                              \
    one_hop<T, Code::code, bits, bundles>(args);                                               \
    watch.end();                                                                               \
  }

#define FLASHCOMM_GPU_ENTRY(name, T, code, bits) \
  FLASHCOMM_ENTRY(name, T, code, bits, false, one_hop_channels(Code::code, bits))
FLASHCOMM_EACH_ONEHOP(FLASHCOMM_GPU_ENTRY)
#undef FLASHCOMM_GPU_ENTRY

// For areas in host memory, as in all_reduce.cu.
#define FLASHCOMM_HOST_ENTRY(name, T, code, bits) FLASHCOMM_ENTRY(name, T, code, bits, true, kHostChannels)
FLASHCOMM_EACH_HOSTONEHOP(FLASHCOMM_HOST_ENTRY)
#undef FLASHCOMM_HOST_ENTRY
#undef FLASHCOMM_ENTRY

}  // namespace flashcomm

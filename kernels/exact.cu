// The exact all-reduce in one hop: every rank writes its whole input to every peer and sums what it gets, over memory that
// every rank of the host can write. For small operations, in which the way of a message counts and not its bytes.
//
//   grid   (blocks), all resident at once, beside those of every rank that shares the GPU (invariant I6)
//   block  (threads), a multiple of 32, at most kExactThreads
//   reads  input      count elements of T, aligned as T is       writes  output  the same; may be the input
//   both   mailboxes  one of each rank, 128-byte aligned
//
// Block b takes vectors b * block_vecs and on, of 16 bytes each. It sends each as two packets, in which a flag stands behind
// each 4 bytes of data; a word of both arrives whole. wire/src/mailboxes.rs says why no old flag is taken for a new one, and a
// test there goes through every interleaving. Each thread writes all of its vectors to all peers, then waits for those of the
// peers in rank order, so the sum is the same on all ranks.
//
// Bytes that leave a rank: 2 for each of data, world - 1 times. The way: a load of the input and the epoch, a store, a load.

#include "element.cuh"
#include "signals.cuh"

namespace flashcomm {

// What a vector of 16 bytes holds, and its sum.
template <class T>
struct Summand {
  static constexpr unsigned kElems = 8;
  using Bits = uint16_t;
  __device__ static void add(const Vec16& v, float (&sum)[8]) {
    float x[8];
    widen<T>(v, x);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] += x[e];
  }
  __device__ static void round(const float (&sum)[8], Vec16& v) { narrow<T>(sum, v); }
};

template <>
struct Summand<float> {
  static constexpr unsigned kElems = 4;
  using Bits = uint32_t;
  __device__ static void add(const Vec16& v, float (&sum)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[e] += __uint_as_float(v.words[e]);
  }
  __device__ static void round(const float (&sum)[4], Vec16& v) {
#pragma unroll
    for (int e = 0; e < 4; ++e) v.words[e] = __float_as_uint(sum[e]);
  }
};

template <class T>
struct Exact {
  static constexpr unsigned kElems = Summand<T>::kElems;
  using Bits = typename Summand<T>::Bits;

  const ExactArgs& args;
  uint32_t epoch;

  // ---- the caller's elements ------------------------------------------------------------------------------------

  // Vector i of the input; past its end zeros.
  __device__ Vec16 load(uint64_t i) const {
    const Bits* at = static_cast<const Bits*>(args.input) + i * kElems;
    const uint64_t rest = args.count - i * kElems;
    return is_aligned16(args.input) && rest >= kElems ? load_vec16(at) : load_slowly(at, rest);
  }
  // Kept out of the way of the usual case, as its counterpart below.
  __device__ __noinline__ static Vec16 load_slowly(const Bits* at, uint64_t rest) {
    Vec16 v = {};
#pragma unroll
    for (unsigned e = 0; e < kElems; ++e) {
      if (e < rest) v.words[e * sizeof(T) / 4] |= uint32_t(at[e]) << (e * sizeof(T) % 4 * 8);
    }
    return v;
  }

  __device__ void store(uint64_t i, const Vec16& v) const {
    Bits* at = static_cast<Bits*>(args.output) + i * kElems;
    const uint64_t rest = args.count - i * kElems;
    if (is_aligned16(args.output) && rest >= kElems) {
      store_vec16(at, v);
    } else {
      store_slowly(at, rest, v);
    }
  }
  __device__ __noinline__ static void store_slowly(Bits* at, uint64_t rest, Vec16 v) {
#pragma unroll
    for (unsigned e = 0; e < kElems; ++e) {
      if (e < rest) at[e] = Bits(v.words[e * sizeof(T) / 4] >> (e * sizeof(T) % 4 * 8));
    }
  }

  // ---- mailboxes ------------------------------------------------------------------------------------------------

  // The first packet of this block's vector i in the mailboxes of a rank; the second is kWarpVecs further.
  __device__ uint4* packet(unsigned at_rank, unsigned from, unsigned i) const {
    const uint32_t turn = epoch % kTurns;
    const uint64_t mailbox = uint64_t((turn * args.world + from) * args.max_blocks + blockIdx.x) * args.max_block_vecs;
    const uint64_t at = (mailbox + i / kWarpVecs * kWarpVecs) * kVecPackets + i % kWarpVecs;
    return reinterpret_cast<uint4*>(args.mailboxes[at_rank]) + at;
  }

  __device__ void send(unsigned to, unsigned i, const Vec16& v) const {
    uint4* at = packet(to, args.rank, i);
    st_relaxed_sys(at, make_uint4(v.words[0], epoch, v.words[1], epoch));
    st_relaxed_sys(at + kWarpVecs, make_uint4(v.words[2], epoch, v.words[3], epoch));
  }

  // Waits for vector i of a peer's. False where the thread gives up.
  __device__ bool receive(unsigned from, unsigned i, Vec16& v) const {
    const uint4* at = packet(args.rank, from, i);
    uint64_t start = 0;
    for (unsigned spins = 1;; ++spins) {
      const uint4 a = ld_relaxed_sys(at), b = ld_relaxed_sys(at + kWarpVecs);
      if (a.y == epoch && a.w == epoch && b.y == epoch && b.w == epoch) {
        v = {{a.x, a.z, b.x, b.z}};
        return true;
      }
      if (spins % 1024 == 0 && gives_up(args, from, blockIdx.x, i, start)) return false;
    }
  }

  // ---- the operation --------------------------------------------------------------------------------------------

  // The first of this block's n vectors is vector first of the input. False where the thread gives up.
  __device__ bool run(uint64_t first, unsigned n) const {
    // Where all places are to be written anew, those past the end get zeros, for which nobody waits.
    const unsigned n_sent = epoch % kRenewal >= kRenewal - kTurns ? args.max_block_vecs : n;
    for (unsigned i = threadIdx.x; i < n_sent; i += blockDim.x) {
      const Vec16 v = i < n ? load(first + i) : Vec16{};
#pragma unroll 1
      for (unsigned step = 1; step < args.world; ++step) {
        const unsigned peer = args.rank + step;
        send(peer < args.world ? peer : peer - args.world, i, v);
      }
    }
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) {
      float sum[kElems];
#pragma unroll
      for (unsigned e = 0; e < kElems; ++e) sum[e] = -0.0f;  // to which -0 adds up to -0
#pragma unroll 1
      for (unsigned rank = 0; rank < args.world; ++rank) {
        Vec16 v;
        if (rank == args.rank) {
          v = load(first + i);
        } else if (!receive(rank, i, v)) {
          return false;
        }
        Summand<T>::add(v, sum);
      }
#pragma unroll
      for (unsigned e = 0; e < kElems; ++e) sum[e] *= args.scale;
      Vec16 v;
      Summand<T>::round(sum, v);
      store(first + i, v);
    }
    return true;
  }
};

template <class T>
__device__ __forceinline__ void exact(const ExactArgs& args) {
  constexpr unsigned kElems = Exact<T>::kElems;
  const uint64_t n_vecs = (args.count + kElems - 1) / kElems;
  const uint64_t first = uint64_t(blockIdx.x) * args.block_vecs;
  if (first >= n_vecs) return;  // as the block of this number does on every rank
  const Exact<T> self = {args, args.epochs[blockIdx.x] + 1};
  const uint64_t rest = n_vecs - first;
  const bool has_ended = self.run(first, rest < args.block_vecs ? unsigned(rest) : args.block_vecs);
  // All threads have read the epoch.
  if (__syncthreads_and(has_ended) && threadIdx.x == 0) args.epochs[blockIdx.x] = self.epoch;
}

#define FLASHCOMM_ENTRY(name, T)                                                                            \
  extern "C" __global__ void __launch_bounds__(kExactThreads, 1) name(const __grid_constant__ ExactArgs args) { \
    exact<T>(args);                                                                                         \
  }
FLASHCOMM_EACH_EXACT(FLASHCOMM_ENTRY)
#undef FLASHCOMM_ENTRY

}  // namespace flashcomm

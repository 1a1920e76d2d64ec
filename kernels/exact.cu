// The exact all-reduce, over memory that every rank of the host can write. For small operations, in which the way of a message
// counts and not its bytes.
//
//   one hop   every rank writes its whole input to every peer and sums what it gets
//   two hops  every stripe goes to its owner, which sums it and writes the sum to every peer: fewer bytes where there are more
//             than two ranks, and the same bits
//
//   grid   (blocks), all resident at once, beside those of every rank that shares the GPU (invariant I6)
//   block  (threads), a multiple of 32, at most kExactThreads
//   reads  input      count elements of T, aligned as T is       writes  output  the same; may be the input
//   both   mailboxes  one of each rank, 128-byte aligned
//
// Block b takes stripes b * block_stripes and on, a warp each: three vectors of 16 bytes a lane, which travel as four packets
// of 12 bytes and a flag. A packet is one access of 128 bits and arrives whole. wire/src/mailboxes.rs says why no old flag is
// taken for a new one, and a test there goes through every interleaving. Each warp writes all of its stripes, then waits for
// those of the peers, three at once, and adds them in rank order, so the sum is the same on all ranks; then, in two hops, for
// the sums of other owners.
//
// Bytes that leave a rank: 4/3 for each of data, world - 1 times; in two hops 2 (world - 1) / world times. The way: a load of
// the input and the epoch, a store, a load; in two hops a store and a load more.

#include "element.cuh"
#include "signals.cuh"
#include "watch.cuh"

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

  // The first element of vector i of this lane in a stripe of the operation.
  __device__ uint64_t element(uint64_t stripe, int i) const {
    return ((stripe * kLaneVecs + i) * kLanes + threadIdx.x % kLanes) * kElems;
  }

  __device__ static void copy(const Vec16 (&from)[kLaneVecs], Vec16 (&to)[kLaneVecs]) {
#pragma unroll
    for (int i = 0; i < kLaneVecs; ++i) to[i] = from[i];
  }

  // Past the end of the input zeros.
  __device__ void load(uint64_t stripe, Vec16 (&v)[kLaneVecs]) const {
    const Bits* input = static_cast<const Bits*>(args.input);
#pragma unroll
    for (int i = 0; i < kLaneVecs; ++i) {
      const uint64_t at = element(stripe, i);
      if (is_aligned16(input) && at + kElems <= args.count) {
        v[i] = load_vec16(input + at);
      } else {
        v[i] = at < args.count ? load_slowly(input + at, args.count - at) : Vec16{};
      }
    }
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

  __device__ void store(uint64_t stripe, const Vec16 (&v)[kLaneVecs]) const {
    Bits* output = static_cast<Bits*>(args.output);
#pragma unroll
    for (int i = 0; i < kLaneVecs; ++i) {
      const uint64_t at = element(stripe, i);
      if (is_aligned16(output) && at + kElems <= args.count) {
        store_vec16(output + at, v[i]);
      } else if (at < args.count) {
        store_slowly(output + at, args.count - at, v[i]);
      }
    }
  }
  __device__ __noinline__ static void store_slowly(Bits* at, uint64_t rest, Vec16 v) {
#pragma unroll
    for (unsigned e = 0; e < kElems; ++e) {
      if (e < rest) at[e] = Bits(v.words[e * sizeof(T) / 4] >> (e * sizeof(T) % 4 * 8));
    }
  }

  // ---- mailboxes ------------------------------------------------------------------------------------------------

  // This lane's first packet of this block's stripe in the mailboxes of a rank; the next ones are kLanes further each.
  __device__ uint4* packets(unsigned at_rank, unsigned from, unsigned stripe) const {
    const unsigned turn = epoch % kTurns, peer = from - (from > at_rank ? 1 : 0);
    const uint64_t mailbox = uint64_t(turn * (args.world - 1) + peer) * args.max_blocks + blockIdx.x;
    const uint64_t at = (mailbox * args.max_block_stripes + stripe) * (kLanePackets * kLanes) + threadIdx.x % kLanes;
    return reinterpret_cast<uint4*>(args.mailboxes[at_rank]) + at;
  }

  __device__ void send(unsigned to, unsigned stripe, const Vec16 (&v)[kLaneVecs]) const {
    uint4* at = packets(to, args.rank, stripe);
#pragma unroll
    for (int i = 0; i < kLaneVecs; ++i) {
      st_relaxed_sys_b128(at + i * kLanes, make_uint4(v[i].words[0], v[i].words[1], v[i].words[2], epoch));
    }
    st_relaxed_sys_b128(at + kLaneVecs * kLanes, make_uint4(v[0].words[3], v[1].words[3], v[2].words[3], epoch));
  }

  // Reads a peer's. False where it is not there yet.
  __device__ bool read(unsigned from, unsigned stripe, Vec16 (&v)[kLaneVecs]) const {
    const uint4* at = packets(args.rank, from, stripe);
    const uint4 a = ld_relaxed_sys_b128(at), b = ld_relaxed_sys_b128(at + kLanes);
    const uint4 c = ld_relaxed_sys_b128(at + 2 * kLanes), d = ld_relaxed_sys_b128(at + 3 * kLanes);
    v[0] = {{a.x, a.y, a.z, d.x}};
    v[1] = {{b.x, b.y, b.z, d.y}};
    v[2] = {{c.x, c.y, c.z, d.z}};
    return a.w == epoch && b.w == epoch && c.w == epoch && d.w == epoch;
  }

  // Waits for those of the n peers from `first` on, of ranks but this one. They are read together: one after the other
  // each would take the way to the mailboxes and back. False where the thread gives up.
  template <unsigned n>
  __device__ bool receive(unsigned first, unsigned stripe, Vec16 (&v)[n][kLaneVecs]) const {
    uint64_t start = 0;
    for (unsigned spins = 1;; ++spins) {
      unsigned missing = n;
#pragma unroll
      for (unsigned i = 0; i < n; ++i) {
        if (!read(peer(first + i), stripe, v[i])) missing = i;
      }
      if (missing == n) return true;
      if (spins % 1024 == 0 && gives_up(args, peer(first + missing), blockIdx.x, stripe, start)) return false;
    }
  }

  // The rank of a peer: they count from 0 to world - 2.
  __device__ unsigned peer(unsigned number) const { return number + (number >= args.rank ? 1 : 0); }

  // ---- the operation --------------------------------------------------------------------------------------------

  __device__ void send_to_peers(unsigned stripe, const Vec16 (&v)[kLaneVecs]) const {
#pragma unroll 1
    for (unsigned step = 1; step < args.world; ++step) {
      const unsigned peer = args.rank + step;
      send(peer < args.world ? peer : peer - args.world, stripe, v);
    }
  }

  __device__ static void add(const Vec16 (&term)[kLaneVecs], float (&sum)[kLaneVecs][kElems]) {
#pragma unroll
    for (int i = 0; i < kLaneVecs; ++i) Summand<T>::add(term[i], sum[i]);
  }

  // Waits for the n peers' stripes from `first` on and adds them, and this rank's, mine, where it is its turn.
  template <unsigned n>
  __device__ bool add_peers(unsigned first, unsigned stripe, const Vec16 (&mine)[kLaneVecs],
                            float (&sum)[kLaneVecs][kElems]) const {
    Vec16 terms[n][kLaneVecs];
    if (!receive<n>(first, stripe, terms)) return false;
#pragma unroll
    for (unsigned i = 0; i < n; ++i) {
      if (first + i == args.rank) add(mine, sum);
      add(terms[i], sum);
    }
    return true;
  }

  // Waits for all peers' stripe and adds it to this rank's, v, which becomes the sum. False where the thread gives up.
  __device__ bool sum_up(unsigned stripe, Vec16 (&v)[kLaneVecs]) const {
    float sum[kLaneVecs][kElems];
#pragma unroll
    for (int i = 0; i < kLaneVecs; ++i) {
#pragma unroll
      for (unsigned e = 0; e < kElems; ++e) sum[i][e] = -0.0f;  // to which -0 adds up to -0
    }
    const unsigned n_peers = args.world - 1;
    unsigned n_added = 0;
#pragma unroll 1
    for (; n_peers - n_added >= 3; n_added += 3) {
      if (!add_peers<3>(n_added, stripe, v, sum)) return false;
    }
    if (n_peers - n_added == 2 && !add_peers<2>(n_added, stripe, v, sum)) return false;
    if (n_peers - n_added == 1 && !add_peers<1>(n_added, stripe, v, sum)) return false;
    if (args.rank == n_peers) add(v, sum);
#pragma unroll
    for (int i = 0; i < kLaneVecs; ++i) {
#pragma unroll
      for (unsigned e = 0; e < kElems; ++e) sum[i][e] *= args.scale;
      Summand<T>::round(sum[i], v[i]);
    }
    return true;
  }

  // The first of this block's n stripes is stripe first of the operation. False where the thread gives up.
  __device__ bool run(unsigned first, unsigned n) const {
    const unsigned warp = threadIdx.x / kLanes, n_warps = blockDim.x / kLanes;
    // Where all places are to be written anew, those past the end get zeros, for which nobody waits.
    const bool renews = epoch % kRenewal >= kRenewal - kTurns;
    const unsigned n_sent = renews ? args.max_block_stripes : n;
    const bool two_hops = args.two_hops && !renews;
    Vec16 mine[kLaneVecs] = {};  // of the first stripe, mostly the only one, of a warp
    for (unsigned stripe = warp; stripe < n_sent; stripe += n_warps) {
      Vec16 v[kLaneVecs] = {};
      if (stripe < n) load(first + stripe, v);
      if (stripe == warp) copy(v, mine);
      const unsigned owner = (first + stripe) % args.world;
      if (!two_hops) {
        send_to_peers(stripe, v);
      } else if (owner != args.rank) {
        send(owner, stripe, v);
      }
    }
    for (unsigned stripe = warp; stripe < n; stripe += n_warps) {
      if (two_hops && (first + stripe) % args.world != args.rank) continue;
      if (stripe != warp) load(first + stripe, mine);
      if (!sum_up(stripe, mine)) return false;
      if (two_hops) send_to_peers(stripe, mine);
      store(first + stripe, mine);
    }
    for (unsigned stripe = warp; two_hops && stripe < n; stripe += n_warps) {
      const unsigned owner = (first + stripe) % args.world;
      if (owner == args.rank) continue;
      Vec16 sum[1][kLaneVecs];
      if (!receive<1>(owner - (owner > args.rank ? 1 : 0), stripe, sum)) return false;
      store(first + stripe, sum[0]);
    }
    return true;
  }
};

template <class T>
__device__ __forceinline__ void exact(const ExactArgs& args) {
  constexpr unsigned kStripeElems = kLanes * kLaneVecs * Exact<T>::kElems;
  const unsigned n_stripes = unsigned((args.count + kStripeElems - 1) / kStripeElems);  // as many as there is room for
  const unsigned first = blockIdx.x * args.block_stripes;
  if (first >= n_stripes) return;  // as the block of this number does on every rank
  const Exact<T> self = {args, args.epochs[blockIdx.x] + 1};
  const bool has_ended = self.run(first, min(n_stripes - first, args.block_stripes));
  // All threads have read the epoch.
  if (__syncthreads_and(has_ended) && threadIdx.x == 0) args.epochs[blockIdx.x] = self.epoch;
}

#define FLASHCOMM_ENTRY(name, T)                                                                            \
  extern "C" __global__ void __launch_bounds__(kExactThreads, 1) name(const __grid_constant__ ExactArgs args) { \
    const Watch watch(args.took);                                                                           \
    exact<T>(args);                                                                                         \
    watch.end();                                                                                            \
  }
FLASHCOMM_EACH_EXACT(FLASHCOMM_ENTRY)
#undef FLASHCOMM_ENTRY

}  // namespace flashcomm

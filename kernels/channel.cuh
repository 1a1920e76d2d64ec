// A channel of a fused kernel: 128 threads that carry tiles between the caller's memory, shared
// memory and payloads. all_reduce.cu and one_hop.cu say what it does with them.
#pragma once

#include "codec.cuh"
#include "signals.cuh"

namespace flashcomm {

// Shared memory of a channel, or the beginning of it.
struct ChannelMemory {
  Vec16 stages[kStages][kRows][kTileThreads];  // of the input
  Vec16 params[kMaxParamsBytes / 16];          // of a tile, where they travel in bundles
};
static_assert(sizeof(ChannelMemory) == kChannelSharedBytes, "the host asks for as much");

// This thread's channel's, where each channel of the block has a Memory. (Found anew where it is
// needed, it takes no register elsewhere.)
template <class Memory>
__device__ __forceinline__ Memory& memory() {
  extern __shared__ uint4 channels[];
  return reinterpret_cast<Memory*>(channels)[threadIdx.y];
}

// The caller's elements. Tiles of the input are on their way through shared memory, each fetched
// one ahead of the one that is taken. Each thread fetches and reads its own elements, so nothing
// here synchronizes.
template <class T, class Memory>
struct Caller {
  const AllReduceArgs& args;
  unsigned stage = 0;

  __device__ static ChannelMemory& shared() { return memory<Memory>(); }
  __device__ static bool is_whole(const Tile& tile) { return tile.n_elems == kTileElems; }

  // Starts to fetch a tile, always the one that is taken after the next: whoever takes a tile names
  // its successor first.
  __device__ void fetch(const Tile& tile) {
    if (is_aligned16(args.input) && is_whole(tile)) {
      const Vec16* vecs = reinterpret_cast<const Vec16*>(static_cast<const T*>(args.input) + tile.start);
      const uint64_t policy = policy_evict_first();
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        cp_async_16(&shared().stages[stage][row][threadIdx.x], vecs + lane_first(row) / kLaneElems, policy);
      }
    }
    cp_async_commit();
    stage ^= 1;
  }

  // Waits until this thread's elements of a tile, whose turn it is, are there. The next fetch takes
  // their place.
  __device__ void take(const Tile& tile) const {
    if (is_aligned16(args.input) && is_whole(tile)) {
      cp_async_wait<1>();
    } else {
      fill_slowly(shared().stages[stage], static_cast<const T*>(args.input) + tile.start, tile.n_elems);
    }
  }
  __device__ Vec16 row(int row) const { return shared().stages[stage][row][threadIdx.x]; }
  __device__ void rows(ThreadVecs& x) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) x[r] = row(r);
  }
  // Kept out of the way of the usual case, which then fits the instruction cache.
  __device__ __noinline__ static void fill_slowly(Vec16 (&rows)[kRows][kTileThreads], const T* tile_ptr, int n_elems) {
    ThreadVecs v;
    load_vecs(tile_ptr, n_elems, v);
#pragma unroll
    for (int row = 0; row < kRows; ++row) rows[row][threadIdx.x] = v[row];
  }
};

// Payloads on their way. kBundles: what a payload has for each group goes through shared memory, so
// that few large requests carry it instead of many small ones, of which a link to the host takes no
// more a second than of large ones.
template <class C, class Memory, bool kBundles>
struct Payloads {
  __device__ static void send(uint8_t* payload, unsigned group_shift, const typename C::Thread& encoded) {
    if constexpr (kBundles) {
      __syncwarp();  // what its lanes received last has been read from there
      C::store_params(params(), group_shift, encoded);
      copy_params(payload + C::kQuantsBytes, params(), group_shift);
      C::store_quants(payload, encoded);
    } else {
      store_payload<C>(payload, group_shift, encoded);
    }
  }

  __device__ static typename C::Thread receive(const uint8_t* payload, unsigned group_shift) {
    if constexpr (kBundles) {
      typename C::Thread encoded;
      C::load_quants(payload, encoded);  // on their way while the rest is
      copy_params(params(), payload + C::kQuantsBytes, group_shift);
      C::load_params(params(), group_shift, encoded);
      return encoded;
    } else {
      return load_payload<C>(payload, group_shift);
    }
  }

 private:
  __device__ static uint8_t* params() { return reinterpret_cast<uint8_t*>(memory<Memory>().params); }

  // To or from shared memory, 16 bytes a thread.
  __device__ static void copy_params(void* to, const void* from, unsigned group_shift) {
    channel_barrier(true);  // what is there has been written, and what was there has been read
    const unsigned at = threadIdx.x;
    if (at * 16 < C::params_bytes(group_shift)) {
      store_vec16(static_cast<Vec16*>(to) + at, load_vec16(static_cast<const Vec16*>(from) + at));
    }
    channel_barrier(true);
  }
};

// Bytes of a slot: a payload, and the rest of its last cache line.
__device__ __forceinline__ uint32_t slot_bytes_of(uint32_t payload) {
  return (payload + kLineBytes - 1) / kLineBytes * kLineBytes;
}

}  // namespace flashcomm

// Combine: both ranks' payloads to the caller's output, where one hop is enough.
//
//   grid   (tiles of the slice)    block  128 threads, one tile
//   reads  payload  slot of rank r at r * slot_bytes
//   writes output   count elements of T, 2-byte aligned
//
// Bytes through memory per element, both ways: 2 (b/8 + 4/g) + 2.

#include "codec.cuh"

namespace flashcomm {

template <class T, Code kCode, int kBits>
__device__ __forceinline__ void combine(const CombineArgs& args) {
  using C = Codec<T, kCode, kBits>;
  const Tile tile = tile_of(args.slice, 0, blockIdx.x);
  if (tile.n_elems == 0) return;

  const unsigned shift = args.slice.group_shift;
  const uint8_t* payload = args.payload + blockIdx.x * payload_bytes<C>(shift);
  const typename C::Thread first = load_payload<C>(payload, shift);
  const typename C::Thread second = load_payload<C>(payload + args.slot_bytes, shift);
  T* output = static_cast<T*>(args.output) + tile.start;
  const bool aligned = is_aligned16(output);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    store_lane(output, lane_first(row), tile.n_elems, aligned, C::decode_both_row(first, second, row, args.scale));
  }
}

#define FLASHCOMM_ENTRY(name, T, code, bits)                                                                     \
  extern "C" __global__ void __launch_bounds__(kTileThreads) name(const __grid_constant__ CombineArgs args) { \
    combine<T, Code::code, bits>(args);                                                                       \
  }
FLASHCOMM_EACH_COMBINE(FLASHCOMM_ENTRY)
#undef FLASHCOMM_ENTRY

}  // namespace flashcomm

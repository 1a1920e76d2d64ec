// Dequantize: the gathered payloads of hop 2 to the caller's output. The owner of a chunk decodes what it sent, as
// everyone else does, so that all ranks hold the same bits.
//
//   grid   (tiles of the slice, ranks)    block  128 threads, one tile
//   reads  payload  slot of owner r at r * slot_bytes
//   writes output   count elements of T, 2-byte aligned
//
// Bytes through memory per element, both ways: b/8 + 4/g + 2.

#include "codec.cuh"

namespace flashcomm {

template <class T, Code kCode, int kBits>
__device__ __forceinline__ void dequantize(const DequantizeArgs& args) {
  using C = Codec<T, kCode, kBits>;
  const unsigned owner = blockIdx.y;
  const Tile tile = tile_of(args.slice, owner, blockIdx.x);
  if (tile.n_elems == 0) return;

  const unsigned shift = args.slice.group_shift;
  const uint8_t* payload = args.payload + owner * args.slot_bytes + blockIdx.x * payload_bytes<C>(shift);
  const typename C::Thread encoded = load_payload<C>(payload, shift);
  T* output = static_cast<T*>(args.output) + tile.start;
  const bool aligned = is_aligned16(output);
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    store_lane(output, lane_first(row), tile.n_elems, aligned, C::decode_row(encoded, row));
  }
}

#define FLASHCOMM_ENTRY(name, T, code, bits)                                                                        \
  extern "C" __global__ void __launch_bounds__(kTileThreads) name(const __grid_constant__ DequantizeArgs args) { \
    dequantize<T, Code::code, bits>(args);                                                                       \
  }
FLASHCOMM_EACH_DEQUANTIZE(FLASHCOMM_ENTRY)
#undef FLASHCOMM_ENTRY

}  // namespace flashcomm

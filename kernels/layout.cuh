// Where everything stands: elements in a tile, tiles in an operation. The numbers are those of wire/src/codec/ and
// wire/src/plan.rs, and the GPU tests hold the two sides together byte for byte.
//
// shared.cuh, which build.rs writes from src/kernels/shared.rs, has what Rust knows too: the constants, the structs that
// kernels get, and the list of kernels.
#pragma once

#include "shared.cuh"

namespace flashcomm {

// A tile of the operation: where its elements start, and how many there are (0: the chunk ends before it).
struct Tile {
  size_t start;
  int n_elems;
};

// Tile i of the slice in the chunk of rank owner.
__device__ __forceinline__ Tile tile_of(const Slice& slice, unsigned owner, unsigned i) {
  const uint64_t in_chunk = slice.first_tile + i;
  const uint64_t start = (owner * slice.chunk_tiles + in_chunk) * kTileElems;
  if (i >= slice.n_tiles || in_chunk >= slice.chunk_tiles || start >= slice.count) return {0, 0};
  const uint64_t rest = slice.count - start;
  return {size_t(start), rest < kTileElems ? int(rest) : kTileElems};
}

// First element, within its tile, of this thread's vector in row.
__device__ __forceinline__ int lane_first(int row) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  return warp * kWarpElems + row * kRowElems + lane * kLaneElems;
}

}  // namespace flashcomm

// Where everything stands: elements in a tile, codes in a payload, tiles in an operation. The numbers are those of
// wire/src/codec.rs and wire/src/plan.rs, and the GPU tests hold the two sides together byte for byte.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashcomm {

constexpr int kTileElems = 4096;  // the unit of coding and chunking
constexpr int kTileThreads = 128;  // threads that code one tile, 32 elements each
constexpr int kWarpElems = 1024;
constexpr int kRows = 4;          // rows of 256 elements that a warp loads, one 16-byte vector a lane
constexpr int kRowElems = 256;
constexpr int kLaneElems = 8;     // elements of a lane in a row

// One slice of one all-reduce, as every kernel gets it. Mirrors SliceArgs in src/kernels.rs.
struct Slice {
  uint64_t count;            // elements of the whole operation
  uint64_t first_tile;       // first tile of the slice within each chunk
  uint64_t chunk_tiles;      // tiles per chunk
  uint32_t n_tiles;          // tiles of the slice in the longest chunk
  uint32_t group_shift;      // log2 of the lanes that hold one quantization group in a row: group size / 8
};

// ---- the fused kernel -----------------------------------------------------------------------------------------

constexpr unsigned kMaxWorld = 16;
constexpr unsigned kSignalWords = 32;  // of a channel: 128 bytes, a line of its own
constexpr unsigned kLaggingWorld = 4;  // ranks up to which the lag is 1
constexpr unsigned kStages = 2;        // input tiles on their way to a channel
constexpr unsigned kMaxParamsBytes = 512;  // of a tile in either code, in groups of 32

// Why a channel gave up waiting.
constexpr uint32_t kAborted = 1, kDeadlinePassed = 2;

// Written by the first channel that gives up waiting, read by the host and by those that still wait. Mirrors GaveUp in
// src/kernels.rs.
struct GaveUp {
  uint32_t why;      // 0: nobody has; written last
  uint32_t claimed;  // by the one that writes the rest
  uint32_t peer;     // who had not signalled
  uint32_t channel;
  uint32_t iteration;
};

// Mirrors AllReduceArgs in src/kernels.rs.
struct AllReduceArgs {
  const void* input;
  void* output;
  uint64_t count;
  uint64_t chunk_tiles;
  uint8_t* areas[kMaxWorld];  // every rank's receive area, as mapped here
  uint32_t* signals;          // that each channel ever gave
  const uint32_t* abort;      // host memory: not 0 once the communicator is aborted
  GaveUp* gave_up;            // host memory
  uint64_t timeout_ns;        // 0: none
  uint32_t rank;
  uint32_t world;
  uint32_t max_channels;      // that the areas have room for
  uint32_t group_shift;
  float scale;                // of the sum: 1, or 1 / world for an average
};

// ---- tiles ----------------------------------------------------------------------------------------------------

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

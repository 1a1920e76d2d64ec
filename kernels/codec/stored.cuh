// No code, the width 16: a payload is the tile's elements as they are stored, NaN as 0x7fff.
#pragma once

#include "planes.cuh"

namespace flashcomm {

template <class T>
struct Stored {
  struct Thread {
    ThreadVecs vecs;
  };

  __device__ static unsigned bytes(unsigned) { return kTileElems * 2; }

  __device__ static Thread encode(const ThreadElems& x, unsigned) {
    Thread out;
#pragma unroll
    for (int row = 0; row < kRows; ++row) narrow<T>(x[row], out.vecs[row]);
    return out;
  }
  __device__ static Thread encode_input(const ThreadVecs& x, unsigned) {
    Thread out;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int w = 0; w < 4; ++w) out.vecs[row].words[w] = Element<T>::max2(x[row].words[w], x[row].words[w]);
    }
    return out;
  }

  __device__ static void add_input(const Vec16& x, unsigned, float (&sum)[kLaneElems]) { add_vec<T>(x, sum); }
  __device__ static void add(const Thread& in, unsigned group_shift, ThreadElems& sum) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) add_input(in.vecs[row], group_shift, sum[row]);
  }
  __device__ static Vec16 decode_row(const Thread& in, int row, unsigned) { return in.vecs[row]; }

  __device__ static Thread load(const uint8_t* payload, unsigned) {
    Thread out;
#pragma unroll
    for (int row = 0; row < kRows; ++row) out.vecs[row] = load_vec16(payload + lane_first(row) * 2);
    return out;
  }
  __device__ static void store(uint8_t* payload, unsigned, const Thread& in) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) store_vec16(payload + lane_first(row) * 2, in.vecs[row]);
  }
};

}  // namespace flashcomm

// No code, the width 16: a payload is the tile's elements as they are stored, NaN as 0x7fff.
#pragma once

#include "planes.cuh"

namespace flashcomm {

template <class T>
struct Stored {
  struct Thread {
    ThreadVecs vecs;
  };

  static constexpr unsigned kQuantsBytes = kTileElems * 2;
  __device__ static unsigned params_bytes(unsigned) { return 0; }

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

  __device__ static void add_input(const Vec16& x, float (&sum)[kLaneElems]) { add_vec<T>(x, sum); }
  __device__ static void add(const Thread& in, ThreadElems& sum) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) add_input(in.vecs[row], sum[row]);
  }
  __device__ static Vec16 decode_row(const Thread& in, int row) { return in.vecs[row]; }

  __device__ static void load_quants(const uint8_t* payload, Thread& t) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) t.vecs[row] = load_vec16(payload + lane_first(row) * 2);
  }
  __device__ static void store_quants(uint8_t* payload, const Thread& t) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) store_vec16(payload + lane_first(row) * 2, t.vecs[row]);
  }
  __device__ static void load_params(const uint8_t*, unsigned, Thread&) {}
  __device__ static void store_params(uint8_t*, unsigned, const Thread&) {}
};

}  // namespace flashcomm

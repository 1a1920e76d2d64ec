// Another code of each group's Hadamard transform. wire/src/codec/rotation.rs has the formulas.
#pragma once

#include "planes.cuh"

namespace flashcomm {

template <class T, class Inner>
struct Rotated {
  using Thread = typename Inner::Thread;

  static constexpr unsigned kCodesBytes = Inner::kCodesBytes;
  __device__ static unsigned params_bytes(unsigned group_shift) { return Inner::params_bytes(group_shift); }

  __device__ static Thread encode(const ThreadElems& x, unsigned group_shift) { return Inner::encode(x, group_shift); }
  __device__ static Thread encode_input(const ThreadVecs& x, unsigned group_shift) {
    ThreadElems rotated;
#pragma unroll
    for (int row = 0; row < kRows; ++row) enter(x[row], group_shift, rotated[row]);
    return Inner::encode(rotated, group_shift);
  }

  __device__ static void add_input(const Vec16& x, unsigned group_shift, float (&sum)[kLaneElems]) {
    float term[kLaneElems];
    enter(x, group_shift, term);
    add_row(term, sum);
  }
  __device__ static void add(const Thread& in, unsigned group_shift, ThreadElems& sum) {
    Inner::add(in, group_shift, sum);
  }

  __device__ static Vec16 decode_row(const Thread& in, int row, unsigned group_shift) {
    float y[kLaneElems];
    Inner::values(in, row, group_shift, y);
    transform(y, group_shift);
    Vec16 out;
    narrow<T>(y, out);
    return out;
  }

  __device__ static void load_codes(const uint8_t* payload, Thread& t) { Inner::load_codes(payload, t); }
  __device__ static void store_codes(uint8_t* payload, const Thread& t) { Inner::store_codes(payload, t); }
  __device__ static void load_params(const uint8_t* params, unsigned group_shift, Thread& t) {
    Inner::load_params(params, group_shift, t);
  }
  __device__ static void store_params(uint8_t* params, unsigned group_shift, const Thread& t) {
    Inner::store_params(params, group_shift, t);
  }

 private:
  __device__ static void enter(const Vec16& elems, unsigned group_shift, float (&x)[kLaneElems]) {
    const float share = __uint_as_float((127 - 3 - group_shift) << 23);  // 1 / group size
    widen<T>(elems, x);
#pragma unroll
    for (int e = 0; e < kLaneElems; ++e) x[e] = __fmul_rn(x[e], share);
    transform(x, group_shift);
  }

  // Of a row, all lanes at once.
  __device__ static void transform(float (&x)[kLaneElems], unsigned group_shift) {
#pragma unroll
    for (int distance = 1; distance < kLaneElems; distance *= 2) {
#pragma unroll
      for (int e = 0; e < kLaneElems; ++e) {
        if ((e & distance) != 0) continue;
        const float a = x[e], b = x[e + distance];
        x[e] = __fadd_rn(a, b), x[e + distance] = __fsub_rn(a, b);
      }
    }
#pragma unroll 1
    for (unsigned mask = 1; mask < 1u << group_shift; mask *= 2) {
      const uint32_t sign = (threadIdx.x & mask) != 0 ? 0x80000000 : 0;  // the second of a pair keeps other - own
#pragma unroll
      for (int e = 0; e < kLaneElems; ++e) {
        const float other = __shfl_xor_sync(kAllLanes, x[e], mask);
        x[e] = __fadd_rn(other, __uint_as_float(__float_as_uint(x[e]) ^ sign));
      }
    }
  }
};

}  // namespace flashcomm

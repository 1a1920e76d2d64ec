// fp16 and bf16 as the codec sees them: 16-byte vectors of 8, exact widening, and the three roundings from fp32.
// Every conversion writes NaN as 0x7fff, the same as wire/src/element.rs.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>

#include "layout.cuh"

namespace flashcomm {

// 16 bytes, the widest access a thread can make.
struct alignas(16) Vec16 {
  uint32_t words[4];
};

__device__ __forceinline__ Vec16 load_vec16(const void* ptr) {
  const uint4 v = *static_cast<const uint4*>(ptr);
  return {{v.x, v.y, v.z, v.w}};
}

__device__ __forceinline__ void store_vec16(void* ptr, const Vec16& v) {
  *static_cast<uint4*>(ptr) = make_uint4(v.words[0], v.words[1], v.words[2], v.words[3]);
}

// What nobody here reads again: the first to leave the L2.
__device__ __forceinline__ void store_vec16_streaming(void* ptr, const Vec16& v) {
  __stcs(static_cast<uint4*>(ptr), make_uint4(v.words[0], v.words[1], v.words[2], v.words[3]));
}

__device__ __forceinline__ bool is_aligned16(const void* ptr) { return reinterpret_cast<uintptr_t>(ptr) % 16 == 0; }

template <class T>
struct Element;

template <>
struct Element<__half> {
  __device__ static float to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  // Of two elements packed in a word, one by one; NaN if either is NaN.
  __device__ static uint32_t min2(uint32_t a, uint32_t b) { return word(__hmin2_nan(pair(a), pair(b))); }
  __device__ static uint32_t max2(uint32_t a, uint32_t b) { return word(__hmax2_nan(pair(a), pair(b))); }
  __device__ static __half2 pair(uint32_t word) { return *reinterpret_cast<const __half2*>(&word); }
  __device__ static uint32_t word(__half2 pair) { return *reinterpret_cast<const uint32_t*>(&pair); }
  __device__ static uint16_t nearest(float x) { return __half_as_ushort(__float2half_rn(x)); }
  __device__ static uint16_t down(float x) { return __half_as_ushort(__float2half_rd(x)); }
  __device__ static uint16_t up(float x) { return __half_as_ushort(__float2half_ru(x)); }
};

template <>
struct Element<__nv_bfloat16> {
  __device__ static float to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
  __device__ static uint32_t min2(uint32_t a, uint32_t b) { return word(__hmin2_nan(pair(a), pair(b))); }
  __device__ static uint32_t max2(uint32_t a, uint32_t b) { return word(__hmax2_nan(pair(a), pair(b))); }
  __device__ static __nv_bfloat162 pair(uint32_t word) { return *reinterpret_cast<const __nv_bfloat162*>(&word); }
  __device__ static uint32_t word(__nv_bfloat162 pair) { return *reinterpret_cast<const uint32_t*>(&pair); }
  __device__ static uint16_t nearest(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
  __device__ static uint16_t down(float x) { return __bfloat16_as_ushort(__float2bfloat16_rd(x)); }
  __device__ static uint16_t up(float x) { return __bfloat16_as_ushort(__float2bfloat16_ru(x)); }
};

constexpr uint16_t kCanonicalNan = 0x7fff;  // of both types

// The elements of one thread, widened and as they are stored.
using ThreadElems = float[kRows][kLaneElems];
using ThreadVecs = Vec16[kRows];

// 8 elements, widened.
template <class T>
__device__ __forceinline__ void widen(const Vec16& v, float (&x)[kLaneElems]) {
#pragma unroll
  for (int e = 0; e < kLaneElems; ++e) x[e] = Element<T>::to_float(uint16_t(v.words[e / 2] >> (e % 2 * 16)));
}

__device__ __forceinline__ uint32_t two_elements(uint16_t low, uint16_t high) { return low | uint32_t(high) << 16; }

// 8 values as elements, rounded to nearest.
template <class T>
__device__ __forceinline__ void narrow(const float (&x)[kLaneElems], Vec16& v) {
#pragma unroll
  for (int e = 0; e < kLaneElems; e += 2) {
    v.words[e / 2] = two_elements(Element<T>::nearest(x[e]), Element<T>::nearest(x[e + 1]));
  }
}

// Loads this thread's elements of a tile of n_elems. Past the end the last element repeats.
// tile_ptr: any alignment (2 bytes at least); a whole tile at 16 bytes takes the path of vectors.
template <class T>
__device__ __forceinline__ void load_vecs(const T* tile_ptr, int n_elems, ThreadVecs& v) {
  if (is_aligned16(tile_ptr) && n_elems == kTileElems) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) v[row] = load_vec16(tile_ptr + lane_first(row));
  } else {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(tile_ptr);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int e = 0; e < kLaneElems; e += 2) {
        const int first = lane_first(row) + e;
        v[row].words[e / 2] = bits[min(first, n_elems - 1)] | uint32_t(bits[min(first + 1, n_elems - 1)]) << 16;
      }
    }
  }
}

// Stores elements first .. first + 8 of a tile of n_elems; nothing past the end.
template <class T>
__device__ __forceinline__ void store_lane(T* tile_ptr, int first, int n_elems, bool aligned, const Vec16& v) {
  if (aligned && first + kLaneElems <= n_elems) {
    store_vec16(tile_ptr + first, v);
  } else {
    uint16_t* bits = reinterpret_cast<uint16_t*>(tile_ptr);
#pragma unroll
    for (int e = 0; e < kLaneElems; ++e) {
      if (first + e < n_elems) bits[first + e] = uint16_t(v.words[e / 2] >> (e % 2 * 16));
    }
  }
}

}  // namespace flashcomm

// Arithmetic of the code blocks on two elements at once.
#pragma once

#include "../element.cuh"

namespace flashcomm {

// Arithmetic on two elements in a word.
template <class T>
struct Pairs;

template <>
struct Pairs<__half> {
  using E = Element<__half>;
  // In both halves, or in the lower and in the upper one.
  static constexpr uint32_t kEighth = 0x30003000, kMinusEighth = 0xb000b000;
  static constexpr uint32_t kPlusMinus = 0xbc003c00, kMinusPlus = 0x3c00bc00;
  static constexpr float kLeastUnit = kLeastUnitFp16, kGreatest = kGreatestFp16;
  __device__ static uint32_t mul(uint32_t a, uint32_t b) { return E::word(__hmul2_rn(E::pair(a), E::pair(b))); }
  __device__ static uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    return E::word(__hfma2(E::pair(a), E::pair(b), E::pair(c)));
  }
  // Lower + upper, lower - upper.
  __device__ static uint32_t butterfly(uint32_t a) {
    return E::word(__hfma2(__high2half2(E::pair(a)), E::pair(kPlusMinus), __low2half2(E::pair(a))));
  }
  __device__ static uint32_t abs_max(uint32_t a, uint32_t b) {
    return E::word(__hmax2_nan(__habs2(E::pair(a)), __habs2(E::pair(b))));
  }
  __device__ static uint32_t abs_min(uint32_t a, uint32_t b) {
    return E::word(__hmin2(__habs2(E::pair(a)), __habs2(E::pair(b))));
  }
};

template <>
struct Pairs<__nv_bfloat16> {
  using E = Element<__nv_bfloat16>;
  static constexpr uint32_t kEighth = 0x3e003e00, kMinusEighth = 0xbe00be00;
  static constexpr uint32_t kPlusMinus = 0xbf803f80, kMinusPlus = 0x3f80bf80;
  static constexpr float kLeastUnit = kLeastUnitBf16, kGreatest = kGreatestBf16;
  __device__ static uint32_t mul(uint32_t a, uint32_t b) { return E::word(__hmul2_rn(E::pair(a), E::pair(b))); }
  __device__ static uint32_t fma(uint32_t a, uint32_t b, uint32_t c) {
    return E::word(__hfma2(E::pair(a), E::pair(b), E::pair(c)));
  }
  __device__ static uint32_t butterfly(uint32_t a) {
    return E::word(__hfma2(__high2bfloat162(E::pair(a)), E::pair(kPlusMinus), __low2bfloat162(E::pair(a))));
  }
  __device__ static uint32_t abs_max(uint32_t a, uint32_t b) {
    return E::word(__hmax2_nan(__habs2(E::pair(a)), __habs2(E::pair(b))));
  }
  __device__ static uint32_t abs_min(uint32_t a, uint32_t b) {
    return E::word(__hmin2(__habs2(E::pair(a)), __habs2(E::pair(b))));
  }
};

}  // namespace flashcomm

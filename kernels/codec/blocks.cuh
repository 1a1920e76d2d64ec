// The code blocks: octets, 8 elements of one lane in a row, each transformed and with a level of its own.
// wire/src/codec/blocks.rs has the formulas.
#pragma once

#include <type_traits>

#include "planes.cuh"

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
};

template <class T, int kBits>
struct Blocks {
  using P = Planes<kBits>;
  static constexpr int kHalfRange = 1 << (kBits - 1);

  struct Thread {
    typename P::Words quants;
    uint32_t levels;    // of row r in byte r % 2, from bit r / 2 * 4 on
    uint32_t units[2];  // of the group in each row
  };

  static constexpr unsigned kQuantsBytes = P::kBytes;
  __device__ static unsigned params_bytes(unsigned group_shift) { return kTileThreads * 2 + n_groups(group_shift) * 2; }

  // x: turned into its transform.
  __device__ static Thread encode_input(ThreadVecs& x, unsigned group_shift) {
    float largest[kRows];
    bool maybe_constant = false;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      enter(x[row]);
      const uint32_t(&w)[4] = x[row].words;
      const uint32_t upper = Pairs<T>::abs_max(w[2], w[3]);
      const uint32_t two = Pairs<T>::abs_max(Pairs<T>::abs_max(w[0], w[1]), upper);
      largest[row] = max_nan(Element<T>::to_float(uint16_t(two)), Element<T>::to_float(uint16_t(two >> 16)));
      maybe_constant |= (upper == 0) | !(largest[row] <= Pairs<T>::kGreatest);
    }
    // Rare. (Asked of the whole warp, here and below, since a branch that may diverge takes registers.)
    if (__any_sync(kAllLanes, maybe_constant)) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        float wide[kLaneElems];
        widen<T>(x[row], wide);
        make_constant(wide, largest[row]);
        narrow<T>(wide, x[row]);
      }
    }
    Thread out = {};
    float inverse[kRows];
    scales(largest, group_shift, out, inverse);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float wide[kLaneElems];
      widen<T>(x[row], wide);
      encode_row(wide, row, inverse[row], out);
    }
    return out;
  }

  __device__ static Thread encode(ThreadElems& x, unsigned group_shift) {
    float largest[kRows];
    bool maybe_constant = false;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float upper = largest_of_4(x[row] + 4);
      largest[row] = max_nan(largest_of_4(x[row]), upper);
      maybe_constant |= (upper == 0.0f) | !(largest[row] <= Pairs<T>::kGreatest);
    }
    if (__any_sync(kAllLanes, maybe_constant)) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) make_constant(x[row], largest[row]);
    }
    Thread out = {};
    float inverse[kRows];
    scales(largest, group_shift, out, inverse);
#pragma unroll
    for (int row = 0; row < kRows; ++row) encode_row(x[row], row, inverse[row], out);
    return out;
  }

  __device__ static void add_input(Vec16 x, float (&sum)[kLaneElems]) {
    enter(x);
    add_vec<T>(x, sum);
  }

  __device__ static void add(const Thread& in, ThreadElems& sum) {
    // The middle of the cell of quant 0, under the pattern that puts the quant into bits 8 to 15 of the mantissa: 2^15 + quant.
    constexpr uint32_t kPattern = 0x47000000;
    constexpr float kMiddle = 32768.0f + kHalfRange - 0.5f;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float step = __fmul_rn(half_bound(in, row), 2.0f / kHalfRange);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t quants = P::get_half(in.quants, row * 2 + half);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float middle = __fsub_rn(__uint_as_float(__byte_perm(quants, kPattern, 0x7504 + e * 16)), kMiddle);
          float& s = sum[row][half * 4 + e];
          s = __fmaf_rn(middle, step, s);  // the product is exact
        }
      }
    }
    // To a constant octet, whose step is 0, nothing has been added so far.
    if (__builtin_expect(has_constants(in), false)) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        if ((in.levels >> level_shift(row) & kMaxLevel) != 0) continue;
        const float half = __fmul_rn(0.5f, Element<T>::to_float(constant(in, row)));
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[row][e] = __fadd_rn(sum[row][e], e == 3 ? -half : half);
      }
    }
  }

  __device__ static Vec16 decode_row(const Thread& in, int row) {
    using H = Element<__half>;
    uint32_t integers[4];
    transform_back(in, row, integers);
    const float half = half_bound(in, row);
    Vec16 out;
    if constexpr (std::is_same_v<T, __half>) {
      const uint32_t even = H::word(__float2half2_rn(half)), odd = even ^ 0x80000000u;
#pragma unroll
      for (int n = 0; n < 4; ++n) out.words[n] = Pairs<__half>::fma(integers[n], n % 2 == 0 ? even : odd, 0);
    } else {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float low = __fmaf_rn(__low2float(H::pair(integers[n])), half, 0.0f);
        const float high = __fmaf_rn(__high2float(H::pair(integers[n])), n % 2 == 0 ? half : -half, 0.0f);
        out.words[n] = Element<T>::word(__floats2bfloat162_rn(low, high));
      }
    }
    if (__any_sync(kAllLanes, half == 0.0f)) {
      const uint16_t element = constant(in, row);
#pragma unroll
      for (int n = 0; n < 4; ++n) out.words[n] = half == 0.0f ? two_elements(element, element) : out.words[n];
    }
    return out;
  }

  __device__ static Vec16 decode_both_row(const Thread& first, const Thread& second, int row, float scale) {
    using H = Element<__half>;
    uint32_t a[4], b[4];
    transform_back(first, row, a);
    transform_back(second, row, b);
    const float bound_a = half_bound(first, row), bound_b = half_bound(second, row);
    const float half_a = __fmul_rn(bound_a, scale), half_b = __fmul_rn(bound_b, scale);
    Vec16 out;
    if constexpr (std::is_same_v<T, __half>) {
      const uint32_t even_a = H::word(__float2half2_rn(half_a)), odd_a = even_a ^ 0x80000000u;
      const uint32_t even_b = H::word(__float2half2_rn(half_b)), odd_b = even_b ^ 0x80000000u;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint32_t product = Pairs<__half>::fma(a[n], n % 2 == 0 ? even_a : odd_a, 0);
        out.words[n] = Pairs<__half>::fma(b[n], n % 2 == 0 ? even_b : odd_b, product);
      }
    } else {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float high_a = n % 2 == 0 ? half_a : -half_a, high_b = n % 2 == 0 ? half_b : -half_b;
        const float low = __fmaf_rn(__low2float(H::pair(a[n])), half_a, 0.0f);
        const float high = __fmaf_rn(__high2float(H::pair(a[n])), high_a, 0.0f);
        out.words[n] = Element<T>::word(__floats2bfloat162_rn(__fmaf_rn(__low2float(H::pair(b[n])), half_b, low),
                                                              __fmaf_rn(__high2float(H::pair(b[n])), high_b, high)));
      }
    }
    const bool is_constant = bound_a == 0.0f || bound_b == 0.0f;
    if (__any_sync(kAllLanes, is_constant)) {
      float sum[kLaneElems];
      widen<T>(decode_row(first, row), sum);
      add_vec<T>(decode_row(second, row), sum);
#pragma unroll
      for (int e = 0; e < kLaneElems; ++e) sum[e] = __fmul_rn(sum[e], scale);
      Vec16 both;
      narrow<T>(sum, both);
#pragma unroll
      for (int n = 0; n < 4; ++n) out.words[n] = is_constant ? both.words[n] : out.words[n];
    }
    return out;
  }

  __device__ static void load_quants(const uint8_t* payload, Thread& t) { P::load(payload, t.quants); }
  __device__ static void store_quants(uint8_t* payload, const Thread& t) { P::store(payload, t.quants); }
  __device__ static void load_params(const uint8_t* params, unsigned group_shift, Thread& t) {
    t.levels = *reinterpret_cast<const uint16_t*>(params + threadIdx.x * 2);
    get<2>(params + kUnitsAt + my_groups(group_shift) * 8, t.units);
  }
  __device__ static void store_params(uint8_t* params, unsigned group_shift, const Thread& t) {
    *reinterpret_cast<uint16_t*>(params + threadIdx.x * 2) = uint16_t(t.levels);
    if (leads_groups(group_shift)) put<2>(params + kUnitsAt + my_groups(group_shift) * 8, t.units);
  }

 private:
  static constexpr unsigned kUnitsAt = kTileThreads * 2;  // behind the levels

  // The elements of a row over half of its bound, but for the signs of 3 and 7: integers times 2^(2 - b). In fp16 whatever
  // the type.
  __device__ static void transform_back(const Thread& in, int row, uint32_t (&integers)[4]) {
    // 2^(12 - b) + 2^(2 - b) * quant. What is transformed is 2^(2 - b) times the middles.
    using H = Element<__half>;
    constexpr uint32_t kExponent = (12 - kBits + 15) << 2, kPattern = kExponent * 0x01010101u;
    constexpr uint32_t kZero = kExponent << 24 | kExponent << 8, kLast = kZero + (2 * kHalfRange - 1) * 0x00010001u;
    __half2 w[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t quants = P::get_half(in.quants, row * 2 + half);
      w[half * 2] = H::pair(__byte_perm(quants, kPattern, 0x4140));
      w[half * 2 + 1] = H::pair(__byte_perm(quants, kPattern, 0x4342));
    }
    __half2 a[4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      a[n] = __hadd2_rn(__hsub2_rn(w[n], H::pair(kLast)), __hsub2_rn(w[n + 2], H::pair(kZero)));
      a[n + 2] = __hsub2_rn(w[n], w[n + 2]);
    }
    integers[0] = Pairs<__half>::butterfly(H::word(__hadd2_rn(a[0], a[1])));
    integers[1] = Pairs<__half>::butterfly(H::word(__hsub2_rn(a[0], a[1])));
    integers[2] = Pairs<__half>::butterfly(H::word(__hadd2_rn(a[2], a[3])));
    integers[3] = Pairs<__half>::butterfly(H::word(__hsub2_rn(a[2], a[3])));
  }

  __device__ static void enter(Vec16& x) {
    using X = Pairs<T>;
    uint32_t(&w)[4] = x.words;
    const uint32_t a0 = X::mul(w[0], X::kEighth), a1 = X::mul(w[1], X::kEighth);
    const uint32_t t0 = X::fma(w[2], X::kEighth, a0), t2 = X::fma(w[2], X::kMinusEighth, a0);
    const uint32_t t1 = X::fma(w[3], X::kEighth, a1), t3 = X::fma(w[3], X::kMinusEighth, a1);
    w[0] = X::butterfly(X::fma(t1, X::kPlusMinus, t0));
    w[1] = X::butterfly(X::fma(t1, X::kMinusPlus, t0));
    w[2] = X::butterfly(X::fma(t3, X::kPlusMinus, t2));
    w[3] = X::butterfly(X::fma(t3, X::kMinusPlus, t2));
  }

  // About 1 / x.
  __device__ static float inverse_of(float x) {
    float y = __uint_as_float(0x7ef311c7u - __float_as_uint(x));
    y = __fmaf_rn(__fmaf_rn(-x, y, 1.0f), y, y);
    return __fmaf_rn(__fmaf_rn(-x, y, 1.0f), y, y);
  }

  // The largest magnitude of 4 values.
  __device__ static float largest_of_4(const float* x) {
    return max_nan(max_nan(fabsf(x[0]), fabsf(x[1])), max_nan(fabsf(x[2]), fabsf(x[3])));
  }

  // Where an octet is to be a constant, c becomes what has its quants when encoded with an inverse of 1, and its largest
  // magnitude 0, which tells scales() of it and takes no part in the group's.
  __device__ static void make_constant(float (&c)[kLaneElems], float& largest) {
    const bool is_equal = c[1] == c[0] && c[2] == c[0] && c[3] == -c[0] && largest_of_4(c + 4) == 0.0f;
    const bool is_constant = is_equal || !(largest <= Pairs<T>::kGreatest);
    const uint32_t element = is_equal ? Element<T>::nearest(__fadd_rn(__fadd_rn(c[0], c[0]), 0.0f)) : kCanonicalNan;
#pragma unroll
    for (int e = 0; e < kLaneElems; ++e) {
      const uint32_t quant = e * kBits < 16 ? element >> (e * kBits) & (2 * kHalfRange - 1) : 0;
      c[e] = select(is_constant, float(int(quant) - kHalfRange), c[e]);
    }
    largest = select(is_constant, 0.0f, largest);
  }

  __device__ static int level_shift(int row) { return row % 2 * 8 + row / 2 * 4; }

  // Whether a level is 0.
  __device__ static bool has_constants(const Thread& in) {
    return ((in.levels - 0x1111) & ~in.levels & 0x8888) != 0;
  }

  // The element of a constant octet.
  __device__ static uint16_t constant(const Thread& in, int row) {
    uint32_t element = 0;
#pragma unroll
    for (int half = 0; half < 2 && half * 4 * kBits < 16; ++half) {
      const uint32_t quants = P::get_half(in.quants, row * 2 + half);
      const uint32_t pairs = (quants & 0x00ff00ff) | (quants & 0xff00ff00) >> (8 - kBits);
      element |= ((pairs & 0xffff) | pairs >> 16 << (2 * kBits)) << (half * 4 * kBits);
    }
    return uint16_t(element);
  }

  // Units and levels, and the inverse of the step in each row.
  // largest: the largest magnitude of each octet; 0: it is a constant, of level 0.
  __device__ static void scales(const float (&largest)[kRows], unsigned group_shift, Thread& out, float (&inverse)[kRows]) {
    const float max = reduce_rows(largest, group_shift, max_nan);
    const float share = __fmul_rn(max, (1.0f + 1.0f / 2048) / kMaxLevel);
    float unit = __uint_as_float((__float_as_uint(share) + 0x1ffffu) & ~0x1ffffu);  // 7 significant bits, rounded up
    unit = fmaxf(unit, Pairs<T>::kLeastUnit);
    const float my_per_unit = __fmul_rn(inverse_of(unit), 1.0f + 1.0f / 4096);
    uint32_t level_bits[kRows], units[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float unit_here = of_row(unit, row);
      units[row] = Element<T>::nearest(unit_here);
      const float level = __fmaf_ru(largest[row], of_row(my_per_unit, row), kIntegerMagic);
      level_bits[row] = __float_as_uint(level);
      const float step = __fmul_rn(__fsub_rn(level, kIntegerMagic), __fmul_rn(unit_here, 1.0f / kHalfRange));
      inverse[row] = largest[row] == 0.0f ? 1.0f : inverse_of(step);
    }
    out.levels = (__byte_perm(level_bits[0], level_bits[1], 0x0040) & 0x0f0f) |
                 (__byte_perm(level_bits[2], level_bits[3], 0x0040) & 0x0f0f) << 4;
    out.units[0] = units[0] | units[1] << 16;
    out.units[1] = units[2] | units[3] << 16;
  }

  // Adds a row's quants. No clamp: the margins of unit and level keep them within their bits.
  __device__ static void encode_row(const float (&x)[kLaneElems], int row, float inverse, Thread& out) {
    uint32_t q[kLaneElems];
#pragma unroll
    for (int e = 0; e < kLaneElems; ++e) {
      q[e] = __float_as_uint(__fmaf_rd(x[e], inverse, kIntegerMagic + kHalfRange));
    }
    P::put_row(q, row, out.quants);
  }

  // Half of L, the bound of a row's octet: its level / 2 times its unit.
  __device__ static float half_bound(const Thread& in, int row) {
    const uint32_t levels = in.levels >> (row / 2 * 4) & 0x0f0f;
    if constexpr (std::is_same_v<T, __half>) {
      // For both rows of the pair at once: 512, whose last mantissa bit is worth 1/2, and the level in the low bits.
      using H = Element<__half>;
      const __half2 half_levels = __hsub2_rn(H::pair(__byte_perm(levels, 0x60606060, 0x4140)), H::pair(0x60006000));
      const __half2 halves = __hmul2_rn(half_levels, H::pair(in.units[row / 2]));
      return row % 2 == 0 ? __low2float(halves) : __high2float(halves);
    } else {
      const uint32_t integer = __byte_perm(levels, kIntegerPattern, row % 2 == 0 ? 0x7550 : 0x7551);
      const float unit = Element<T>::to_float(uint16_t(in.units[row / 2] >> (row % 2 * 16)));
      return __fmul_rn(__fsub_rn(__uint_as_float(integer), kIntegerMagic), __fmul_rn(0.5f, unit));
    }
  }
};

}  // namespace flashcomm

// The code blocks: octets, 8 elements of one lane in a row, each transformed and with a level of its own.
// wire/src/codec/blocks.rs has the formulas.
#pragma once

#include <type_traits>

#include "scales.cuh"

namespace flashcomm {

template <class T, int kBits>
struct Blocks {
  using P = Planes<kBits>;
  static constexpr int kHalfRange = 1 << (kBits - 1);

  struct Thread {
    typename P::Words quants;
    Scales<T, kHalfRange> scales;
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
    const bool has_bands = scale(x, largest, group_shift, out, inverse);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float wide[kLaneElems];
      widen<T>(x[row], wide);
      if (has_bands) out.scales.bring_to_zero(wide, row);
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
    if (scale(x, largest, group_shift, out, inverse)) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) out.scales.bring_to_zero(x[row], row);
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) encode_row(x[row], row, inverse[row], out);
    return out;
  }

  __device__ static void add_input(Vec16 x, float (&sum)[kLaneElems]) {
    enter(x);
    add_vec<T>(x, sum);
  }

  __device__ static void add(const Thread& in, ThreadElems& sum) {
    const bool is_special = __any_sync(kAllLanes, in.scales.has_special());
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (!is_special) {
        const float step = __fmul_rn(in.scales.half_bound(row), 2.0f / kHalfRange);
        for_each_middle(in, row, [&](int e, float middle) {
          sum[row][e] = __fmaf_rn(middle, step, sum[row][e]);  // the product is exact
        });
      } else {
        const auto [bound, base] = in.scales.limits(row);
        const float step = __fmul_rn(bound, 1.0f / kHalfRange);
        const bool is_constant = in.scales.level(row) == 0;
        const float half = __fmul_rn(0.5f, Element<T>::to_float(constant(in, row)));
        for_each_middle(in, row, [&](int e, float middle) {
          const float value = __fmaf_rn(middle, step, copysignf(base, middle));  // exact
          const float of_constant = e > 3 ? 0.0f : e == 3 ? -half : half;
          sum[row][e] = __fadd_rn(sum[row][e], select(is_constant, of_constant, value));
        });
      }
    }
  }

  __device__ static Vec16 decode_row(const Thread& in, int row) {
    using H = Element<__half>;
    uint32_t integers[4];
    transform_back(in, row, integers);
    const float half = in.scales.half_bound(row);
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
    if (__any_sync(kAllLanes, half == 0.0f)) decode_special(in, row, half == 0.0f, integers, out);
    return out;
  }

  __device__ static Vec16 decode_both_row(const Thread& first, const Thread& second, int row, float scale) {
    using H = Element<__half>;
    uint32_t a[4], b[4];
    transform_back(first, row, a);
    transform_back(second, row, b);
    const float bound_a = first.scales.half_bound(row), bound_b = second.scales.half_bound(row);
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
    const bool is_special = bound_a == 0.0f || bound_b == 0.0f;
    if (__any_sync(kAllLanes, is_special)) {
      float sum[kLaneElems];
      widen<T>(decode_row(first, row), sum);
      add_vec<T>(decode_row(second, row), sum);
#pragma unroll
      for (int e = 0; e < kLaneElems; ++e) sum[e] = __fmul_rn(sum[e], scale);
      Vec16 both;
      narrow<T>(sum, both);
#pragma unroll
      for (int n = 0; n < 4; ++n) out.words[n] = is_special ? both.words[n] : out.words[n];
    }
    return out;
  }

  __device__ static void load_quants(const uint8_t* payload, Thread& t) { P::load(payload, t.quants); }
  __device__ static void store_quants(uint8_t* payload, const Thread& t) { P::store(payload, t.quants); }
  __device__ static void load_params(const uint8_t* params, unsigned group_shift, Thread& t) {
    t.scales.levels = *reinterpret_cast<const uint16_t*>(params + threadIdx.x * 2);
    get<2>(params + kUnitsAt + my_groups(group_shift) * 8, t.scales.units);
  }
  __device__ static void store_params(uint8_t* params, unsigned group_shift, const Thread& t) {
    *reinterpret_cast<uint16_t*>(params + threadIdx.x * 2) = uint16_t(t.scales.levels);
    if (leads_groups(group_shift)) put<2>(params + kUnitsAt + my_groups(group_shift) * 8, t.scales.units);
  }

 private:
  static constexpr unsigned kUnitsAt = kTileThreads * 2;  // behind the levels

  // The elements of a row over half of its bound, but for the signs of 3 and 7: integers times 2^(2 - b). In fp16 whatever
  // the type.
  __device__ static void transform_back(const Thread& in, int row, uint32_t (&integers)[4]) {
    transform_back(P::get_half(in.quants, row * 2), P::get_half(in.quants, row * 2 + 1), integers);
  }

  // The same of 8 quants, as bytes.
  __device__ static void transform_back(uint32_t lower, uint32_t upper, uint32_t (&integers)[4]) {
    // 2^(12 - b) + 2^(2 - b) * quant. What is transformed is 2^(2 - b) times the middles.
    using H = Element<__half>;
    constexpr uint32_t kExponent = (12 - kBits + 15) << 2, kPattern = kExponent * 0x01010101u;
    constexpr uint32_t kZero = kExponent << 24 | kExponent << 8, kLast = kZero + (2 * kHalfRange - 1) * 0x00010001u;
    __half2 w[4];
    w[0] = H::pair(__byte_perm(lower, kPattern, 0x4140));
    w[1] = H::pair(__byte_perm(lower, kPattern, 0x4342));
    w[2] = H::pair(__byte_perm(upper, kPattern, 0x4140));
    w[3] = H::pair(__byte_perm(upper, kPattern, 0x4342));
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

  // A row of a constant octet, or of one whose group has bands. integers: of transform_back; out: where it is special.
  __device__ static void decode_special(const Thread& in, int row, bool is_special, const uint32_t (&integers)[4],
                                        Vec16& out) {
    using H = Element<__half>;
    // Of quants on either side of 0, the nearest to it: 2^(1 - b) times what the signs become.
    const auto nearest_quants = [&](int half) {
      return (P::get_half(in.quants, row * 2 + half) >> (kBits - 1) & 0x01010101) + (kHalfRange - 1) * 0x01010101u;
    };
    uint32_t signs[4];
    transform_back(nearest_quants(0), nearest_quants(1), signs);
    const auto [bound, base] = in.scales.limits(row);
    const float half = __fmul_rn(bound, 0.5f);
    const auto value = [&](float integer, float sign, bool is_negated) {
      const float whole_sign = __fmul_rn(sign, float(kHalfRange));  // the base times that may be too large for a float
      return __fmaf_rn(integer, is_negated ? -half : half, __fmaf_rn(whole_sign, is_negated ? -base : base, 0.0f));
    };
    const bool is_constant = in.scales.level(row) == 0;
    const uint32_t element = constant(in, row);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float low = value(__low2float(H::pair(integers[n])), __low2float(H::pair(signs[n])), false);
      const float high = value(__high2float(H::pair(integers[n])), __high2float(H::pair(signs[n])), n % 2 == 1);
      const uint32_t banded = two_elements(Element<T>::nearest(low), Element<T>::nearest(high));
      const uint32_t special = is_constant ? two_elements(element, element) : banded;
      out.words[n] = is_special ? special : out.words[n];
    }
  }

  // Calls use(e, the middle of the cell of element e) of a row.
  template <class Use>
  __device__ static void for_each_middle(const Thread& in, int row, Use use) {
    // The middle of the cell of quant 0, under the pattern that puts the quant into bits 8 to 15 of the mantissa: 2^15 + quant.
    constexpr uint32_t kPattern = 0x47000000;
    constexpr float kMiddle = 32768.0f + kHalfRange - 0.5f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t quants = P::get_half(in.quants, row * 2 + half);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        use(half * 4 + e, __fsub_rn(__uint_as_float(__byte_perm(quants, kPattern, 0x7504 + e * 16)), kMiddle));
      }
    }
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

  // The largest magnitude of 4 values.
  __device__ static float largest_of_4(const float* x) {
    return max_nan(max_nan(fabsf(x[0]), fabsf(x[1])), max_nan(fabsf(x[2]), fabsf(x[3])));
  }

  // Where an octet is to be a constant, c becomes what has its quants when encoded with an inverse of 1, and its largest
  // magnitude 0, which tells Scales of it and takes no part in the group's.
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

  // The smallest magnitude of a row.
  __device__ static float lowest(const Vec16& x) {
    const uint32_t(&w)[4] = x.words;
    const uint32_t two = Pairs<T>::abs_min(Pairs<T>::abs_min(w[0], w[1]), Pairs<T>::abs_min(w[2], w[3]));
    return fminf(Element<T>::to_float(uint16_t(two)), Element<T>::to_float(uint16_t(two >> 16)));
  }
  __device__ static float lowest(const float (&x)[kLaneElems]) {
    float lowest = fabsf(x[0]);
#pragma unroll
    for (int e = 1; e < kLaneElems; ++e) lowest = fminf(lowest, fabsf(x[e]));
    return lowest;
  }

  // The largest one.
  __device__ static float largest(const Vec16& x) {
    const uint32_t(&w)[4] = x.words;
    const uint32_t two = Pairs<T>::abs_max(Pairs<T>::abs_max(w[0], w[1]), Pairs<T>::abs_max(w[2], w[3]));
    return max_nan(Element<T>::to_float(uint16_t(two)), Element<T>::to_float(uint16_t(two >> 16)));
  }
  __device__ static float largest(const float (&x)[kLaneElems]) { return max_nan(largest_of_4(x), largest_of_4(x + 4)); }

  // Units and levels, and the inverse of the step in each row; whether there are groups with bands in the warp.
  // largest: the largest magnitude of each octet; 0: it is a constant, of level 0.
  template <class Row>
  __device__ static bool scale(const Row (&x)[kRows], const float (&largest)[kRows], unsigned group_shift, Thread& out,
                               float (&inverse)[kRows]) {
    out.scales.set(largest, group_shift, inverse);
    if (!out.scales.may_have_bands(group_shift)) return false;
    // Worked out again, since there are no registers to keep them in.
    const auto lowest_of = [&](int row) { return lowest(x[row]); };
    const auto largest_of = [&](int row) { return Blocks::largest(x[row]); };
    return out.scales.add_bands(lowest_of, largest_of, group_shift, inverse);
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
};

}  // namespace flashcomm

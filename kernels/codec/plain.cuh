// The plain code: quants, and for each group a scale and a zero. wire/src/codec/plain.rs has the formulas.
#pragma once

#include <type_traits>

#include "planes.cuh"

namespace flashcomm {

template <class T, int kBits>
struct Plain {
  using P = Planes<kBits>;
  static constexpr float kMaxQuant = float((1 << kBits) - 1);

  // What one thread holds of an encoded tile.
  struct Thread {
    typename P::Words quants;
    uint32_t params[kRows];  // of the group in each row: scale, zero << 16
  };

  static constexpr unsigned kQuantsBytes = P::kBytes;
  __device__ static unsigned params_bytes(unsigned group_shift) { return n_groups(group_shift) * 4; }

  __device__ static Thread encode(const ThreadElems& x, unsigned group_shift) {
    float low[kRows], high[kRows], inverse[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      low[row] = high[row] = x[row][0];
#pragma unroll
      for (int e = 1; e < kLaneElems; ++e) {
        low[row] = min_nan(low[row], x[row][e]);
        high[row] = max_nan(high[row], x[row][e]);
      }
    }
    Thread out = {};
    group_params(low, high, group_shift, out.params, inverse);
#pragma unroll
    for (int row = 0; row < kRows; ++row) encode_row(x[row], row, inverse[row], out);
    return out;
  }

  // The same of elements as they are stored: two at a time while they are compared, and half the registers.
  __device__ static Thread encode_input(const ThreadVecs& x, unsigned group_shift) {
    float low[kRows], high[kRows], inverse[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const uint32_t(&w)[4] = x[row].words;
      const uint32_t l = Element<T>::min2(Element<T>::min2(w[0], w[1]), Element<T>::min2(w[2], w[3]));
      const uint32_t h = Element<T>::max2(Element<T>::max2(w[0], w[1]), Element<T>::max2(w[2], w[3]));
      low[row] = min_nan(Element<T>::to_float(uint16_t(l)), Element<T>::to_float(uint16_t(l >> 16)));
      high[row] = max_nan(Element<T>::to_float(uint16_t(h)), Element<T>::to_float(uint16_t(h >> 16)));
    }
    Thread out = {};
    group_params(low, high, group_shift, out.params, inverse);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float wide[kLaneElems];
      widen<T>(x[row], wide);
      encode_row(wide, row, inverse[row], out);
    }
    return out;
  }

  __device__ static void add_input(const Vec16& x, float (&sum)[kLaneElems]) { add_vec<T>(x, sum); }

  __device__ static void add(const Thread& in, ThreadElems& sum) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float term[kLaneElems];
      values(in, row, term);
      add_row(term, sum[row]);
    }
  }

  __device__ static Vec16 decode_row(const Thread& in, int row) {
    Vec16 out;
    if constexpr (std::is_same_v<T, __half>) {
      const __half2 scale = Element<T>::pair(__byte_perm(in.params[row], 0, 0x1010));
      const __half2 zero = Element<T>::pair(__byte_perm(in.params[row], 0, 0x3232));
      const __half2 magic = Element<T>::pair(0x64006400);  // 1024, whose last mantissa bit is worth 1
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t quants = P::get_half(in.quants, row * 2 + half);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const __half2 integers = Element<T>::pair(__byte_perm(quants, 0x64646464, e == 0 ? 0x4140 : 0x4342));
          out.words[half * 2 + e] = Element<T>::word(__hfma2(__hsub2_rn(integers, magic), scale, zero));
        }
      }
    } else {
      float y[kLaneElems];
      values(in, row, y);
      narrow<T>(y, out);
    }
    return out;
  }

  __device__ static Vec16 decode_both_row(const Thread& first, const Thread& second, int row, float scale) {
    float sum[kLaneElems], term[kLaneElems];
    values(first, row, sum);
    values(second, row, term);
    add_row(term, sum);
#pragma unroll
    for (int e = 0; e < kLaneElems; ++e) sum[e] = __fmul_rn(sum[e], scale);
    Vec16 out;
    narrow<T>(sum, out);
    return out;
  }

  __device__ static void load_quants(const uint8_t* payload, Thread& t) { P::load(payload, t.quants); }
  __device__ static void store_quants(uint8_t* payload, const Thread& t) { P::store(payload, t.quants); }
  __device__ static void load_params(const uint8_t* params, unsigned group_shift, Thread& t) {
    get<4>(params + my_groups(group_shift) * 16, t.params);
  }
  __device__ static void store_params(uint8_t* params, unsigned group_shift, const Thread& t) {
    if (leads_groups(group_shift)) put<4>(params + my_groups(group_shift) * 16, t.params);
  }

 private:
  __device__ static void values(const Thread& in, int row, float (&y)[kLaneElems]) {
    const float scale = Element<T>::to_float(uint16_t(in.params[row]));
    const float zero = Element<T>::to_float(uint16_t(in.params[row] >> 16));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t quants = P::get_half(in.quants, row * 2 + half);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t integer = __byte_perm(quants, kIntegerPattern, 0x7550 + e);
        y[half * 4 + e] = __fmaf_rn(__fsub_rn(__uint_as_float(integer), kIntegerMagic), scale, zero);
      }
    }
  }

  // Adds a row's quants; its scale and zero stand in out.params.
  __device__ static void encode_row(const float (&x)[kLaneElems], int row, float inverse, Thread& out) {
    const float zero = Element<T>::to_float(uint16_t(out.params[row] >> 16));
    // No clamp: the directed roundings keep the product within the quants, it is 0 where 1/scale is no number, and in a
    // group that is not finite it is NaN, of which every bit that can be a quant's is 1.
    uint32_t q[kLaneElems];
#pragma unroll
    for (int e = 0; e < kLaneElems; ++e) {
      q[e] = __float_as_uint(__fadd_rn(__fmul_rn(__fsub_rn(x[e], zero), inverse), kIntegerMagic));
    }
    P::put_row(q, row, out.quants);
  }

  // Scale, zero and 1/scale (0 where that is no number) of the group in each row. Each lane works out one row, lane % 4.
  // low, high: the extremes of this thread's elements in each row.
  __device__ static void group_params(const float (&low)[kRows], const float (&high)[kRows], unsigned group_shift,
                                      uint32_t (&params)[kRows], float (&inverse)[kRows]) {
    const float min = reduce_rows(low, group_shift, min_nan);
    const float max = reduce_rows(high, group_shift, max_nan);

    // + 0.0f turns -0 into +0: which of the two is the minimum or the maximum depends on the order of comparison.
    const float zero = __fadd_rn(Element<T>::to_float(Element<T>::down(min)), 0.0f);
    const float step = __fdiv_rn(__fsub_rn(max, zero), kMaxQuant);
    const float scale = __fadd_rn(Element<T>::to_float(Element<T>::up(step)), 0.0f);
    const bool finite = isfinite(min) && isfinite(max) && isfinite(zero) && isfinite(scale);
    const uint32_t mine = finite ? two_elements(Element<T>::nearest(scale), Element<T>::nearest(zero))
                                 : two_elements(kCanonicalNan, kCanonicalNan);
    const float reciprocal = __frcp_rn(scale);
    const float my_inverse = finite && isfinite(reciprocal) ? reciprocal : 0.0f;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      params[row] = of_row(mine, row);
      inverse[row] = of_row(my_inverse, row);
    }
  }
};

}  // namespace flashcomm

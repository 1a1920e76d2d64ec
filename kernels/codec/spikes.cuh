// Spike reserving: the extremes of a group travel by themselves. wire/src/codec/spikes.rs has the formulas.
#pragma once

#include "plain.cuh"

namespace flashcomm {

template <class T, int kBits>
struct Spikes {
  using P = Planes<kBits>;
  static constexpr float kMaxCode = float((1 << kBits) - 1);

  struct Thread {
    typename Plain<T, kBits>::Thread plain;  // of the rest
    uint32_t spikes[kRows];                  // of the group in each row: minimum, maximum << 16
    uint32_t places[2];                      // of the minimum and the maximum, a byte each, row after row
  };

  static constexpr unsigned kCodesBytes = P::kBytes;
  __device__ static unsigned params_bytes(unsigned group_shift) { return n_groups(group_shift) * 10; }

  __device__ static Thread encode(const ThreadElems& x, unsigned group_shift) {
    return encode_rows([&](int row, float(&wide)[kLaneElems]) {
#pragma unroll
      for (int e = 0; e < kLaneElems; ++e) wide[e] = x[row][e];
    }, group_shift);
  }
  __device__ static Thread encode_input(const ThreadVecs& x, unsigned group_shift) {
    return encode_rows([&](int row, float(&wide)[kLaneElems]) { widen<T>(x[row], wide); }, group_shift);
  }

  __device__ static void add_input(const Vec16& x, unsigned, float (&sum)[kLaneElems]) { add_vec<T>(x, sum); }
  __device__ static void add(const Thread& in, unsigned group_shift, ThreadElems& sum) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float term[kLaneElems];
      values(in, row, group_shift, term);
      add_row(term, sum[row]);
    }
  }

  __device__ static void values(const Thread& in, int row, unsigned group_shift, float (&y)[kLaneElems]) {
    Plain<T, kBits>::values(in.plain, row, group_shift, y);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const unsigned place = place_here(in, row, which, group_shift);
      const float spike = Element<T>::to_float(uint16_t(in.spikes[row] >> (which * 16)));
#pragma unroll
      for (unsigned e = 0; e < kLaneElems; ++e) y[e] = e == place ? spike : y[e];
    }
  }

  __device__ static Vec16 decode_row(const Thread& in, int row, unsigned group_shift) {
    Vec16 out = Plain<T, kBits>::decode_row(in.plain, row, group_shift);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const unsigned place = place_here(in, row, which, group_shift);
      const uint32_t both = __byte_perm(in.spikes[row], 0, which == 0 ? 0x1010 : 0x3232);
      const uint32_t selector = place % 2 == 0 ? 0x3254 : 0x5410;  // the spike in the lower or in the upper half
#pragma unroll
      for (unsigned w = 0; w < 4; ++w) {
        // Chosen by the selector: to write one word of four by its index would put them into memory.
        out.words[w] = __byte_perm(out.words[w], both, place / 2 == w ? selector : 0x3210);
      }
    }
    return out;
  }

  __device__ static void load_codes(const uint8_t* payload, Thread& t) { P::load(payload, t.plain.codes); }
  __device__ static void store_codes(uint8_t* payload, const Thread& t) { P::store(payload, t.plain.codes); }
  __device__ static void load_params(const uint8_t* params, unsigned group_shift, Thread& t) {
    Plain<T, kBits>::load_params(params, group_shift, t.plain);
    get<4>(params + spikes_at(group_shift), t.spikes);
    get<2>(params + places_at(group_shift), t.places);
  }
  __device__ static void store_params(uint8_t* params, unsigned group_shift, const Thread& t) {
    Plain<T, kBits>::store_params(params, group_shift, t.plain);
    if (leads_groups(group_shift)) {
      put<4>(params + spikes_at(group_shift), t.spikes);
      put<2>(params + places_at(group_shift), t.places);
    }
  }

 private:
  __device__ static size_t spikes_at(unsigned group_shift) { return n_groups(group_shift) * 4 + my_groups(group_shift) * 16; }
  __device__ static size_t places_at(unsigned group_shift) { return n_groups(group_shift) * 8 + my_groups(group_shift) * 8; }

  // Element of the group that is the first of this thread's.
  __device__ static unsigned first_place(unsigned group_shift) {
    return (threadIdx.x & ((1u << group_shift) - 1)) * kLaneElems;
  }
  // Which of this thread's elements of a row is the minimum (0) or the maximum (1) of the group; none if it is not below 8.
  __device__ static unsigned place_here(const Thread& in, int row, int which, unsigned group_shift) {
    return (in.places[row / 2] >> (row % 2 * 16 + which * 8) & 0xff) - first_place(group_shift);
  }

  // A value with its place in the last 7 bits: one comparison orders both.
  __device__ static float key(float x, unsigned place) {
    return __uint_as_float((__float_as_uint(x) & ~127u) | place);
  }

  // The two least and the two greatest keys.
  struct Ends {
    float low, low2, high, high2;

    __device__ friend Ends shuffle_xor(const Ends& x, int mask) {
      return {shuffle_xor(x.low, mask), shuffle_xor(x.low2, mask), shuffle_xor(x.high, mask), shuffle_xor(x.high2, mask)};
    }
    // By members: a choice between two structs would put both into memory.
    __device__ friend Ends select(bool first, const Ends& a, const Ends& b) {
      return {select(first, a.low, b.low), select(first, a.low2, b.low2), select(first, a.high, b.high),
              select(first, a.high2, b.high2)};
    }
  };
  __device__ static Ends merge(const Ends& a, const Ends& b) {
    return {min_nan(a.low, b.low), min_nan(max_nan(a.low, b.low), min_nan(a.low2, b.low2)), max_nan(a.high, b.high),
            max_nan(min_nan(a.high, b.high), max_nan(a.high2, b.high2))};
  }
  __device__ static Ends lane_ends(const float (&x)[kLaneElems], unsigned first) {
    Ends pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float a = key(x[2 * i], 2 * i), b = key(x[2 * i + 1], 2 * i + 1);
      const float low = min_nan(a, b), high = max_nan(a, b);
      pairs[i] = {low, high, high, low};
    }
    const Ends ends = merge(merge(pairs[0], pairs[1]), merge(pairs[2], pairs[3]));
    const auto from_first = [first](float k) { return __uint_as_float(__float_as_uint(k) | first); };
    return {from_first(ends.low), from_first(ends.low2), from_first(ends.high), from_first(ends.high2)};
  }

  // get_row(row, wide): this thread's elements of a row.
  template <class GetRow>
  __device__ static Thread encode_rows(GetRow get_row, unsigned group_shift) {
    Ends lanes[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float wide[kLaneElems];
      get_row(row, wide);
      lanes[row] = lane_ends(wide, first_place(group_shift));
    }
    const Ends ends = reduce_rows(lanes, group_shift, merge);

    const float zero = __fadd_rn(Element<T>::to_float(Element<T>::down(key(ends.low2, 0))), 0.0f);
    const float step = __fdiv_rn(__fsub_rn(key(ends.high2, 0), zero), kMaxCode);
    const float scale = __fadd_rn(Element<T>::to_float(Element<T>::up(step)), 0.0f);
    const float range = __fmul_rn(scale, kMaxCode);
    const bool finite = isfinite(ends.low) && isfinite(ends.high) && isfinite(zero) && isfinite(range);
    uint32_t my_params = two_elements(kCanonicalNan, kCanonicalNan), my_spikes = my_params, my_places = 0;
    if (finite) {
      my_params = two_elements(Element<T>::nearest(scale), Element<T>::nearest(zero));
      my_spikes = two_elements(Element<T>::nearest(__fadd_rn(key(ends.low, 0), 0.0f)),
                               Element<T>::nearest(__fadd_rn(key(ends.high, 0), 0.0f)));
      my_places = (__float_as_uint(ends.low) & 127) | (__float_as_uint(ends.high) & 127) << 8;
    }
    const float reciprocal = __frcp_rn(range);
    const float my_inverse = finite && isfinite(reciprocal) ? reciprocal : 0.0f;

    Thread out = {};
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      out.plain.params[row] = of_row(my_params, row);
      out.spikes[row] = of_row(my_spikes, row);
      out.places[row / 2] |= of_row(my_places, row) << (row % 2 * 16);
      const float inverse = of_row(my_inverse, row);
      const float zero_here = Element<T>::to_float(uint16_t(out.plain.params[row] >> 16));
      const float bias = -__fmul_rn(zero_here, inverse);
      float wide[kLaneElems];
      get_row(row, wide);
      uint32_t q[kLaneElems];
#pragma unroll
      for (int e = 0; e < kLaneElems; ++e) {
        q[e] = __float_as_uint(__fmaf_rn(__saturatef(__fmaf_rn(wide[e], inverse, bias)), kMaxCode, kIntegerMagic));
      }
      P::put_row(q, row, out.plain.codes);
    }
    return out;
  }
};

}  // namespace flashcomm

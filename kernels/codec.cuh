// The codec of one tile: 128 threads, 32 elements each, four rows of 8. Bit for bit the same as the scalar
// specification in wire/src/codec.rs, where the formulas and the layout are written down.
//
// A warp needs no other: its rows hold whole quantization groups. Nothing here synchronizes a block.
#pragma once

#include <type_traits>

#include "element.cuh"
#include "layout.cuh"
#include "ptx.cuh"

namespace flashcomm {

constexpr unsigned kAllLanes = 0xffffffff;

// 2^23: adding it to a float in [0, 2^22] rounds to an integer, ties to even, which then stands in the low mantissa
// bits under the exponent pattern kIntegerPattern.
constexpr float kIntegerMagic = 8388608.0f;
constexpr uint32_t kIntegerPattern = 0x4b000000;

// Codec of kBits per element, elements (and scales and zeros) of type T.
template <class T, int kBits>
struct Codec {
  static_assert(kBits >= 2 && kBits <= 8, "widths are 2 to 8 bits");
  static constexpr float kMaxCode = float((1 << kBits) - 1);
  // A width's planes: 8, or those of 4, 2, 1 that add up to it. The widest holds the lowest bits of a code.
  static constexpr bool kHas8 = kBits == 8, kHas4 = kBits & 4, kHas2 = kBits & 2, kHas1 = kBits & 1;
  static constexpr int kShift2 = kHas4 ? 4 : 0, kShift1 = kShift2 + (kHas2 ? 2 : 0);
  // First bytes of the planes in a payload, and first words in a thread's registers.
  static constexpr int kPlane2At = kHas4 ? kTileElems / 2 : 0;
  static constexpr int kPlane1At = kPlane2At + (kHas2 ? kTileElems / 4 : 0);
  static constexpr int kWord2 = kHas4 ? 4 : 0, kWord1 = kWord2 + (kHas2 ? 2 : 0);

  // What one thread holds of an encoded tile.
  struct Thread {
    uint32_t codes[kBits];   // 32 codes of kBits, plane by plane
    uint32_t params[kRows];  // of the group in each row: scale, zero << 16
  };

  __device__ static size_t bytes(unsigned group_shift) { return tile_bytes<kBits>(group_shift); }

  // ---- encode -------------------------------------------------------------------------------------------------

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
  __device__ static Thread encode(const ThreadVecs& x, unsigned group_shift) {
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

  // ---- decode -------------------------------------------------------------------------------------------------

  __device__ static void decode_row(const Thread& in, int row, float (&y)[kLaneElems]) {
    const float scale = Element<T>::to_float(uint16_t(in.params[row]));
    const float zero = Element<T>::to_float(uint16_t(in.params[row] >> 16));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t codes = get_codes(in.codes, row * 2 + half);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const uint32_t integer = __byte_perm(codes, kIntegerPattern, 0x7550 + e);
        y[half * 4 + e] = __fmaf_rn(__fsub_rn(__uint_as_float(integer), kIntegerMagic), scale, zero);
      }
    }
  }

  // A row as the output has it.
  __device__ static Vec16 decode_row(const Thread& in, int row) {
    Vec16 out;
    if constexpr (std::is_same_v<T, __half>) {
      const __half2 scale = Element<T>::pair(__byte_perm(in.params[row], 0, 0x1010));
      const __half2 zero = Element<T>::pair(__byte_perm(in.params[row], 0, 0x3232));
      const __half2 magic = Element<T>::pair(0x64006400);  // 1024, whose last mantissa bit is worth 1
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t codes = get_codes(in.codes, row * 2 + half);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const __half2 integers = Element<T>::pair(__byte_perm(codes, 0x64646464, e == 0 ? 0x4140 : 0x4342));
          out.words[half * 2 + e] = Element<T>::word(__hfma2(__hsub2_rn(integers, magic), scale, zero));
        }
      }
    } else {
      float y[kLaneElems];
      decode_row(in, row, y);
#pragma unroll
      for (int e = 0; e < kLaneElems; e += 2) {
        out.words[e / 2] = Element<T>::nearest(y[e]) | uint32_t(Element<T>::nearest(y[e + 1])) << 16;
      }
    }
    return out;
  }

  // ---- payload ------------------------------------------------------------------------------------------------
  // payload: the first byte of a tile, 16-byte aligned (every tile and every plane is a multiple of 128 bytes).

  __device__ static Thread load(const uint8_t* payload, unsigned group_shift) {
    Thread t;
    if constexpr (kHas8) {
      get<4>(payload + thread_codes_at<8>(0, 0), t.codes);
      get<4>(payload + thread_codes_at<8>(0, 1), t.codes + 4);
    }
    if constexpr (kHas4) get<4>(payload + thread_codes_at<4>(0), t.codes);
    if constexpr (kHas2) get<2>(payload + thread_codes_at<2>(kPlane2At), t.codes + kWord2);
    if constexpr (kHas1) get<1>(payload + thread_codes_at<1>(kPlane1At), t.codes + kWord1);
    get<4>(payload + thread_params_at<kBits>(group_shift), t.params);
    return t;
  }

  __device__ static void store(uint8_t* payload, unsigned group_shift, const Thread& t) {
    if constexpr (kHas8) {
      put<4>(payload + thread_codes_at<8>(0, 0), t.codes);
      put<4>(payload + thread_codes_at<8>(0, 1), t.codes + 4);
    }
    if constexpr (kHas4) put<4>(payload + thread_codes_at<4>(0), t.codes);
    if constexpr (kHas2) put<2>(payload + thread_codes_at<2>(kPlane2At), t.codes + kWord2);
    if constexpr (kHas1) put<1>(payload + thread_codes_at<1>(kPlane1At), t.codes + kWord1);
    if ((threadIdx.x & ((1u << group_shift) - 1)) == 0) put<4>(payload + thread_params_at<kBits>(group_shift), t.params);
  }

 private:
  // Adds a row's codes; its scale and zero stand in out.params.
  __device__ static void encode_row(const float (&x)[kLaneElems], int row, float inverse, Thread& out) {
    const float zero = Element<T>::to_float(uint16_t(out.params[row] >> 16));
    // No clamp: the directed roundings keep the product within the codes, it is 0 where 1/scale is no number, and in a
    // group that is not finite it is NaN, of which every bit that can be a code's is 1.
    uint32_t q[kLaneElems];
#pragma unroll
    for (int e = 0; e < kLaneElems; ++e) {
      q[e] = __float_as_uint(__fadd_rn(__fmul_rn(__fsub_rn(x[e], zero), inverse), kIntegerMagic));
    }
    put_codes(pack_bytes(q), row * 2, out.codes);
    put_codes(pack_bytes(q + 4), row * 2 + 1, out.codes);
  }

  // Scale, zero and 1/scale (0 where that is no number) of the group in each row. Each lane works out one row,
  // lane % 4, and the four lanes of a quad (always of one group) exchange the results.
  // low, high: the extremes of this thread's elements in each row.
  __device__ static void group_params(const float (&low)[kRows], const float (&high)[kRows], unsigned group_shift,
                                      uint32_t (&params)[kRows], float (&inverse)[kRows]) {
    const float min = reduce_rows(low, group_shift, min_nan);
    const float max = reduce_rows(high, group_shift, max_nan);

    // + 0.0f turns -0 into +0: which of the two is the minimum or the maximum depends on the order of comparison.
    const float zero = __fadd_rn(Element<T>::to_float(Element<T>::down(min)), 0.0f);
    const float step = __fdiv_rn(__fsub_rn(max, zero), kMaxCode);
    const float scale = __fadd_rn(Element<T>::to_float(Element<T>::up(step)), 0.0f);
    const bool finite = isfinite(min) && isfinite(max) && isfinite(zero) && isfinite(scale);
    const uint32_t mine = finite ? Element<T>::nearest(scale) | uint32_t(Element<T>::nearest(zero)) << 16
                                 : kCanonicalNan | uint32_t(kCanonicalNan) << 16;
    const float reciprocal = __frcp_rn(scale);
    const float my_inverse = finite && isfinite(reciprocal) ? reciprocal : 0.0f;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      params[row] = __shfl_sync(kAllLanes, mine, row, 4);
      inverse[row] = __shfl_sync(kAllLanes, my_inverse, row, 4);
    }
  }

  // Reduces the four rows over the lanes of a group; lane l gets the result of row l % 4. Halving: a lane passes on
  // the rows that it does not keep, so this takes 5 shuffles at 16 lanes a group instead of 16.
  template <class Op>
  __device__ static float reduce_rows(const float (&v)[kRows], unsigned group_shift, Op op) {
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    const float a = op(odd ? v[1] : v[0], __shfl_xor_sync(kAllLanes, odd ? v[0] : v[1], 1));
    const float b = op(odd ? v[3] : v[2], __shfl_xor_sync(kAllLanes, odd ? v[2] : v[3], 1));
    float c = op(high ? b : a, __shfl_xor_sync(kAllLanes, high ? a : b, 2));
    if (group_shift > 2) c = op(c, __shfl_xor_sync(kAllLanes, c, 4));
    if (group_shift > 3) c = op(c, __shfl_xor_sync(kAllLanes, c, 8));
    return c;
  }

  // Four integers under kIntegerPattern, of 8 bits at most, as bytes, the first lowest.
  __device__ static uint32_t pack_bytes(const uint32_t* q) {
    return __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410);
  }

  // Adds half row n (4 codes, as bytes) to the planes. In a plane of p bits it stands in word n * p / 8, in each byte
  // from bit n * p % 8 on, so that four codes move at a time.
  __device__ static void put_codes(uint32_t bytes, int n, uint32_t (&codes)[kBits]) {
    if constexpr (kHas8) codes[n] = bytes;
    if constexpr (kHas4) codes[n / 2] |= plane_bits<4>(bytes, 0) << (n % 2 * 4);
    if constexpr (kHas2) codes[kWord2 + n / 4] |= plane_bits<2>(bytes, kShift2) << (n % 4 * 2);
    if constexpr (kHas1) codes[kWord1] |= plane_bits<1>(bytes, kShift1) << n;
  }

  // Half row n of the planes, 4 codes as bytes.
  __device__ static uint32_t get_codes(const uint32_t (&codes)[kBits], int n) {
    uint32_t bytes = 0;
    if constexpr (kHas8) bytes = codes[n];
    if constexpr (kHas4) bytes |= plane_bits<4>(codes[n / 2], n % 2 * 4);
    if constexpr (kHas2) bytes |= plane_bits<2>(codes[kWord2 + n / 4], n % 4 * 2) << kShift2;
    if constexpr (kHas1) bytes |= plane_bits<1>(codes[kWord1], n) << kShift1;
    return bytes;
  }

  // Bits shift .. shift + kPlaneBits of each byte, at the bottom of the byte.
  template <int kPlaneBits>
  __device__ static uint32_t plane_bits(uint32_t bytes, int shift) {
    constexpr uint32_t kMask = 0x01010101u * ((1 << kPlaneBits) - 1);
    return (bytes >> shift) & kMask;
  }

  template <int kWords>
  __device__ static void get(const uint8_t* ptr, uint32_t* words) {
    if constexpr (kWords == 4) {
      const Vec16 v = load_vec16(ptr);
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] = v.words[w];
    } else if constexpr (kWords == 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(ptr);
      words[0] = v.x, words[1] = v.y;
    } else {
      words[0] = *reinterpret_cast<const uint32_t*>(ptr);
    }
  }

  template <int kWords>
  __device__ static void put(uint8_t* ptr, const uint32_t* words) {
    if constexpr (kWords == 4) {
      store_vec16(ptr, {{words[0], words[1], words[2], words[3]}});
    } else if constexpr (kWords == 2) {
      *reinterpret_cast<uint2*>(ptr) = make_uint2(words[0], words[1]);
    } else {
      *reinterpret_cast<uint32_t*>(ptr) = words[0];
    }
  }
};

// No code: a payload is the tile's elements as they are stored, NaN as 0x7fff.
template <class T>
struct Codec<T, 16> {
  struct Thread {
    ThreadVecs vecs;
  };

  __device__ static size_t bytes(unsigned group_shift) { return tile_bytes<16>(group_shift); }

  __device__ static Thread encode(const ThreadElems& x, unsigned) {
    Thread out;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int e = 0; e < kLaneElems; e += 2) {
        out.vecs[row].words[e / 2] =
            Element<T>::nearest(x[row][e]) | uint32_t(Element<T>::nearest(x[row][e + 1])) << 16;
      }
    }
    return out;
  }
  __device__ static Thread encode(const ThreadVecs& x, unsigned) {
    Thread out;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int w = 0; w < 4; ++w) out.vecs[row].words[w] = Element<T>::max2(x[row].words[w], x[row].words[w]);
    }
    return out;
  }

  __device__ static void decode_row(const Thread& in, int row, float (&y)[kLaneElems]) { widen<T>(in.vecs[row], y); }
  __device__ static Vec16 decode_row(const Thread& in, int row) { return in.vecs[row]; }

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

// Calls X(suffix, type, bits) for each element type and width.
#define FLASHCOMM_EACH_WIDTH(X, suffix, T) \
  X(suffix, T, 2) X(suffix, T, 3) X(suffix, T, 4) X(suffix, T, 5) X(suffix, T, 6) X(suffix, T, 7) X(suffix, T, 8)
#define FLASHCOMM_EACH_CODEC(X)                                                        \
  FLASHCOMM_EACH_WIDTH(X, fp16, __half) FLASHCOMM_EACH_WIDTH(X, bf16, __nv_bfloat16) \
  X(fp16, __half, 16) X(bf16, __nv_bfloat16, 16)

// Calls PAIR(suffix, type, reduce bits, gather bits) for each pair of widths: all pairs of codes, and 16 with itself.
#define FLASHCOMM_EACH_GATHER(PAIR, suffix, T, in)                                                       \
  PAIR(suffix, T, in, 2) PAIR(suffix, T, in, 3) PAIR(suffix, T, in, 4) PAIR(suffix, T, in, 5)            \
  PAIR(suffix, T, in, 6) PAIR(suffix, T, in, 7) PAIR(suffix, T, in, 8)
#define FLASHCOMM_EACH_PAIR_OF(PAIR, suffix, T)                                                          \
  FLASHCOMM_EACH_GATHER(PAIR, suffix, T, 2) FLASHCOMM_EACH_GATHER(PAIR, suffix, T, 3)                    \
  FLASHCOMM_EACH_GATHER(PAIR, suffix, T, 4) FLASHCOMM_EACH_GATHER(PAIR, suffix, T, 5)                    \
  FLASHCOMM_EACH_GATHER(PAIR, suffix, T, 6) FLASHCOMM_EACH_GATHER(PAIR, suffix, T, 7)                    \
  FLASHCOMM_EACH_GATHER(PAIR, suffix, T, 8) PAIR(suffix, T, 16, 16)
#define FLASHCOMM_EACH_PAIR(PAIR) \
  FLASHCOMM_EACH_PAIR_OF(PAIR, fp16, __half) FLASHCOMM_EACH_PAIR_OF(PAIR, bf16, __nv_bfloat16)

}  // namespace flashcomm

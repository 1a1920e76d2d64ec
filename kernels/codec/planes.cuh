// Quants, integers of kBits, in a thread's words and in a payload: bit planes, the same for every code.
// wire/src/codec/layout.rs has the layout.
#pragma once

#include "../element.cuh"
#include "../ptx.cuh"

namespace flashcomm {

constexpr unsigned kAllLanes = 0xffffffff;

// 2^23: adding it to a float in [0, 2^22] rounds to an integer, ties to even, which then stands in the low mantissa
// bits under the exponent pattern kIntegerPattern.
constexpr float kIntegerMagic = 8388608.0f;
constexpr uint32_t kIntegerPattern = 0x4b000000;

// Words that one thread reads or writes at once.
template <int kWords>
__device__ __forceinline__ void get(const uint8_t* ptr, uint32_t* words) {
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
__device__ __forceinline__ void put(uint8_t* ptr, const uint32_t* words) {
  if constexpr (kWords == 4) {
    store_vec16(ptr, {{words[0], words[1], words[2], words[3]}});
  } else if constexpr (kWords == 2) {
    *reinterpret_cast<uint2*>(ptr) = make_uint2(words[0], words[1]);
  } else {
    *reinterpret_cast<uint32_t*>(ptr) = words[0];
  }
}

template <int kBits>
struct Planes {
  static_assert(kBits >= 2 && kBits <= 8, "widths are 2 to 8 bits");
  // A width's planes: 8, or those of 4, 2, 1 that add up to it. The widest holds the lowest bits of a quant.
  static constexpr bool kHas8 = kBits == 8, kHas4 = kBits & 4, kHas2 = kBits & 2, kHas1 = kBits & 1;
  static constexpr int kShift2 = kHas4 ? 4 : 0, kShift1 = kShift2 + (kHas2 ? 2 : 0);
  // First bytes of the planes in a payload, and first words in a thread's registers.
  static constexpr int kPlane2At = kHas4 ? kTileElems / 2 : 0;
  static constexpr int kPlane1At = kPlane2At + (kHas2 ? kTileElems / 4 : 0);
  static constexpr int kWord2 = kHas4 ? 4 : 0, kWord1 = kWord2 + (kHas2 ? 2 : 0);

  using Words = uint32_t[kBits];  // a thread's 32 quants, plane by plane

  // Bytes of a tile's quants; what a code has per group comes behind.
  static constexpr int kBytes = kTileElems / 8 * kBits;

  // payload: the first byte of a tile, 16-byte aligned (every tile and every plane is a multiple of 64 bytes).
  __device__ static void load(const uint8_t* payload, Words& words) {
    if constexpr (kHas8) {
      get<4>(payload + at<8>(0, 0), words);
      get<4>(payload + at<8>(0, 1), words + 4);
    }
    if constexpr (kHas4) get<4>(payload + at<4>(0), words);
    if constexpr (kHas2) get<2>(payload + at<2>(kPlane2At), words + kWord2);
    if constexpr (kHas1) get<1>(payload + at<1>(kPlane1At), words + kWord1);
  }

  __device__ static void store(uint8_t* payload, const Words& words) {
    if constexpr (kHas8) {
      put<4>(payload + at<8>(0, 0), words);
      put<4>(payload + at<8>(0, 1), words + 4);
    }
    if constexpr (kHas4) put<4>(payload + at<4>(0), words);
    if constexpr (kHas2) put<2>(payload + at<2>(kPlane2At), words + kWord2);
    if constexpr (kHas1) put<1>(payload + at<1>(kPlane1At), words + kWord1);
  }

  // Adds the quants of a row, integers of 8 bits at most under kIntegerPattern.
  __device__ static void put_row(const uint32_t (&integers)[kLaneElems], int row, Words& words) {
    put_half(pack_bytes(integers), row * 2, words);
    put_half(pack_bytes(integers + 4), row * 2 + 1, words);
  }

  // Half row n of the planes, 4 quants as bytes.
  __device__ static uint32_t get_half(const Words& words, int n) {
    uint32_t bytes = 0;
    if constexpr (kHas8) bytes = words[n];
    if constexpr (kHas4) bytes |= plane_bits<4>(words[n / 2], n % 2 * 4);
    if constexpr (kHas2) bytes |= plane_bits<2>(words[kWord2 + n / 4], n % 4 * 2) << kShift2;
    if constexpr (kHas1) bytes |= plane_bits<1>(words[kWord1], n) << kShift1;
    return bytes;
  }

 private:
  // This thread's words of a plane of kPlaneBits whose first byte is plane_at: one per bit. (The plane of 8 bits is two
  // half planes of 4 words a thread.)
  template <int kPlaneBits>
  __device__ static size_t at(int plane_at, int half = 0) {
    constexpr int bytes = kPlaneBits == 8 ? 16 : kPlaneBits * 4;
    return plane_at + half * (kTileElems / 2) + threadIdx.x * bytes;
  }

  // Four integers as bytes, the first lowest.
  __device__ static uint32_t pack_bytes(const uint32_t* q) {
    return __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410);
  }

  // In a plane of p bits half row n (4 quants, as bytes) stands in word n * p / 8, in each byte from bit n * p % 8 on, so
  // that four quants move at a time.
  __device__ static void put_half(uint32_t bytes, int n, Words& words) {
    if constexpr (kHas8) words[n] = bytes;
    if constexpr (kHas4) words[n / 2] |= plane_bits<4>(bytes, 0) << (n % 2 * 4);
    if constexpr (kHas2) words[kWord2 + n / 4] |= plane_bits<2>(bytes, kShift2) << (n % 4 * 2);
    if constexpr (kHas1) words[kWord1] |= plane_bits<1>(bytes, kShift1) << n;
  }

  // Bits shift .. shift + kPlaneBits of each byte, at the bottom of the byte.
  template <int kPlaneBits>
  __device__ static uint32_t plane_bits(uint32_t bytes, int shift) {
    constexpr uint32_t kMask = 0x01010101u * ((1 << kPlaneBits) - 1);
    return (bytes >> shift) & kMask;
  }
};

// Groups of a tile.
__device__ __forceinline__ unsigned n_groups(unsigned group_shift) { return kTileElems / kLaneElems >> group_shift; }
// The quadruple of groups, one a row, that this thread's elements belong to, and whether it is the thread that writes for it.
__device__ __forceinline__ unsigned my_groups(unsigned group_shift) { return threadIdx.x >> group_shift; }
__device__ __forceinline__ bool leads_groups(unsigned group_shift) {
  return (threadIdx.x & ((1u << group_shift) - 1)) == 0;
}

__device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(kAllLanes, x, mask); }
__device__ __forceinline__ float select(bool first, float a, float b) { return first ? a : b; }

// Reduces the four rows over the lanes of a group; lane l gets the result of row l % 4. Halving: a lane passes on
// the rows that it does not keep, so this takes 5 exchanges at 16 lanes a group instead of 16.
template <class Op>
__device__ __forceinline__ float reduce_rows(const float (&v)[kRows], unsigned group_shift, Op op) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const float a = op(select(odd, v[1], v[0]), shuffle_xor(select(odd, v[0], v[1]), 1));
  const float b = op(select(odd, v[3], v[2]), shuffle_xor(select(odd, v[2], v[3]), 1));
  float c = op(select(high, b, a), shuffle_xor(select(high, a, b), 2));
  if (group_shift > 2) c = op(c, shuffle_xor(c, 4));
  if (group_shift > 3) c = op(c, shuffle_xor(c, 8));
  return c;
}

// What lane row % 4 of every quad (always of one group) has worked out for its row.
template <class X>
__device__ __forceinline__ X of_row(X mine, int row) {
  return __shfl_sync(kAllLanes, mine, row, 4);
}

// Makes a sum of no terms: what leaves any term as it is, -0 too.
__device__ __forceinline__ void start_sum(ThreadElems& sum) {
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int e = 0; e < kLaneElems; ++e) sum[row][e] = -0.0f;
  }
}

__device__ __forceinline__ void add_row(const float (&term)[kLaneElems], float (&sum)[kLaneElems]) {
#pragma unroll
  for (int e = 0; e < kLaneElems; ++e) sum[e] = __fadd_rn(sum[e], term[e]);
}

// Adds a row of elements as they are stored.
template <class T>
__device__ __forceinline__ void add_vec(const Vec16& x, float (&sum)[kLaneElems]) {
  float term[kLaneElems];
  widen<T>(x, term);
  add_row(term, sum);
}

__device__ __forceinline__ void scale_sum(float scale, ThreadElems& sum) {
  if (scale == 1.0f) return;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
#pragma unroll
    for (int e = 0; e < kLaneElems; ++e) sum[row][e] = __fmul_rn(sum[row][e], scale);
  }
}

}  // namespace flashcomm

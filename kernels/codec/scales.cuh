// What the octets of the code blocks are scaled by: levels, the units of their groups, and bands.
// wire/src/codec/scale.rs has the formulas.
#pragma once

#include <type_traits>

#include "pairs.cuh"
#include "planes.cuh"

namespace flashcomm {

// About 1 / x.
__device__ __forceinline__ float inverse_of(float x) {
  float y = __uint_as_float(0x7ef311c7u - __float_as_uint(x));
  y = __fmaf_rn(__fmaf_rn(-x, y, 1.0f), y, y);
  return __fmaf_rn(__fmaf_rn(-x, y, 1.0f), y, y);
}

// Of one thread's octets, one a row. kHalfRange: cells on one side of 0.
template <class T, int kHalfRange>
struct Scales {
  uint32_t levels;    // of row r in byte r % 2, from bit r / 2 * 4 on
  uint32_t units[2];  // of the group in each row, as they are stored

  // Between these and the sum of both stand the magnitudes of an octet: B and L.
  struct Limits {
    float bound, base;
  };

  __device__ uint32_t level(int row) const { return levels >> level_shift(row) & kMaxLevel; }

  // Of a row's group.
  __device__ bool has_bands(int row) const { return (stored_unit(row) & kSign) != 0; }

  // Whether there is a constant octet, or a group with bands.
  __device__ bool has_special() const {
    const bool has_constants = ((levels - 0x1111) & ~levels & 0x8888) != 0;
    return has_constants || ((units[0] | units[1]) & (kSign | kSign << 16)) != 0;
  }

  __device__ Limits limits(int row) const {
    const uint32_t stored = stored_unit(row);
    const bool is_plain = !has_bands(row);
    const float unit = Element<T>::to_float(is_plain ? stored : stored & ~(kSign | kLast));
    const float narrower = is_plain ? 0.5f : shrink(1 + (stored & kLast));
    const float whole = __fmul_rn(unit, float(kMaxLevel)), band = __fmul_rn(whole, narrower);
    if (!is_plain && level(row) == kMaxLevel) return {band, __fsub_rn(whole, band)};
    return {__fmul_rn(float(level(row)), __fmul_rn(unit, 2 * narrower)), 0.0f};
  }

  // Half of L; 0 where a group has bands.
  __device__ float half_bound(int row) const {
    const uint32_t two_levels = levels >> (row / 2 * 4) & 0x0f0f;
    if constexpr (std::is_same_v<T, __half>) {
      // For both rows of the pair at once: 512, whose last mantissa bit is worth 1/2, and the level in the low bits.
      using H = Element<__half>;
      const __half2 half_levels = __hsub2_rn(H::pair(__byte_perm(two_levels, 0x60606060, 0x4140)), H::pair(0x60006000));
      const __half2 halves = __hmax2(__hmul2_rn(half_levels, H::pair(units[row / 2])), H::pair(0));
      return row % 2 == 0 ? __low2float(halves) : __high2float(halves);
    } else {
      const uint32_t integer = __byte_perm(two_levels, kIntegerPattern, row % 2 == 0 ? 0x7550 : 0x7551);
      const float unit = Element<T>::to_float(stored_unit(row));
      return fmaxf(__fmul_rn(__fsub_rn(__uint_as_float(integer), kIntegerMagic), __fmul_rn(0.5f, unit)), 0.0f);
    }
  }

  // Without bands. largest: the largest magnitude of each octet; 0: a constant, of level 0. inverse: of the step.
  __device__ void set(const float (&largest)[kRows], unsigned group_shift, float (&inverse)[kRows]) {
    const float max = reduce_rows(largest, group_shift, max_nan);
    const float share = __fmul_rn(max, (1.0f + 1.0f / 2048) / kMaxLevel);
    float unit = __uint_as_float((__float_as_uint(share) + 0x1ffffu) & ~0x1ffffu);  // 7 significant bits, rounded up
    unit = fmaxf(unit, Pairs<T>::kLeastUnit);
    const float my_per_unit = per(unit);
    uint32_t level_bits[kRows], stored[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float unit_here = of_row(unit, row);
      stored[row] = Element<T>::nearest(unit_here);
      const float level = level_of(largest[row], of_row(my_per_unit, row));
      level_bits[row] = __float_as_uint(level);
      const float step = __fmul_rn(__fsub_rn(level, kIntegerMagic), __fmul_rn(unit_here, 1.0f / kHalfRange));
      inverse[row] = largest[row] == 0.0f ? 1.0f : inverse_of(step);
    }
    levels = (__byte_perm(level_bits[0], level_bits[1], 0x0040) & 0x0f0f) |
             (__byte_perm(level_bits[2], level_bits[3], 0x0040) & 0x0f0f) << 4;
    units[0] = stored[0] | stored[1] << 16;
    units[1] = stored[2] | stored[3] << 16;
  }

  // Whether a group of the warp may allow bands, by its levels: each is 15, as that of the largest octet is, or at most 7,
  // since what is no band must be at most 14 of half the unit. Rare, and quickly told.
  __device__ bool may_have_bands(unsigned group_shift) const {
    const uint32_t are_all_set = levels & levels >> 1 & levels >> 2 & levels >> 3;
    uint32_t may = (~levels >> 3 | are_all_set) & 0x1111;
    for (unsigned lanes = 1; lanes >> group_shift == 0; lanes *= 2) may &= __shfl_xor_sync(kAllLanes, may, lanes);
    return __any_sync(kAllLanes, (may & are_all_set) != 0);
  }

  // Gives bands to the groups whose octets all allow them; whether one of the warp has them.
  // lowest(row), largest(row): of the magnitudes of an octet that is not constant. inverse: as in set.
  template <class Lowest, class Largest>
  __device__ bool add_bands(Lowest lowest, Largest largest, unsigned group_shift, float (&inverse)[kRows]) {
    uint32_t allowed = 0;  // of row r: shift number 1 in bit 2 * r, number 2 in the next
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float unit = Element<T>::to_float(stored_unit(row)), whole = __fmul_rn(unit, float(kMaxLevel));
      const float lowest_here = lowest(row), largest_here = largest(row);
#pragma unroll
      for (int n = 1; n <= 2; ++n) {
        const bool as_band = lowest_here > __fsub_rn(whole, __fmul_rn(whole, shrink(n)));
        const bool as_other = others_level(largest_here, unit, n) < kIntegerMagic + kMaxLevel;
        const bool is_allowed = level(row) == 0 || (level(row) == kMaxLevel ? as_band : as_other);
        allowed |= uint32_t(is_allowed && unit > Pairs<T>::kLeastUnit) << (row * 2 + n - 1);
      }
    }
    for (unsigned lanes = 1; lanes >> group_shift == 0; lanes *= 2) allowed &= __shfl_xor_sync(kAllLanes, allowed, lanes);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int n = (allowed >> (row * 2) & 3) + 1 >> 1;  // the larger that is allowed; 0: none
      if (n == 0) continue;
      const float unit = Element<T>::to_float(stored_unit(row));
      units[row / 2] |= (kSign | (n - 1)) << (row % 2 * 16);
      if (level(row) == 0 || level(row) == kMaxLevel) continue;
      const uint32_t level = __float_as_uint(others_level(largest(row), unit, n)) & kMaxLevel;
      levels = (levels & ~(kMaxLevel << level_shift(row))) | level << level_shift(row);
    }
    // Of all rows: to keep those that stay as they are takes registers.
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float step = __fmul_rn(limits(row).bound, 1.0f / kHalfRange);
      inverse[row] = level(row) == 0 ? 1.0f : inverse_of(step);
    }
    return __any_sync(kAllLanes, allowed != 0);
  }

  // Subtracts B, by sign, from a row that is about to be encoded.
  __device__ void bring_to_zero(float (&x)[kLaneElems], int row) const {
    const float base = limits(row).base;
#pragma unroll
    for (int e = 0; e < kLaneElems; ++e) x[e] = __fsub_rn(x[e], copysignf(base, x[e]));  // exact
  }

 private:
  static constexpr uint32_t kSign = 0x8000, kLast = 1;  // of a stored unit

  __device__ static int level_shift(int row) { return row % 2 * 8 + row / 2 * 4; }
  __device__ uint16_t stored_unit(int row) const { return uint16_t(units[row / 2] >> (row % 2 * 16)); }
  // 2^-w of the shift w that is number n, 1 or 2.
  __device__ static float shrink(int n) { return n == 1 ? 0.25f : 0.0625f; }
  // 1 / unit and a margin.
  __device__ static float per(float unit) { return __fmul_rn(inverse_of(unit), 1.0f + 1.0f / 4096); }
  // Under kIntegerMagic.
  __device__ static float level_of(float largest, float per_unit) { return __fmaf_ru(largest, per_unit, kIntegerMagic); }
  // The level of an octet that is no band, where the group has the shift number n.
  __device__ static float others_level(float largest, float unit, int n) {
    return level_of(largest, __fmul_rn(per(unit), n == 1 ? 2.0f : 8.0f));
  }
};

}  // namespace flashcomm

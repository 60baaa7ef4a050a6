// The arithmetic of the stream contract (docs/streams.md, "Results"): inputs become integers under a shared power-of-two
// scale, sums of integers have no order, and what is left of floating point happens in one fixed order.
#pragma once

#include <cstdint>

#include "stream.h"

namespace ferret {

inline constexpr int kTile = 512;           // elements that share a scale in project; tiles start at multiples of it
inline constexpr int kDeltaBits = 22;       // |q| < 2^22: 512 of them add up below 2^31
inline constexpr int kGroup = 64;           // columns that share a scale in reconstruct
inline constexpr int kCoordinateBits = 23;  // |c| < 2^23
inline constexpr int kFoldRadix = 64;       // sums are folded 64 at a time, at every level, in both directions
inline constexpr int kWordsPerTile = kTile / 32;

template <class Real>
struct Working;  // the working precision: float32, or float64 if an input is float64

template <>
struct Working<float> {
  static constexpr int limbs = 1;
  static constexpr int min_tile_exponent = -148;  // of the smallest denormal
  static constexpr int max_block_exponent = 64;   // reconstruct: the block's scale stays within 2^+-64,
  static constexpr int group_range = 100;         // a group's scale within 2^-100 of the block's
};

template <>
struct Working<double> {
  static constexpr int limbs = 2;
  static constexpr int min_tile_exponent = -1000;  // below 2^-1044 an element counts as zero
  static constexpr int max_block_exponent = 512;
  static constexpr int group_range = 400;
};

// 2^e for a normal result.
FERRET_HD float power_of_two(int e, float) { return bits_to_float(static_cast<uint32_t>(e + 127) << 23); }

FERRET_HD double power_of_two(int e, double) {
  const uint64_t bits = static_cast<uint64_t>(e + 1023) << 52;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// e with x = m * 2^e, 0.5 <= m < 1, for a finite x > 0.
FERRET_HD int exponent_of(float x) {
  const uint32_t bits = float_to_bits(x);
  if (bits >= 0x00800000u) return static_cast<int>(bits >> 23) - 126;
  return static_cast<int>(float_to_bits(x * 0x1p24f) >> 23) - 126 - 24;
}

FERRET_HD int exponent_of(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (bits >= 0x0010000000000000u) return static_cast<int>(bits >> 52) - 1022;
  x *= 0x1p54;
  memcpy(&bits, &x, sizeof bits);
  return static_cast<int>(bits >> 52) - 1022 - 54;
}

template <class T>
FERRET_HD T clamp(T x, T low, T high) {
  return x < low ? low : high < x ? high : x;
}

// Round half to even for |x| <= 2^23.
FERRET_HD int32_t round_to_int(double x) {
  const double shifted = x + 6755399441055744.0;  // 1.5 * 2^52
  int64_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  return static_cast<int32_t>(bits);
}

// Round half to even for |x| <= 2^23, where the float32 trick of round_to_int ends at 2^22.
FERRET_HD int32_t round_to_int_wide(float x) { return round_to_int(static_cast<double>(x)); }
FERRET_HD int32_t round_to_int_wide(double x) { return round_to_int(x); }

// x * 2^(bits - e) as `limbs` integers below 2^bits: x ~ (hi + lo * 2^-bits) * 2^(e - bits).
// The scale is applied as two factors because 2^(bits - e) itself may lie outside the range of Real.
template <class Real>
struct Scale {
  Real first, second;

  FERRET_HD Scale(int bits, int e) {
    const int shift = bits - e;
    const int half = shift / 2;
    first = power_of_two(half, Real());
    second = power_of_two(shift - half, Real());
  }
  FERRET_HD Real operator()(Real x) const { return (x * first) * second; }
};

struct Limbs {
  int32_t hi, lo;
};

template <class Real>
FERRET_HD Limbs to_fixed_point(Real scaled, int bits) {
  const int32_t limit = (1 << bits) - 1;
  Limbs result = {clamp(round_to_int_wide(scaled), -limit, limit), 0};
  if (Working<Real>::limbs == 2) {
    const Real rest = (scaled - static_cast<Real>(result.hi)) * static_cast<Real>(1 << bits);
    result.lo = clamp(round_to_int_wide(rest), -limit, limit);
  }
  return result;
}

// The value of exact integer sums over both limbs.
FERRET_HD double join_limbs(int64_t hi, int64_t lo, int bits) {
  return static_cast<double>(hi) + static_cast<double>(lo) * power_of_two(-bits, double());
}

// project: gamma_k = S_k * project_factor, S_k the folded sum of the tiles (in units of 2^-basis_exponent).
FERRET_HD double project_factor(Basis basis, uint64_t numel, uint64_t columns) {
  const double scale = power_of_two(-basis_exponent(basis), double()) / basis_variance(basis);
  return square_root(static_cast<double>(numel)) / static_cast<double>(columns) * scale;
}

// reconstruct: an element is T * apply_factor, T the folded sum of the groups in units of 2^(block_exponent - basis_exponent).
FERRET_HD double apply_factor(Basis basis, uint64_t numel, double alpha, int block_exponent) {
  const double scale = power_of_two(block_exponent - basis_exponent(basis), double());
  return alpha * scale / square_root(static_cast<double>(numel));
}

}  // namespace ferret

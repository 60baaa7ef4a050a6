// Loops over elements that the compiler vectorises by itself; compiled once per instruction set, so in no named namespace.
#pragma once

#include <limits>

#include "kernels.h"

namespace ferret::cpu {
namespace {

// Calls f with a typed null pointer of the dtype's element type.
template <class F>
void with_element_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32: return f(static_cast<float*>(nullptr));
    case Dtype::bfloat16: return f(static_cast<bfloat16_t*>(nullptr));
    case Dtype::float16: return f(static_cast<float16_t*>(nullptr));
    case Dtype::float64: return f(static_cast<double*>(nullptr));
  }
}

template <class Real>
void widen(const void* from, Dtype dtype, int64_t n, Real* to) {
  with_element_type(dtype, [=](auto* type) {
    const auto* x = static_cast<decltype(type)>(const_cast<void*>(from));
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Real>(to_float(x[i]));
  });
}

template <class Real>
void subtract(const void* from, Dtype dtype, int64_t n, Real* inout) {
  with_element_type(dtype, [=](auto* type) {
    const auto* x = static_cast<decltype(type)>(const_cast<void*>(from));
    for (int64_t i = 0; i < n; ++i) inout[i] = static_cast<Real>(to_float(x[i])) - inout[i];
  });
}

template <class Real>
void accumulate(const Real* sums, int64_t n, Real weight, Real* total) {
  for (int64_t i = 0; i < n; ++i) total[i] = fused_multiply_add(sums[i], weight, total[i]);
}

template <class Real>
void scale_add(const Real* sums, int64_t n, Real factor, bool overwrite, Dtype dtype, void* param) {
  with_element_type(dtype, [=](auto* type) {
    auto* p = static_cast<decltype(type)>(param);
    if (overwrite) {
      for (int64_t i = 0; i < n; ++i) store_rounded(fused_multiply_add(sums[i], factor, Real(0)), &p[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) {
        store_rounded(fused_multiply_add(sums[i], factor, static_cast<Real>(to_float(p[i]))), &p[i]);
      }
    }
  });
}

enum class TileState { zero, finite, not_finite };

template <class Real>
struct TileIntegers {
  alignas(64) int32_t q[Working<Real>::limbs][kTile];
  double unit;  // 2^(n - 22): an element is (q + q' 2^-22) * unit
};

FERRET_HD uint32_t magnitude_bits(float x) { return float_to_bits(x) & 0x7FFFFFFFu; }
FERRET_HD uint64_t magnitude_bits(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x7FFFFFFFFFFFFFFFu;
}

// Step 1 of project. The largest magnitude is found among the bit patterns, where NaN and infinity are the largest.
template <class Real>
TileState to_integers(const Real* x, TileIntegers<Real>& tile) {
  auto largest = magnitude_bits(Real(0));
  for (int i = 0; i < kTile; ++i) largest = largest < magnitude_bits(x[i]) ? magnitude_bits(x[i]) : largest;
  if (largest == 0) return TileState::zero;
  Real magnitude;
  memcpy(&magnitude, &largest, sizeof magnitude);
  if (!(magnitude - magnitude == 0)) return TileState::not_finite;

  const int exponent = exponent_of(magnitude);
  const int n = exponent < Working<Real>::min_tile_exponent ? Working<Real>::min_tile_exponent : exponent;
  const Scale<Real> scale(kDeltaBits, n);
  constexpr int32_t limit = (1 << kDeltaBits) - 1;
  for (int i = 0; i < kTile; ++i) tile.q[0][i] = clamp(round_to_int(scale(x[i])), -limit, limit);
  if constexpr (Working<Real>::limbs == 2) {
    for (int i = 0; i < kTile; ++i) {
      const Real rest = (scale(x[i]) - static_cast<Real>(tile.q[0][i])) * static_cast<Real>(1 << kDeltaBits);
      tile.q[1][i] = clamp(round_to_int(rest), -limit, limit);
    }
  }
  tile.unit = power_of_two(n - kDeltaBits, double());
  return TileState::finite;
}

// Step 2 of project, after the exact sums: values[limb][k] -> sums[k].
template <class Real>
void add_tile_values(const double* const* values, int count, double unit, double* sums) {
  for (int k = 0; k < count; ++k) {
    double value = values[0][k];
    if constexpr (Working<Real>::limbs == 2) value += values[1][k] * 0x1p-22;
    sums[k] += value * unit;
  }
}

template <class Real>
void poison(int count, double* sums) {
  for (int k = 0; k < count; ++k) sums[k] = std::numeric_limits<double>::quiet_NaN();
}

}  // namespace
}  // namespace ferret::cpu

// float16 and bfloat16 as bit patterns, for host and device code that knows neither torch nor a vendor's types. On a GPU
// one instruction does each; only the bits of a NaN differ.
#pragma once

#include "stream.h"

namespace ferret {

enum class Dtype : int32_t { float32, bfloat16, float16, float64 };

FERRET_HD constexpr int size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

FERRET_HD constexpr Dtype dtype_of(float) { return Dtype::float32; }
FERRET_HD constexpr Dtype dtype_of(double) { return Dtype::float64; }

struct bfloat16_t {
  uint16_t bits;
};
struct float16_t {
  uint16_t bits;
};

FERRET_HD float to_float(bfloat16_t x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

FERRET_HD float to_float(float16_t x) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7FFFu;
  if (rest >= 0x7C00u) return bits_to_float(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
  // The bits of a float16 read as a float32 are off by a factor of 2^112, for denormals too.
  return bits_to_float(sign | float_to_bits(bits_to_float(rest << 13) * 0x1p112f));
#endif
}

// Round to nearest even; what is too large becomes infinity, NaN stays NaN.
FERRET_HD bfloat16_t to_bfloat16(float x) {
#if defined(__CUDA_ARCH__)
  bfloat16_t rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
#else
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

FERRET_HD float16_t to_float16(float x) {
#if defined(__CUDA_ARCH__)
  float16_t rounded;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
#else
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // >= 65520
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    return {static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3F000000u))};
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
#endif
}

FERRET_HD float to_float(float x) { return x; }
FERRET_HD double to_float(double x) { return x; }

// The result of the working precision as an element, rounded once to the element's type.
template <class Real>
FERRET_HD void store_rounded(Real x, float* out) {
  *out = static_cast<float>(x);
}
template <class Real>
FERRET_HD void store_rounded(Real x, double* out) {
  *out = static_cast<double>(x);
}
template <class Real>
FERRET_HD void store_rounded(Real x, bfloat16_t* out) {
  *out = to_bfloat16(static_cast<float>(x));
}
template <class Real>
FERRET_HD void store_rounded(Real x, float16_t* out) {
  *out = to_float16(static_cast<float>(x));
}

// Stochastic rounding: down or up with the probabilities that make x the mean, by 16 random bits. What comes out is a float32
// that T holds exactly, or infinity, so that storing it rounds no more.
FERRET_HD float round_stochastically(float x, uint32_t random, bfloat16_t) {
  const uint32_t bits = float_to_bits(x);
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? x : bits_to_float((bits + random) & 0xFFFF0000u);
}

FERRET_HD float round_stochastically(float x, uint32_t random, float16_t) {
  const uint32_t bits = float_to_bits(x), sign = bits & 0x80000000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude >= 0x47800000u) return x;  // 2^16, which rounds to infinity, and more
  if (magnitude < 0x38800000u) {           // below 2^-14: to multiples of 2^-24
    const auto fixed = static_cast<uint32_t>(bits_to_float(magnitude) * 0x1p40f);
    return bits_to_float(sign | float_to_bits(static_cast<float>((fixed + random) >> 16) * 0x1p-24f));
  }
  const uint32_t lost = (magnitude & 0x1FFFu) << 3;
  return bits_to_float((bits & ~0x1FFFu) + (lost + random > 0xFFFFu ? 0x2000u : 0u));
}

}  // namespace ferret

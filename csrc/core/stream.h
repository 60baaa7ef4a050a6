// The stream contract, version 1 (docs/streams.md): element (j, k) of a basis is a pure function of (seed, kind, j, k).
// Every element is an *integer* b(j, k) times a constant of the kind, so that sums over elements can be exact.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "philox.h"

namespace ferret {

enum class Basis : int32_t { rademacher = 1, uniform = 2, gaussian = 3 };

inline constexpr uint32_t kContractTag = 0x00010000u;  // high half: contract version 1; low byte: the basis kind

// Elements covered by one Philox call.
FERRET_HD constexpr int elements_per_call(Basis basis) {
  return basis == Basis::rademacher ? 128 : basis == Basis::uniform ? 16 : 4;
}

// An element before the 1/sqrt(d) scaling is b * 2^-basis_exponent.
FERRET_HD constexpr int basis_exponent(Basis basis) {
  return basis == Basis::rademacher ? 0 : basis == Basis::uniform ? 8 : 16;
}

// rho * d: the variance of an element before the 1/sqrt(d) scaling. uniform: (256^2 - 1) / 3 / 256^2.
FERRET_HD constexpr double basis_variance(Basis basis) { return basis == Basis::uniform ? 21845.0 / 65536.0 : 1.0; }

FERRET_HD Words stream_counter(Basis basis, uint64_t t, uint32_t k) {
  return {{static_cast<uint32_t>(t), static_cast<uint32_t>(t >> 32), k, kContractTag | static_cast<uint32_t>(basis)}};
}

// The four words of group t of column k.
FERRET_HD Words stream_words(uint64_t seed, Basis basis, uint64_t t, uint32_t k) {
  return philox4x32_10(stream_counter(basis, t, k), static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}
FERRET_HD Words stream_words(const RoundKeys& keys, Basis basis, uint64_t t, uint32_t k) {
  return philox4x32_10(stream_counter(basis, t, k), keys);
}

// The bits of stochastic rounding: element j has half-word j mod 8 of call j / 8.
inline constexpr Basis kRounding = static_cast<Basis>(0x80);  // no basis, but a stream of its own
inline constexpr int kRoundingElements = 8;

FERRET_HD Words rounding_words(uint64_t seed, uint64_t call) { return stream_words(seed, kRounding, call, 0); }
FERRET_HD uint32_t rounding_bits(const Words& words, int i) {  // by choice, since a GPU has no index into registers
  const uint32_t even = i & 4 ? words.w[2] : words.w[0], odd = i & 4 ? words.w[3] : words.w[1];
  return ((i & 2 ? odd : even) >> (16 * (i & 1))) & 0xFFFFu;
}

FERRET_HD float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FERRET_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FERRET_HD float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

FERRET_HD double fused_multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

FERRET_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

FERRET_HD double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

// Round half to even, as an integer, for |x| <= 2^22: adding 1.5 * 2^23 leaves the integer in the low mantissa bits.
FERRET_HD int32_t round_to_int(float x) { return static_cast<int32_t>(float_to_bits(x + 12582912.0f)) - 0x4B400000; }

// Constants of the Box-Muller transform below; the polynomials are Chebyshev fits of our own (docs/streams.md).
struct BoxMuller {
  // ln(1 + f) = f - f^2/2 + f^3 P(f) for 1 + f in [sqrt(1/2), sqrt(2))
  static constexpr float kLog0 = 0x1.555588p-2f, kLog1 = -0x1.00026ap-2f, kLog2 = 0x1.994ba0p-3f,
                         kLog3 = -0x1.53d25ap-3f, kLog4 = 0x1.2c9296p-3f, kLog5 = -0x1.212536p-3f,
                         kLog6 = 0x1.7bca36p-4f;
  // sin(a) = a + a^3 P(a^2), cos(a) = 1 + a^2 P(a^2) for |a| <= pi/4
  static constexpr float kSin0 = -0x1.555552p-3f, kSin1 = 0x1.110c2ap-7f, kSin2 = -0x1.9aca02p-13f;
  static constexpr float kCos0 = -0x1.fffff4p-2f, kCos1 = 0x1.554a52p-5f, kCos2 = -0x1.661efap-10f;
  static constexpr float kTwoLn2 = 0x1.62e430p+0f;
  static constexpr float kAngle = 0x1.921fb6p-32f;    // pi/4 * 2^-31
  static constexpr uint32_t kSqrtHalf = 0x3F3504F3u;  // bits of sqrt(1/2)
};

struct IntegerPair {
  int32_t b[2];
};

// Two normal deviates in units of 2^-16 from two words; only correctly rounded operations, in this order, so the bits are
// the same on every processor. Largest magnitude 6.56 * 2^16 < 2^19.
FERRET_HD IntegerPair box_muller(uint32_t word0, uint32_t word1) {
  const float x = static_cast<float>(static_cast<int32_t>((word0 >> 1) | 1u));  // u = x * 2^-31 in (0, 1]
  const uint32_t bits = float_to_bits(x);
  const int32_t exponent = static_cast<int32_t>(bits - BoxMuller::kSqrtHalf) >> 23;
  const float f = bits_to_float(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  float p = fused_multiply_add(BoxMuller::kLog6, f, BoxMuller::kLog5);
  p = fused_multiply_add(p, f, BoxMuller::kLog4);
  p = fused_multiply_add(p, f, BoxMuller::kLog3);
  p = fused_multiply_add(p, f, BoxMuller::kLog2);
  p = fused_multiply_add(p, f, BoxMuller::kLog1);
  p = fused_multiply_add(p, f, BoxMuller::kLog0);
  const float log_m = fused_multiply_add(f * f, fused_multiply_add(f, p, -0.5f), f);
  const float radius =
      square_root(fused_multiply_add(static_cast<float>(31 - exponent), BoxMuller::kTwoLn2, -2.0f * log_m));

  const float angle = static_cast<float>(static_cast<int32_t>(word1 << 2)) * BoxMuller::kAngle;
  const float a2 = angle * angle;
  float s = fused_multiply_add(BoxMuller::kSin2, a2, BoxMuller::kSin1);
  s = fused_multiply_add(s, a2, BoxMuller::kSin0);
  s = fused_multiply_add(s * a2, angle, angle);
  float c = fused_multiply_add(BoxMuller::kCos2, a2, BoxMuller::kCos1);
  c = fused_multiply_add(c, a2, BoxMuller::kCos0);
  c = fused_multiply_add(c, a2, 1.0f);

  const int32_t rs = round_to_int(radius * s * 65536.0f);
  const int32_t rc = round_to_int(radius * c * 65536.0f);
  switch (word1 >> 30) {  // quarter turns
    case 0: return {{rc, rs}};
    case 1: return {{-rs, rc}};
    case 2: return {{-rc, -rs}};
    default: return {{rs, -rc}};
  }
}

// The integer of element i (0 <= i < elements_per_call) of a call.
FERRET_HD int32_t basis_integer(Basis basis, const Words& words, int i) {
  if (basis == Basis::rademacher) return 1 - 2 * static_cast<int32_t>((words.w[i / 32] >> (i % 32)) & 1u);
  if (basis == Basis::uniform) return 2 * static_cast<int32_t>((words.w[i / 4] >> (8 * (i % 4))) & 255u) - 255;
  const int pair = i & 2;
  return box_muller(words.w[pair], words.w[pair + 1]).b[i & 1];
}

}  // namespace ferret

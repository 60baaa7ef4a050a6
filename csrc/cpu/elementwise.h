// Loops over elements that the compiler vectorises by itself; compiled once per instruction set, so in no named namespace.
#pragma once

#include <limits>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

FERRET_HD uint32_t checksum_of(uint64_t seed, uint64_t t, uint32_t k) {
  const Words words = stream_words(seed, Basis::rademacher, t, k);
  return words.w[0] ^ words.w[1] ^ words.w[2] ^ words.w[3];
}

#if defined(__AVX2__) && defined(__F16C__)
// Eight elements of float16 as float32 and back. The compiler vectorises the plain loops, but knows no instruction for float16.
struct EightHalves {
  FERRET_HD static __m256 load(const float* x) { return _mm256_loadu_ps(x); }
  FERRET_HD static __m256 load(const float16_t* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  FERRET_HD static __m256 zero() { return _mm256_setzero_ps(); }
  FERRET_HD static __m256 subtract(__m256 a, __m256 b) { return _mm256_sub_ps(a, b); }
  FERRET_HD static __m256 fused(__m256 a, float b, __m256 c) { return _mm256_fmadd_ps(a, _mm256_set1_ps(b), c); }

  FERRET_HD static void store(__m256 x, float* to) { _mm256_storeu_ps(to, x); }
  FERRET_HD static void store(__m256 x, float16_t* to) {  // a NaN has one bit pattern
    const __m128i bits = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    const __m128i nan = _mm_or_si128(_mm_and_si128(bits, _mm_set1_epi16(-0x8000)), _mm_set1_epi16(0x7E00));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m128i mask = _mm_packs_epi32(_mm256_castsi256_si128(is_nan), _mm256_extracti128_si256(is_nan, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_blendv_epi8(bits, nan, mask));
  }
};
#endif

#define FERRET_CALLED __attribute__((noinline))  // inlined with a constant n, GCC warns of loops that never end

#if defined(__AVX512F__) && defined(__AVX512BW__)
// Sixteen elements of 16 bits as float32 and back.
struct SixteenHalves {
  FERRET_HD static __m512 load(const float* x) { return _mm512_loadu_ps(x); }
  FERRET_HD static __m512 load(const float16_t* x) { return _mm512_cvtph_ps(bits(x)); }
  FERRET_HD static __m512 load(const bfloat16_t* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits(x)), 16));
  }
  FERRET_HD static __m512 zero() { return _mm512_setzero_ps(); }
  FERRET_HD static __m512 subtract(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
  FERRET_HD static __m512 fused(__m512 a, float b, __m512 c) { return _mm512_fmadd_ps(a, _mm512_set1_ps(b), c); }

  FERRET_HD static void store(__m512 x, float* to) { _mm512_storeu_ps(to, x); }
  FERRET_HD static void store(__m512 x, float16_t* to) {  // a NaN has one bit pattern
    const __m256i rounded = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    const __m256i nan =
        _mm256_or_si256(_mm256_and_si256(rounded, _mm256_set1_epi16(-0x8000)), _mm256_set1_epi16(0x7E00));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_mask_blend_epi16(is_nan, rounded, nan));
  }
  FERRET_HD static void store(__m512 x, bfloat16_t* to) {
    const __m512i rounded = _mm512_srli_epi32(round_to_high_half(x), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
  }
  // Two vectors at a time: one permutation takes the high halves of both.
  FERRET_HD static void store(__m512 x, __m512 y, bfloat16_t* to) {
    const __m512i odd =
        _mm512_setr_epi32(0x030001, 0x070005, 0x0B0009, 0x0F000D, 0x130011, 0x170015, 0x1B0019, 0x1F001D, 0x230021,
                          0x270025, 0x2B0029, 0x2F002D, 0x330031, 0x370035, 0x3B0039, 0x3F003D);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(round_to_high_half(x), odd, round_to_high_half(y)));
  }

 private:
  // The high half of each lane is x as bfloat16, half to even, a NaN a quiet one.
  FERRET_HD static __m512i round_to_high_half(__m512 x) {
    const __m512i all = _mm512_castps_si512(x), up = _mm512_add_epi32(all, _mm512_set1_epi32(0x7FFF));
    const __mmask16 odd = _mm512_test_epi32_mask(all, _mm512_set1_epi32(0x10000));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
    return _mm512_mask_or_epi32(rounded, is_nan, all, _mm512_set1_epi32(0x400000));
  }
  FERRET_HD static __m256i bits(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
};
#endif

// Each loop does `width` elements of T at a time where it can, and one at a time what is left.
template <class Real, class T>
struct Loop {
  static constexpr int width = 1;
};
#if defined(__AVX512F__) && defined(__AVX512BW__)
template <>
struct Loop<float, bfloat16_t> : SixteenHalves {
  static constexpr int width = 16;
  static constexpr bool pairs = true;  // two vectors are stored together
};
template <>
struct Loop<float, float16_t> : SixteenHalves {
  static constexpr int width = 16;
  static constexpr bool pairs = false;
};
#elif defined(__AVX2__) && defined(__F16C__)
template <>
struct Loop<float, float16_t> : EightHalves {
  static constexpr int width = 8;
  static constexpr bool pairs = false;
};
#endif

template <class Real>
FERRET_CALLED void widen(const void* from, Dtype dtype, int64_t n, Real* to) {
  with_element_type(dtype, [=](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Wide = Loop<Real, T>;
    const T* x = static_cast<const T*>(from);
    int64_t i = 0;
    if constexpr (Wide::width > 1) {
      for (; i + Wide::width <= n; i += Wide::width) Wide::store(Wide::load(x + i), to + i);
    }
    for (; i < n; ++i) to[i] = static_cast<Real>(to_float(x[i]));
  });
}

template <class Real>
FERRET_CALLED void subtract(const void* from, Dtype dtype, int64_t n, Real* inout) {
  with_element_type(dtype, [=](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Wide = Loop<Real, T>;
    const T* x = static_cast<const T*>(from);
    int64_t i = 0;
    if constexpr (Wide::width > 1) {
      for (; i + Wide::width <= n; i += Wide::width)
        Wide::store(Wide::subtract(Wide::load(x + i), Wide::load(inout + i)), inout + i);
    }
    for (; i < n; ++i) inout[i] = static_cast<Real>(to_float(x[i])) - inout[i];
  });
}

// A tile of the run in the working precision, in `buffer` unless it lies in memory so.
template <class Real>
const Real* in_working_precision(const RunProduct<Real>& p, int tile, Real* buffer) {
  const auto at = [=](const void* run) { return static_cast<const char*>(run) + tile * kTile * size_of(p.dtype); };
  if (p.before == nullptr && p.dtype == dtype_of(Real())) return reinterpret_cast<const Real*>(at(p.now));
  widen(at(p.now), p.dtype, kTile, buffer);
  if (p.before != nullptr) subtract(at(p.before), p.dtype, kTile, buffer);
  return buffer;
}

template <class Real>
void accumulate(const Real* sums, int64_t n, Real weight, bool first, Real* total) {
  if (first) {
    for (int64_t i = 0; i < n; ++i) total[i] = fused_multiply_add(sums[i], weight, Real(0));
  } else {
    for (int64_t i = 0; i < n; ++i) total[i] = fused_multiply_add(sums[i], weight, total[i]);
  }
}

template <class Real>
void scale_add(const Real* sums, int64_t n, Real factor, bool overwrite, Dtype dtype, void* param,
               const uint16_t* random) {
  with_element_type(dtype, [=](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using Wide = Loop<Real, T>;
    T* p = static_cast<T*>(param);
    int64_t i = 0;
    if constexpr (sizeof(T) == 2) {
      for (; random != nullptr && i < n; ++i) {
        const Real x = fused_multiply_add(sums[i], factor, overwrite ? Real(0) : static_cast<Real>(to_float(p[i])));
        store_rounded(round_stochastically(static_cast<float>(x), random[i], T()), &p[i]);
      }
    }
    if constexpr (Wide::width > 1) {
      const auto result = [=](int64_t at) {
        return Wide::fused(Wide::load(sums + at), factor, overwrite ? Wide::zero() : Wide::load(p + at));
      };
      if constexpr (Wide::pairs) {
        for (; i + 2 * Wide::width <= n; i += 2 * Wide::width) Wide::store(result(i), result(i + Wide::width), p + i);
      }
      for (; i + Wide::width <= n; i += Wide::width) Wide::store(result(i), p + i);
    }
    if (overwrite) {
      for (; i < n; ++i) store_rounded(fused_multiply_add(sums[i], factor, Real(0)), &p[i]);
    } else {
      for (; i < n; ++i) store_rounded(fused_multiply_add(sums[i], factor, static_cast<Real>(to_float(p[i]))), &p[i]);
    }
  });
}

enum class TileState { zero, finite, not_finite };

template <class Real>
struct TileIntegers {
  alignas(64) int32_t q[Working<Real>::limbs][kTile];
  int32_t total[Working<Real>::limbs];  // the sum of q, below 2^31
  double unit;                          // 2^(n - 22): an element is (q + q' 2^-22) * unit
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
  for (int limb = 0; limb < Working<Real>::limbs; ++limb) {
    tile.total[limb] = 0;
    for (int i = 0; i < kTile; ++i) tile.total[limb] += tile.q[limb][i];
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

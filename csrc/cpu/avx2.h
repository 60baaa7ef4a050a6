// AVX2 with FMA as the vector type of vector.h: 8 lanes of 32 bits.
#pragma once

#include <immintrin.h>

#include "../core/stream.h"

namespace ferret::cpu {
namespace {

struct Avx2 {
  using I = __m256i;
  using F = __m256;
  static constexpr int lanes = 8;

  // The compiler shall not move work on x over this place.
  FERRET_HD static void fence(I& x) { __asm__ volatile("" : "+x"(x)); }
  FERRET_HD static I load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  FERRET_HD static void store(void* p, I x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
  FERRET_HD static I set1(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  FERRET_HD static I iota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  FERRET_HD static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  FERRET_HD static I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  FERRET_HD static I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  FERRET_HD static I bit_or(I a, I b) { return _mm256_or_si256(a, b); }
  FERRET_HD static I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
  FERRET_HD static I bit_xor(I a, I b, I c) { return bit_xor(bit_xor(a, c), b); }
  template <int n>
  FERRET_HD static I shift_right(I a) {
    return _mm256_srli_epi32(a, n);
  }
  template <int n>
  FERRET_HD static I shift_right_signed(I a) {
    return _mm256_srai_epi32(a, n);
  }
  template <int n>
  FERRET_HD static I shift_left(I a) {
    return _mm256_slli_epi32(a, n);
  }

  // Swaps the bits of b under `mask` with the bits of a n places higher.
  template <int n>
  FERRET_HD static void exchange(I& a, I& b, I mask) {
    const I t = bit_and(bit_xor(shift_right<n>(a), b), mask);
    a = bit_xor(a, shift_left<n>(t));
    b = bit_xor(b, t);
  }

  // Lanes of 64 bits: products of the low halves, sums, and the odd 32-bit lanes moved onto the even ones and back.
  FERRET_HD static I multiply_even(I a, I b) { return _mm256_mul_epu32(a, b); }
  FERRET_HD static I multiply_even_signed(I a, I b) { return _mm256_mul_epi32(a, b); }
  FERRET_HD static I add64(I a, I b) { return _mm256_add_epi64(a, b); }
  FERRET_HD static I odd_to_even(I a) { return _mm256_srli_epi64(a, 32); }
  FERRET_HD static I interleave(I even, I odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }

  FERRET_HD static I max_unsigned(I a, I b) { return _mm256_max_epu32(a, b); }
  FERRET_HD static uint32_t reduce_max(I a) {
    uint32_t lane[8], result = 0;
    store(lane, a);
    for (const uint32_t x : lane) result = result < x ? x : result;
    return result;
  }

  FERRET_HD static uint32_t reduce_add(I a) {
    uint32_t lane[8], result = 0;
    store(lane, a);
    for (const uint32_t x : lane) result += x;
    return result;
  }

  // sums[i] = the sum of the lanes of a[i]
  FERRET_HD static void reduce_add4(const I* a, uint32_t* sums) {
    const I x = _mm256_hadd_epi32(_mm256_hadd_epi32(a[0], a[1]), _mm256_hadd_epi32(a[2], a[3]));
    const __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), y);
  }

  static constexpr int dot_columns = 0;
  static constexpr int few_columns = 6;  // up to which adding under masks beats looking up
  // a + b in the lanes whose bit in the part-th byte of the word is set, a elsewhere: the bits go to the signs.
  template <int part>
  FERRET_HD static I add_where(I a, const uint32_t* word, I b) {
    const I bits = _mm256_sllv_epi32(set1(*word), _mm256_sub_epi32(set1(31u - 8 * part), iota()));
    return add(a, bit_and(shift_right_signed<31>(bits), b));
  }

  // 16-bit pairs: sum + a.low * b.low + a.high * b.high.
  FERRET_HD static I add_products(I sum, I a, I b) { return add(sum, _mm256_madd_epi16(a, b)); }

  // Tables of 2^bits subset sums: table[i] = the sum of those of x[0], x[1], .. whose bit (1, 2, ..) is set in i.
  static constexpr int table_bits = 3;  // the width of which look-ups serve most bits an instruction
  template <int bits>
  FERRET_HD static void store_subset_sums(int32_t* table, const int32_t* x) {
    static_assert(bits == 3 || bits == 4);
    const I a = _mm256_and_si256(_mm256_set1_epi32(x[0]), _mm256_setr_epi32(0, -1, 0, -1, 0, -1, 0, -1));
    const I b = _mm256_and_si256(_mm256_set1_epi32(x[1]), _mm256_setr_epi32(0, 0, -1, -1, 0, 0, -1, -1));
    const I c = _mm256_and_si256(_mm256_set1_epi32(x[2]), _mm256_setr_epi32(0, 0, 0, 0, -1, -1, -1, -1));
    const I low = _mm256_add_epi32(_mm256_add_epi32(a, b), c);
    store(table, low);
    if constexpr (bits == 4) store(table + 8, _mm256_add_epi32(low, _mm256_set1_epi32(x[3])));
  }
  // Entry (index mod 2^bits) in every lane. A permutation looks at 3 bits; a fourth chooses between two tables of 8.
  template <int bits>
  FERRET_HD static I look_up(const int32_t* table, I index) {
    const I low = _mm256_permutevar8x32_epi32(load(table), index);
    if constexpr (bits == 3) return low;
    const F high = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(load(table + 8), index));
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(low), high, _mm256_castsi256_ps(shift_left<28>(index))));
  }

  FERRET_HD static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
  // Where x is negative a, else b; a with its sign flipped where x is negative.
  FERRET_HD static F select_negative(I x, F a, F b) { return _mm256_blendv_ps(b, a, as_float(x)); }
  FERRET_HD static F flip_sign(F a, I x) { return as_float(bit_xor(as_int(a), bit_and(x, set1(0x80000000u)))); }
  FERRET_HD static I round(F x) { return _mm256_cvtps_epi32(x); }  // half to even
  FERRET_HD static I as_int(F x) { return _mm256_castps_si256(x); }
  FERRET_HD static F as_float(I x) { return _mm256_castsi256_ps(x); }
  FERRET_HD static F set1(float x) { return _mm256_set1_ps(x); }
  FERRET_HD static F add(F a, F b) { return _mm256_add_ps(a, b); }
  FERRET_HD static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  FERRET_HD static F multiply(F a, F b) { return _mm256_mul_ps(a, b); }
  FERRET_HD static F fused(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  FERRET_HD static F square_root(F x) { return _mm256_sqrt_ps(x); }

  // h = fma(x, scale, h) over 8 lanes, or fma(x, scale, 0), x rounded once to the type of h.
  FERRET_HD static void fold(I x, float scale, bool open, float* h) {
    const F before = open ? _mm256_setzero_ps() : _mm256_loadu_ps(h);
    _mm256_storeu_ps(h, _mm256_fmadd_ps(_mm256_cvtepi32_ps(x), _mm256_set1_ps(scale), before));
  }
  // take(lane, x) with x[i] = from[lanes * i + lane]: halves of rows four apart come together when they are loaded, which leaves 4x4
  // blocks within the halves.
  template <class Take>
  FERRET_HD static void transpose(const float* from, Take take) {
    for (int lane = 0; lane < 8; lane += 4) {
      F x[4];
      for (int i = 0; i < 4; ++i) {
        const float* row = from + 8 * i + lane;
        x[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)), _mm_loadu_ps(row + 8 * 4), 1);
      }
      const F a = _mm256_unpacklo_ps(x[0], x[1]), b = _mm256_unpackhi_ps(x[0], x[1]);
      const F c = _mm256_unpacklo_ps(x[2], x[3]), d = _mm256_unpackhi_ps(x[2], x[3]);
      take(lane, _mm256_shuffle_ps(a, c, 0x44));
      take(lane + 1, _mm256_shuffle_ps(a, c, 0xEE));
      take(lane + 2, _mm256_shuffle_ps(b, d, 0x44));
      take(lane + 3, _mm256_shuffle_ps(b, d, 0xEE));
    }
  }
  FERRET_HD static void store_double(double* to, I x) {
    _mm256_storeu_pd(to, _mm256_cvtepi32_pd(_mm256_castsi256_si128(x)));
    _mm256_storeu_pd(to + 4, _mm256_cvtepi32_pd(_mm256_extracti128_si256(x, 1)));
  }
};

}  // namespace
}  // namespace ferret::cpu

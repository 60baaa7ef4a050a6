// AVX-512 (F, BW, DQ, VL) as the vector type of vector.h: 16 lanes of 32 bits.
#pragma once

#include <immintrin.h>

#include "../core/stream.h"

namespace ferret::cpu {
namespace {

struct Avx512 {
  using I = __m512i;
  using F = __m512;
  static constexpr int lanes = 16;

  // The compiler shall not move work on x over this place.
  FERRET_HD static void fence(I& x) { __asm__ volatile("" : "+v"(x)); }
  FERRET_HD static I load(const void* p) { return _mm512_loadu_si512(p); }
  FERRET_HD static void store(void* p, I x) { _mm512_storeu_si512(p, x); }
  FERRET_HD static I set1(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  FERRET_HD static I iota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  FERRET_HD static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  FERRET_HD static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  FERRET_HD static I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  FERRET_HD static I bit_or(I a, I b) { return _mm512_or_si512(a, b); }
  FERRET_HD static I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
  FERRET_HD static I bit_xor(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  template <int n>
  FERRET_HD static I shift_right(I a) {
    return _mm512_srli_epi32(a, n);
  }
  template <int n>
  FERRET_HD static I shift_right_signed(I a) {
    return _mm512_srai_epi32(a, n);
  }
  template <int n>
  FERRET_HD static I shift_left(I a) {
    return _mm512_slli_epi32(a, n);
  }

  // Swaps the bits of b under `mask` with the bits of a n places higher.
  template <int n>
  FERRET_HD static void exchange(I& a, I& b, I mask) {
    const I up = shift_left<n>(b), down = shift_right<n>(a);
    a = _mm512_ternarylogic_epi32(mask, a, up, 0xCA);
    b = _mm512_ternarylogic_epi32(mask, down, b, 0xCA);
  }

  // Lanes of 64 bits: products of the low halves, sums, and the odd 32-bit lanes moved onto the even ones and back.
  FERRET_HD static I multiply_even(I a, I b) { return _mm512_mul_epu32(a, b); }
  FERRET_HD static I multiply_even_signed(I a, I b) { return _mm512_mul_epi32(a, b); }
  FERRET_HD static I add64(I a, I b) { return _mm512_add_epi64(a, b); }
  FERRET_HD static I odd_to_even(I a) { return _mm512_srli_epi64(a, 32); }
  FERRET_HD static I interleave(I even, I odd) { return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA); }

  FERRET_HD static I max_unsigned(I a, I b) { return _mm512_max_epu32(a, b); }
  FERRET_HD static uint32_t reduce_max(I a) { return _mm512_reduce_max_epu32(a); }
  FERRET_HD static uint32_t reduce_add(I a) { return static_cast<uint32_t>(_mm512_reduce_add_epi32(a)); }

  // Lane i of each quarter = the sum of that quarter of a[i].
  FERRET_HD static I add_within_quarters(const I* a) {
    const I ab = add(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
    const I cd = add(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
    return add(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  }
  // sums[i] = the sum of the lanes of a[i]
  FERRET_HD static void reduce_add4(const I* a, uint32_t* sums) {
    const I x = add_within_quarters(a);
    const __m256i y = _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    const __m128i z = _mm_add_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), z);
  }

  static constexpr int dot_columns = 0;   // up to which dot products of bytes beat looking up
  static constexpr int few_columns = 24;  // up to which adding under masks beats looking up
  // a + b in the lanes whose bit in the part-th half of the word is set, a elsewhere.
  template <int part>
  FERRET_HD static I add_where(I a, const uint32_t* word, I b) {
    uint16_t bits[2];
    memcpy(bits, word, sizeof bits);
    return _mm512_mask_add_epi32(a, _cvtu32_mask16(bits[part]), a, b);
  }

  // 16-bit pairs: sum + a.low * b.low + a.high * b.high.
  FERRET_HD static I add_products(I sum, I a, I b) { return add(sum, _mm512_madd_epi16(a, b)); }

  // Tables of 2^bits subset sums: table[i] = the sum of those of x[0], x[1], .. whose bit (1, 2, ..) is set in i.
  static constexpr int table_bits = 4;  // the width of which look-ups serve most bits an instruction
  template <int bits>
  FERRET_HD static void store_subset_sums(int32_t* table, const int32_t* x) {
    static_assert(bits == 4);
    I sums = _mm512_maskz_set1_epi32(0xAAAA, x[0]);
    sums = _mm512_mask_add_epi32(sums, 0xCCCC, sums, _mm512_set1_epi32(x[1]));
    sums = _mm512_mask_add_epi32(sums, 0xF0F0, sums, _mm512_set1_epi32(x[2]));
    sums = _mm512_mask_add_epi32(sums, 0xFF00, sums, _mm512_set1_epi32(x[3]));
    _mm512_storeu_si512(table, sums);
  }
  // Entry (index mod 2^bits) in every lane.
  template <int bits>
  FERRET_HD static I look_up(const int32_t* table, I index) {
    return _mm512_permutexvar_epi32(index, load(table));
  }

  FERRET_HD static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  // Where x is negative a, else b; a with its sign flipped where x is negative.
  FERRET_HD static F select_negative(I x, F a, F b) { return _mm512_mask_blend_ps(_mm512_movepi32_mask(x), b, a); }
  FERRET_HD static F flip_sign(F a, I x) {
    return as_float(_mm512_ternarylogic_epi32(as_int(a), x, set1(0x80000000u), 0x78));  // a ^ (x & sign)
  }
  FERRET_HD static I round(F x) { return _mm512_cvtps_epi32(x); }  // half to even
  FERRET_HD static I as_int(F x) { return _mm512_castps_si512(x); }
  FERRET_HD static F as_float(I x) { return _mm512_castsi512_ps(x); }
  FERRET_HD static F set1(float x) { return _mm512_set1_ps(x); }
  FERRET_HD static F add(F a, F b) { return _mm512_add_ps(a, b); }
  FERRET_HD static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  FERRET_HD static F multiply(F a, F b) { return _mm512_mul_ps(a, b); }
  FERRET_HD static F fused(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  FERRET_HD static F square_root(F x) { return _mm512_sqrt_ps(x); }

  // h = fma(x, scale, h) over 16 lanes, or fma(x, scale, 0), x rounded once to the type of h.
  FERRET_HD static void fold(I x, float scale, bool open, float* h) {
    const F before = open ? _mm512_setzero_ps() : _mm512_loadu_ps(h);
    _mm512_storeu_ps(h, _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), _mm512_set1_ps(scale), before));
  }
  // take(lane, x) with x[i] = from[lanes * i + lane]: quarters of four rows apart come together when they are loaded, which leaves
  // 4x4 blocks within the quarters.
  template <class Take>
  FERRET_HD static void transpose(const float* from, Take take) {
    for (int lane = 0; lane < 16; lane += 4) {
      F x[4];
      for (int i = 0; i < 4; ++i) {
        const float* row = from + 16 * i + lane;
        x[i] = _mm512_castps128_ps512(_mm_loadu_ps(row));
        x[i] = _mm512_insertf32x4(x[i], _mm_loadu_ps(row + 16 * 4), 1);
        x[i] = _mm512_insertf32x4(x[i], _mm_loadu_ps(row + 16 * 8), 2);
        x[i] = _mm512_insertf32x4(x[i], _mm_loadu_ps(row + 16 * 12), 3);
      }
      const F a = _mm512_unpacklo_ps(x[0], x[1]), b = _mm512_unpackhi_ps(x[0], x[1]);
      const F c = _mm512_unpacklo_ps(x[2], x[3]), d = _mm512_unpackhi_ps(x[2], x[3]);
      take(lane, _mm512_shuffle_ps(a, c, 0x44));
      take(lane + 1, _mm512_shuffle_ps(a, c, 0xEE));
      take(lane + 2, _mm512_shuffle_ps(b, d, 0x44));
      take(lane + 3, _mm512_shuffle_ps(b, d, 0xEE));
    }
  }
  FERRET_HD static void store_double(double* to, I x) {
    _mm512_storeu_pd(to, _mm512_cvtepi32_pd(_mm512_castsi512_si256(x)));
    _mm512_storeu_pd(to + 8, _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(x, 1)));
  }
};

}  // namespace
}  // namespace ferret::cpu

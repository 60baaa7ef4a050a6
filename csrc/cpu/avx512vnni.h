// AVX-512 with VNNI, GFNI and VPOPCNTDQ: sums of products of bytes, and bits as bytes, for vector_dots.h.
#pragma once

#include "../core/half.h"
#include "avx512.h"

namespace ferret::cpu {
namespace {

struct Avx512Vnni : Avx512 {
  static constexpr int dot_columns = 48;

  FERRET_HD static F load_floats(const float* x) { return _mm512_loadu_ps(x); }
  FERRET_HD static F load_floats(const bfloat16_t* x) {
    return as_float(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))), 16));
  }
  FERRET_HD static F load_floats(const float16_t* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  // The largest magnitude so far and in 64 bit patterns of 16 bits, by lanes of 16 bits, and that of all lanes.
  FERRET_HD static I largest_of_64(const void* x, I so_far) {
    const auto bits = [x](int i) {
      return _mm512_and_si512(load(static_cast<const char*>(x) + 64 * i), _mm512_set1_epi16(0x7FFF));
    };
    return _mm512_max_epu16(so_far, _mm512_max_epu16(bits(0), bits(1)));
  }
  FERRET_HD static uint16_t reduce_max16(I largest) {
    const I low = _mm512_and_si512(largest, _mm512_set1_epi32(0xFFFF)), high = _mm512_srli_epi32(largest, 16);
    return static_cast<uint16_t>(reduce_max(max_unsigned(low, high)));
  }

  FERRET_HD static I count_bits(I x) { return _mm512_popcnt_epi32(x); }
  FERRET_HD static I add_products(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }
  // sum + the four products of each lane's bytes.
  FERRET_HD static I dot(I sum, I unsigned_bytes, I signed_bytes) {
    return _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
  }
  // sums[lane] += lane of quarter i * unit[i], quarter by quarter, for `count` lanes and no more than there are.
  FERRET_HD static void add_quarters(I x, const double (&unit)[4], double* sums, int count) {
    const __m512d low = _mm512_cvtepi32_pd(_mm512_castsi512_si256(x)),
                  high = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(x, 1));
    const __m256d quarter[4] = {_mm512_castpd512_pd256(low), _mm512_extractf64x4_pd(low, 1),
                                _mm512_castpd512_pd256(high), _mm512_extractf64x4_pd(high, 1)};
    const auto lanes = static_cast<__mmask8>(count < 4 ? (1 << count) - 1 : 15);
    __m256d sum = _mm256_maskz_loadu_pd(lanes, sums);
    for (int i = 0; i < 4; ++i) sum = _mm256_add_pd(sum, _mm256_mul_pd(quarter[i], _mm256_set1_pd(unit[i])));
    _mm256_mask_storeu_pd(sums, lanes, sum);
  }

  // Quarter i of x holds eight pieces of 16 bits of tile i. Bit 7 - n of byte j in lane i of quarter q of the result is bit 4 q + j of
  // piece n.
  FERRET_HD static I transpose_pieces(I x) {
    const I low_bytes_first =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const I byte_i_asks_for_bit_i = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201u));
    return transpose_lanes(
        _mm512_gf2p8affine_epi64_epi8(byte_i_asks_for_bit_i, _mm512_shuffle_epi8(x, low_bytes_first), 0));
  }
  // Lane i of quarter j = lane j of quarter i.
  FERRET_HD static I transpose_lanes(I x) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
  }
  // The bits of piece n as bytes 1 (not set) and -1: the lowest bit of a byte is the constant's, all others are the piece's.
  template <int n>
  FERRET_HD static I signs_of_piece(I transposed) {
    constexpr uint64_t bit = 0x80u >> n;
    return _mm512_gf2p8affine_epi64_epi8(transposed, _mm512_set1_epi64(static_cast<int64_t>(bit * 0x0001010101010101u)),
                                         1);
  }

  // Lane i of each quarter of digits[m] = byte m of the four lanes in that quarter of x[i]. Zen 5 unpacks on any of its four ports, while
  // shuffles meet with products and signs.
  FERRET_HD static void take_digits(const I (&x)[4], I (&digits)[3]) {
    const I sorted = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    I a[4];
    for (int i = 0; i < 4; ++i) a[i] = _mm512_shuffle_epi8(x[i], sorted);
    const I low01 = _mm512_unpacklo_epi32(a[0], a[1]), low23 = _mm512_unpacklo_epi32(a[2], a[3]);
    const I high01 = _mm512_unpackhi_epi32(a[0], a[1]), high23 = _mm512_unpackhi_epi32(a[2], a[3]);
    digits[0] = _mm512_unpacklo_epi64(low01, low23);
    digits[1] = _mm512_unpackhi_epi64(low01, low23);
    digits[2] = _mm512_unpacklo_epi64(high01, high23);
  }
  // Lane j of quarter i = the sum of lane i of all quarters of a[j].
  FERRET_HD static I sum_over_quarters(const I (&a)[4]) {
    const auto half = [](I a, I b) { return add(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD)); };
    return transpose_lanes(half(half(a[0], a[1]), half(a[2], a[3])));
  }
};

}  // namespace
}  // namespace ferret::cpu

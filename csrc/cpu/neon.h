// NEON as the vector type of vector.h: 4 lanes of 32 bits.
//
// Two things differ from there. Multiplications with 64-bit results take the low or the high two lanes, not the even or the odd
// ones. And look-ups give bytes, so a table of 16 sums is kept as planes, one for each byte of the sums: one instruction looks up
// 16 indices in a plane. What is looked up is added in 16 bits, plane by plane, and the planes are joined at the end.
#pragma once

#include <arm_neon.h>

#include "vector.h"

namespace ferret::cpu {
namespace {

struct Neon {
  using I = uint32x4_t;
  using F = float32x4_t;
  static constexpr int lanes = 4;

  FERRET_HD static I load(const void* p) { return vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
  FERRET_HD static void store(void* p, I x) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_u32(x)); }
  FERRET_HD static I set1(uint32_t x) { return vdupq_n_u32(x); }
  FERRET_HD static I iota() {
    static constexpr uint32_t numbers[] = {0, 1, 2, 3};
    return load(numbers);
  }
  FERRET_HD static I add(I a, I b) { return vaddq_u32(a, b); }
  FERRET_HD static I sub(I a, I b) { return vsubq_u32(a, b); }
  FERRET_HD static I bit_and(I a, I b) { return vandq_u32(a, b); }
  FERRET_HD static I bit_or(I a, I b) { return vorrq_u32(a, b); }
  FERRET_HD static I bit_xor(I a, I b) { return veorq_u32(a, b); }
  FERRET_HD static I bit_xor(I a, I b, I c) { return bit_xor(bit_xor(a, c), b); }
  template <int n>
  FERRET_HD static I shift_right(I a) {
    if constexpr (n == 0) {
      return a;
    } else {
      return vshrq_n_u32(a, n);
    }
  }
  template <int n>
  FERRET_HD static I shift_right_signed(I a) {
    return vreinterpretq_u32_s32(vshrq_n_s32(vreinterpretq_s32_u32(a), n));
  }
  template <int n>
  FERRET_HD static I shift_left(I a) {
    return vshlq_n_u32(a, n);
  }

  // Swaps the bits of b under `mask` with the bits of a n places higher.
  template <int n>
  FERRET_HD static void exchange(I& a, I& b, I mask) {
    const I up = shift_left<n>(b), down = shift_right<n>(a);
    a = vbslq_u32(mask, a, up);
    b = vbslq_u32(mask, down, b);
  }

  FERRET_HD static I max_unsigned(I a, I b) { return vmaxq_u32(a, b); }
  FERRET_HD static uint32_t reduce_max(I a) { return vmaxvq_u32(a); }
  FERRET_HD static uint32_t reduce_add(I a) { return vaddvq_u32(a); }

  static constexpr int dot_columns = 0;
  static constexpr int few_columns = 0;  // not timed

  // 16-bit pairs: sum + a.low * b.low + a.high * b.high.
  FERRET_HD static I add_products(I sum, I a, I b) {
    const int16x8_t x = vreinterpretq_s16_u32(a), y = vreinterpretq_s16_u32(b);
    return add(sum,
               vreinterpretq_u32_s32(vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y))));
  }

  // first + the 16 subset sums of the lanes of x: byte i of plane p is byte p of sum i.
  struct Planes {
    uint8x16_t plane[4];
  };
  FERRET_HD static Planes subset_sums(I x, I first) {
    static constexpr uint32_t masks[2][4] = {{0, ~0u, 0, ~0u}, {0, 0, ~0u, ~0u}};
    const I a = bit_and(vdupq_laneq_u32(x, 0), load(masks[0])), b = bit_and(vdupq_laneq_u32(x, 1), load(masks[1]));
    const I c = vdupq_laneq_u32(x, 2), d = vdupq_laneq_u32(x, 3);
    const I sums0 = add(first, add(a, b)), sums4 = add(sums0, c), sums8 = add(sums0, d), sums12 = add(sums4, d);
    const auto even = [](I s, I t) { return vuzp1q_u16(vreinterpretq_u16_u32(s), vreinterpretq_u16_u32(t)); };
    const auto odd = [](I s, I t) { return vuzp2q_u16(vreinterpretq_u16_u32(s), vreinterpretq_u16_u32(t)); };
    const uint8x16_t low0 = vreinterpretq_u8_u16(even(sums0, sums4)), low8 = vreinterpretq_u8_u16(even(sums8, sums12));
    const uint8x16_t high0 = vreinterpretq_u8_u16(odd(sums0, sums4)), high8 = vreinterpretq_u8_u16(odd(sums8, sums12));
    return {{vuzp1q_u8(low0, low8), vuzp2q_u8(low0, low8), vuzp1q_u8(high0, high8), vuzp2q_u8(high0, high8)}};
  }
  // The planes in the place of 16 sums.
  template <int bits>
  FERRET_HD static void store_subset_sums(int32_t* table, const int32_t* x) {
    static_assert(bits == 4);
    const Planes sums = subset_sums(load(x), set1(0u));
    for (int p = 0; p < 4; ++p) vst1q_u8(reinterpret_cast<uint8_t*>(table) + 16 * p, sums.plane[p]);
  }
  FERRET_HD static I join_planes(uint16x4_t p0, uint16x4_t p1, uint16x4_t p2, uint16x4_t p3) {
    const I low = vmlal_n_u16(vmovl_u16(p0), p1, 256), high = vmlal_n_u16(vmovl_u16(p2), p3, 256);
    return add(low, shift_left<16>(high));
  }

  FERRET_HD static F to_float(I x) { return vcvtq_f32_s32(vreinterpretq_s32_u32(x)); }
  // Where x is negative a, else b; a with its sign flipped where x is negative.
  FERRET_HD static F select_negative(I x, F a, F b) { return vbslq_f32(shift_right_signed<31>(x), a, b); }
  FERRET_HD static F flip_sign(F a, I x) { return as_float(bit_xor(as_int(a), bit_and(x, set1(0x80000000u)))); }
  FERRET_HD static I round(F x) { return vreinterpretq_u32_s32(vcvtnq_s32_f32(x)); }  // half to even
  FERRET_HD static I as_int(F x) { return vreinterpretq_u32_f32(x); }
  FERRET_HD static F as_float(I x) { return vreinterpretq_f32_u32(x); }
  FERRET_HD static F set1(float x) { return vdupq_n_f32(x); }
  FERRET_HD static F add(F a, F b) { return vaddq_f32(a, b); }
  FERRET_HD static F sub(F a, F b) { return vsubq_f32(a, b); }
  FERRET_HD static F multiply(F a, F b) { return vmulq_f32(a, b); }
  FERRET_HD static F fused(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  FERRET_HD static F square_root(F x) { return vsqrtq_f32(x); }

  // h = fma(x, scale, h) over 4 lanes, or fma(x, scale, 0), x rounded once to the type of h.
  FERRET_HD static void fold(I x, float scale, bool open, float* h) {
    vst1q_f32(h, fused(to_float(x), set1(scale), open ? set1(0.0f) : vld1q_f32(h)));
  }
  // take(lane, x) with x[i] = from[lanes * i + lane].
  template <class Take>
  FERRET_HD static void transpose(const float* from, Take take) {
    const float32x4x4_t x = vld4q_f32(from);
    for (int lane = 0; lane < 4; ++lane) take(lane, x.val[lane]);
  }
  FERRET_HD static void store_double(double* to, I x) {
    const int32x4_t s = vreinterpretq_s32_u32(x);
    vst1q_f64(to, vcvtq_f64_s64(vmovl_s32(vget_low_s32(s))));
    vst1q_f64(to + 2, vcvtq_f64_s64(vmovl_high_s32(s)));
  }
};

// Words stay whole; only a product is in two halves.
template <>
struct Halves<Neon> {
  Neon::I words;

  struct Product {
    uint32x4_t first, second;  // 64 bits each of lanes 0 and 1, of lanes 2 and 3
    FERRET_HD Halves low() const { return {vuzp1q_u32(first, second)}; }
    FERRET_HD Halves high() const { return {vuzp2q_u32(first, second)}; }
  };

  FERRET_HD static Halves split(Neon::I x) { return {x}; }
  FERRET_HD Neon::I join() const { return words; }
  FERRET_HD Product times(uint32_t factor) const {
    const Neon::I f = Neon::set1(factor);
    return {vreinterpretq_u32_u64(vmull_u32(vget_low_u32(words), vget_low_u32(f))),
            vreinterpretq_u32_u64(vmull_high_u32(words, f))};
  }
  FERRET_HD Halves operator^(Halves other) const { return {Neon::bit_xor(words, other.words)}; }
  FERRET_HD Halves operator^(uint32_t key) const { return {Neon::bit_xor(words, Neon::set1(key))}; }
  FERRET_HD Halves operator^(One other) const { return *this ^ static_cast<uint32_t>(other.word); }
  FERRET_HD friend Halves operator^(One one, Halves other) { return other ^ one; }
  FERRET_HD Halves bit_xor(Halves other, uint32_t key) const {
    return {Neon::bit_xor(words, other.words, Neon::set1(key))};
  }
};

template <>
struct WideSum<Neon> {
  int64x2_t first, second;

  FERRET_HD void clear() { first = second = vdupq_n_s64(0); }
  FERRET_HD void add_product(Neon::I b, Neon::I factor) {
    const int32x4_t x = vreinterpretq_s32_u32(b), y = vreinterpretq_s32_u32(factor);
    first = vmlal_s32(first, vget_low_s32(x), vget_low_s32(y));
    second = vmlal_high_s32(second, x, y);
  }
  FERRET_HD void store(double* to) const {
    vst1q_f64(to, vcvtq_f64_s64(first));
    vst1q_f64(to + 2, vcvtq_f64_s64(second));
  }
};

// ---- project ----

// What is looked up for 16 elements. The low nibbles of the two bytes of a half word pick from two tables, the high nibbles from
// two others. A table's sums start at that of its negative elements' magnitudes: then they take 24 bits, and sum q b is the sum
// of all magnitudes minus twice what is looked up.
struct HalfWordTables {
  uint8_t planes[2][3][2][16];  // [low nibbles, high nibbles][plane][byte of the half word][index]
  static_assert(4 * ((1 << kDeltaBits) - 1) < 1 << 24, "three planes hold the sum of four magnitudes");

  // Returns magnitudes + |q|, lane by lane.
  FERRET_HD int32x4_t fill(const int32_t* q, int32x4_t magnitudes) {
    const int32x4_t zero = vdupq_n_s32(0);
    int32x4_t x[4], negative[4];
    for (int n = 0; n < 4; ++n) {
      x[n] = vld1q_s32(q + 4 * n);
      negative[n] = vmaxq_s32(vnegq_s32(x[n]), zero);
      magnitudes = vabaq_s32(magnitudes, x[n], zero);
    }
    const int32x4_t first = vpaddq_s32(vpaddq_s32(negative[0], negative[1]), vpaddq_s32(negative[2], negative[3]));
    unroll(Count<4>(), [&](auto n) FERRET_INLINE {
      const auto sums =
          Neon::subset_sums(vreinterpretq_u32_s32(x[n]), vreinterpretq_u32_s32(vdupq_laneq_s32(first, n)));
      for (int p = 0; p < 3; ++p) vst1q_u8(planes[n % 2][p][n / 2], sums.plane[p]);
    });
    return magnitudes;
  }
};

// What eight columns look up, two words of 4 lanes side by side so that a vector holds 16 bits of each.
struct EightColumns {
  uint16x8_t sums[3] = {vdupq_n_u16(0), vdupq_n_u16(0), vdupq_n_u16(0)};  // [plane]
  static_assert(kTile / 4 * 255 < 1 << 16, "16 bits hold the bytes of a tile's look-ups");

  FERRET_HD void add(const HalfWordTables (&tables)[2], Neon::I left, Neon::I right) {
    const uint16x8_t a = vreinterpretq_u16_u32(left), b = vreinterpretq_u16_u32(right);
    add(tables[0], vreinterpretq_u8_u16(vuzp1q_u16(a, b)));
    add(tables[1], vreinterpretq_u8_u16(vuzp2q_u16(a, b)));
  }
  FERRET_HD void store(int32_t magnitudes, double* to) const {
    const uint16x4_t none = vdup_n_u16(0);
    const Neon::I set[2] = {
        Neon::join_planes(vget_low_u16(sums[0]), vget_low_u16(sums[1]), vget_low_u16(sums[2]), none),
        Neon::join_planes(vget_high_u16(sums[0]), vget_high_u16(sums[1]), vget_high_u16(sums[2]), none)};
    const Neon::I all = Neon::set1(static_cast<uint32_t>(magnitudes));
    for (int i = 0; i < 2; ++i) Neon::store_double(to + 4 * i, Neon::sub(all, Neon::add(set[i], set[i])));
  }

 private:
  FERRET_HD void add(const HalfWordTables& tables, uint8x16_t bytes) {
    const uint8x16_t second_table = vreinterpretq_u8_u16(vdupq_n_u16(0x1000));  // 16 more for the second byte
    look_up(tables.planes[0], vbslq_u8(vdupq_n_u8(15), bytes, second_table));
    look_up(tables.planes[1], vsriq_n_u8(second_table, bytes, 4));
  }
  FERRET_HD void look_up(const uint8_t (&planes)[3][2][16], uint8x16_t index) {
    for (int p = 0; p < 3; ++p) sums[p] = vpadalq_u8(sums[p], vqtbl2q_u8(vld1q_u8_x2(planes[p][0]), index));
  }
};

template <>
void rademacher_tile_sums<Neon>(const int32_t* q, int32_t, uint64_t tile, int begin, int end, Stream stream,
                                uint32_t first, int count, double* values) {
  HalfWordTables tables[kWordsPerTile][2];
  const int first_call = begin / 128, last_call = (end + 127) / 128;
  int32x4_t magnitudes = vdupq_n_s32(0);
  for (int word = first_call * 4; word < last_call * 4; ++word) {
    for (int half = 0; half < 2; ++half) magnitudes = tables[word][half].fill(q + 32 * word + 16 * half, magnitudes);
  }
  const PhiloxKeys keys(stream.seed);
  const auto calls = calls_of_tile<128>(keys, stream.basis, tile);
  for (int i = 0; i < count; i += 8) {
    const uint32_t k = first + static_cast<uint32_t>(i);
    const auto left = columns_of<Neon>(keys, tile * (kTile / 128), k);
    const auto right = columns_of<Neon>(keys, tile * (kTile / 128), k + 4);
    EightColumns columns;
    for (int call = first_call; call < last_call; ++call) {
      Neon::I w[2][4];
      philox_pair<Neon>(keys, calls[call], left, calls[call], right, w);
      for (int word = 0; word < 4; ++word) columns.add(tables[4 * call + word], w[0][word], w[1][word]);
    }
    columns.store(vaddvq_s32(magnitudes), values + i);
  }
}

// ---- reconstruct ----

// A row's 32 nibbles pick from one table.
template <>
struct NibbleSums<Neon> {
  uint16x8_t sums[4][4];  // [plane][low nibbles of bytes 0 to 7, of bytes 8 to 15, high nibbles of both]
  uint32_t start;
  static_assert(kGroup / 4 * 255 < 1 << 16, "16 bits hold the bytes of a group's look-ups");

  FERRET_HD explicit NibbleSums(uint32_t s) : start(s) {
    for (auto& plane : sums) {
      for (auto& sum : plane) sum = vdupq_n_u16(0);
    }
  }
  FERRET_HD void add(const int32_t* table, Neon::I row) {
    const uint8x16_t bytes = vreinterpretq_u8_u32(row);
    const uint8x16_t low = vandq_u8(bytes, vdupq_n_u8(15)), high = vshrq_n_u8(bytes, 4);
    unroll(Count<4>(), [&](auto p) FERRET_INLINE {
      const uint8x16_t plane = vld1q_u8(reinterpret_cast<const uint8_t*>(table) + 16 * p);
      const uint8x16_t of_low = vqtbl1q_u8(plane, low), of_high = vqtbl1q_u8(plane, high);
      sums[p][0] = vaddw_u8(sums[p][0], vget_low_u8(of_low));
      sums[p][1] = vaddw_high_u8(sums[p][1], of_low);
      sums[p][2] = vaddw_u8(sums[p][2], vget_low_u8(of_high));
      sums[p][3] = vaddw_high_u8(sums[p][3], of_high);
    });
  }
  FERRET_HD void get(Neon::I (&to)[8]) const {
    uint32_t joined[2][16];  // [low nibbles, high nibbles][byte of the row]
    unroll(Count<4>(), [&](auto i) FERRET_INLINE {
      uint32_t* bytes = &joined[i / 2][i % 2 * 8];
      vst1q_u32(bytes, Neon::join_planes(vget_low_u16(sums[0][i]), vget_low_u16(sums[1][i]), vget_low_u16(sums[2][i]),
                                         vget_low_u16(sums[3][i])));
      vst1q_u32(bytes + 4, Neon::join_planes(vget_high_u16(sums[0][i]), vget_high_u16(sums[1][i]),
                                             vget_high_u16(sums[2][i]), vget_high_u16(sums[3][i])));
    });
    for (int high = 0; high < 2; ++high) {
      const uint32x4x4_t x = vld4q_u32(joined[high]);  // [byte of a lane]
      for (int byte = 0; byte < 4; ++byte) to[2 * byte + high] = Neon::add(x.val[byte], Neon::set1(start));
    }
  }
};

}  // namespace
}  // namespace ferret::cpu

// The stream over the lanes of a vector type V (avx2.h, avx512.h): Philox words of many columns or calls, normal deviates.
#pragma once

#include "../core/job.h"

namespace ferret::cpu {
namespace {

// 32-bit lanes, the even ones and the odd ones apart, each in the low half of a 64-bit lane. The high halves hold garbage that a
// multiplication ignores, which saves taking products apart.
template <class V>
struct Halves {
  typename V::I even, odd;

  FERRET_HD static Halves split(typename V::I x) { return {x, V::odd_to_even(x)}; }
  FERRET_HD static Halves all(uint32_t x) { return {V::set1(x), V::set1(x)}; }
  FERRET_HD typename V::I join() const { return V::interleave(even, odd); }
  FERRET_HD Halves high() const { return {V::odd_to_even(even), V::odd_to_even(odd)}; }
  FERRET_HD Halves times(uint32_t factor) const {
    const typename V::I f = V::set1(factor);
    return {V::multiply_even(even, f), V::multiply_even(odd, f)};
  }
  FERRET_HD Halves bit_xor(Halves other, uint32_t key) const {
    const typename V::I k = V::set1(key);
    return {V::bit_xor(even, other.even, k), V::bit_xor(odd, other.odd, k)};
  }
  FERRET_HD Halves bit_xor(uint32_t key) const {
    const typename V::I k = V::set1(key);
    return {V::bit_xor(even, k), V::bit_xor(odd, k)};
  }
};

struct PhiloxKeys {
  uint32_t key0[kPhiloxRounds], key1[kPhiloxRounds];

  FERRET_HD explicit PhiloxKeys(uint64_t seed) {
    for (uint32_t r = 0; r < kPhiloxRounds; ++r) {
      key0[r] = static_cast<uint32_t>(seed) + r * kPhiloxWeyl0;
      key1[r] = static_cast<uint32_t>(seed >> 32) + r * kPhiloxWeyl1;
    }
  }
};

FERRET_HD uint32_t high_word(uint64_t product) { return static_cast<uint32_t>(product >> 32); }

// What is left after the first two rounds.
template <class V>
FERRET_HD void philox_rounds(Halves<V> x0, Halves<V> x1, Halves<V> x2, Halves<V> x3, const PhiloxKeys& keys,
                             typename V::I w[4]) {
  for (int r = 2; r < kPhiloxRounds; ++r) {
    const Halves<V> p0 = x0.times(kPhiloxMultiplier0), p1 = x2.times(kPhiloxMultiplier1);
    x0 = p1.high().bit_xor(x1, keys.key0[r]);
    x2 = p0.high().bit_xor(x3, keys.key1[r]);
    x1 = p1;
    x3 = p0;
  }
  w[0] = x0.join();
  w[1] = x1.join();
  w[2] = x2.join();
  w[3] = x3.join();
}

// Words of the columns k, k + 1, .. in the lanes, for one call after the other. Of the first two rounds, what depends on k is
// done once here, what depends on the call is done on scalars, and only two exclusive ors a call meet both.
template <class V>
class ColumnWords {
 public:
  FERRET_HD ColumnWords(Stream stream, uint64_t t, uint32_t k)
      : keys_(stream.seed),
        tag_(kContractTag | static_cast<uint32_t>(stream.basis)),
        high_(static_cast<uint32_t>(t >> 32)) {
    const auto p1 = Halves<V>::split(V::add(V::set1(k), V::iota())).times(kPhiloxMultiplier1);
    const auto p0 = p1.high().bit_xor(high_ ^ keys_.key0[0]).times(kPhiloxMultiplier0);
    x1_ = p1;
    x2_ = p0.high();
    x3_ = p0;
  }
  // t must have the high half of the constructor's.
  FERRET_HD void call(uint64_t t, typename V::I w[4]) const {
    const uint64_t p0 = uint64_t{kPhiloxMultiplier0} * static_cast<uint32_t>(t);
    const uint64_t p1 = uint64_t{kPhiloxMultiplier1} * (high_word(p0) ^ tag_ ^ keys_.key1[0]);
    philox_rounds<V>(x1_.bit_xor(high_word(p1) ^ keys_.key0[1]), Halves<V>::all(static_cast<uint32_t>(p1)),
                     x2_.bit_xor(static_cast<uint32_t>(p0) ^ keys_.key1[1]), x3_, keys_, w);
  }

 private:
  PhiloxKeys keys_;
  uint32_t tag_, high_;
  Halves<V> x1_, x2_, x3_;
};

// Words of the calls t, t + 1, .. in the lanes, t a multiple of their number, for one column after the other; the first two
// rounds as above with calls and columns exchanged.
template <class V>
class CallWords {
 public:
  FERRET_HD CallWords(Stream stream, uint64_t t) : keys_(stream.seed), high_(static_cast<uint32_t>(t >> 32)) {
    const uint32_t tag = kContractTag | static_cast<uint32_t>(stream.basis);
    const auto p0 = Halves<V>::split(V::add(V::set1(static_cast<uint32_t>(t)), V::iota())).times(kPhiloxMultiplier0);
    const auto p1 = p0.high().bit_xor(tag ^ keys_.key1[0]).times(kPhiloxMultiplier1);
    x0_ = p1.high();
    x1_ = p1;
    x3_ = p0;
  }
  FERRET_HD void column(uint32_t k, typename V::I w[4]) const {
    const uint64_t p1 = uint64_t{kPhiloxMultiplier1} * k;
    const uint64_t p0 = uint64_t{kPhiloxMultiplier0} * (high_word(p1) ^ high_ ^ keys_.key0[0]);
    philox_rounds<V>(x0_.bit_xor(static_cast<uint32_t>(p1) ^ keys_.key0[1]), x1_,
                     x3_.bit_xor(high_word(p0) ^ keys_.key1[1]), Halves<V>::all(static_cast<uint32_t>(p0)), keys_, w);
  }

 private:
  PhiloxKeys keys_;
  uint32_t high_;
  Halves<V> x0_, x1_, x3_;
};

// box_muller of core/stream.h over the lanes, operation by operation.
template <class V>
FERRET_HD void box_muller(typename V::I word0, typename V::I word1, typename V::I& first, typename V::I& second) {
  using I = typename V::I;
  using F = typename V::F;
  const F x = V::to_float(V::bit_or(V::template shift_right<1>(word0), V::set1(1u)));
  const I bits = V::as_int(x);
  const I exponent = V::template shift_right_signed<23>(V::sub(bits, V::set1(BoxMuller::kSqrtHalf)));
  const F f = V::sub(V::as_float(V::sub(bits, V::template shift_left<23>(exponent))), V::set1(1.0f));
  F p = V::fused(V::set1(BoxMuller::kLog6), f, V::set1(BoxMuller::kLog5));
  p = V::fused(p, f, V::set1(BoxMuller::kLog4));
  p = V::fused(p, f, V::set1(BoxMuller::kLog3));
  p = V::fused(p, f, V::set1(BoxMuller::kLog2));
  p = V::fused(p, f, V::set1(BoxMuller::kLog1));
  p = V::fused(p, f, V::set1(BoxMuller::kLog0));
  const F log_m = V::fused(V::multiply(f, f), V::fused(f, p, V::set1(-0.5f)), f);
  const F radius = V::square_root(V::fused(V::to_float(V::sub(V::set1(31u), exponent)), V::set1(BoxMuller::kTwoLn2),
                                           V::multiply(V::set1(-2.0f), log_m)));

  const F angle = V::multiply(V::to_float(V::template shift_left<2>(word1)), V::set1(BoxMuller::kAngle));
  const F a2 = V::multiply(angle, angle);
  F s = V::fused(V::set1(BoxMuller::kSin2), a2, V::set1(BoxMuller::kSin1));
  s = V::fused(s, a2, V::set1(BoxMuller::kSin0));
  s = V::fused(V::multiply(s, a2), angle, angle);
  F c = V::fused(V::set1(BoxMuller::kCos2), a2, V::set1(BoxMuller::kCos1));
  c = V::fused(c, a2, V::set1(BoxMuller::kCos0));
  c = V::fused(c, a2, V::set1(1.0f));

  const auto rounded = [](F value) {
    const F shifted = V::add(V::multiply(value, V::set1(65536.0f)), V::set1(12582912.0f));
    return V::sub(V::as_int(shifted), V::set1(0x4B400000u));
  };
  const I rs = rounded(V::multiply(radius, s)), rc = rounded(V::multiply(radius, c));
  const I odd = V::template shift_right_signed<31>(V::template shift_left<1>(word1));  // quarter turns 1 and 3
  const I half = V::template shift_right_signed<31>(word1);                            // quarter turns 2 and 3
  const I swap = V::bit_and(V::bit_xor(rc, rs), odd);
  const I sign = V::bit_xor(odd, half);
  first = V::sub(V::bit_xor(rc, swap, sign), sign);
  second = V::sub(V::bit_xor(rs, swap, half), half);
}

}  // namespace
}  // namespace ferret::cpu

// The stream over the lanes of a vector type V (avx2.h, avx512.h): Philox words of many columns or calls, normal deviates.
#pragma once

#include <utility>

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
  FERRET_HD Halves bit_xor(Halves other) const { return {V::bit_xor(even, other.even), V::bit_xor(odd, other.odd)}; }
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

#define FERRET_INLINE __attribute__((always_inline))  // for lambdas, where the compiler would rather call

// f(constant 0), f(constant 1), ..
template <class F, int... n>
FERRET_HD void unroll(std::integer_sequence<int, n...>, F f) {
  (f(std::integral_constant<int, n>()), ...);
}
template <int n>
using Count = std::make_integer_sequence<int, n>;

struct Nothing {
  FERRET_HD void operator()(int) const {}
};

// Rounds 3 to 9 of n counters side by side: a chain of multiplications waits for each of its rounds, so one counter alone would leave
// multipliers idle. beside(0), .., beside(7) is other work in between, which fills what two counters leave.
template <class V, int n, class F>
FERRET_HD void philox_rounds(Halves<V> (&x)[n][4], const PhiloxKeys& keys, typename V::I (&w)[n][4], F beside) {
  unroll(Count<7>(), [&](auto round) FERRET_INLINE {
    for (auto& c : x) {
      const Halves<V> p0 = c[0].times(kPhiloxMultiplier0), p1 = c[2].times(kPhiloxMultiplier1);
      c[0] = p1.high().bit_xor(c[1], keys.key0[3 + round]);
      c[2] = p0.high().bit_xor(c[3], keys.key1[3 + round]);
      c[1] = p1;
      c[3] = p0;
    }
    beside(round);
  });
  beside(7);
  for (int i = 0; i < n; ++i) {
    for (int word = 0; word < 4; ++word) w[i][word] = x[i][word].join();
  }
}

// Words of the columns k, k + 1, .. in the lanes, for any of a few calls. In the first three rounds call and column meet only in
// four exclusive ors: CallPart holds what depends on the call and is done once for all columns, on scalars; ColumnWords what
// depends on the columns and is done once for all calls.
struct CallPart {
  uint32_t x0, x1, x2;  // what enters round 1 by x0 and x2, and round 2 by x1

  FERRET_HD CallPart() = default;
  FERRET_HD CallPart(const PhiloxKeys& keys, Basis basis, uint64_t t) {
    const uint32_t tag = kContractTag | static_cast<uint32_t>(basis);
    const uint64_t p0 = uint64_t{kPhiloxMultiplier0} * static_cast<uint32_t>(t);
    const uint64_t p1 = uint64_t{kPhiloxMultiplier1} * (high_word(p0) ^ tag ^ keys.key1[0]);
    x0 = high_word(p1) ^ keys.key0[1];
    x1 = static_cast<uint32_t>(p1) ^ keys.key0[2];
    x2 = static_cast<uint32_t>(p0) ^ keys.key1[1];
  }
};

template <class V>
class ColumnWords {
 public:
  // For calls whose high half is t's.
  FERRET_HD ColumnWords(const PhiloxKeys& keys, uint64_t t, uint32_t k) : keys_(keys) {
    const auto p1 = Halves<V>::split(V::add(V::set1(k), V::iota())).times(kPhiloxMultiplier1);
    const auto p0 = p1.high().bit_xor(high_word(t) ^ keys.key0[0]).times(kPhiloxMultiplier0);
    x0_ = p1;
    x2_ = p0.high();
    x3_ = p0.bit_xor(keys.key1[2]);
  }
  // w[i] = the words of call i.
  template <int n, class F = Nothing>
  FERRET_HD void words(const CallPart* calls, typename V::I (&w)[n][4], F beside = F()) const {
    Halves<V> x[n][4];
    for (int i = 0; i < n; ++i) {
      x[i][3] = x0_.bit_xor(calls[i].x0).times(kPhiloxMultiplier0);
      x[i][1] = x2_.bit_xor(calls[i].x2).times(kPhiloxMultiplier1);
      x[i][0] = x[i][1].high().bit_xor(calls[i].x1);
      x[i][2] = x[i][3].high().bit_xor(x3_);
    }
    philox_rounds(x, keys_, w, beside);
  }

 private:
  const PhiloxKeys& keys_;
  Halves<V> x0_, x2_, x3_;
};

// Words of calls in the lanes, for any of a few columns; the rounds are shared as above with calls and columns exchanged.
struct ColumnPart {
  uint32_t x0, x2, x3;

  FERRET_HD ColumnPart() = default;
  // For calls whose high half is t's.
  FERRET_HD ColumnPart(const PhiloxKeys& keys, uint64_t t, uint32_t k) {
    const uint64_t p1 = uint64_t{kPhiloxMultiplier1} * k;
    const uint64_t p0 = uint64_t{kPhiloxMultiplier0} * (high_word(p1) ^ high_word(t) ^ keys.key0[0]);
    x0 = static_cast<uint32_t>(p1) ^ keys.key0[1];
    x2 = high_word(p0) ^ keys.key1[1];
    x3 = static_cast<uint32_t>(p0) ^ keys.key1[2];
  }
};

// A ColumnPart with columns in the lanes too.
template <class V>
struct ColumnLanes {
  Halves<V> x0, x2, x3;

  FERRET_HD ColumnLanes(const PhiloxKeys& keys, uint64_t t, typename V::I k) {
    const auto p1 = Halves<V>::split(k).times(kPhiloxMultiplier1);
    const auto p0 = p1.high().bit_xor(high_word(t) ^ keys.key0[0]).times(kPhiloxMultiplier0);
    x0 = p1.bit_xor(keys.key0[1]);
    x2 = p0.high().bit_xor(keys.key1[1]);
    x3 = p0.bit_xor(keys.key1[2]);
  }
};

template <class V>
class CallWords {
 public:
  // Of calls whose low halves are t.
  FERRET_HD CallWords(const PhiloxKeys& keys, Basis basis, typename V::I t) : keys_(keys) {
    const uint32_t tag = kContractTag | static_cast<uint32_t>(basis);
    const auto p0 = Halves<V>::split(t).times(kPhiloxMultiplier0);
    const auto p1 = p0.high().bit_xor(tag ^ keys.key1[0]).times(kPhiloxMultiplier1);
    x0_ = p1.high();
    x1_ = p1.bit_xor(keys.key0[2]);
    x2_ = p0;
  }
  // w[i] = the words of column i.
  template <int n, class Part>
  FERRET_HD void words(const Part* columns, typename V::I (&w)[n][4]) const {
    Halves<V> x[n][4];
    for (int i = 0; i < n; ++i) {
      x[i][3] = x0_.bit_xor(columns[i].x0).times(kPhiloxMultiplier0);
      x[i][1] = x2_.bit_xor(columns[i].x2).times(kPhiloxMultiplier1);
      x[i][0] = x[i][1].high().bit_xor(x1_);
      x[i][2] = x[i][3].high().bit_xor(columns[i].x3);
    }
    philox_rounds(x, keys_, w, Nothing());
  }

 private:
  const PhiloxKeys& keys_;
  Halves<V> x0_, x1_, x2_;
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

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

// box_muller of core/stream.h over the lanes of n pairs of words, operation by operation, side by side because it is one long chain.
// The factor 2^16 goes to the radius, and quarter turns and signs to sine and cosine, which changes no rounding.
// b[2i], b[2i + 1] = the deviates of words[2i], words[2i + 1].
template <class V, int n>
FERRET_HD void box_muller(const typename V::I* words, typename V::I* b) {
  using I = typename V::I;
  using F = typename V::F;
  const auto each = [](auto f) FERRET_INLINE { unroll(Count<n>(), f); };
  I exponent[n];
  F f[n], p[n], radius[n], angle[n], a2[n], s[n], c[n];
  each([&](auto i) FERRET_INLINE {
    const I bits = V::as_int(V::to_float(V::bit_or(V::template shift_right<1>(words[2 * i]), V::set1(1u))));
    exponent[i] = V::template shift_right_signed<23>(V::sub(bits, V::set1(BoxMuller::kSqrtHalf)));
    f[i] = V::sub(V::as_float(V::sub(bits, V::template shift_left<23>(exponent[i]))), V::set1(1.0f));
    p[i] = V::set1(BoxMuller::kLog6);
    angle[i] = V::multiply(V::to_float(V::template shift_left<2>(words[2 * i + 1])), V::set1(BoxMuller::kAngle));
    a2[i] = V::multiply(angle[i], angle[i]);
    s[i] = V::set1(BoxMuller::kSin2);
    c[i] = V::set1(BoxMuller::kCos2);
  });
  for (const float log : {BoxMuller::kLog5, BoxMuller::kLog4, BoxMuller::kLog3, BoxMuller::kLog2, BoxMuller::kLog1,
                          BoxMuller::kLog0, -0.5f}) {
    each([&](auto i) FERRET_INLINE { p[i] = V::fused(p[i], f[i], V::set1(log)); });
  }
  each([&](auto i) FERRET_INLINE {
    const F log_m = V::fused(V::multiply(f[i], f[i]), p[i], f[i]);
    const F square = V::fused(V::to_float(V::sub(V::set1(31u), exponent[i])), V::set1(BoxMuller::kTwoLn2),
                              V::multiply(V::set1(-2.0f), log_m));
    radius[i] = V::multiply(V::square_root(square), V::set1(65536.0f));
  });
  each([&](auto i) FERRET_INLINE {
    s[i] = V::fused(s[i], a2[i], V::set1(BoxMuller::kSin1));
    c[i] = V::fused(c[i], a2[i], V::set1(BoxMuller::kCos1));
  });
  each([&](auto i) FERRET_INLINE {
    s[i] = V::fused(s[i], a2[i], V::set1(BoxMuller::kSin0));
    c[i] = V::fused(c[i], a2[i], V::set1(BoxMuller::kCos0));
  });
  each([&](auto i) FERRET_INLINE {
    s[i] = V::fused(V::multiply(s[i], a2[i]), angle[i], angle[i]);
    c[i] = V::fused(c[i], a2[i], V::set1(1.0f));
    const I word = words[2 * i + 1], odd = V::template shift_left<1>(word);  // signs: quarter turns 2 and 3, 1 and 3
    const F first = V::flip_sign(V::select_negative(odd, s[i], c[i]), V::bit_xor(word, odd));
    const F second = V::flip_sign(V::select_negative(odd, c[i], s[i]), word);
    b[2 * i] = V::round(V::multiply(radius[i], first));
    b[2 * i + 1] = V::round(V::multiply(radius[i], second));
  });
}

}  // namespace
}  // namespace ferret::cpu

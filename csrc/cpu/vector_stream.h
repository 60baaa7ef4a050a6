// The stream over the lanes of a vector type V (avx2.h, avx512.h, neon.h): Philox words of many columns or calls, normal deviates.
#pragma once

#include <utility>

#include "../core/job.h"

namespace ferret::cpu {
namespace {

// 32-bit words, each in the low half of a 64-bit one. The high halves may hold anything: a multiplication ignores them, which saves
// taking products apart. Halves has the lanes of a vector, the even and the odd ones apart; One is a word that all lanes share.
// low() and high() are the words of a product.
struct One {
  uint64_t word;

  FERRET_HD One low() const { return *this; }
  FERRET_HD One high() const { return {word >> 32}; }
  FERRET_HD One times(uint32_t factor) const { return {uint64_t{static_cast<uint32_t>(word)} * factor}; }
  FERRET_HD One operator^(uint32_t key) const { return {word ^ key}; }
};

template <class V>
struct Halves {
  typename V::I even, odd;

  FERRET_HD static Halves split(typename V::I x) { return {x, V::odd_to_even(x)}; }
  FERRET_HD typename V::I join() const { return V::interleave(even, odd); }
  FERRET_HD Halves low() const { return *this; }
  FERRET_HD Halves high() const { return {V::odd_to_even(even), V::odd_to_even(odd)}; }
  FERRET_HD Halves times(uint32_t factor) const {
    const typename V::I f = V::set1(factor);
    return {V::multiply_even(even, f), V::multiply_even(odd, f)};
  }
  FERRET_HD Halves operator^(Halves other) const { return {V::bit_xor(even, other.even), V::bit_xor(odd, other.odd)}; }
  FERRET_HD Halves operator^(uint32_t key) const {
    const typename V::I k = V::set1(key);
    return {V::bit_xor(even, k), V::bit_xor(odd, k)};
  }
  FERRET_HD Halves operator^(One other) const { return *this ^ static_cast<uint32_t>(other.word); }
  FERRET_HD friend Halves operator^(One one, Halves other) { return other ^ one; }
  FERRET_HD Halves bit_xor(Halves other, uint32_t key) const {
    const typename V::I k = V::set1(key);
    return {V::bit_xor(even, other.even, k), V::bit_xor(odd, other.odd, k)};
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

// In the first three rounds a call t and a column k meet only in four exclusive ors. What comes before depends on one of them alone and
// is done once: Call and Column hold the words x0 to x3 as they enter rounds 1 (x0, x2) and 2 (x1, x3).
template <class Words>  // One or Halves
struct Call {
  Words x0, x1, x2;

  Call() = default;
  FERRET_HD Call(const PhiloxKeys& keys, Basis basis, Words t) {
    const auto p0 = t.times(kPhiloxMultiplier0);
    const auto p1 =
        (p0.high() ^ (kContractTag | static_cast<uint32_t>(basis)) ^ keys.key1[0]).times(kPhiloxMultiplier1);
    x0 = p1.high() ^ keys.key0[1];
    x1 = p1.low() ^ keys.key0[2];
    x2 = p0.low() ^ keys.key1[1];
  }
};

template <class Words>
struct Column {
  Words x0, x2, x3;

  Column() = default;
  // For calls with the high half of t.
  FERRET_HD Column(const PhiloxKeys& keys, uint64_t t, Words k) {
    const auto p1 = k.times(kPhiloxMultiplier1);
    const auto p0 = (p1.high() ^ static_cast<uint32_t>(t >> 32) ^ keys.key0[0]).times(kPhiloxMultiplier0);
    x0 = p1.low();
    x2 = p0.high();
    x3 = p0.low() ^ keys.key1[2];
  }
};

// The columns k, k + 1, .. in the lanes.
template <class V>
FERRET_HD Column<Halves<V>> columns_of(const PhiloxKeys& keys, uint64_t t, uint32_t k) {
  return {keys, t, Halves<V>::split(V::add(V::set1(k), V::iota()))};
}
// The calls t, t + 1, .. in the lanes; t is a multiple of their number.
template <class V>
FERRET_HD Call<Halves<V>> calls_of(const PhiloxKeys& keys, Basis basis, uint64_t t) {
  return {keys, basis, Halves<V>::split(V::add(V::set1(static_cast<uint32_t>(t)), V::iota()))};
}

#define FERRET_INLINE __attribute__((always_inline))  // for lambdas, where the compiler would rather call

// f(constant 0), f(constant 1), ..
template <class F, int... n>
FERRET_HD void unroll(std::integer_sequence<int, n...>, [[maybe_unused]] F f) {
  (f(std::integral_constant<int, n>()), ...);
}
template <int n>
using Count = std::make_integer_sequence<int, n>;

struct Nothing {
  FERRET_HD void operator()(int) const {}
};

// w[i] = the words of a call and a column, for two pairs of them side by side: a chain of multiplications waits for each of its rounds,
// so one alone would leave multipliers idle. Lanes are calls or columns or both. beside(constant 0), .., beside(constant 7) is other
// work in between, which fills what two leave.
template <class V, class CallWords, class ColumnWords, class F = Nothing>
FERRET_HD void philox_pair(const PhiloxKeys& keys, const Call<CallWords>& call0, const Column<ColumnWords>& column0,
                           const Call<CallWords>& call1, const Column<ColumnWords>& column1, typename V::I (&w)[2][4],
                           F beside = F()) {
  Halves<V> x[2][4];
  const auto meet = [](const auto& call, const auto& column, Halves<V>(&c)[4]) FERRET_INLINE {
    const auto p0 = (column.x0 ^ call.x0).times(kPhiloxMultiplier0);
    const auto p1 = (column.x2 ^ call.x2).times(kPhiloxMultiplier1);
    c[0] = p1.high() ^ call.x1;
    c[1] = p1.low();
    c[2] = p0.high() ^ column.x3;
    c[3] = p0.low();
  };
  meet(call0, column0, x[0]);
  meet(call1, column1, x[1]);
  unroll(Count<7>(), [&](auto round) FERRET_INLINE {
    for (auto& c : x) {
      const auto p0 = c[0].times(kPhiloxMultiplier0), p1 = c[2].times(kPhiloxMultiplier1);
      c[0] = p1.high().bit_xor(c[1], keys.key0[3 + round]);
      c[2] = p0.high().bit_xor(c[3], keys.key1[3 + round]);
      c[1] = p1.low();
      c[3] = p0.low();
    }
    beside(round);
  });
  beside(std::integral_constant<int, 7>());
  for (int i = 0; i < 2; ++i) {
    for (int word = 0; word < 4; ++word) w[i][word] = x[i][word].join();
  }
}

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

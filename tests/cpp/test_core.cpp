// The stream's words and elements against tests/golden.txt, and the arithmetic of core/ against the C library's.
#include <cmath>
#include <limits>

#include "core/fixed_point.h"
#include "golden.h"

using namespace ferret;
using testing::check;

static void test_stream(const std::vector<golden::Record>& records) {
  for (const golden::Record& r : records) {
    std::vector<uint32_t> words;
    for (const std::string& value : r.values()) words.push_back(static_cast<uint32_t>(golden::hex(value)));
    const auto word = [&](int i) { return static_cast<uint32_t>(golden::hex(r.argument(i))); };
    if (r.kind() == "philox") {
      const Words w = philox4x32_10({{word(1), word(2), word(3), word(4)}}, word(5), word(6));
      check(words == std::vector<uint32_t>(w.w, w.w + 4), r.name());
    } else if (r.kind() == "words") {
      const Words w = stream_words(golden::hex(r.argument(1)), golden::basis_of(r.argument(2)),
                                   static_cast<uint64_t>(r.integer(3)), static_cast<uint32_t>(r.integer(4)));
      check(words == std::vector<uint32_t>(w.w, w.w + 4), r.name());
    } else if (r.kind() == "integers") {
      const Basis basis = golden::basis_of(r.argument(2));
      const uint64_t e = static_cast<uint64_t>(elements_per_call(basis));
      for (size_t i = 0; i < r.values().size(); ++i) {
        const uint64_t j = static_cast<uint64_t>(r.integer(3)) + i;
        const Words w = stream_words(golden::hex(r.argument(1)), basis, j / e, static_cast<uint32_t>(r.integer(5)));
        check(basis_integer(basis, w, static_cast<int>(j % e)) == std::atoi(r.values()[i].c_str()), r.name());
      }
    }
  }
}

template <class Real>
static void test_exponent(Real x) {
  int expected;
  std::frexp(x, &expected);
  check(exponent_of(x) == expected, "exponent_of " + std::to_string(static_cast<double>(x)));
}

static void test_arithmetic() {
  for (int e = -149; e < 128; ++e) {
    for (float m : {1.0f, 1.25f, 1.9999999f}) test_exponent(std::ldexp(m, e));
  }
  for (int e = -1074; e < 1024; ++e) test_exponent(std::ldexp(1.0, e));
  for (int i = -4000; i <= 4000; ++i) {
    const float x = static_cast<float>(i) * 0.25f;
    check(round_to_int(x) == std::nearbyint(x) && round_to_int(static_cast<double>(x)) == std::nearbyint(x),
          "round_to_int " + std::to_string(x));
  }
  check(round_to_int(4194303.5f) == 4194304 && round_to_int(-4194303.5f) == -4194304, "round_to_int at 2^22");
  check(to_fixed_point(8388607.75, kCoordinateBits).hi == (1 << kCoordinateBits) - 1, "to_fixed_point clamps");
}

// Every float16 and bfloat16 survives the way to float32 and back, and what lies between two goes to the nearer.
static void test_halves() {
  int wrong = 0;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float16_t h = {static_cast<uint16_t>(bits)};
    const bfloat16_t b = {static_cast<uint16_t>(bits)};
    if (!std::isnan(to_float(h))) wrong += to_float16(to_float(h)).bits != bits;
    if (!std::isnan(to_float(b))) wrong += to_bfloat16(to_float(b)).bits != bits;
    wrong += std::isnan(to_float(h)) != std::isnan(to_float(to_float16(to_float(h))));
    wrong += std::isnan(to_float(b)) != std::isnan(to_float(to_bfloat16(to_float(b))));
    if ((bits & 0x7FFF) >= 0x7BFF) continue;
    const float low = to_float(h), high = to_float(float16_t{static_cast<uint16_t>(bits + 1)});
    const float middle = (low + high) / 2;
    wrong += to_float16(middle).bits != (bits % 2 == 0 ? bits : bits + 1);
    wrong += to_float16(std::nextafter(middle, low)).bits != bits ||
             to_float16(std::nextafter(middle, high)).bits != bits + 1;
  }
  check(wrong == 0, "16-bit conversions, wrong: " + std::to_string(wrong));
  check(to_float16(65519.9f).bits == 0x7BFF && to_float16(65520.0f).bits == 0x7C00, "float16 overflow");
  check(to_bfloat16(std::numeric_limits<float>::max()).bits == 0x7F80, "bfloat16 overflow");
}

// Mean, variance and kurtosis of the integers; 4 standard errors of n draws.
static void test_moments() {
  const int n = 1 << 20;
  for (const Basis basis : {Basis::rademacher, Basis::uniform, Basis::gaussian}) {
    const int e = elements_per_call(basis);
    double sums[3] = {};
    for (int j = 0; j < n; j += e) {
      const Words words = stream_words(99, basis, static_cast<uint64_t>(j / e), 3);
      for (int i = 0; i < e; ++i) {
        const double x = std::ldexp(basis_integer(basis, words, i), -basis_exponent(basis));
        sums[0] += x;
        sums[1] += x * x;
        sums[2] += x * x * x * x;
      }
    }
    const double variance = basis_variance(basis), kurtosis = basis == Basis::rademacher ? 1
                                                              : basis == Basis::uniform  ? 1.8
                                                                                         : 3;
    const double eighth = basis == Basis::gaussian  ? 105
                          : basis == Basis::uniform ? 9
                                                    : 1;  // E x^8 / variance^4, rounded up
    const std::string name = "moments of kind " + std::to_string(static_cast<int>(basis));
    check(std::abs(sums[0] / n) <= 4 * std::sqrt(variance / n), name + ", mean");
    check(std::abs(sums[1] / n / variance - 1) <= 4 * std::sqrt((kurtosis - 1) / n) + 1e-12, name + ", variance");
    check(std::abs(sums[2] / n / (variance * variance) - kurtosis) <= 4 * std::sqrt(eighth / n), name + ", kurtosis");
  }
}

int main(int, char** argv) {
  test_stream(golden::read(argv[1]));
  test_arithmetic();
  test_halves();
  test_moments();
  return testing::summary();
}

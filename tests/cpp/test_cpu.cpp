// Every CPU path and several thread counts against tests/golden.txt, and against one another on plans of odd shape.
#include <cfenv>
#include <cmath>
#include <limits>

#include "golden.h"
#include "threads.h"

using namespace ferret;
using testing::check;
using testing::threads;

struct Cpu {
  int count;
  void project(const ProjectJob& job) const { cpu::project(job, threads(count)); }
  bool apply(const ApplyJob& job) const { return cpu::apply(job, threads(count)); }
  void basis(const BasisJob& job) const { cpu::basis(job, threads(count)); }
};

// Three tensors of different dtype in two blocks, the boundary between the first two in the middle of a tile, and a shard of a
// block that lies far out.
struct OddPlan {
  std::vector<golden::Array> old_tensors, new_tensors;
  std::vector<Block> blocks = {{1024, 5000, 70, 0}, {int64_t{1} << 41, 40000, 3, 70}};
  std::vector<Piece> pieces = {
      {0, 0, 1500, 1024, 0}, {1, 10, 3500, 2524, 0}, {2, 0, 33333, (int64_t{1} << 41) + 77, 1}};

  explicit OddPlan(bool wide) {
    const Dtype dtypes[] = {Dtype::float32, Dtype::bfloat16, wide ? Dtype::float64 : Dtype::float16};
    const int64_t counts[] = {1500, 3600, 33333};
    for (int i = 0; i < 3; ++i) {
      old_tensors.push_back(golden::input(dtypes[i], counts[i], 11 + i));
      new_tensors.push_back(golden::input(Dtype::float32, counts[i], 21 + i));
    }
  }
  Plan plan() const { return {blocks.data(), 2, pieces.data(), 3}; }
  static std::vector<TensorRef> refs(std::vector<golden::Array>& tensors) {
    std::vector<TensorRef> result;
    for (golden::Array& tensor : tensors) result.push_back(tensor.ref());
    return result;
  }
};

static std::vector<char> project(OddPlan& odd, bool wide, Basis basis, int count) {
  golden::Array gamma(wide ? Dtype::float64 : Dtype::float32, 73);
  const auto now = OddPlan::refs(odd.new_tensors), before = OddPlan::refs(odd.old_tensors);
  cpu::project({odd.plan(), now.data(), before.data(), {42, basis}, wide, gamma.bytes.data()}, threads(count));
  return gamma.bytes;
}

static std::vector<char> apply(OddPlan odd, bool wide, Basis basis, int count) {
  const auto params = OddPlan::refs(odd.old_tensors);
  golden::Array gammas = golden::input(wide ? Dtype::float64 : Dtype::float32, 2 * 73, 5);
  const Update updates[] = {{7, 0.25}, {8, -1.5}};
  check(cpu::apply({odd.plan(), params.data(), updates, 2, {gammas.bytes.data()}, 73, basis, -0.7, wide, false},
                   threads(count)),
        "apply on a plan");
  std::vector<char> result;
  for (const golden::Array& tensor : odd.old_tensors)
    result.insert(result.end(), tensor.bytes.begin(), tensor.bytes.end());
  return result;
}

// Paths, thread counts and repeated runs give equal bytes.
static void test_equal_bits() {
  for (const Basis basis : {Basis::rademacher, Basis::uniform, Basis::gaussian}) {
    for (const bool wide : {false, true}) {
      OddPlan odd(wide);
      cpu::set_isa("scalar");
      const auto gamma = project(odd, wide, basis, 1), params = apply(odd, wide, basis, 1);
      for (const std::string& isa : cpu::available_isas()) {
        cpu::set_isa(isa);
        for (int count = 1; count <= 3; ++count) {
          const std::string name = isa + ", " + std::to_string(count) + " threads, kind " +
                                   std::to_string(static_cast<int>(basis)) + (wide ? ", wide" : "");
          check(project(odd, wide, basis, count) == gamma, "project on a plan: " + name);
          check(apply(odd, wide, basis, count) == params, "apply on a plan: " + name);
        }
      }
    }
  }
}

static void test_philox_checksum() {
  for (const uint32_t columns : {3u, 37u}) {
    for (const uint64_t calls : {1, 131}) {
      uint32_t expected = 0;
      for (uint32_t k = 0; k < columns; ++k) {
        for (uint64_t t = 0; t < calls; ++t) {
          for (const uint32_t word : stream_words(~uint64_t{6}, Basis::rademacher, t, k).w) expected ^= word;
        }
      }
      for (const std::string& isa : cpu::available_isas()) {
        cpu::set_isa(isa);
        check(cpu::philox_checksum(~uint64_t{6}, columns, calls) == expected, "philox_checksum: " + isa);
      }
    }
  }
}

// Integers of the largest magnitude throughout, where sums and what they are made of come closest to overflowing: all of one
// sign, and of both by turns.
static void test_largest_integers() {
  const Block block = {0, 2048, 256, 0};
  const Piece piece = {0, 0, 2048, 0, 0};
  const Plan plan = {&block, 1, &piece, 1};
  const Update update = {9, 1.0};
  for (const Basis basis : {Basis::rademacher, Basis::uniform, Basis::gaussian}) {
    for (const bool wide : {false, true}) {
      for (const double sign : {1.0, -1.0, 0.0}) {
        const Dtype dtype = wide ? Dtype::float64 : Dtype::float32;
        golden::Array x(dtype, 2048), gammas(dtype, 256);
        const double largest = wide ? 1 - 0x1p-53 : 1 - 0x1p-24;
        for (int i = 0; i < 2048; ++i) x.set(i, largest * (sign != 0 ? sign : i % 3 == 0 ? 1 : -1));
        for (int k = 0; k < 256; ++k) gammas.set(k, largest * (sign != 0 ? sign : k % 3 == 0 ? 1 : -1));
        const TensorRef delta = x.ref();
        golden::Array expected[2] = {gammas, x};
        for (const std::string& isa : cpu::available_isas()) {
          golden::Array gamma = gammas, rebuilt = x;
          const TensorRef param = rebuilt.ref();
          cpu::set_isa(isa);
          cpu::project({plan, &delta, nullptr, {8, basis}, wide, gamma.bytes.data()}, threads(1));
          cpu::apply({plan, &param, &update, 1, {gammas.bytes.data()}, 256, basis, 1.0, wide, true}, threads(1));
          if (isa == "scalar") {
            expected[0] = gamma;
            expected[1] = rebuilt;
          }
          const std::string name = isa + ", sign " + std::to_string(sign) + ", kind " +
                                   std::to_string(static_cast<int>(basis)) + (wide ? ", wide" : "");
          check(gamma.bytes == expected[0].bytes, "project of the largest integers: " + name);
          check(rebuilt.bytes == expected[1].bytes, "reconstruct of the largest integers: " + name);
        }
      }
    }
  }
}

// Another rounding, and denormal numbers taken for 0.
static void disturb_floating_point() {
  std::fesetround(FE_UPWARD);
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(__builtin_ia32_stmxcsr() | 0x8040);
#elif defined(__aarch64__)
  uint64_t control;
  __asm__ volatile("mrs %0, fpcr" : "=r"(control));
  __asm__ volatile("msr fpcr, %0" ::"r"(control | 1 << 24));
#endif
}

// The caller's floating-point environment changes no bit, and is the caller's again afterwards.
static void test_floating_point_environment() {
  const auto tiny = [](OddPlan odd) {
    for (int i = 0; i < 1500; ++i) {
      odd.new_tensors[0].set(i, std::ldexp(i - 700, -149));
      odd.old_tensors[0].set(i, std::ldexp(i % 7, -140));
    }
    return odd;
  };
  for (const std::string& isa : cpu::available_isas()) {
    cpu::set_isa(isa);
    for (const Basis basis : {Basis::rademacher, Basis::gaussian}) {
      OddPlan odd = tiny(OddPlan(false));
      const auto gamma = project(odd, false, basis, 1), params = apply(odd, false, basis, 1);
      disturb_floating_point();
      const auto disturbed_gamma = project(odd, false, basis, 1), disturbed_params = apply(odd, false, basis, 1);
      const bool restored = std::fegetround() == FE_UPWARD;
      std::fesetenv(FE_DFL_ENV);
      const std::string name = isa + ", kind " + std::to_string(static_cast<int>(basis));
      check(disturbed_gamma == gamma, "project in another floating-point environment: " + name);
      check(disturbed_params == params, "apply in another floating-point environment: " + name);
      check(restored, "the floating-point environment is restored: " + name);
    }
  }
}

// Every path has a number of columns up to which it works in another way, and other ways for what is left over.
static void test_every_number_of_columns() {
  const golden::Array input = golden::input(Dtype::float32, 5000, 31);
  for (int64_t columns = 1; columns <= 66; ++columns) {
    const Block block = {1024, 5000, columns, 0};
    const Piece piece = {0, 0, 5000, 1024, 0};
    const Plan plan = {&block, 1, &piece, 1};
    std::vector<char> expected_gamma, expected_param;
    for (const std::string& isa : cpu::available_isas()) {  // scalar first
      cpu::set_isa(isa);
      golden::Array delta = input, param = input, gamma(Dtype::float32, columns);
      const TensorRef now = delta.ref(), target = param.ref();
      cpu::project({plan, &now, nullptr, {42, Basis::rademacher}, false, gamma.bytes.data()}, threads(1));
      const Update update = {42, columns % 2 == 0 ? 1.0 : 0.5};  // a weight of 1 is left out
      cpu::apply({plan, &target, &update, 1, {gamma.bytes.data()}, columns, Basis::rademacher, -0.7, false, false},
                 threads(1));
      if (expected_gamma.empty()) {
        expected_gamma = gamma.bytes;
        expected_param = param.bytes;
      }
      const std::string name = isa + ", " + std::to_string(columns) + " columns";
      check(gamma.bytes == expected_gamma, "project: " + name);
      check(param.bytes == expected_param, "apply: " + name);
    }
  }
}

// The first elements of the second tensor belong to no piece, so apply leaves them alone.
static void test_untouched() {
  OddPlan odd(false);
  const auto after = apply(odd, false, Basis::rademacher, 2);
  const auto& tensor = odd.old_tensors[1].bytes;
  check(std::equal(tensor.begin(), tensor.begin() + 20, after.begin() + 1500 * 4), "elements outside the pieces");
}

static void test_not_finite() {
  for (const std::string& isa : cpu::available_isas()) {
    cpu::set_isa(isa);
    OddPlan odd(false);
    odd.new_tensors[2].set(20000, std::numeric_limits<double>::infinity());
    const auto bytes = project(odd, false, Basis::rademacher, 2);
    int nans = 0;
    for (int k = 0; k < 73; ++k) {
      float gamma;
      std::memcpy(&gamma, &bytes[4 * static_cast<size_t>(k)], 4);
      nans += std::isnan(gamma) == (k >= 70);
    }
    check(nans == 73, isa + ": an infinity makes its block NaN, and no other");

    OddPlan target(false);
    const auto params = OddPlan::refs(target.old_tensors);
    golden::Array gammas = golden::input(Dtype::float32, 73, 5);
    gammas.set(72, std::nan(""));
    const Update update = {7, 1.0};
    const bool done = cpu::apply(
        {target.plan(), params.data(), &update, 1, {gammas.bytes.data()}, 73, Basis::rademacher, 1.0, false, false},
        threads(2));
    bool same = true;
    const OddPlan fresh(false);
    for (int i = 0; i < 3; ++i) same &= target.old_tensors[i].bytes == fresh.old_tensors[i].bytes;
    check(!done && same, isa + ": apply refuses a NaN and changes nothing");
  }
}

int main(int, char** argv) {
  const auto records = golden::read(argv[1]);
  for (const std::string& isa : cpu::available_isas()) {
    cpu::set_isa(isa);
    for (const int count : {1, 3}) {
      Cpu backend{count};
      golden::run(records, backend, isa + ", " + std::to_string(count) + " threads");
    }
  }
  test_equal_bits();
  test_philox_checksum();
  test_largest_integers();
  test_floating_point_environment();
  test_every_number_of_columns();
  test_untouched();
  test_not_finite();
  try {
    cpu::set_isa("mmx");
    check(false, "an unknown path is refused");
  } catch (const std::runtime_error& error) {
    check(std::string(error.what()).find("got 'mmx'") != std::string::npos, "an unknown path is named");
  }
  return testing::summary();
}

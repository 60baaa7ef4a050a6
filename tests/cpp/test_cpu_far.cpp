// The last elements that a stream can have, up to 2^63 - 2, and the last columns that a basis can have, up to 2^32 - 2.
#include "cpu/dispatch.h"
#include "plan_cases.h"
#include "testing.h"
#include "threads.h"

using namespace ferret;
using testing::check;

static constexpr int64_t kLength = 3000;

// Against contract.h.
template <class Real>
static void test_end_of_stream(Basis basis, int64_t columns, const std::string& isa) {
  constexpr bool wide = sizeof(Real) == 8;
  const std::string name = isa + ", kind " + std::to_string(static_cast<int>(basis)) + (wide ? ", wide" : "");
  cases::Case c = cases::single(dtype_of(Real()), INT64_MAX - kLength, INT64_MAX, kLength, columns);
  c.fill(2);
  const auto refs = c.refs();
  std::vector<Real> gamma(columns);
  cpu::project({c.plan(), refs.data(), nullptr, {6, basis}, wide, gamma.data()}, testing::threads(2));
  check(gamma == cases::expected_gamma<Real>(c, nullptr, {6, basis}), "project at the end of the stream: " + name);
  cases::Case expected = c;
  const Update update = {6, 1.0};
  cpu::apply({c.plan(), refs.data(), &update, 1, {gamma.data()}, columns, basis, 0.5, wide, false},
             testing::threads(2));
  cases::expected_apply<Real>(expected, {{6, 1.0, gamma}}, basis, 0.5, false);
  check(cases::same_bits(c, expected), "apply at the end of the stream: " + name);

  cases::Tensor column(Dtype::float64, kLength);
  cpu::basis({{6, basis}, 1, INT64_MAX - kLength, INT64_MAX, kLength, column.ref()}, testing::threads(2));
  contract::Column integers({6, basis}, 1);
  bool equal = true;
  for (int64_t i = 0; i < kLength; ++i) {
    const double unit = std::ldexp(1.0, -basis_exponent(basis)) / std::sqrt(static_cast<double>(INT64_MAX));
    const double got = column.get(i), want = integers[INT64_MAX - kLength + i] * unit;
    equal &= std::abs(got - want) <= 1e-15 * std::abs(want);
  }
  check(equal, "basis at the end of the stream: " + name);
}

// Against the scalar path.
template <class Real>
static void test_last_columns(Basis basis, int count, const std::string& isa) {
  cases::Case c = cases::single(dtype_of(Real()), 0, cpu::kRunElements, cpu::kRunElements, 1);
  c.fill(3);
  const void* x = c.refs()[0].data;
  double sums[2][cpu::kColumnBatch + cpu::kPad] = {};
  for (int i = 0; i < 2; ++i) {
    cpu::set_isa(i == 0 ? "scalar" : isa);
    const uint32_t first = UINT32_MAX - static_cast<uint32_t>(count);
    const cpu::RunProduct<Real> run = {x,          nullptr, 1,     dtype_of(Real()), {}, 0, 0, cpu::kRunElements,
                                       {7, basis}, first,   count, sums[i]};
    check(cpu::kernels_of<Real>(cpu::active_kernels()).project_runs(run) == 1, "one run is done");
  }
  check(
      sums[0][0] != 0 && std::equal(sums[0], sums[0] + count, sums[1]),
      "the last columns, " + std::to_string(count) + ": " + isa + ", kind " + std::to_string(static_cast<int>(basis)));
}

int main() {
  for (const std::string& isa : cpu::available_isas()) {
    for (const Basis basis : {Basis::rademacher, Basis::uniform, Basis::gaussian}) {
      for (const int count : {40, 100}) {
        test_last_columns<float>(basis, count, isa);
        test_last_columns<double>(basis, count, isa);
      }
      cpu::set_isa(isa);
      for (const int64_t columns : {3, 70}) {
        test_end_of_stream<float>(basis, columns, isa);
        test_end_of_stream<double>(basis, columns, isa);
      }
    }
  }
  return testing::summary();
}

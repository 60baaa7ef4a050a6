// Numbers beyond 32 bits: elements far inside tensors of up to 8 TB, of which only the pages in use take memory; stream
// elements up to the last, 2^63 - 2; columns up to 2^32 - 2. UndefinedBehaviorSanitizer is what this test is for, as much as the bits.
#include <sys/mman.h>

#include "cpu/dispatch.h"
#include "plan_cases.h"
#include "testing.h"
#include "threads.h"

using namespace ferret;
using testing::check;

static constexpr int64_t kLength = 3000;
static constexpr int kTileRun = cpu::kRun * kTile;

// `numel` elements that are 0 and take no memory until they are written.
class HugeTensor {
 public:
  HugeTensor(Dtype dtype, int64_t numel) : dtype_(dtype), bytes_(static_cast<size_t>(numel) * size_of(dtype)) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
  }
  ~HugeTensor() {
    if (exists()) munmap(data_, bytes_);
  }
  HugeTensor(const HugeTensor&) = delete;
  HugeTensor& operator=(const HugeTensor&) = delete;
  bool exists() const { return data_ != MAP_FAILED; }
  TensorRef ref() const { return {data_, dtype_}; }
  char* at(int64_t i) const { return static_cast<char*>(data_) + i * size_of(dtype_); }

 private:
  Dtype dtype_;
  size_t bytes_;
  void* data_;
};

// A run of elements of a huge tensor gives what the same run alone gives, and nothing beside it changes.
template <class Real>
static void test_elements(Dtype dtype, int64_t start, int count) {
  constexpr bool wide = sizeof(Real) == 8;
  const std::string name =
      "element " + std::to_string(start) + " of " + std::to_string(size_of(dtype)) + " bytes, " + std::to_string(count);
  const HugeTensor huge(dtype, start + 2 * kLength);
  check(huge.exists(), "address space for " + name);
  if (!huge.exists()) return;
  cases::Case alone = cases::single(dtype, start, start + 2 * kLength, kLength, 9);
  alone.fill(1);
  const size_t bytes = kLength * size_of(dtype);
  const TensorRef ref = huge.ref();
  std::memcpy(huge.at(start), alone.refs()[0].data, bytes);
  const Piece piece = {0, start, kLength, start, 0};
  const Plan plan = {alone.blocks.data(), 1, &piece, 1};

  std::vector<Real> gamma(9);
  cpu::project({plan, &ref, nullptr, {5, Basis::rademacher}, wide, gamma.data()}, testing::threads(count));
  check(gamma == cases::expected_gamma<Real>(alone, nullptr, {5, Basis::rademacher}), "project: " + name);
  const Update update = {5, 1.0};
  cpu::apply({plan, &ref, &update, 1, gamma.data(), 9, Basis::rademacher, -0.5, wide, false}, testing::threads(count));
  cases::expected_apply<Real>(alone, {{5, 1.0, gamma}}, Basis::rademacher, -0.5, false);
  check(std::memcmp(huge.at(start), alone.refs()[0].data, bytes) == 0, "apply: " + name);
  const std::vector<char> zeros(bytes);
  check(std::memcmp(huge.at(start - kLength), zeros.data(), bytes) == 0, "before: " + name);
  check(std::memcmp(huge.at(start + kLength), zeros.data(), bytes) == 0, "behind: " + name);
}

// The last elements that a stream can have.
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
  cpu::apply({c.plan(), refs.data(), &update, 1, gamma.data(), columns, basis, 0.5, wide, false}, testing::threads(2));
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

// The last columns that a basis can have, against the same columns of the scalar path.
template <class Real>
static void test_last_columns(Basis basis, const std::string& isa) {
  constexpr int count = 100;
  cases::Case c = cases::single(dtype_of(Real()), 0, kTileRun, kTileRun, 1);
  c.fill(3);
  const char* x = static_cast<const char*>(c.refs()[0].data);
  double sums[2][count + cpu::kPad] = {};
  for (int i = 0; i < 2; ++i) {
    cpu::set_isa(i == 0 ? "scalar" : isa);
    cpu::RunProduct<Real> run = {{}, {}, 0, 0, kTileRun, {7, basis}, UINT32_MAX - count, count, sums[i]};
    for (int tile = 0; tile < cpu::kRun; ++tile) {
      run.x[tile] = {x + tile * kTile * sizeof(Real), nullptr, dtype_of(Real())};
    }
    cpu::kernels_of<Real>(cpu::active_kernels()).project_run(run);
  }
  check(sums[0][0] != 0 && std::equal(sums[0], sums[0] + count, sums[1]),
        "the last columns: " + isa + ", kind " + std::to_string(static_cast<int>(basis)));
}

int main() {
  for (const int64_t start : {(int64_t{1} << 31) - 1000, (int64_t{1} << 32) - 1000, (int64_t{1} << 40) + 77}) {
    for (const int count : {1, 2}) {
      for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
        test_elements<float>(dtype, start, count);
      }
      test_elements<double>(Dtype::float64, start, count);
    }
  }
  for (const std::string& isa : cpu::available_isas()) {
    for (const Basis basis : {Basis::rademacher, Basis::uniform, Basis::gaussian}) {
      test_last_columns<float>(basis, isa);
      test_last_columns<double>(basis, isa);
      for (const int64_t columns : {3, 70}) {
        test_end_of_stream<float>(basis, columns, isa);
        test_end_of_stream<double>(basis, columns, isa);
      }
    }
  }
  return testing::summary();
}

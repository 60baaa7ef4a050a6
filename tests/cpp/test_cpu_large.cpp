// Elements far inside tensors of up to 8 TB, of which only the pages in use take memory.
#include <sys/mman.h>

#include "plan_cases.h"
#include "testing.h"
#include "threads.h"

using namespace ferret;
using testing::check;

static constexpr int64_t kLength = 3000;

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
  cpu::apply({plan, &ref, &update, 1, {gamma.data()}, 9, Basis::rademacher, -0.5, wide, false},
             testing::threads(count));
  cases::expected_apply<Real>(alone, {{5, 1.0, gamma}}, Basis::rademacher, -0.5, false);
  check(std::memcmp(huge.at(start), alone.refs()[0].data, bytes) == 0, "apply: " + name);
  const std::vector<char> zeros(bytes);
  check(std::memcmp(huge.at(start - kLength), zeros.data(), bytes) == 0, "before: " + name);
  check(std::memcmp(huge.at(start + kLength), zeros.data(), bytes) == 0, "behind: " + name);
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
  return testing::summary();
}

// The CUDA kernels on the emulator against docs/streams.md evaluated plainly (contract.h) and against the known
// answers, bit for bit. Usage: test_cuda_kernels tests/golden.txt
#include "cuda_emulator.h"

#include "cuda/apply.cu"
#include "cuda/basis.cu"
#include "cuda/project.cu"
#include "golden.h"
#include "plan_cases.h"

namespace {

using namespace cases;
using testing::check;

const Basis kBases[] = {Basis::rademacher, Basis::uniform, Basis::gaussian};
const char* name_of(Basis basis) {
  return basis == Basis::rademacher ? "rademacher" : basis == Basis::uniform ? "uniform" : "gaussian";
}
template <class Real>
std::string label(const char* what, Basis basis) {
  return std::string(what) + " " + name_of(basis) + (contract::is_wide<Real> ? " wide" : "");
}

// ---- what they give ----

std::vector<char> workspace_of(size_t bytes) { return std::vector<char>(bytes + 256, '\x5a'); }
void* aligned(std::vector<char>& buffer) {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(buffer.data()) + 255) / 256 * 256);
}

constexpr int kAnyLevel = -1;

template <class Real>
std::vector<Real> run_project(Case& now, Case* before, Stream stream, int level = kAnyLevel) {
  std::vector<Real> gamma(now.total(), Real(-7));
  const auto refs = now.refs();
  const auto before_refs = before == nullptr ? std::vector<TensorRef>() : before->refs();
  const ProjectJob job = {
      now.plan(),  refs.data(), before == nullptr ? nullptr : before_refs.data(), stream, contract::is_wide<Real>,
      gamma.data()};
  if (level == kAnyLevel) {
    auto buffer = workspace_of(cuda::project_workspace(job));
    check(cuda::project(job, aligned(buffer), buffer.size() - 256, nullptr).ok(), "project launches");
  } else {
    auto buffer = workspace_of(cuda::ProjectLaunches(job, level, nullptr).workspace.bytes());
    check(cuda::run(cuda::ProjectLaunches(job, level, aligned(buffer)), job, buffer.size() - 256, nullptr).ok(),
          "project launches");
  }
  return gamma;
}

template <class Real>
void run_apply(Case& c, const Updates<Real>& updates, Basis basis, double alpha, bool overwrite) {
  std::vector<Update> list;
  std::vector<Real> gammas;
  for (const auto& update : updates) {
    list.push_back({update.seed, update.weight});
    gammas.insert(gammas.end(), update.gamma.begin(), update.gamma.end());
  }
  const auto refs = c.refs();
  const ApplyJob job = {c.plan(),  refs.data(), list.data(), static_cast<int64_t>(list.size()), {gammas.data()},
                        c.total(), basis,       alpha,       contract::is_wide<Real>,           overwrite};
  auto buffer = workspace_of(cuda::apply_workspace(job));
  check(cuda::apply(job, aligned(buffer), buffer.size() - 256, nullptr).ok(), "apply launches");
}

template <class Real>
bool same_bits(const std::vector<Real>& a, const std::vector<Real>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(Real)) == 0);
}

template <class Real>
void expect_project(Case& now, Case* before, Stream stream, const std::string& what, int level = kAnyLevel) {
  const auto expected = expected_gamma<Real>(now, before, stream);
  for (const bool reversed : {false, true}) {
    emulator::reversed = reversed;
    check(same_bits(run_project<Real>(now, before, stream, level), expected),
          what + (reversed ? ", threads reversed" : ""));
  }
}

template <class Real>
void expect_apply(Case& c, const Updates<Real>& updates, Basis basis, double alpha, const std::string& what) {
  for (const bool overwrite : {false, true}) {
    Case expected = c, got = c;
    emulator::reversed = overwrite;
    expected_apply(expected, updates, basis, alpha, overwrite);
    run_apply(got, updates, basis, alpha, overwrite);
    check(same_bits(got, expected), what + (overwrite ? ", overwrite" : ""));
  }
}

template <class Real>
Updates<Real> some_updates(int64_t total, int count) {
  Random random(99);
  const double weights[] = {0.75, -1e-3, 1e6};
  Updates<Real> updates;
  for (int i = 0; i < count; ++i) {
    updates.push_back({random.bits(), weights[i % 3], {}});
    for (int64_t k = 0; k < total; ++k)
      updates.back().gamma.push_back(static_cast<Real>(std::ldexp(random.value(), 5 * i)));
  }
  return updates;
}

// ---- tests ----

constexpr uint64_t kSeed = 0xFEDCBA9876543210u;

template <class Real>
void test_project_columns(Basis basis) {
  for (const int64_t columns : {1, 2, 3, 4, 7, 8, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 130}) {
    Case c = single(Dtype::float32, 512 + 77, 100000, 2100, columns);
    c.fill(columns);
    expect_project<Real>(c, nullptr, {kSeed, basis}, label<Real>("project", basis) + " K=" + std::to_string(columns));
  }
}

template <class Real>
void test_project_plans(Basis basis) {
  Case now = packed(contract::is_wide<Real>), before = packed(contract::is_wide<Real>);
  before.tensors[4] = Tensor(Dtype::float32, 2500);  // old and new may differ in dtype
  now.fill(1), before.fill(2);
  for (const int level : {kAnyLevel, 0, 1, 2, 3}) {
    const std::string what = label<Real>("project plan", basis) + " level " + std::to_string(level);
    expect_project<Real>(now, nullptr, {kSeed, basis}, what, level);
    expect_project<Real>(now, &before, {kSeed, basis}, what + " difference", level);
  }
}

// Most tiles are found from the one before.
template <class Real>
void test_long_pieces(Basis basis, int64_t columns) {
  Case now = long_pieces(columns), before = long_pieces(columns);
  now.fill(1), before.fill(2);
  for (const int level : {0, 1}) {
    const auto what = label<Real>("long pieces", basis) + " level " + std::to_string(level);
    expect_project<Real>(now, nullptr, {kSeed, basis}, "project " + what, level);
    expect_project<Real>(now, &before, {kSeed, basis}, "project_difference " + what, level);
  }
  expect_apply<Real>(now, some_updates<Real>(columns, 2), basis, 0.4, label<Real>("apply long pieces", basis));
}

// Enough tiles for every level of the tree to end inside the range.
template <class Real>
void test_project_fold() {
  const int64_t border = int64_t{512} << 18;
  for (const int64_t columns : {1, 3}) {
    Case c = single(Dtype::float32, border - 70 * 512 + 5, 1 << 20, 140 * 512, columns);
    c.fill(7);
    for (const int level : {0, 1, 2, 3}) {
      const auto what = label<Real>("project across nodes", Basis::rademacher) + " level " + std::to_string(level);
      expect_project<Real>(c, nullptr, {kSeed, Basis::rademacher}, what, level);
    }
  }
}

template <class Real>
void test_project_extremes(Basis basis) {
  const double tiny = std::numeric_limits<Real>::denorm_min(), huge = std::numeric_limits<Real>::max();
  for (const double value : {0.0, tiny, 3 * tiny, 0x1p-140, 0x1.fffffep-106, 0x1.fffffep-105, 0x1.fffffep-104,
                             0x1.fffffcp-40, 0x1.fffff8p-40, huge, 0x1.fffffep0, 1.0, -0.0}) {
    Case c = single(contract::is_wide<Real> ? Dtype::float64 : Dtype::float32, 1024, 900, 900, 3);
    for (int64_t i = 0; i < 900; ++i) c.tensors[0].set(i, i < 512 ? value : i % 3 * value / 2);
    expect_project<Real>(c, nullptr, {kSeed, basis},
                         label<Real>("project extreme", basis) + " " + std::to_string(value));
  }
}

// NaN and infinity reach all coordinates of their own block and no others.
template <class Real>
void test_project_poison(Basis basis) {
  for (const double bad : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    Case clean = packed(contract::is_wide<Real>), c = packed(contract::is_wide<Real>);
    clean.fill(3), c.fill(3);
    c.tensors[4].set(1700, bad);  // of block 1
    for (const int level : {0, 1}) {
      const auto expected = run_project<Real>(clean, nullptr, {kSeed, basis}, level);
      const auto got = run_project<Real>(c, nullptr, {kSeed, basis}, level);
      bool ok = true;
      for (int64_t k = 0; k < c.total(); ++k) ok &= k >= 5 && k < 135 ? std::isnan(got[k]) : got[k] == expected[k];
      check(ok, label<Real>("project poison", basis));
    }
  }
}

template <class Real>
void test_apply_columns(Basis basis) {
  for (const int64_t columns : {1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 130}) {
    Case c = single(Dtype::float32, 512 + 77, 100000, 300, columns);
    c.fill(columns);
    const auto what = label<Real>("apply", basis) + " K=" + std::to_string(columns);
    expect_apply<Real>(c, some_updates<Real>(columns, 2), basis, -0.3, what);
  }
}

template <class Real>
void test_apply_plans(Basis basis) {
  for (const int updates : {1, 3}) {
    Case c = packed(contract::is_wide<Real>);
    c.fill(4);
    const auto what = label<Real>("apply plan", basis) + " updates " + std::to_string(updates);
    expect_apply<Real>(c, some_updates<Real>(c.total(), updates), basis, 1.5, what);
  }
}

// More than 64 groups: H is folded twice.
template <class Real>
void test_apply_many_columns(Basis basis, int64_t elements = 40) {
  for (const int64_t columns : {4096, 4200, 8300}) {
    Case c = single(Dtype::float32, 33, 1000, elements, columns);
    c.fill(5);
    const auto what = label<Real>("apply many columns", basis) + " K=" + std::to_string(columns);
    expect_apply<Real>(c, some_updates<Real>(columns, 2), basis, 0.01, what);
  }
}

// Scales at the ends of their ranges, groups of zeros, and blocks whose exponents differ as much as they can.
template <class Real>
void test_apply_extremes(Basis basis) {
  const int limit = std::numeric_limits<Real>::max_exponent - 1;
  for (const int second : {limit, 0, -limit, std::numeric_limits<Real>::min_exponent - 20}) {
    Case c = single(contract::is_wide<Real> ? Dtype::float64 : Dtype::float32, 0, 130, 130, 200);
    c.fill(6);
    auto updates = some_updates<Real>(200, 2);
    for (int64_t k = 0; k < 200; ++k) {
      updates[0].gamma[k] = k / 64 == 1 ? Real(0) : static_cast<Real>(std::ldexp(updates[0].gamma[k], limit - 10));
      updates[1].gamma[k] = static_cast<Real>(std::ldexp(updates[1].gamma[k], k < 64 ? second - 10 : second / 2 - 10));
    }
    expect_apply<Real>(c, updates, basis, 1e-30, label<Real>("apply extreme", basis) + " 2^" + std::to_string(second));
  }
  Case c = single(Dtype::bfloat16, 0, 130, 130, 70);
  c.fill(6);
  expect_apply<Real>(c, {{1, 1.0, std::vector<Real>(70)}}, basis, 1.0, label<Real>("apply zeros", basis));
  expect_apply<Real>(c, {}, basis, 1.0, label<Real>("apply nothing", basis));
}

template <class Real>
void test_apply_not_finite(Basis basis) {
  for (const double bad : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    Case before = packed(contract::is_wide<Real>);
    before.fill(8);
    auto updates = some_updates<Real>(before.total(), 2);
    updates[1].gamma[140] = static_cast<Real>(bad);
    Case untouched = before, filled = before;
    run_apply(untouched, updates, basis, 1.0, false);
    check(same_bits(untouched, before), label<Real>("apply leaves parameters untouched", basis));
    run_apply(filled, updates, basis, 1.0, true);
    bool ok = true;
    for (int64_t i = 0; i < 2500; ++i) ok &= std::isnan(filled.tensors[4].get(i));
    check(ok, label<Real>("reconstruct fills with NaN", basis));
  }
}

// Tables of more than one packet.
void test_many_blocks() {
  Case c;
  for (int b = 0; b < 100; ++b) {
    c.tensors.emplace_back(Dtype::float32, 600);
    c.add_block(b * 1024, 600, 1 + b % 3);
    c.add_piece(b, 0, 600, b * 1024);
  }
  c.fill(11);
  static_assert(100 * sizeof(Block) / sizeof(uint64_t) > size_t{cuda::kPacket} / 2);
  expect_project<float>(c, nullptr, {kSeed, Basis::rademacher}, "project many blocks");
  expect_apply<float>(c, some_updates<float>(c.total(), 2), Basis::rademacher, 0.5, "apply many blocks");
}

void test_workspace() {
  Case c = single(Dtype::float32, 0, 100, 100, 3);
  auto refs = c.refs();
  float gamma[3];
  const ProjectJob job = {c.plan(), refs.data(), nullptr, {1, Basis::rademacher}, false, gamma};
  auto buffer = workspace_of(cuda::project_workspace(job));
  const auto status = cuda::project(job, aligned(buffer), buffer.size() - 257, nullptr);
  check(status.code == cudaErrorInvalidValue && std::strstr(status.where, "workspace") != nullptr,
        "a small workspace is an error");
}

// The emulated product against plain sums: every operand at its place, and the largest sizes.
struct MmaParams {
  const uint8_t* a;  // [16, 32]
  const int8_t* b;   // [32, 8]
  int32_t* d;        // [16, 8]
};

void mma_kernel(MmaParams p) {
  const unsigned lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t a[4] = {}, b[2] = {};
  int32_t d[4] = {};
  for (unsigned byte = 0; byte < 4; ++byte) {
    for (unsigned r = 0; r < 4; ++r) {
      a[r] |= uint32_t{p.a[(g + 8 * (r % 2)) * 32 + 4 * t + 16 * (r / 2) + byte]} << (8 * byte);
    }
    for (unsigned r = 0; r < 2; ++r) {
      b[r] |= uint32_t{static_cast<uint8_t>(p.b[(4 * t + 16 * r + byte) * 8 + g])} << (8 * byte);
    }
  }
  mma_m16n8k32(d, a, b);
  for (unsigned r = 0; r < 4; ++r) p.d[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2] = d[r];
}

void test_mma() {
  Random random(3);
  std::vector<uint8_t> a(16 * 32);
  std::vector<int8_t> b(32 * 8);
  std::vector<int32_t> d(16 * 8), expected(16 * 8);
  for (auto& x : a) x = static_cast<uint8_t>(random.below(256));
  for (auto& x : b) x = static_cast<int8_t>(random.below(256) - 128);
  MmaParams params = {a.data(), b.data(), d.data()};
  void* arguments[] = {&params};
  cudaLaunchKernel(mma_kernel, dim3(1), dim3(32), arguments, 0, nullptr);
  for (int i = 0; i < 16 * 8; ++i) {
    for (int k = 0; k < 32; ++k) expected[i] += a[i / 8 * 32 + k] * b[k * 8 + i % 8];
  }
  check(d == expected, "mma of whole matrices");
}

// Every element of the four matrices is where the PTX ISA says, with rows in any place.
struct LoadParams {
  const cuda::DigitRow* rows;
  const int* places;  // [32] of the rows
  uint32_t* x;        // [32, 4]
};

void load_kernel(LoadParams p) {
  uint32_t x[4];
  load_transposed(&p.rows[p.places[threadIdx.x]], x);
  for (int i = 0; i < 4; ++i) p.x[4 * threadIdx.x + i] = x[i];
}

void test_load_transposed() {
  std::vector<cuda::DigitRow> rows(64);
  std::vector<int> places(32);
  std::vector<uint32_t> x(128);
  for (int r = 0; r < 64; ++r) {
    for (uint32_t i = 0; i < 4; ++i) rows[r].v[i] = (8u * r + 2 * i) | (8u * r + 2 * i + 1) << 16;
  }
  for (int r = 0; r < 32; ++r) places[r] = 37 * r % 64;
  LoadParams params = {rows.data(), places.data(), x.data()};
  void* arguments[] = {&params};
  cudaLaunchKernel(load_kernel, dim3(1), dim3(32), arguments, 0, nullptr);
  bool ok = true;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t column = lane / 4, row = 2 * (lane % 4);
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t low = 8 * places[8 * i + row] + column, high = 8 * places[8 * i + row + 1] + column;
      ok &= x[4 * lane + i] == (low | high << 16);
    }
  }
  check(ok, "transposed loads of four matrices");
}

void test_signed_digits() {
  bool ok = true;
  for (const int32_t q : {0, 1, -1, 127, 128, -128, -129, 0x7FFFFF, (1 << 29) - 1, -(1 << 29)}) {
    const uint32_t digits = cuda::signed_digits(q);
    int64_t value = 0;
    for (int n = 3; n >= 0; --n) value = 256 * value + static_cast<int8_t>(digits >> (8 * n));
    ok &= value == q;
  }
  check(ok, "signed digits");
}

// ---- known answers ----

struct Cuda {
  static void run(const cuda::Status& status) { check(status.ok(), status.where); }

  void project(const ProjectJob& job) {
    auto buffer = workspace_of(cuda::project_workspace(job));
    run(cuda::project(job, aligned(buffer), buffer.size() - 256, nullptr));
  }
  bool apply(const ApplyJob& job) {
    auto buffer = workspace_of(cuda::apply_workspace(job));
    run(cuda::apply(job, aligned(buffer), buffer.size() - 256, nullptr));
    return true;
  }
  void basis(const BasisJob& job) { run(cuda::basis(job, nullptr)); }
};

// Codes as the bits of one long number, drawn at random, and what they stand for.
struct PackedUpdates {
  Packing packing;
  std::vector<Update> list;
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  std::vector<std::vector<uint32_t>> columns;

  template <class Real>
  Updates<Real> draw(const Case& c, int count) {
    Random random(5);
    Updates<Real> updates;
    const int64_t bytes = (c.total() * (packing.bits + packing.choice) + 7) / 8;
    for (int i = 0; i < count; ++i) {
      list.push_back({random.bits(), 0.5 - i});
      updates.push_back({list.back().seed, list.back().weight, {}});
      columns.emplace_back();
      const size_t begin = codes.size();
      for (int64_t at = 0; at < bytes; ++at) codes.push_back(static_cast<uint8_t>(random.bits() >> 40));
      int64_t bit = 0;
      const auto next = [&](int bits) {
        uint32_t value = 0;
        for (int n = 0; n < bits; ++n, ++bit) value |= (codes[begin + bit / 8] >> bit % 8 & 1u) << n;
        return value;
      };
      for (const Block& block : c.blocks) {
        scales.push_back(std::ldexp(1.0f + static_cast<float>(random.below(100)), -3 * i));
        for (int64_t k = 0; k < block.columns; ++k) {
          const int level = 2 * static_cast<int>(next(packing.bits)) + 1 - (1 << packing.bits);
          updates.back().gamma.push_back(static_cast<Real>(scales.back() * static_cast<float>(level)));
          columns.back().push_back(static_cast<uint32_t>(k << packing.choice) + next(packing.choice));
        }
      }
    }
    for (int i = 0; i < count; ++i) updates[i].columns = columns[i].data();
    return updates;
  }
};

template <class Real>
void test_apply_packed(Basis basis) {
  for (const Packing packing :
       {Packing{1, 0}, Packing{2, 0}, Packing{4, 0}, Packing{8, 0}, Packing{1, 1}, Packing{1, 8}, Packing{1, 16}}) {
    Case c = packed(contract::is_wide<Real>);
    c.fill(3);
    PackedUpdates given = {packing, {}, {}, {}, {}};
    Case expected = c;
    expected_apply(expected, given.draw<Real>(c, 2), basis, -0.3, false);
    const auto refs = c.refs();
    const AllGammas gammas = {nullptr, given.codes.data(), given.scales.data(), packing};
    const ApplyJob job = {c.plan(), refs.data(), given.list.data(),       2,    gammas, c.total(),
                          basis,    -0.3,        contract::is_wide<Real>, false};
    auto buffer = workspace_of(cuda::apply_workspace(job));
    check(cuda::apply(job, aligned(buffer), buffer.size() - 256, nullptr).ok(), "apply launches");
    check(same_bits(c, expected), label<Real>("apply packed", basis) + " bits " + std::to_string(packing.bits) +
                                      " choice " + std::to_string(packing.choice));
  }
}

template <class Real>
void test_apply(Basis basis) {
  test_apply_columns<Real>(basis);
  test_apply_plans<Real>(basis);
  test_apply_many_columns<Real>(basis);
  test_apply_extremes<Real>(basis);
  test_apply_not_finite<Real>(basis);
  test_apply_packed<Real>(basis);
}

// Tensors that lie as vectors want them, of every dtype, and coordinates of the largest size.
void test_apply_whole_spans() {
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16}) {
    for (const int64_t columns : {5, 16, 64, 65}) {
      Case c = single(dtype, 2048, 4096, 2500, columns);
      c.fill(columns);
      auto updates = some_updates<float>(columns, 3);
      for (int64_t k = 0; k < columns; ++k) updates[2].gamma[k] = k % 2 == 0 ? 0x1.fffffep0f : -0x1.fffffep0f;
      expect_apply<float>(c, updates, Basis::rademacher, 0.7, "apply whole spans K=" + std::to_string(columns));
    }
  }
}

template <class Real>
void test_all(Basis basis) {
  test_project_columns<Real>(basis);
  test_project_plans<Real>(basis);
  test_long_pieces<Real>(basis, 5);
  test_project_extremes<Real>(basis);
  test_project_poison<Real>(basis);
  test_apply<Real>(basis);
}

// The matrix units give the same bits: columns in and between groups of 16, packed plans, extremes, poison.
void test_matrix_path() {
  setenv("FERRET_CUDA_PATH", "mma", 1);
  test_project_columns<float>(Basis::rademacher);
  test_project_plans<float>(Basis::rademacher);
  for (const double value :
       {0.0, 0x1p-149, 0x1p-107, 0x1.fffffep-106, 0x1.fffffep-105, 0x1.fffff8p-40, 0x1.fffffep0, 0x1.fffffep127}) {
    for (const double sign : {1.0, -1.0}) {
      Case c = single(Dtype::float32, 1024, 900, 900, 17);
      for (int64_t i = 0; i < 900; ++i) c.tensors[0].set(i, i < 512 ? sign * value : i % 3 * value / 2);
      expect_project<float>(c, nullptr, {kSeed, Basis::rademacher}, "matrix extreme " + std::to_string(value));
    }
  }
  test_project_poison<float>(Basis::rademacher);
  for (const int64_t columns : {5, 40}) test_long_pieces<float>(Basis::rademacher, columns);
  test_apply<float>(Basis::rademacher);
  test_apply_whole_spans();
  test_apply_many_columns<float>(Basis::rademacher, 1000);
  test_project_fold<float>();
  test_many_blocks();
  setenv("FERRET_CUDA_PATH", "fast", 1);
  Case c = single(Dtype::float32, 0, 100, 100, 3);
  auto refs = c.refs();
  float gamma[3];
  const ProjectJob job = {c.plan(), refs.data(), nullptr, {1, Basis::rademacher}, false, gamma};
  auto buffer = workspace_of(cuda::project_workspace(job));
  const auto status = cuda::project(job, aligned(buffer), buffer.size() - 256, nullptr);
  check(!status.ok() && std::strstr(status.where, "simt or mma") != nullptr, "an unknown path is an error");
  setenv("FERRET_CUDA_PATH", "mma", 1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s tests/golden.txt\n", argv[0]);
    return 2;
  }
  unsetenv("FERRET_CUDA_PATH");
  check(cuda::takes_matrix_units(Basis::rademacher, false), "the matrix units are the default");
  setenv("FERRET_CUDA_PATH", "simt", 1);
  for (const Basis basis : kBases) {
    test_all<float>(basis);
    test_all<double>(basis);
  }
  test_project_fold<float>();
  test_project_fold<double>();
  test_many_blocks();
  test_workspace();
  test_mma();
  test_load_transposed();
  test_signed_digits();
  Cuda backend;
  golden::run(golden::read(argv[1]), backend, "emulator");
  test_matrix_path();
  golden::run(golden::read(argv[1]), backend, "emulator, matrix units");
  return testing::summary();
}

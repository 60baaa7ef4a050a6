// Memory that runs out at every point in turn: the backend throws std::bad_alloc, and apply has changed nothing.
#include <atomic>
#include <cstdlib>
#include <new>

#include "plan_cases.h"
#include "testing.h"
#include "threads.h"

using namespace ferret;
using testing::check;

static std::atomic<int64_t> allocations_left{INT64_MAX};
static thread_local bool exempt = false;  // the tests' own threads are made whatever happens

// Not inlined, since GCC would take malloc and delete, or new and free, for a pair that does not match.
[[gnu::noinline]] void* operator new(size_t bytes) {
  if (!exempt && allocations_left.fetch_sub(1) <= 0) throw std::bad_alloc();
  void* memory = std::malloc(bytes == 0 ? 1 : bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

static cpu::Threads threads(int count) {
  return {count, [count](const std::function<void()>& worker) {
            exempt = true;
            testing::threads(count).run(worker);
            exempt = false;
          }};
}

// Whether f() got along with that many allocations. What it throws must be std::bad_alloc.
template <class F>
bool fits(int64_t allocations, F f) {
  allocations_left = allocations;
  try {
    f();
    allocations_left = INT64_MAX;
    return true;
  } catch (const std::bad_alloc&) {
    allocations_left = INT64_MAX;
    return false;
  }
}

template <class Real>
static void test_apply(int count, const std::string& name) {
  constexpr bool wide = sizeof(Real) == 8;
  cases::Case fresh = cases::packed(wide);
  fresh.fill(4);
  cases::Updates<Real> updates = {{7, 0.25, {}}, {8, -1.5, {}}};
  cases::Random random(5);
  std::vector<Real> gammas;
  for (auto& update : updates) {
    for (int64_t k = 0; k < fresh.total(); ++k) update.gamma.push_back(static_cast<Real>(random.value()));
    gammas.insert(gammas.end(), update.gamma.begin(), update.gamma.end());
  }
  cases::Case expected = fresh;
  cases::expected_apply(expected, updates, Basis::gaussian, -0.7, false);

  const Update rows[] = {{7, 0.25}, {8, -1.5}};
  int64_t allocations = 0;
  for (;; ++allocations) {
    cases::Case params = fresh;
    const auto refs = params.refs();
    const ApplyJob job = {params.plan(), refs.data(),     rows, 2,    {gammas.data()},
                          fresh.total(), Basis::gaussian, -0.7, wide, false};
    if (fits(allocations, [&] { cpu::apply(job, threads(count)); })) {
      check(cases::same_bits(params, expected), "apply with enough memory: " + name);
      break;
    }
    check(cases::same_bits(params, fresh), "apply after " + std::to_string(allocations) + " allocations: " + name);
  }
  check(allocations >= 5 * 3, "apply of 5 blocks and 2 updates takes memory: " + name);
}

template <class Real>
static void test_project(int count, const std::string& name) {
  constexpr bool wide = sizeof(Real) == 8;
  cases::Case now = cases::packed(wide);
  now.fill(6);
  const auto expected = cases::expected_gamma<Real>(now, nullptr, {9, Basis::uniform});
  const auto refs = now.refs();
  std::vector<Real> gamma(now.total());
  int64_t allocations = 0;
  while (!fits(allocations, [&] {
    cpu::project({now.plan(), refs.data(), nullptr, {9, Basis::uniform}, wide, gamma.data()}, threads(count));
  })) {
    ++allocations;
  }
  check(allocations >= 5, "project of 5 blocks takes memory: " + name);
  check(gamma == expected, "project with enough memory: " + name);
}

int main() {
  for (const std::string& isa : cpu::available_isas()) {
    cpu::set_isa(isa);
    for (const int count : {1, 3}) {
      const std::string name = isa + ", " + std::to_string(count) + " threads";
      test_apply<float>(count, name + ", float32");
      test_apply<double>(count, name + ", float64");
      test_project<float>(count, name + ", float32");
      test_project<double>(count, name + ", float64");
    }
  }
  return testing::summary();
}

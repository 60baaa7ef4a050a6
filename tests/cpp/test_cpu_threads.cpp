// Many callers at once, while the path changes under them: they share inputs and processor, and must share nothing else.
// ThreadSanitizer is what this test is for; without it, it compares bits.
#include <atomic>

#include "plan_cases.h"
#include "testing.h"
#include "threads.h"

using namespace ferret;
using testing::check;

static constexpr int kCallers = 6, kCalls = 4;

// What a caller asks for, one after the other, on inputs that all callers read.
struct Calls {
  Basis basis;
  bool wide;
  cases::Case old_tensors, new_tensors;
  std::vector<float> gammas;
  std::vector<double> wide_gammas;

  Calls(Basis kind, bool is_wide)
      : basis(kind), wide(is_wide), old_tensors(cases::packed(is_wide)), new_tensors(cases::packed(is_wide)) {
    old_tensors.fill(1);
    new_tensors.fill(2);
    cases::Random random(3);
    for (int64_t i = 0; i < 2 * old_tensors.total(); ++i) wide_gammas.push_back(random.value());
    gammas.assign(wide_gammas.begin(), wide_gammas.end());
  }

  // project, apply to a copy and one column of a basis, as bytes.
  std::vector<char> run(uint64_t seed, int threads) const {
    std::vector<char> result = projected(seed, threads);
    cases::Case params = old_tensors;
    const auto refs = params.refs();
    const Update updates[] = {{seed, 0.25}, {seed + 1, -1.5}};
    const void* coordinates = wide ? static_cast<const void*>(wide_gammas.data()) : gammas.data();
    const bool done =
        cpu::apply({params.plan(), refs.data(), updates, 2, {coordinates}, params.total(), basis, -0.7, wide, false},
                   testing::threads(threads));
    if (!done) return {};
    for (const auto& tensor : params.tensors) result.insert(result.end(), tensor.bytes().begin(), tensor.bytes().end());
    cases::Tensor column(Dtype::bfloat16, 5000);
    cpu::basis({{seed, basis}, 3, 77, 9000, 5000, column.ref()}, testing::threads(threads));
    result.insert(result.end(), column.bytes().begin(), column.bytes().end());
    return result;
  }

 private:
  std::vector<char> projected(uint64_t seed, int threads) const {
    cases::Case now = new_tensors, before = old_tensors;  // copies, since a TensorRef may be written to
    const auto now_refs = now.refs(), before_refs = before.refs();
    std::vector<char> gamma(now.total() * (wide ? sizeof(double) : sizeof(float)));
    cpu::project({now.plan(), now_refs.data(), before_refs.data(), {seed, basis}, wide, gamma.data()},
                 testing::threads(threads));
    return gamma;
  }
};

int main() {
  std::vector<Calls> inputs;
  for (const Basis basis : {Basis::rademacher, Basis::uniform, Basis::gaussian}) {
    for (const bool wide : {false, true}) inputs.emplace_back(basis, wide);
  }
  std::vector<std::vector<char>> got(kCallers * kCalls);
  const auto input_of = [&](int call) -> const Calls& { return inputs[call % inputs.size()]; };

  std::atomic<bool> stop{false};
  std::thread chooser([&] {  // the callers may be the first to ask for a path
    const auto names = cpu::available_isas();
    for (size_t i = 0; !stop; ++i) {
      cpu::set_isa(names[i % names.size()]);
      std::this_thread::yield();
    }
  });
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller) {
    callers.emplace_back([&, caller] {
      for (int call = caller; call < kCallers * kCalls; call += kCallers) {
        got[call] = input_of(call + caller).run(call, 1 + caller % 3);
      }
    });
  }
  for (std::thread& thread : callers) thread.join();
  stop = true;
  chooser.join();

  cpu::set_isa("scalar");
  for (int call = 0; call < kCallers * kCalls; ++call) {
    const auto expected = input_of(call + call % kCallers).run(call, 1);
    check(!expected.empty() && got[call] == expected, "call " + std::to_string(call) + " among others, beside itself");
  }
  return testing::summary();
}

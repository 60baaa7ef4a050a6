// The operators' schemas and their CPU implementation.
#include <new>
#include <stdexcept>
#include <string>

#include "../cpu/cpu.h"
#include "jobs.h"

namespace ferret {
namespace {

thread_local bool pool_in_use = false;  // torch's threads belong to the thread that first called for them

cpu::Threads torch_threads() {
  const int count = static_cast<int>(torch::stable::get_num_threads());
  return {count, [count](const std::function<void()>& worker) {
            pool_in_use = true;
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) worker();
            });
          }};
}

// Errors of the torch-free core, all of them before an element of a parameter has changed.
template <class F>
auto with_torch_errors(const char* out_of_memory, F f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    STD_TORCH_CHECK(false, out_of_memory);
  } catch (const std::runtime_error& error) {
    STD_TORCH_CHECK(false, error.what());
  }
}

struct Cpu {
  static void project(const ProjectJob& job, const Tensor&) {
    with_torch_errors("project: out of memory", [&] { cpu::project(job, torch_threads()); });
  }
  static void apply(const ApplyJob& job, const Tensor&) {
    const bool done = with_torch_errors("apply: out of memory; the parameters are untouched",
                                        [&] { return cpu::apply(job, torch_threads()); });
    STD_TORCH_CHECK(done, "apply: gamma has a NaN or infinity; the parameters are untouched");
  }
  static void basis(const BasisJob& job, const Tensor&) {
    with_torch_errors("basis: out of memory", [&] { cpu::basis(job, torch_threads()); });
  }
};

std::string cpu_isa() {
  return with_torch_errors("cpu_isa: out of memory", [] { return cpu::active_isa(); });
}

void set_cpu_isa(std::string name) {
  with_torch_errors("set_cpu_isa: out of memory", [&] { cpu::set_isa(name); });
}

bool threads_in_use() { return pool_in_use; }

}  // namespace

STABLE_TORCH_LIBRARY(ferret, library) {
  library.def("project(Tensor delta, int seed, int k, int kind, int offset, int numel) -> Tensor");
  library.def(
      "project_blocks(Tensor[] new, Tensor[] old, Tensor blocks, Tensor pieces, int total, int seed, int kind) -> "
      "Tensor");
  library.def(
      "reconstruct(Tensor gamma, int seed, int count, int kind, int offset, int numel, ScalarType dtype) -> Tensor");
  library.def(
      "apply_blocks_(Tensor(a!)[] params, Tensor blocks, Tensor pieces, Tensor gammas, int[] seeds, float[] weights, "
      "float alpha, int kind) -> ()");
  library.def("basis_(Tensor(a!) out, int seed, int k, int kind, int offset, int numel) -> ()");
  library.def("cpu_isa() -> str");
  library.def("set_cpu_isa(str name) -> ()");
  library.def("threads_in_use() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(ferret, CPU, library) { Operators<Cpu>::implement(library); }

STABLE_TORCH_LIBRARY_IMPL(ferret, CompositeExplicitAutograd, library) {
  library.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  library.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
  library.impl("threads_in_use", TORCH_BOX(&threads_in_use));
}

}  // namespace ferret

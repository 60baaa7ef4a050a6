// The operators' schemas and their CPU implementation.
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>

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

// The torch-free core fails, if it does, before an element of a parameter has changed.
template <class F>
auto or_say(const char* out_of_memory, F f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    throw std::runtime_error(out_of_memory);  // without the place in our sources, as STD_TORCH_CHECK would have it
  }
}

struct Cpu {
  static void project(const ProjectJob& job, const Tensor&) {
    or_say("project: out of memory", [&] { cpu::project(job, torch_threads()); });
  }
  static void apply(const ApplyJob& job, const Tensor&) {
    const bool done =
        or_say("apply: out of memory; the parameters are untouched", [&] { return cpu::apply(job, torch_threads()); });
    STD_TORCH_CHECK(done, "apply: gamma has a NaN or infinity; the parameters are untouched");
  }
  static void basis(const BasisJob& job, const Tensor&) {
    or_say("basis: out of memory", [&] { cpu::basis(job, torch_threads()); });
  }
};

std::tuple<Tensor, Tensor> pack(Tensor gammas, Tensor blocks, int64_t total, int64_t bits, int64_t choice) {
  const Packing packing = packing_of("pack", bits, choice);
  const Block* table = TablePlan::blocks_of("pack", blocks, total, packing.choice);
  STD_TORCH_CHECK(gammas.is_contiguous() && gammas.scalar_type() == ScalarType::Float && total >= 0 &&
                      total <= INT64_MAX >> packing.choice && gammas.numel() == total << packing.choice,
                  "pack: gammas must be float32 and as many as the plan's columns");
  Tensor codes =
      allocated("pack", [&] { return torch::stable::new_zeros(gammas, {packing.bytes(total)}, ScalarType::Byte); });
  Tensor scales = allocated("pack", [&] { return torch::stable::new_zeros(gammas, {blocks.size(0)}); });
  const PackJob job = {table,
                       blocks.size(0),
                       total,
                       static_cast<const float*>(gammas.data_ptr()),
                       packing,
                       static_cast<uint8_t*>(codes.data_ptr()),
                       static_cast<float*>(scales.data_ptr())};
  or_say("pack: out of memory", [&] { cpu::pack(job, torch_threads()); });
  return {codes, scales};
}

std::tuple<Tensor, Tensor> unpack(Tensor codes, Tensor scales, Tensor blocks, int64_t total, int64_t bits,
                                  int64_t choice) {
  const Packing packing = packing_of("unpack", bits, choice);
  const Block* table = TablePlan::blocks_of("unpack", blocks, total, packing.choice);
  const AllGammas packed = packed_gammas("unpack", codes, scales, 1, total, blocks.size(0), packing);
  Tensor values = allocated("unpack", [&] { return torch::stable::new_zeros(scales, {total}, ScalarType::Float); });
  Tensor columns = allocated("unpack", [&] { return torch::stable::new_zeros(scales, {total}, ScalarType::Long); });
  const UnpackJob job = {table,
                         blocks.size(0),
                         total,
                         packed,
                         static_cast<float*>(values.data_ptr()),
                         static_cast<int64_t*>(columns.data_ptr())};
  or_say("unpack: out of memory", [&] { cpu::unpack(job, torch_threads()); });
  return {values, columns};
}

std::string cpu_isa() {
  return or_say("cpu_isa: out of memory", [] { return cpu::active_isa(); });
}

void set_cpu_isa(std::string name) {
  or_say("set_cpu_isa: out of memory", [&] { cpu::set_isa(name); });
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
      "float alpha, int kind, int? rounding_seed=None) -> ()");
  library.def(
      "apply_packed_(Tensor(a!)[] params, Tensor blocks, Tensor pieces, int total, Tensor codes, Tensor scales, "
      "int bits, int choice, int[] seeds, float[] weights, float alpha, int kind, int? rounding_seed=None) -> ()");
  library.def("pack(Tensor gammas, Tensor blocks, int total, int bits, int choice) -> (Tensor, Tensor)");
  library.def(
      "unpack(Tensor codes, Tensor scales, Tensor blocks, int total, int bits, int choice) -> (Tensor, Tensor)");
  library.def("basis_(Tensor(a!) out, int seed, int k, int kind, int offset, int numel) -> ()");
  library.def("cpu_isa() -> str");
  library.def("set_cpu_isa(str name) -> ()");
  library.def("threads_in_use() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(ferret, CPU, library) {
  Operators<Cpu>::implement(library);
  library.impl("pack", TORCH_BOX(&pack));
  library.impl("unpack", TORCH_BOX(&unpack));
}

STABLE_TORCH_LIBRARY_IMPL(ferret, CompositeExplicitAutograd, library) {
  library.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  library.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
  library.impl("threads_in_use", TORCH_BOX(&threads_in_use));
}

}  // namespace ferret

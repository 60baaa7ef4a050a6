// The operators' CUDA implementation: torch's memory, device and stream around csrc/cuda. Each call is an NVTX range.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <nvtx3/nvToolsExt.h>

#include <string>

#include "../cuda/ferret_cuda.h"
#include "jobs.h"

namespace ferret {
namespace {

class NvtxRange {
 public:
  explicit NvtxRange(const std::string& name) { nvtxRangePushA(name.c_str()); }
  ~NvtxRange() { nvtxRangePop(); }
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;
};

CUstream_st* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<CUstream_st*>(stream);
}

// Freed when it leaves scope: the allocator hands memory out again only to work behind this one on the same stream.
Tensor workspace_of(const char* op, const Tensor& like, size_t bytes) {
  return allocated(op, [&] { return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte); });
}

void check(const char* op, cuda::Status status) {
  STD_TORCH_CHECK(status.ok(), op, ": CUDA error ", status.code, " (", status.text, ") in ", status.where);
}

int64_t elements(const Plan& plan) {
  int64_t sum = 0;
  for (int64_t p = 0; p < plan.num_pieces; ++p) sum += plan.pieces[p].length;
  return sum;
}

std::string shape_of(const Plan& plan) {
  int64_t columns = 0;
  for (int64_t b = 0; b < plan.num_blocks; ++b) columns += plan.blocks[b].columns;
  return " d=" + std::to_string(elements(plan)) + " L=" + std::to_string(plan.num_blocks) +
         " K=" + std::to_string(columns);
}

struct Cuda {
  static void project(const ProjectJob& job, const Tensor& like) {
    const NvtxRange range("ferret::project" + shape_of(job.plan));
    const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
    const size_t bytes = cuda::project_workspace(job);
    const Tensor workspace = workspace_of("project", like, bytes);
    check("project", cuda::project(job, workspace.data_ptr(), bytes, current_stream(like)));
  }

  static void apply(const ApplyJob& job, const Tensor& like) {
    const NvtxRange range("ferret::apply" + shape_of(job.plan) + " N=" + std::to_string(job.num_updates));
    const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
    const size_t bytes = cuda::apply_workspace(job);
    const Tensor workspace = workspace_of("apply", like, bytes);
    check("apply", cuda::apply(job, workspace.data_ptr(), bytes, current_stream(like)));
  }

  static void basis(const BasisJob& job, const Tensor& like) {
    const NvtxRange range("ferret::basis d=" + std::to_string(job.count));
    const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
    check("basis", cuda::basis(job, current_stream(like)));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ferret, CUDA, library) { Operators<Cuda>::implement(library); }

}  // namespace ferret

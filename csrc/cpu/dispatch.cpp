#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace ferret::cpu {
namespace {

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> kernels = {&kScalarKernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) kernels.push_back(&kAvx2Kernels);
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    kernels.push_back(&kAvx512Kernels);
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vpopcntdq") &&
        __builtin_cpu_supports("gfni")) {
      kernels.push_back(&kAvx512VnniKernels);
    }
  }
#elif defined(__aarch64__)
  kernels.push_back(&kNeonKernels);  // part of every such processor
#endif
  return kernels;
}

const Kernels& find_kernels(const std::string& name) {
  std::string names;
  for (const Kernels* kernels : available_kernels()) {
    if (kernels->name == name) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::runtime_error("FERRET_CPU_ISA: expected one of " + names + " (what this processor can run), got '" + name +
                           "'");
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels& active_kernels() {
  const Kernels* kernels = active.load();
  if (kernels == nullptr) {
    const char* forced = std::getenv("FERRET_CPU_ISA");
    kernels = forced != nullptr && *forced != '\0' ? &find_kernels(forced) : available_kernels().back();
    active.store(kernels);
  }
  return *kernels;
}

uint32_t philox_checksum(uint64_t seed, uint32_t columns, uint64_t calls) {
  return active_kernels().philox_checksum(seed, columns, calls);
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available_kernels()) names.emplace_back(kernels->name);
  return names;
}

std::string active_isa() { return active_kernels().name; }

void set_isa(const std::string& name) { active.store(&find_kernels(name)); }

std::vector<BlockPieces> pieces_by_block(const Plan& plan) {
  std::vector<BlockPieces> result(plan.num_blocks);
  const Piece* piece = plan.pieces;
  for (int64_t block = 0; block < plan.num_blocks; ++block) {
    result[block].begin = piece;
    while (piece != plan.pieces + plan.num_pieces && piece->block == block) ++piece;
    result[block].end = piece;
  }
  return result;
}

}  // namespace ferret::cpu

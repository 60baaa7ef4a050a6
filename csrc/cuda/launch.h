// What every launcher shares: checked launches, and where the pieces of a plan's blocks are. For .cu files, which nvcc
// gives the declarations of the CUDA runtime.
#pragma once

#include <algorithm>
#include <vector>

#include "ferret_cuda.h"

namespace ferret::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kThreads = 128;  // of a CTA, in all kernels
inline constexpr int kWarps = kThreads / kWarp;
inline constexpr int64_t kMaxCtas = 0x7FFFFFFF;

inline Status check(cudaError_t code, const char* where) { return {code, cudaGetErrorString(code), where}; }

// Kernels take one struct of parameters and walk their work items with a stride of the grid, so any number of CTAs will
// do.
template <class Params>
Status launch(const char* where, void (*kernel)(Params), int64_t ctas, CUstream_st* stream, Params params) {
  if (ctas == 0) return check(cudaSuccess, where);
  void* arguments[] = {&params};
  const dim3 grid(static_cast<unsigned>(clamp(ctas, int64_t{1}, kMaxCtas)));
  return check(cudaLaunchKernel(kernel, grid, dim3(kThreads), arguments, 0, stream), where);
}

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// The pieces of one block: [first, last) of the plan's, and the stream elements from the first of them to the last.
struct BlockPieces {
  int64_t first, last;
  Range elements;

  FERRET_HD bool empty() const { return elements.begin == elements.end; }
};

// One entry a block. Pieces of length zero own no element.
inline std::vector<BlockPieces> pieces_by_block(const Plan& plan) {
  std::vector<BlockPieces> result;
  result.reserve(plan.num_blocks);
  int64_t p = 0;
  for (int64_t b = 0; b < plan.num_blocks; ++b) {
    BlockPieces block = {p, p, {0, 0}};
    for (; p < plan.num_pieces && plan.pieces[p].block == b; ++p) {
      const Piece& piece = plan.pieces[p];
      if (piece.length == 0) continue;
      if (block.empty()) block.elements.begin = static_cast<uint64_t>(piece.offset);
      block.elements.end = static_cast<uint64_t>(piece.offset + piece.length);
    }
    block.last = p;
    result.push_back(block);
  }
  return result;
}

inline int64_t size(Range range) { return static_cast<int64_t>(range.end - range.begin); }

// The aligned runs of 2^shift elements that a block's elements touch.
inline Range spans_of(const BlockPieces& pieces, int shift) {
  if (pieces.empty()) return {0, 0};
  return {pieces.elements.begin >> shift, ((pieces.elements.end - 1) >> shift) + 1};
}

}  // namespace ferret::cuda

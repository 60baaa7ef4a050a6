// The float64 fold of project: a tree of radix 64 over the stream index (docs/streams.md, "project", step 3).
#pragma once

#include "elements.cuh"

namespace ferret::cuda {

// Folds the values of consecutive nodes, added in ascending order, into the nodes of up to `levels` levels above.
// open[i] is the sum so far of the level i + 1 node that the next value falls into. A missing node is one of value 0
// and changes nothing.
template <int levels>
struct FoldTree {
  double open[levels] = {};

  __device__ __forceinline__ void add(uint64_t node, double value) {
    open[0] += value;
#pragma unroll
    for (int i = 0; i + 1 < levels; ++i) {
      ++node;
      if (node % kFoldRadix != 0) return;
      node = node / kFoldRadix - 1;
      open[i + 1] += open[i];
      open[i] = 0;
    }
  }

  __device__ __forceinline__ double root() const {
    double sum = open[0];
#pragma unroll
    for (int i = 1; i < levels; ++i) sum = open[i] + sum;
    return sum;
  }
};

// One pass: the sums of nodes of level `from`, laid out [block][node][column], become those of level `to`. first_in and
// first_out are where a block's sums begin. The last pass goes to kTopLevel, one node a block, and writes gamma.
struct FoldParams {
  const Block* blocks;        // [L]
  const BlockPieces* pieces;  // [L]
  int64_t num_blocks;
  int from, to;
  const int64_t* first_in;   // [L]
  const int64_t* first_out;  // [L]
  int64_t count;             // sums of level `to`
  const double* in;
  double* out;  // null in the last pass
  void* gamma;  // [K], used in the last pass
  Basis basis;
  bool wide;
};

// Sum of a node's children for one column. Loads of one node do not wait for each other's sums.
__device__ inline double fold_children(const double* in, Range nodes, Range children, int64_t columns) {
  FoldTree<kTopLevel + 1> tree;
#pragma unroll 4
  for (uint64_t child = children.begin; child < children.end; ++child) {
    tree.add(child, in[static_cast<int64_t>(child - nodes.begin) * columns]);
  }
  return tree.root();
}

// A thread makes one sum. `from` nodes of a block with no piece at hand do not exist, and its sum is 0.
__global__ void __launch_bounds__(kThreads) fold_kernel(FoldParams p) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < p.count; i += stride) {
    const int64_t b = find_last(p.num_blocks, i, [&](int64_t at) { return p.first_out[at]; });
    const Block& block = p.blocks[b];
    const int64_t node = (i - p.first_out[b]) / block.columns, column = (i - p.first_out[b]) % block.columns;
    double sum = 0;
    if (!p.pieces[b].empty()) {
      const Range nodes = nodes_of(p.pieces[b].elements, p.from);
      const uint64_t parent = nodes_of(p.pieces[b].elements, p.to).begin + node;
      const int shift = node_shift(p.to) - node_shift(p.from);
      const uint64_t begin = parent << shift, end = (parent + 1) << shift;
      const Range children = {begin < nodes.begin ? nodes.begin : begin, nodes.end < end ? nodes.end : end};
      sum = fold_children(p.in + p.first_in[b] + column, nodes, children, block.columns);
    }
    if (p.out != nullptr) {
      p.out[i] = sum;
      continue;
    }
    const double gamma = sum * project_factor(p.basis, block.numel, block.columns);
    if (p.wide) {
      static_cast<double*>(p.gamma)[block.start + column] = gamma;
    } else {
      static_cast<float*>(p.gamma)[block.start + column] = static_cast<float>(gamma);
    }
  }
}

}  // namespace ferret::cuda

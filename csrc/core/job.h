// What a backend is asked to do, as plain data: the same for CPU and CUDA. Shapes: T tensors, L blocks, P pieces, N updates,
// K = total coordinates of the plan.
#pragma once

#include "block_plan.h"
#include "half.h"

namespace ferret {

struct TensorRef {
  void* data;  // contiguous; only read unless it is a parameter of an ApplyJob
  Dtype dtype;
};

struct Plan {
  const Block* blocks;  // [L]
  int64_t num_blocks;
  const Piece* pieces;  // [P], sorted by block, then by offset; pieces of a block do not overlap
  int64_t num_pieces;
};

struct Stream {
  uint64_t seed;
  Basis basis;
};

// gamma = 1/(rho K) V^T (before - now), or of `now` alone.
struct ProjectJob {
  Plan plan;
  const TensorRef* now;     // [T]
  const TensorRef* before;  // [T] or null
  Stream stream;
  bool wide;    // working precision float64
  void* gamma;  // [K], working precision
};

struct Update {
  uint64_t seed;
  double weight;
};

// param += alpha * sum_i weight_i V_i gamma_i, or, with `overwrite`, param = that.
struct ApplyJob {
  Plan plan;
  const TensorRef* params;  // [T]
  const Update* updates;    // [N]
  int64_t num_updates;
  const void* gammas;  // [N, K], working precision
  int64_t total;       // K
  Basis basis;
  double alpha;
  bool wide;
  bool overwrite;
};

// out[i] = v_k[offset + i], column k of a block of `numel` elements.
struct BasisJob {
  Stream stream;
  uint32_t k;
  int64_t offset;
  int64_t numel;
  int64_t count;
  TensorRef out;
};

}  // namespace ferret

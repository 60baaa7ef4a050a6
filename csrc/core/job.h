// What a backend is asked to do, as plain data: the same for CPU and CUDA. Shapes: T tensors, L blocks, P pieces, N updates,
// K = total coordinates of the plan.
#pragma once

#include "block_plan.h"
#include "half.h"
#include "packed.h"

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

// How results are rounded to 16 bits.
struct Rounding {
  bool stochastic = false;  // else to nearest
  uint64_t seed = 0;
};

// param += alpha * sum_i weight_i V_i gamma_i, or, with `overwrite`, param = that. Blocks count their coordinates; where these
// are packed with a choice, a basis has 2^choice times as many columns.
struct ApplyJob {
  Plan plan;
  const TensorRef* params;  // [T]
  const Update* updates;    // [N]
  int64_t num_updates;
  AllGammas gammas;
  int64_t total;  // K
  Basis basis;
  double alpha;
  bool wide;
  bool overwrite;
  Rounding rounding = {};  // not with `overwrite`
};

// Coordinates as codes: of every 2^choice candidates the one of the largest magnitude. Only the CPU does this and its inverse.
struct PackJob {
  const Block* blocks;  // [L]; columns and start count codes
  int64_t num_blocks;
  int64_t total;        // K
  const float* gammas;  // [K 2^choice]
  Packing packing;
  uint8_t* codes;  // [packing.bytes(K)]
  float* scales;   // [L]
};

struct UnpackJob {
  const Block* blocks;  // [L]
  int64_t num_blocks;
  int64_t total;     // K
  AllGammas packed;  // of one update
  float* values;     // [K]
  int64_t* columns;  // [K], within the block's basis
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

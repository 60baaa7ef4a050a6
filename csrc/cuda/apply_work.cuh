// What apply's kernels work on: blocks, and the coordinates of an update and block as integers.
#pragma once

#include "prepare.cuh"

namespace ferret::cuda {

// An item is what a warp takes at a time: some spans of 128 elements.
struct ApplyBlock {
  Block block;
  BlockPieces pieces;
  int64_t index;  // of all L blocks
  uint64_t first_group_of_spans;
  int64_t first_item;
  int64_t first_scale;
};

struct ApplyParams {
  const ApplyBlock* blocks;  // those that this kernel takes
  int64_t listed;
  int64_t num_blocks;  // L
  const Piece* pieces;
  const TensorRef* params;
  const Update* updates;
  int64_t num_updates;
  int64_t total;
  int64_t num_groups;
  int64_t items;
  bool overwrite;
  Rounding rounding;
  Coordinates coordinates;

  __device__ __forceinline__ const ApplyBlock& block_of(int64_t item) const {
    return blocks[find_last(listed, item, [&](int64_t at) { return blocks[at].first_item; })];
  }
};

// The coordinates of an update and block, and the scales of their groups.
template <class Real>
struct Integers {
  const int32_t* limbs[2];
  const uint32_t* columns;
  const Real* scales;

  __device__ __forceinline__ Integers(const ApplyParams& p, const ApplyBlock& block, int64_t update)
      : limbs{p.coordinates.integers[0] + update * p.total + block.block.start,
              p.coordinates.integers[1] + update * p.total + block.block.start},
        columns(p.coordinates.columns + update * p.total + block.block.start),
        scales(static_cast<const Real*>(p.coordinates.scales) + update * p.num_groups + block.first_scale) {}
};

// T += weight H for one update.
template <int n, class Real>
__device__ __forceinline__ void add_update(const ApplyParams& p, const ApplyBlock& block, int64_t update,
                                           const Real (&sum)[n], Real (&total)[n]) {
  const Real weight = static_cast<const Real*>(p.coordinates.weights)[update * p.num_blocks + block.index];
#pragma unroll
  for (int j = 0; j < n; ++j) total[j] = fused_multiply_add(sum[j], weight, total[j]);
}

// x = x + T C, or NaN where a coordinate is not finite.
template <int n, class Real>
__device__ __forceinline__ void add_total(const ApplyParams& p, const ApplyBlock& block, const Real (&total)[n],
                                          Real (&x)[n]) {
  const bool poisoned = *p.coordinates.not_finite != 0;
  const Real factor = poisoned ? Limits<Real>::nan : static_cast<const Real*>(p.coordinates.factors)[block.index];
#pragma unroll
  for (int j = 0; j < n; ++j) x[j] = fused_multiply_add(total[j], factor, x[j]);
}

// Stochastic rounding of x, the elements of the span that starts at `start`, where the run has them.
template <int n, class Places, class Real>
__device__ __forceinline__ void round_by_chance(const ApplyParams& p, uint64_t start, const Run& run, Places places,
                                                Real (&x)[n]) {
  const Dtype dtype = p.params[run.tensor].dtype;
  if (size_of(dtype) != 2) return;
  constexpr int row = Places::row;  // starts at a multiple of its length, so one call has it
  static_assert(kRoundingElements % row == 0);
  Words words = {};
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const uint64_t j = start + places[i];
    if (i % row == 0) words = rounding_words(p.rounding.seed, j / kRoundingElements);
    if (!run.has(places[i])) continue;
    const uint32_t random = rounding_bits(words, static_cast<int>(j % kRoundingElements));
    const float narrow = static_cast<float>(x[i]);
    x[i] = dtype == Dtype::bfloat16 ? round_stochastically(narrow, random, bfloat16_t())
                                    : round_stochastically(narrow, random, float16_t());
  }
}

// H of up to `n` elements: groups are folded into it in ascending order.
template <int n, class Real>
struct GroupFold {
  Real run[n] = {}, sum[n] = {};

  __device__ __forceinline__ void add(const Real (&group)[n], Real scale, int64_t g) {
    const bool closes = g % kFoldRadix == kFoldRadix - 1;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      run[i] = fused_multiply_add(group[i], scale, run[i]);
      if (closes) {
        sum[i] += run[i];
        run[i] = 0;
      }
    }
  }
  __device__ __forceinline__ void close() {
#pragma unroll
    for (int i = 0; i < n; ++i) sum[i] += run[i];
  }
};

}  // namespace ferret::cuda

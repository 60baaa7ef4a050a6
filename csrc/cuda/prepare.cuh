// Coordinates -> integers under a scale per group and per block (docs/streams.md, "reconstruct and apply", steps 1, 2
// and the factors of 5 and 6), on the device, so that apply waits for nothing.
#pragma once

#include "elements.cuh"

namespace ferret::cuda {

// Shapes: L blocks, N updates, K coordinates, S groups of all blocks together.
struct Coordinates {
  int32_t* integers[2];  // [N, K] each limb
  uint32_t* columns;     // [N, K], of the basis
  void* scales;          // [N, S] working precision, in units of 2^(n* of update and block)
  int32_t* exponents;    // [N, L], n*
  void* weights;         // [N, L] working precision, in units of 2^N of the block
  void* factors;         // [L] working precision, C
  int32_t* not_finite;   // [1], 0 before
};

struct PrepareParams {
  const Block* blocks;         // [L]
  const int64_t* first_group;  // [L]
  int64_t num_blocks;
  const Update* updates;  // [N]
  int64_t num_updates;
  AllGammas gammas;
  int64_t total;       // K
  int64_t num_groups;  // S
  Basis basis;
  double alpha;
  Coordinates to;
};

// The largest over the CTA of every thread's n; all threads get it.
__device__ inline int max_of_cta(int n) {
  __shared__ int of_warp[kWarps];
  const int tid = static_cast<int>(threadIdx.x);
  n = __reduce_max_sync(kAllLanes, n);
  __syncthreads();
  if (tid % kWarp == 0) of_warp[tid / kWarp] = n;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) n = max(n, of_warp[warp]);
  return n;
}

// The largest exponent among coordinates from, from + step, .. below count.
template <class Real>
__device__ __forceinline__ int largest_exponent(const Gammas<Real>& gammas, int64_t from, int64_t step, int64_t count) {
  int n = kZeroExponent;
  for (int64_t k = from; k < count; k += step) n = max(n, exponent_or_zero(gammas.value(k)));
  return n;
}

// A CTA takes one (update, block): first n*, then a warp a group of 64 columns.
template <class Real>
__global__ void __launch_bounds__(kThreads) quantise_kernel(PrepareParams p) {
  constexpr int limit = Working<Real>::max_block_exponent;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp;
  for (int64_t item = blockIdx.x; item < p.num_updates * p.num_blocks; item += gridDim.x) {
    const int64_t update = item / p.num_blocks, b = item % p.num_blocks;
    const Block& block = p.blocks[b];
    const int64_t base = update * p.total + block.start;
    const auto gammas = p.gammas.of<Real>(update, p.total, b, p.num_blocks, block.start);
    const int largest = max_of_cta(largest_exponent(gammas, tid, kThreads, block.columns));
    const int block_exponent = largest == kZeroExponent ? 0 : clamp(largest, -limit, limit);
    if (tid == 0) {
      p.to.exponents[item] = block_exponent;
      if (!is_finite_exponent<Real>(largest)) *p.to.not_finite = 1;
    }
    Real* scales = static_cast<Real*>(p.to.scales) + update * p.num_groups + p.first_group[b];
    for (int64_t first = tid / kWarp * kGroup; first < block.columns; first += kWarps * kGroup) {
      const int64_t end = min(first + kGroup, block.columns);
      int n = __reduce_max_sync(kAllLanes, largest_exponent(gammas, first + lane, kWarp, end));
      n = clamp(n, block_exponent - Working<Real>::group_range, Limits<Real>::max_exponent);
      if (lane == 0) scales[first / kGroup] = power_of_two(n - kCoordinateBits - block_exponent, Real());
      const Scale<Real> scale(kCoordinateBits, n);
      for (int64_t k = first + lane; k < end; k += kWarp) {
        const Limbs c = to_fixed_point(scale(gammas.value(k)), kCoordinateBits);
        p.to.integers[0][base + k] = c.hi;
        if constexpr (Working<Real>::limbs == 2) p.to.integers[1][base + k] = c.lo;
        p.to.columns[base + k] = gammas.column(k);
      }
    }
  }
}

// x 2^e, rounded once: down to e = -1024 two normal factors do it, and only the second product can round.
__device__ __forceinline__ double scale_down(double x, int e) {
  return x * power_of_two(e / 2, double()) * power_of_two(e - e / 2, double());
}

// A thread takes one block: the updates' weights relative to the largest block exponent, and the factor of the whole.
template <class Real>
__global__ void __launch_bounds__(kThreads) weigh_kernel(PrepareParams p) {
  constexpr double largest = Limits<Real>::largest;
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t b = int64_t{blockIdx.x} * kThreads + threadIdx.x; b < p.num_blocks; b += stride) {
    int exponent = p.num_updates == 0 ? 0 : kZeroExponent;
    for (int64_t i = 0; i < p.num_updates; ++i) exponent = max(exponent, p.to.exponents[i * p.num_blocks + b]);
    for (int64_t i = 0; i < p.num_updates; ++i) {
      const double weight = scale_down(p.updates[i].weight, p.to.exponents[i * p.num_blocks + b] - exponent);
      static_cast<Real*>(p.to.weights)[i * p.num_blocks + b] = static_cast<Real>(weight);
    }
    const double factor = apply_factor(p.basis, p.blocks[b].numel, p.alpha, exponent);
    static_cast<Real*>(p.to.factors)[b] = static_cast<Real>(clamp(factor, -largest, largest));
  }
}

}  // namespace ferret::cuda

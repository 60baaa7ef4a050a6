// The inner part of project: a stage of tiles as integers in shared memory, and their products with the bits of one
// call.
#pragma once

#include <type_traits>

#include "lanes.cuh"

namespace ferret::cuda {

inline constexpr int kBatch = kThreads;  // columns of a CTA
inline constexpr int kStage = kWarps;    // tiles of a stage, one a warp
inline constexpr int kPerLane = kTile / kWarp;

// Where elements come from: `before - now`, or `now` alone.
struct Deltas {
  const Piece* pieces;
  const TensorRef* now;
  const TensorRef* before;  // or null
};

// ---- a stage in shared memory ----

// Where a tile's integers are, so that threads of a warp that work on different calls or tiles read 16 bytes each from
// distinct banks; and, for rademacher, how far they are shifted: the bit they meet stays at place i of its byte, an
// integer is shifted by 7 - i, and every product is 2^7 times what it stands for.
template <Basis basis>
struct Layout {
  static constexpr int per_call = elements_per_call(basis);
  static constexpr int calls = kTile / per_call;
  static constexpr int call_stride = basis == Basis::rademacher ? per_call + 16 : per_call;
  static constexpr int tile_stride = calls * call_stride + (basis == Basis::gaussian ? 8 : 4);

  static constexpr int scale_bits = basis == Basis::rademacher ? 7 : 0;

  __device__ static int place(int element) { return element / per_call * call_stride + element % per_call; }
  __device__ static int32_t scaled(int32_t q, int element) {
    return q * (1 << (scale_bits - element % (scale_bits + 1)));
  }
};

struct alignas(16) Quad {
  int32_t v[4];
};

template <class Real>
struct TileHeader {
  int exponent;                       // n, kZeroExponent, or that of infinity and NaN
  int32_t sum[Working<Real>::limbs];  // of q

  __device__ bool has_integers() const { return exponent != kZeroExponent && is_finite_exponent<Real>(exponent); }
};

template <Basis basis, class Real>
struct Stage {
  static constexpr int limbs = Working<Real>::limbs;
  alignas(16) int32_t q[limbs][kStage * Layout<basis>::tile_stride];
  int64_t sums[limbs][kStage * kBatch];  // [part of the calls][tile][column], raw
  TileHeader<Real> headers[2][kStage];   // of this stage and of the one that may still be read
};

// Which part of a stage a thread sums: column tid % columns, and with few columns only some of the tiles and calls.
struct Share {
  int column, tile, call;
  int tile_step, call_step;
  int columns;
  bool active;

  __device__ Share(int columns, int calls) : columns(columns) {
    const int tid = static_cast<int>(threadIdx.x);
    int parts = 1;
    while (2 * parts * columns <= kThreads && 2 * parts <= kStage * calls) parts *= 2;
    tile_step = parts < kStage ? parts : kStage;
    call_step = parts / tile_step;
    column = tid % columns;
    tile = tid / columns % tile_step;
    call = tid / columns / tile_step;
    active = call < call_step;
  }
  __device__ int slot(int call_part, int at_tile) const { return (call_part * kStage + at_tile) * columns + column; }
};

// ---- tile -> integers ----

template <class Real>
__device__ __forceinline__ void load_tile(const Deltas& deltas, const BlockPieces& pieces, uint64_t tile,
                                          LanePlaces places, Real (&x)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] = 0;
  for_each_run(deltas.pieces, pieces, tile * kTile, kTile, [&](const Run& run) {
    if (deltas.before == nullptr) return load(deltas.now[run.tensor], run, places, x);
    Real now[kPerLane] = {};
    load(deltas.before[run.tensor], run, places, x);
    load(deltas.now[run.tensor], run, places, now);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] -= now[i];
  });
}

// What the largest element of a tile is found by: the bits of |x|, which are ordered as |x| is and take two instructions,
// or for float64, where they are too long for a warp's maximum, the exponent.
template <class Real>
inline constexpr int kNoSize = std::is_same<Real, float>::value ? 0 : kZeroExponent;

__device__ __forceinline__ int size_of(float x) { return static_cast<int>(float_to_bits(x) & 0x7FFFFFFFu); }
__device__ __forceinline__ int size_of(double x) { return exponent_or_zero(x); }

// n of a warp's tile, from every lane's largest size.
template <class Real>
__device__ __forceinline__ int tile_exponent(int size) {
  int n = __reduce_max_sync(kAllLanes, size);
  if constexpr (std::is_same<Real, float>::value) n = exponent_or_zero(bits_to_float(static_cast<uint32_t>(n)));
  return n == kZeroExponent ? n : max(n, Working<Real>::min_tile_exponent);
}

// q and q'. A float32 of 22 bits is rounded in float32.
template <class Real>
__device__ __forceinline__ Limbs to_limbs(Real scaled) {
  constexpr int32_t limit = (1 << kDeltaBits) - 1;
  Limbs q = {clamp(round_to_int(scaled), -limit, limit), 0};
  if constexpr (Working<Real>::limbs == 2) {
    q.lo = clamp(round_to_int((scaled - q.hi) * static_cast<Real>(1 << kDeltaBits)), -limit, limit);
  }
  return q;
}

// A warp's tile as integers and their sums.
template <Basis basis, class Real>
__device__ __forceinline__ void quantise_tile(const Deltas& deltas, const BlockPieces& pieces, uint64_t tile, int warp,
                                              Stage<basis, Real>& stage, TileHeader<Real>& header) {
  const LanePlaces places = {static_cast<int>(threadIdx.x) % kWarp, kWarp};
  Real x[kPerLane];
  load_tile(deltas, pieces, tile, places, x);
  int size = kNoSize<Real>;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) size = max(size, size_of(x[i]));
  const int n = tile_exponent<Real>(size);
  header.exponent = n;
  if (!header.has_integers()) return;

  int32_t sums[2] = {};
  const Scale<Real> scale(kDeltaBits, n);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const Limbs q = to_limbs(scale(x[i]));
    const int at = warp * Layout<basis>::tile_stride + Layout<basis>::place(places[i]);
    stage.q[0][at] = Layout<basis>::scaled(q.hi, places[i]);
    sums[0] += q.hi;
    if constexpr (Working<Real>::limbs == 2) {
      stage.q[1][at] = Layout<basis>::scaled(q.lo, places[i]);
      sums[1] += q.lo;
    }
  }
  for (int limb = 0; limb < Working<Real>::limbs; ++limb) header.sum[limb] = __reduce_add_sync(kAllLanes, sums[limb]);
}

// ---- integers x raw bits ----

// sum += raw . q over one call.
template <Basis basis>
__device__ __forceinline__ void add_call(const Words& words, const int32_t* q, int64_t& sum) {
  const auto* quads = reinterpret_cast<const Quad*>(q);
  int32_t normal[4];
  if constexpr (basis == Basis::gaussian) normals_of(words, normal);
#pragma unroll
  for (int i = 0; i < elements_per_call(basis) / 4; ++i) {
    const Quad quad = quads[i];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int32_t raw;
      if constexpr (basis == Basis::rademacher) raw = (words.w[i / 8] >> (8 * (i / 2 % 4))) & (1u << (i % 2 * 4 + j));
      if constexpr (basis == Basis::uniform) raw = (words.w[i] >> (8 * j)) & 255u;
      if constexpr (basis == Basis::gaussian) raw = normal[j];
      sum = multiply_add(quad.v[j], raw, sum);
    }
  }
}

}  // namespace ferret::cuda

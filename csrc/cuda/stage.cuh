// The inner part of project: a stage of tiles as integers in shared memory, and their products with the bits of one
// call.
#pragma once

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

template <class Places, class Real>
__device__ __forceinline__ void load_tile(const Deltas& deltas, const Runs<kTile>& runs, Places places,
                                          Real (&x)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] = 0;
  runs.each([&](const Run& run) {
    if (deltas.before == nullptr) return load(deltas.now[run.tensor], run, places, x);
    Real now[kPerLane] = {};
    load(deltas.before[run.tensor], run, places, x);
    load(deltas.now[run.tensor], run, places, now);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] -= now[i];
  });
}

// max(a, b) for a, b >= 0 or NaN, which is larger than all else: an instruction that a maximum of bits takes two for.
__device__ __forceinline__ float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float largest;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(a), "f"(b));
  return largest;
#else
  return float_to_bits(a) < float_to_bits(b) ? b : a;
#endif
}

// What the largest element of a tile is found by, of a lane's: the bits of |x|, which are ordered as |x| is, or for
// float64, where they are too long for a warp's maximum, the exponent.
__device__ __forceinline__ int largest_size(const float (&x)[kPerLane]) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) largest = max_or_nan(largest, std::fabs(x[i]));
  return static_cast<int>(float_to_bits(largest));
}
__device__ __forceinline__ int largest_size(const double (&x)[kPerLane]) {
  int largest = kZeroExponent;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) largest = max(largest, exponent_or_zero(x[i]));
  return largest;
}

// n of a warp's tile, from the largest size in it.
__device__ __forceinline__ int tile_exponent(int largest, float) {
  const int n = exponent_or_zero(bits_to_float(static_cast<uint32_t>(largest)));
  return n == kZeroExponent ? n : max(n, Working<float>::min_tile_exponent);
}
__device__ __forceinline__ int tile_exponent(int largest, double) {
  return largest == kZeroExponent ? largest : max(largest, Working<double>::min_tile_exponent);
}

// q and q' of a tile whose exponent is n, for the size of its largest element.
template <class Real>
struct TileScale;

template <>
struct TileScale<double> {
  static constexpr int32_t limit = (1 << kDeltaBits) - 1;
  Scale<double> scale;

  __device__ __forceinline__ TileScale(int n, int, double (&)[kPerLane]) : scale(kDeltaBits, n) {}
  __device__ __forceinline__ Limbs operator()(double x) const {
    const double scaled = scale(x);
    const int32_t hi = clamp(round_to_int(scaled), -limit, limit);
    return {hi, clamp(round_to_int((scaled - hi) * static_cast<double>(1 << kDeltaBits)), -limit, limit)};
  }
};

// Scaling and rounding are one fused multiply-add: x 2^(22 - n) is exact, and its sum with 1.5 2^23 has the integer in its
// low bits. Rare tiles are changed first, so that others need no more: where 2^(n - 22) is no normal float32 the tile is
// made larger, exactly; where its largest element would become 2^22 all are limited to what becomes 2^22 - 1.
template <>
struct TileScale<float> {
  static constexpr int32_t limit = (1 << kDeltaBits) - 1;
  static constexpr int32_t offset = 0x4B400000;  // bits of 1.5 2^23
  float factor;

  __device__ __forceinline__ TileScale(int n, int size, float (&x)[kPerLane]) {
    const bool tiny = n < kDeltaBits - 126;
    const float up = tiny ? 0x1p64f : 1.0f, largest = bits_to_float(static_cast<uint32_t>(size)) * up;
    if (tiny) n += 64;
    factor = power_of_two(kDeltaBits - n, float());
    if (tiny || raw(largest) > offset + limit) {
      const float most = static_cast<float>(limit) * power_of_two(n - kDeltaBits, float());
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) x[i] = clamp(x[i] * up, -most, most);
    }
  }
  // q + offset.
  __device__ __forceinline__ int32_t raw(float x) const {
    return static_cast<int32_t>(float_to_bits(fused_multiply_add(x, factor, 12582912.0f)));
  }
  __device__ __forceinline__ Limbs operator()(float x) const { return {raw(x) - offset, 0}; }
};

// A warp's tile as integers and their sums; `runs` are the tile's.
template <Basis basis, class Real>
__device__ __forceinline__ void quantise_tile(const Deltas& deltas, const Runs<kTile>& runs, int warp,
                                              Stage<basis, Real>& stage, TileHeader<Real>& header) {
  const LanePlaces<1, kWarp> places = {static_cast<int>(threadIdx.x) % kWarp};
  Real x[kPerLane];
  load_tile(deltas, runs, places, x);
  const int size = __reduce_max_sync(kAllLanes, largest_size(x));
  const int n = tile_exponent(size, Real());
  header.exponent = n;
  if (!header.has_integers()) return;

  int32_t sums[2] = {};
  const TileScale<Real> scale(n, size, x);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const Limbs q = scale(x[i]);
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

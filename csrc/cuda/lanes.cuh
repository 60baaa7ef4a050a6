// Which elements of a span of 128 a lane owns, so that a warp makes every Philox call of a column once.
#pragma once

#include "elements.cuh"

namespace ferret::cuda {

inline constexpr int kSpan = 128;  // elements of a warp
inline constexpr int kSpanShift = 7;
inline constexpr int kOwned = kSpan / kWarp;

// rademacher: one call, lane l owns bit l of every word. uniform: eight calls, lane l owns the four bytes of word l.
// gaussian: lane l owns call l.
template <Basis basis>
__device__ __forceinline__ auto owned_places(int lane) {
  if constexpr (basis == Basis::rademacher) {
    return LanePlaces<1, kWarp>{lane};
  } else {
    return LanePlaces<kOwned, kOwned>{kOwned * lane};
  }
}

// The four integers of a gaussian call.
__device__ __forceinline__ void normals_of(const Words& words, int32_t (&b)[4]) {
  const IntegerPair first = box_muller(words.w[0], words.w[1]), second = box_muller(words.w[2], words.w[3]);
  b[0] = first.b[0], b[1] = first.b[1], b[2] = second.b[0], b[3] = second.b[1];
}

// The integers of a lane's elements of one column when no words are shared.
template <Basis basis>
__device__ __forceinline__ void owned_integers(uint64_t seed, uint64_t span, uint32_t column, int lane,
                                               int32_t (&b)[kOwned]) {
  constexpr int e = elements_per_call(basis);
  const auto places = owned_places<basis>(lane);
  const Words words = stream_words(seed, basis, span * (kSpan / e) + places.first / e, column);
  if constexpr (basis == Basis::gaussian) {
    normals_of(words, b);
  } else {
#pragma unroll
    for (int i = 0; i < kOwned; ++i) b[i] = basis_integer(basis, words, places[i] % e);
  }
}

}  // namespace ferret::cuda

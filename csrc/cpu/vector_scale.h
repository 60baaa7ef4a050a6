// The shared scale of a tile's integers over a vector type V.
#pragma once

#include "elementwise.h"
#include "vector_sums.h"

namespace ferret::cpu {
namespace {

// The bits of the largest magnitude so far and in four vectors from element i on, by lanes; load(i) is a vector of float32, the elements
// i, i + 1, .. NaN and infinity count as the largest.
template <class V, class Load>
FERRET_HD typename V::I largest_of_four(Load load, int i, typename V::I so_far) {
  typename V::I x[4];
  for (int j = 0; j < 4; ++j) x[j] = V::bit_and(V::as_int(load(i + j * V::lanes)), V::set1(0x7FFFFFFFu));
  return V::max_unsigned(so_far, V::max_unsigned(V::max_unsigned(x[0], x[1]), V::max_unsigned(x[2], x[3])));
}

template <class V, class Load>
FERRET_HD float largest_magnitude(Load load) {
  typename V::I largest = V::set1(0u);
  for (int i = 0; i < kTile; i += 4 * V::lanes) largest = largest_of_four<V>(load, i, largest);
  return bits_to_float(V::reduce_max(largest));
}

struct TileScale {
  TileState state;
  bool simple;  // round(x * scale) are the integers: none rounds up to 2^22, and the scale is a float32
  float scale;  // 2^(22 - n), 0 unless the tile is finite and not zero
  double unit;  // 1 / scale; 0 where the tile is zero, NaN where it is not finite
};

FERRET_HD TileScale scale_of(float largest) {
  if (largest == 0) return {TileState::zero, true, 0, 0};
  if (!(largest - largest == 0)) return {TileState::not_finite, true, 0, std::numeric_limits<double>::quiet_NaN()};
  const int n = exponent_of(largest);
  if (kDeltaBits - n > 127) return {TileState::finite, false, 0, 0};
  const float scale = power_of_two(kDeltaBits - n, float());
  const bool rounds_up = round_to_int(largest * scale) == 1 << kDeltaBits;
  return {TileState::finite, !rounds_up, scale, power_of_two(n - kDeltaBits, double())};
}

}  // namespace
}  // namespace ferret::cpu

// The vector paths: one algorithm over a vector type V (avx2.h, avx512.h, neon.h), compiled once per instruction set.
#pragma once

#include "vector_project.h"
#include "vector_reconstruct.h"

namespace ferret::cpu {
namespace {

template <class V>
uint32_t philox_checksum(uint64_t seed, uint32_t columns, uint64_t calls) {
  using I = typename V::I;
  const PhiloxKeys keys(seed);
  const uint32_t full_columns = columns / V::lanes * V::lanes;
  const uint64_t full_calls = calls / 2 * 2;
  I sum = V::set1(0u);
  constexpr uint64_t chunk = 64;
  Call<One> call[chunk];
  for (uint64_t begin = 0; begin < full_calls; begin += chunk) {
    const int count = static_cast<int>(full_calls - begin < chunk ? full_calls - begin : chunk);
    for (int i = 0; i < count; ++i) call[i] = {keys, Basis::rademacher, One{begin + static_cast<uint64_t>(i)}};
    for (uint32_t k = 0; k < full_columns; k += V::lanes) {
      const auto column = columns_of<V>(keys, begin, k);
      for (int i = 0; i < count; i += 2) {
        I w[2][4];
        philox_pair<V>(keys, call[i], column, call[i + 1], column, w);
        for (const auto& word : w) sum = V::bit_xor(sum, V::bit_xor(word[0], word[1], word[2]), word[3]);
      }
    }
  }
  uint32_t lanes[V::lanes], result = 0;
  V::store(lanes, sum);
  for (const uint32_t lane : lanes) result ^= lane;
  for (uint64_t t = 0; t < calls; ++t) {
    for (uint32_t k = t < full_calls ? full_columns : 0; k < columns; ++k) result ^= checksum_of(seed, t, k);
  }
  return result;
}

template <class V>
void rounding_of_span(uint64_t seed, uint64_t span, uint16_t* random) {
  using I = typename V::I;
  constexpr int calls = kSpan / kRoundingElements;
  const PhiloxKeys keys(seed);
  const uint64_t t = span * calls;
  const Column<One> column = {keys, t, One{0}};
  alignas(64) uint32_t words[4][calls];
  for (int i = 0; i < calls; i += 2 * V::lanes) {
    const auto first = calls_of<V>(keys, kRounding, t + static_cast<uint64_t>(i));
    const auto second = calls_of<V>(keys, kRounding, t + static_cast<uint64_t>(i + V::lanes));
    I w[2][4];
    philox_pair<V>(keys, first, column, second, column, w);
    for (int n = 0; n < 8; ++n) V::store(words[n % 4] + i + n / 4 * V::lanes, w[n / 4][n % 4]);
  }
  for (int i = 0; i < calls; ++i) {
    for (int n = 0; n < kRoundingElements; ++n) {
      random[kRoundingElements * i + n] = static_cast<uint16_t>(words[n / 2][i] >> (16 * (n % 2)));
    }
  }
}

template <class V, class Real>
constexpr RealKernels<Real> real_kernels() {
  return {widen<Real>,
          subtract<Real>,
          project_runs<V, Real>,
          sum_columns<V, Real>,
          accumulate<Real>,
          to_element_order<V, Real>,
          scale_add_in_order<V, Real>,
          scale_add<Real>};
}

}  // namespace
}  // namespace ferret::cpu

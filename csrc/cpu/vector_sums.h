// Exact sums over lanes that project and reconstruct share.
#pragma once

#include "vector_stream.h"

namespace ferret::cpu {
namespace {

// Exact sums of products of 32-bit lanes, kept in 64 bits for even and odd lanes apart.
template <class V>
struct WideSum {
  typename V::I even, odd;

  FERRET_HD void clear() { even = odd = V::set1(0u); }
  FERRET_HD void add_product(typename V::I b, typename V::I factor) {
    even = V::add64(even, V::multiply_even_signed(b, factor));
    odd = V::add64(odd, V::multiply_even_signed(V::odd_to_even(b), factor));
  }
  FERRET_HD void store(double* to) const {
    int64_t lanes[2][V::lanes / 2];
    V::store(lanes[0], even);
    V::store(lanes[1], odd);
    for (int i = 0; i < V::lanes; ++i) to[i] = static_cast<double>(lanes[i % 2][i / 2]);
  }
};

// A factor below 2^23 as two 12-bit halves, two factors side by side, for add_products with bytes.
struct PairHalves {
  int32_t high, low;

  FERRET_HD PairHalves(int32_t a, int32_t b) : high(pack(a >> 12, b >> 12)), low(pack(a & 4095, b & 4095)) {}
  FERRET_HD static int32_t pack(int32_t a, int32_t b) {
    return static_cast<int32_t>((static_cast<uint32_t>(b) << 16) | (static_cast<uint32_t>(a) & 0xFFFFu));
  }
};

// sum f (2u - 255) from the sums of f_high u and f_low u and the sum of f.
FERRET_HD double uniform_sum(int32_t high, int32_t low, int64_t factors) {
  return 2.0 * (4096.0 * high + low) - 255.0 * static_cast<double>(factors);
}

}  // namespace
}  // namespace ferret::cpu

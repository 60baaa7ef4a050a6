// docs/streams.md evaluated as it is written, one element after the other: what the fast kernels are compared with, bit
// for bit. Only basis_integer and the tables' structs are taken from csrc/core.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../../csrc/core/job.h"

namespace contract {

using namespace ferret;

template <class Real>
constexpr bool is_wide = std::is_same_v<Real, double>;

// The integers of one column, read in ascending order.
class Column {
 public:
  Column(Stream stream, uint32_t k) : stream_(stream), k_(k) {}

  int32_t operator[](uint64_t j) {
    const uint64_t e = elements_per_call(stream_.basis);
    if (!has_words_ || j / e != call_) {
      call_ = j / e;
      words_ = stream_words(stream_.seed, stream_.basis, call_, k_);
      has_words_ = true;
    }
    return basis_integer(stream_.basis, words_, static_cast<int>(j % e));
  }

 private:
  Stream stream_;
  uint32_t k_;
  bool has_words_ = false;
  uint64_t call_ = 0;
  Words words_ = {};
};

inline int exponent(double x) {
  int n;
  std::frexp(x, &n);
  return n;
}

template <class Real>
Real largest_magnitude(const Real* x, int64_t n) {
  Real largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(x[i]));
  return largest;
}

// x 2^(bits - n) as integers; the second limb is 0 in float32.
template <class Real>
Limbs to_integers(Real x, int n, int bits) {
  const double limit = std::ldexp(1.0, bits) - 1, scaled = std::ldexp(static_cast<double>(x), bits - n);
  const double hi = std::clamp(std::rint(scaled), -limit, limit);
  const double lo = is_wide<Real> ? std::clamp(std::rint(std::ldexp(scaled - hi, bits)), -limit, limit) : 0.0;
  return {static_cast<int32_t>(hi), static_cast<int32_t>(lo)};
}

// ---- project ----

template <class Real>
double tile_value(const Real* x, uint64_t start, int count, Stream stream, uint32_t k) {
  for (int i = 0; i < count; ++i) {
    if (!std::isfinite(x[i])) return std::numeric_limits<double>::quiet_NaN();
  }
  const Real largest = largest_magnitude(x, count);
  if (largest == 0) return 0;
  const int n = is_wide<Real> ? std::max(exponent(largest), -1000) : exponent(largest);
  Column column(stream, k);
  int64_t hi = 0, lo = 0;
  for (int i = 0; i < count; ++i) {
    const Limbs q = to_integers(x[i], n, 22);
    const int32_t b = column[start + i];
    hi += int64_t{q.hi} * b;
    lo += int64_t{q.lo} * b;
  }
  return std::ldexp(static_cast<double>(hi) + std::ldexp(static_cast<double>(lo), -22), n - 22);
}

// The value of a node, from those of the tiles first_tile, first_tile + 1, ..; all others are 0.
inline double node_value(const std::vector<double>& tiles, uint64_t first_tile, int level, uint64_t node) {
  const uint64_t begin = node << (6 * level), end = (node + 1) << (6 * level);
  if (end <= first_tile || begin >= first_tile + tiles.size()) return 0;
  if (level == 0) return tiles[node - first_tile];
  double sum = 0;
  for (uint64_t child = 64 * node; child < 64 * (node + 1); ++child)
    sum += node_value(tiles, first_tile, level - 1, child);
  return sum;
}

inline double fold(const std::vector<double>& tiles, uint64_t first_tile) {
  int level = 0;
  while (first_tile >> (6 * level) != (first_tile + tiles.size() - 1) >> (6 * level)) ++level;
  return node_value(tiles, first_tile, level, first_tile >> (6 * level));
}

// x: the elements [offset, offset + x.size()) of a block of d.
template <class Real>
std::vector<Real> project(const std::vector<Real>& x, uint64_t offset, uint64_t d, Stream stream, int64_t columns) {
  const double rho_d = stream.basis == Basis::uniform ? 21845.0 / 65536.0 : 1.0;
  const double c = std::sqrt(static_cast<double>(d)) / static_cast<double>(columns) *
                   (std::ldexp(1.0, -basis_exponent(stream.basis)) / rho_d);
  std::vector<Real> gamma;
  for (int64_t k = 0; k < columns; ++k) {
    std::vector<double> tiles;
    for (uint64_t j = offset; j < offset + x.size(); j = (j / 512 + 1) * 512) {
      const uint64_t end = std::min<uint64_t>((j / 512 + 1) * 512, offset + x.size());
      tiles.push_back(tile_value(&x[j - offset], j, static_cast<int>(end - j), stream, static_cast<uint32_t>(k)));
    }
    gamma.push_back(x.empty() ? Real(0) : static_cast<Real>(fold(tiles, offset / 512) * c));
  }
  return gamma;
}

// ---- reconstruct and apply ----

template <class Real>
int block_exponent(const std::vector<Real>& gamma) {
  const int limit = is_wide<Real> ? 512 : 64;
  const Real largest = largest_magnitude(gamma.data(), static_cast<int64_t>(gamma.size()));
  return largest == 0 ? 0 : std::clamp(exponent(largest), -limit, limit);
}

// H of the elements [offset, offset + count) in units of 2^n*. Coordinate k is of column ids[k], or k where ids is null.
template <class Real>
std::vector<Real> sum_columns(const std::vector<Real>& gamma, const uint32_t* ids, Stream stream, uint64_t offset,
                              int64_t count) {
  const int n_star = block_exponent(gamma);
  const auto columns = static_cast<int64_t>(gamma.size());
  std::vector<Real> h(count), H(count);
  for (int64_t first = 0; first < columns; first += 64) {
    const int64_t end = std::min<int64_t>(first + 64, columns);
    const Real largest = largest_magnitude(&gamma[first], end - first);
    std::vector<int64_t> hi(count), lo(count);
    const int lowest = n_star - (is_wide<Real> ? 400 : 100);
    const int n = largest == 0 ? lowest : std::max(exponent(largest), lowest);
    for (int64_t k = first; k < end; ++k) {
      const Limbs c = to_integers(gamma[k], n, 23);
      Column column(stream, ids == nullptr ? static_cast<uint32_t>(k) : ids[k]);
      for (int64_t i = 0; i < count; ++i) {
        const int32_t b = column[offset + i];
        hi[i] += int64_t{c.hi} * b;
        lo[i] += int64_t{c.lo} * b;
      }
    }
    const auto scale = static_cast<Real>(std::ldexp(1.0, n - 23 - n_star));
    for (int64_t i = 0; i < count; ++i) {
      const auto G = static_cast<Real>(static_cast<double>(hi[i]) + std::ldexp(static_cast<double>(lo[i]), -23));
      h[i] = std::fma(G, scale, h[i]);
      if (end == columns || end % 4096 == 0) {
        H[i] += h[i];
        h[i] = 0;
      }
    }
  }
  return H;
}

template <class Real>
struct Received {
  uint64_t seed;
  double weight;
  std::vector<Real> gamma;
  const uint32_t* columns = nullptr;  // [K] of the basis, where they are not 0, 1, ..
};

// x += alpha * sum_i w_i V_i gamma_i, in the working precision.
template <class Real>
void apply(std::vector<Real>& x, uint64_t offset, uint64_t d, Basis basis, double alpha,
           const std::vector<Received<Real>>& updates) {
  int N = updates.empty() ? 0 : std::numeric_limits<int>::min();
  for (const auto& update : updates) N = std::max(N, block_exponent(update.gamma));
  std::vector<Real> T(x.size());
  for (const auto& update : updates) {
    const auto H =
        sum_columns(update.gamma, update.columns, {update.seed, basis}, offset, static_cast<int64_t>(x.size()));
    const auto weight = static_cast<Real>(std::ldexp(update.weight, block_exponent(update.gamma) - N));
    for (size_t i = 0; i < x.size(); ++i) T[i] = std::fma(H[i], weight, T[i]);
  }
  const double largest = std::numeric_limits<Real>::max();
  const double C = alpha * std::ldexp(1.0, N - basis_exponent(basis)) / std::sqrt(static_cast<double>(d));
  const auto factor = static_cast<Real>(std::clamp(C, -largest, largest));
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::fma(T[i], factor, x[i]);
}

}  // namespace contract

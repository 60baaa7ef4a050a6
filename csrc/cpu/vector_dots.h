// project with few columns on processors that add up products of bytes (V: avx512vnni.h): a run's integers as three digits of a byte,
// q = a + 2^8 b + 2^16 c with a, b >= 0, and the random bits as bytes 0 and 1. The sums of the digits under the set bits are exact, and
// with them S = sum q - 2 (sum of the q whose bit is set).
//
// Quarter i of a vector belongs to tile i of the run throughout: Philox works on the run's 16 calls, four a tile.
#pragma once

#include "vector_scale.h"

namespace ferret::cpu {
namespace {

// A run's integers by pieces of 16: digit[word][n][m] holds byte m of the piece of each tile whose bits are piece n of that word of the
// tile's four calls, which is n / 2 * 128 + word * 32 + n % 2 * 16 elements into the tile.
struct alignas(64) RunDigits {
  uint8_t digit[4][8][3][64];
};

// Sums over a run by tile (quarter) for up to 4 columns (lane), modulo 2^32; digits[column][m] are its sums by lane.
template <class V, int columns>
FERRET_HD typename V::I join_digits(const typename V::I (&digits)[columns][3]) {
  typename V::I sums[4];
  for (int c = 0; c < 4; ++c) {
    const auto& d = digits[c < columns ? c : 0];
    sums[c] = V::add(V::add(d[0], V::template shift_left<8>(d[1])), V::template shift_left<16>(d[2]));
  }
  return V::add_within_quarters(sums);
}

template <class V>
FERRET_HD void add_dots(typename V::I (&sum)[3], const typename V::I (&digit)[3], typename V::I bits) {
  sum[0] = V::dot(sum[0], digit[0], bits);
  sum[1] = V::dot(sum[1], digit[1], bits);
  sum[2] = V::dot(sum[2], bits, digit[2]);
}

// The tiles of a run, all of T, as float32; `difference`: before - now.
template <class V, class T, bool difference>
struct RunSource {
  const T* now[kRun];
  const T* before[kRun];

  FERRET_HD explicit RunSource(const TileSource (&x)[kRun]) {
    alignas(64) static constexpr uint32_t kZeros[kTile] = {};
    for (int i = 0; i < kRun; ++i) {
      now[i] = static_cast<const T*>(x[i].now == nullptr ? kZeros : x[i].now);
      before[i] = static_cast<const T*>(x[i].now == nullptr ? kZeros : x[i].before);
    }
  }
  FERRET_HD typename V::F load(int tile, int i) const {
    const auto x = V::load_floats(now[tile] + i);
    if constexpr (difference) return V::sub(V::load_floats(before[tile] + i), x);
    return x;
  }
  FERRET_HD float largest(int tile, LinesAhead& ahead) const {
    if constexpr (!difference && sizeof(T) == 2) return to_float(T{V::largest_magnitude16(now[tile], kTile / 32)});
    return largest_magnitude<V>([&](int i) FERRET_INLINE { return load(tile, i); }, [&]() FERRET_INLINE { ahead(); });
  }
};

// Rounds the run's tiles to integers under their scales; returns the totals, every lane of a quarter its tile's.
template <class V, bool hurry, class Source>
FERRET_HD typename V::I to_digits(const Source x, const float (&scales)[kRun], RunDigits& digits, LinesAhead& ahead) {
  using I = typename V::I;
  typename V::F scale[kRun];  // neither this nor x lies in memory that the compiler thinks the digits may overwrite
  for (int i = 0; i < kRun; ++i) scale[i] = V::set1(scales[i]);
  I totals[1][3] = {{V::set1(0u), V::set1(0u), V::set1(0u)}};
  for (int word = 0; word < 4; ++word) {
    auto& to = digits.digit[word];
    unroll(Count<8>(), [&](auto n) FERRET_INLINE {
      I q[kRun], digit[3];
      for (int i = 0; i < kRun; ++i) {
        // The fused addition rounds x * scale to an integer, since floats from 2^23 to 2^24 are integers, and leaves it in the low
        // bits as q + 2^22: what is too much is taken from the third digit.
        q[i] = V::as_int(V::fused(x.load(i, 32 * word + n / 2 * 128 + n % 2 * 16), scale[i], V::set1(0x1.8p23f)));
      }
      V::take_digits(q, digit);
      digit[2] = V::sub_bytes(digit[2], V::set1(0x40404040u));
      for (int m = 0; m < 3; ++m) V::store(to[n][m], digit[m]);
      add_dots<V>(totals[0], digit, V::set1(0x01010101u));
      ahead();
      if constexpr (hurry) ahead();
    });
  }
  return join_digits<V, 1>(totals);
}

using RunBits = uint32_t[4][kRun * 4];  // [word][call of the run]

template <class V, int columns>
FERRET_HD typename V::I dot_columns(const RunBits* bits, const RunDigits& digits, LinesAhead& ahead) {
  using I = typename V::I;
  I sums[columns][3];
  for (auto& column : sums) {
    for (auto& sum : column) sum = V::set1(0u);
  }
  for (int word = 0; word < 4; ++word) {
    I transposed[columns];
    for (int c = 0; c < columns; ++c) transposed[c] = V::transpose_pieces(V::load(bits[c][word]));
    unroll(Count<8>(), [&](auto n) FERRET_INLINE {
      const auto& from = digits.digit[word][n];
      const I digit[3] = {V::load(from[0]), V::load(from[1]), V::load(from[2])};
      for (int c = 0; c < columns; ++c) add_dots<V>(sums[c], digit, V::template bytes_of_piece<n>(transposed[c]));
      ahead();
    });
  }
  return join_digits<V, columns>(sums);
}

inline constexpr int kDotBatch = 16;  // columns whose bits are made together

// Values of a tile by column. Four are stored at a time, also those of the last column alone.
template <class V>
using DotValues = double[V::dot_columns + 3];

// values[tile][i] of the columns first + i.
template <class V>
void rademacher_run_dots(const RunDigits& digits, typename V::I totals, uint64_t first_tile, Stream stream,
                         uint32_t first, int count, LinesAhead ahead, DotValues<V>* values) {
  using I = typename V::I;
  const uint64_t t = first_tile * 4;
  const PhiloxKeys keys(stream.seed);
  const auto calls = calls_of<V>(keys, stream.basis, t);
  alignas(64) RunBits bits[kDotBatch];
  for (int batch = 0; batch < count; batch += kDotBatch) {
    const int end = batch + kDotBatch < count ? batch + kDotBatch : count;
    for (int i = batch; i < end; i += 2) {
      const uint32_t k = first + static_cast<uint32_t>(i);
      const Column<One> column0 = {keys, t, One{k}}, column1 = {keys, t, One{k + 1}};
      I w[2][4];
      philox_pair<V>(keys, calls, column0, calls, column1, w);
      for (int n = 0; n < 4; ++n) ahead();
      for (int word = 0; word < 8; ++word) V::store(bits[i - batch + word / 4][word % 4], w[word / 4][word % 4]);
    }
    int i = batch;
    const auto dot = [&](auto columns) FERRET_INLINE {
      for (; i + columns <= end; i += columns) {
        const I set = dot_columns<V, columns>(bits + (i - batch), digits, ahead);
        V::store_quarters(V::sub(totals, V::add(set, set)), &values[0][i], std::extent_v<DotValues<V>>);
      }
    };
    dot(std::integral_constant<int, 4>());
    dot(std::integral_constant<int, 2>());
    dot(std::integral_constant<int, 1>());
  }
}

// False, and nothing done, where a tile needs the general way to integers.
template <class V, class T, bool difference>
bool project_run_by_dots(const RunProduct<float>& p) {
  const RunSource<V, T, difference> x(p.x);
  float scale[kRun];
  double unit[kRun];
  TileState states[kRun];
  LinesAhead ahead(&p.ahead[0][0], 2 * kRun, 128);
  for (int i = 0; i < kRun; ++i) {
    const TileScale found = scale_of(x.largest(i, ahead));
    if (!found.simple) return false;
    states[i] = found.state, scale[i] = found.scale, unit[i] = found.unit;
  }
  RunDigits digits;
  const auto totals =
      p.count <= 4 ? to_digits<V, true>(x, scale, digits, ahead) : to_digits<V, false>(x, scale, digits, ahead);
  DotValues<V> values[kRun];
  rademacher_run_dots<V>(digits, totals, p.tile, p.stream, p.first, p.count, ahead, values);
  for (int i = 0; i < kRun; ++i) {
    if (states[i] == TileState::not_finite) poison<float>(p.count, p.sums);
    if (states[i] != TileState::finite) continue;
    const double* of_tile[1] = {values[i]};
    add_tile_values<float>(of_tile, p.count, unit[i], p.sums);
  }
  return true;
}

template <class V>
bool project_run_by_dots(const RunProduct<float>& p) {
  const TileSource* some = nullptr;
  for (const TileSource& x : p.x) {
    if (x.now == nullptr) continue;
    if (some != nullptr && (x.dtype != some->dtype || (x.before == nullptr) != (some->before == nullptr))) return false;
    some = &x;
  }
  if (some == nullptr) return true;
  const auto go = [&](auto difference) {
    switch (some->dtype) {
      case Dtype::float32: return project_run_by_dots<V, float, difference>(p);
      case Dtype::bfloat16: return project_run_by_dots<V, bfloat16_t, difference>(p);
      case Dtype::float16: return project_run_by_dots<V, float16_t, difference>(p);
      default: return false;
    }
  };
  return some->before == nullptr ? go(std::false_type()) : go(std::true_type());
}

}  // namespace
}  // namespace ferret::cpu

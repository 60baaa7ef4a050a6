// The vector paths: one algorithm over a vector type V (avx2.h, avx512.h), compiled once per instruction set.
//
// project keeps columns in the lanes; four consecutive elements q make a table of 16 subset sums, and each lane's next four
// random bits pick its entry: one look-up serves 4 elements of every lane's column. With S = sum of the q whose bit is set
// (sign -1) a column's sum is total - 2 S, modulo 2^32 on the way and exact at the end.
// reconstruct keeps calls (runs of elements) in the lanes; the words of four columns are transposed as 4x4 bit blocks, so that
// a nibble holds one element's bits of four columns, and the tables hold the subset sums of four coordinates.
#pragma once

#include <utility>

#include "elementwise.h"
#include "vector_stream.h"

namespace ferret::cpu {
namespace {

template <class F, int... n>
FERRET_HD void unroll(std::integer_sequence<int, n...>, F f) {
  (f(std::integral_constant<int, n>()), ...);
}
using Nibbles = std::make_integer_sequence<int, 8>;
using Bytes = std::make_integer_sequence<int, 4>;

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

// A factor below 2^23 as two 12-bit halves, two factors side by side, for multiply_pairs with bytes.
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

// ---- project: values[i] = sum over the tile of q_j b(j, first + i) ----

template <class V>
void rademacher_tile_sums(const int32_t* q, uint64_t tile, int begin, int end, Stream stream, uint32_t first, int count,
                          double* values) {
  using I = typename V::I;
  alignas(64) int32_t tables[kTile / 4][16];
  const int first_call = begin / 128, last_call = (end + 127) / 128;
  uint32_t total = 0;
  for (int j = first_call * 128; j < last_call * 128; ++j) total += static_cast<uint32_t>(q[j]);
  for (int m = first_call * 32; m < last_call * 32; ++m) V::store_subset_sums(tables[m], q + 4 * m);

  for (int i = 0; i < count; i += V::lanes) {
    const ColumnWords<V> columns(stream, tile * (kTile / 128), first + static_cast<uint32_t>(i));
    I sums[4] = {V::set1(0u), V::set1(0u), V::set1(0u), V::set1(0u)};
    for (int call = first_call; call < last_call; ++call) {
      I w[4];
      columns.call(tile * (kTile / 128) + call, w);
      for (int word = 0; word < 4; ++word) {
        unroll(Nibbles(), [&](auto n) {
          const auto table = V::load_table(tables[call * 32 + word * 8 + n]);
          sums[n % 4] = V::add(sums[n % 4], V::look_up(table, V::template shift_right<4 * n>(w[word])));
        });
      }
    }
    const I set = V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3]));
    V::store_double(values + i, V::sub(V::set1(total), V::add(set, set)));
  }
}

template <class V>
void uniform_tile_sums(const int32_t* q, uint64_t tile, int begin, int end, Stream stream, uint32_t first, int count,
                       double* values) {
  using I = typename V::I;
  const int first_call = begin / 16, last_call = (end + 15) / 16;
  int32_t pairs[kTile / 4][2][2];  // [word][even bytes, odd bytes][high, low]
  int64_t total = 0;
  for (int m = first_call * 4; m < last_call * 4; ++m) {
    for (int odd = 0; odd < 2; ++odd) {
      const PairHalves pair(q[4 * m + odd], q[4 * m + odd + 2]);
      pairs[m][odd][0] = pair.high;
      pairs[m][odd][1] = pair.low;
      total += static_cast<int64_t>(q[4 * m + odd]) + q[4 * m + odd + 2];
    }
  }
  const I even_bytes = V::set1(0x00FF00FFu);
  for (int i = 0; i < count; i += V::lanes) {
    const ColumnWords<V> columns(stream, tile * (kTile / 16), first + static_cast<uint32_t>(i));
    I high = V::set1(0u), low = V::set1(0u);
    for (int call = first_call; call < last_call; ++call) {
      I w[4];
      columns.call(tile * (kTile / 16) + call, w);
      for (int word = 0; word < 4; ++word) {
        const auto& pair = pairs[call * 4 + word];
        const I bytes[2] = {V::bit_and(w[word], even_bytes),
                            V::bit_and(V::template shift_right<8>(w[word]), even_bytes)};
        for (int odd = 0; odd < 2; ++odd) {
          high = V::add(high, V::multiply_pairs(bytes[odd], V::set1(static_cast<uint32_t>(pair[odd][0]))));
          low = V::add(low, V::multiply_pairs(bytes[odd], V::set1(static_cast<uint32_t>(pair[odd][1]))));
        }
      }
    }
    int32_t highs[V::lanes], lows[V::lanes];
    V::store(highs, high);
    V::store(lows, low);
    for (int lane = 0; lane < V::lanes; ++lane) values[i + lane] = uniform_sum(highs[lane], lows[lane], total);
  }
}

template <class V>
void gaussian_tile_sums(const int32_t* q, uint64_t tile, int begin, int end, Stream stream, uint32_t first, int count,
                        double* values) {
  using I = typename V::I;
  const int first_call = begin / 4, last_call = (end + 3) / 4;
  for (int i = 0; i < count; i += V::lanes) {
    const ColumnWords<V> columns(stream, tile * (kTile / 4), first + static_cast<uint32_t>(i));
    WideSum<V> sum;
    sum.clear();
    for (int call = first_call; call < last_call; ++call) {
      I w[4], b[4];
      columns.call(tile * (kTile / 4) + call, w);
      box_muller<V>(w[0], w[1], b[0], b[1]);
      box_muller<V>(w[2], w[3], b[2], b[3]);
      for (int e = 0; e < 4; ++e) sum.add_product(b[e], V::set1(static_cast<uint32_t>(q[4 * call + e])));
    }
    sum.store(values + i);
  }
}

template <class V, class Real>
void project_tile(const TileProduct<Real>& p) {
  TileIntegers<Real> tile;
  const TileState state = to_integers(p.x, tile);
  if (state == TileState::zero) return;
  if (state == TileState::not_finite) return poison<Real>(p.count, p.sums);
  alignas(64) double values[Working<Real>::limbs][kColumnBatch + kPad];
  const auto tile_sums = p.stream.basis == Basis::rademacher ? rademacher_tile_sums<V>
                         : p.stream.basis == Basis::uniform  ? uniform_tile_sums<V>
                                                             : gaussian_tile_sums<V>;
  for (int limb = 0; limb < Working<Real>::limbs; ++limb) {
    tile_sums(tile.q[limb], p.tile, p.begin, p.end, p.stream, p.first, p.count, values[limb]);
  }
  add_tile_values<Real>(values, p.count, tile.unit, p.sums);
}

// ---- reconstruct: H of the elements of `lanes` consecutive calls, as [place in the call][lane] ----

template <class V, class Real>
struct CallSums {
  static constexpr int kPlaces = 128;
  alignas(64) Real h[kPlaces][V::lanes];
  alignas(64) Real total[kPlaces][V::lanes];
};

// h = fma(G, scale, h) with G = hi + lo * 2^-23 from exact float64 sums, rounded once to Real.
template <class V, class Real>
FERRET_HD void fold_exact(const double* hi, const double* lo, Real scale, Real* h) {
  for (int i = 0; i < V::lanes; ++i) {
    const double value = Working<Real>::limbs == 2 ? hi[i] + lo[i] * 0x1p-23 : hi[i];
    h[i] = fused_multiply_add(static_cast<Real>(value), scale, h[i]);
  }
}

// Rows of four words as 4x4 bit blocks: afterwards nibble n of x[r] holds bit 4n + r of the former x[0], x[1], x[2], x[3].
template <class V>
FERRET_HD void transpose_nibbles(typename V::I x[4]) {
  using I = typename V::I;
  const I ones = V::set1(0x55555555u), twos = V::set1(0x33333333u);
  for (int r = 0; r < 4; r += 2) {
    const I t = V::bit_and(V::bit_xor(V::template shift_right<1>(x[r]), x[r + 1]), ones);
    x[r + 1] = V::bit_xor(x[r + 1], t);
    x[r] = V::bit_xor(x[r], V::template shift_left<1>(t));
  }
  for (int r = 0; r < 2; ++r) {
    const I t = V::bit_and(V::bit_xor(V::template shift_right<2>(x[r]), x[r + 2]), twos);
    x[r + 2] = V::bit_xor(x[r + 2], t);
    x[r] = V::bit_xor(x[r], V::template shift_left<2>(t));
  }
}

template <class V, class Real>
void rademacher_add_group(const Group<Real>& group, const CallWords<V>& calls, uint32_t first, int columns,
                          Real (*h)[V::lanes]) {
  using I = typename V::I;
  constexpr int limbs = Working<Real>::limbs;
  const int quads = (columns + 3) / 4;
  alignas(64) int32_t nibbles[kGroup / 4][16][V::lanes];  // [quad][word * 4 + row]
  alignas(64) int32_t tables[limbs][kGroup / 4][16];
  uint32_t total[limbs] = {};
  for (int quad = 0; quad < quads; ++quad) {
    I w[4][4];  // [column][word]
    for (int c = 0; c < 4; ++c) calls.column(first + static_cast<uint32_t>(4 * quad + c), w[c]);
    for (int word = 0; word < 4; ++word) {
      I rows[4] = {w[0][word], w[1][word], w[2][word], w[3][word]};
      transpose_nibbles<V>(rows);
      for (int r = 0; r < 4; ++r) V::store(nibbles[quad][word * 4 + r], rows[r]);
    }
    for (int limb = 0; limb < limbs; ++limb) {
      V::store_subset_sums(tables[limb][quad], group.c[limb] + 4 * quad);
      for (int c = 0; c < 4; ++c) total[limb] += static_cast<uint32_t>(group.c[limb][4 * quad + c]);
    }
  }
  for (int row = 0; row < 16; ++row) {
    I sums[limbs][8];
    for (int limb = 0; limb < limbs; ++limb) {
      for (int n = 0; n < 8; ++n) sums[limb][n] = V::set1(0u);
      for (int quad = 0; quad < quads; ++quad) {
        const auto table = V::load_table(tables[limb][quad]);
        const I index = V::load(nibbles[quad][row]);
        unroll(Nibbles(), [&](auto n) {
          sums[limb][n] = V::add(sums[limb][n], V::look_up(table, V::template shift_right<4 * n>(index)));
        });
      }
      for (int n = 0; n < 8; ++n) sums[limb][n] = V::sub(V::set1(total[limb]), V::add(sums[limb][n], sums[limb][n]));
    }
    for (int n = 0; n < 8; ++n) {
      Real* to = h[row / 4 * 32 + 4 * n + row % 4];
      if constexpr (limbs == 1) {
        V::fold(sums[0][n], group.scale, to);
      } else {
        double values[2][V::lanes];
        V::store_double(values[0], sums[0][n]);
        V::store_double(values[1], sums[1][n]);
        fold_exact<V>(values[0], values[1], group.scale, to);
      }
    }
  }
}

template <class V, class Real>
void uniform_add_group(const Group<Real>& group, const CallWords<V>& calls, uint32_t first, int columns,
                       Real (*h)[V::lanes]) {
  using I = typename V::I;
  constexpr int limbs = Working<Real>::limbs;
  const int pairs = (columns + 1) / 2;
  alignas(64) int32_t words[kGroup][4][V::lanes];
  for (int k = 0; k < 2 * pairs; ++k) {
    I w[4];
    calls.column(first + static_cast<uint32_t>(k), w);
    for (int word = 0; word < 4; ++word) V::store(words[k][word], w[word]);
  }
  int64_t total[limbs] = {};
  for (int limb = 0; limb < limbs; ++limb) {
    for (int k = 0; k < kGroup; ++k) total[limb] += group.c[limb][k];
  }
  const I byte = V::set1(255u);
  for (int word = 0; word < 4; ++word) {
    unroll(Bytes(), [&](auto b) {
      double values[2][V::lanes];
      for (int limb = 0; limb < limbs; ++limb) {
        I high = V::set1(0u), low = V::set1(0u);
        for (int pair = 0; pair < pairs; ++pair) {
          const I even = V::bit_and(V::template shift_right<8 * b>(V::load(words[2 * pair][word])), byte);
          const I odd = V::bit_and(V::template shift_right<8 * b>(V::load(words[2 * pair + 1][word])), byte);
          const I bytes = V::bit_or(even, V::template shift_left<16>(odd));
          const PairHalves factors(group.c[limb][2 * pair], group.c[limb][2 * pair + 1]);
          high = V::add(high, V::multiply_pairs(bytes, V::set1(static_cast<uint32_t>(factors.high))));
          low = V::add(low, V::multiply_pairs(bytes, V::set1(static_cast<uint32_t>(factors.low))));
        }
        int32_t highs[V::lanes], lows[V::lanes];
        V::store(highs, high);
        V::store(lows, low);
        for (int i = 0; i < V::lanes; ++i) values[limb][i] = uniform_sum(highs[i], lows[i], total[limb]);
      }
      fold_exact<V>(values[0], values[1], group.scale, h[4 * word + b]);
    });
  }
}

template <class V, class Real>
void gaussian_add_group(const Group<Real>& group, const CallWords<V>& calls, uint32_t first, int columns,
                        Real (*h)[V::lanes]) {
  using I = typename V::I;
  constexpr int limbs = Working<Real>::limbs;
  WideSum<V> sums[limbs][4];
  for (auto& limb : sums) {
    for (auto& sum : limb) sum.clear();
  }
  for (int k = 0; k < columns; ++k) {
    I w[4], b[4];
    calls.column(first + static_cast<uint32_t>(k), w);
    box_muller<V>(w[0], w[1], b[0], b[1]);
    box_muller<V>(w[2], w[3], b[2], b[3]);
    for (int limb = 0; limb < limbs; ++limb) {
      const I factor = V::set1(static_cast<uint32_t>(group.c[limb][k]));
      for (int e = 0; e < 4; ++e) sums[limb][e].add_product(b[e], factor);
    }
  }
  for (int e = 0; e < 4; ++e) {
    double values[2][V::lanes];
    for (int limb = 0; limb < limbs; ++limb) sums[limb][e].store(values[limb]);
    fold_exact<V>(values[0], values[1], group.scale, h[e]);
  }
}

template <class V, class Real>
void sum_columns(const SpanSum<Real>& s) {
  const int e = elements_per_call(s.stream.basis);
  const auto add_group = s.stream.basis == Basis::rademacher ? rademacher_add_group<V, Real>
                         : s.stream.basis == Basis::uniform  ? uniform_add_group<V, Real>
                                                             : gaussian_add_group<V, Real>;
  CallSums<V, Real> calls;
  const int step = e * V::lanes;
  for (int begin = s.begin / step * step; begin < s.end; begin += step) {
    const CallWords<V> words(s.stream, (s.span * kSpan + begin) / e);
    memset(calls.h, 0, sizeof(calls.h[0]) * e);
    memset(calls.total, 0, sizeof(calls.total[0]) * e);
    const auto close_fold = [&] {
      for (int place = 0; place < e; ++place) {
        for (int lane = 0; lane < V::lanes; ++lane) calls.total[place][lane] += calls.h[place][lane];
      }
      memset(calls.h, 0, sizeof(calls.h[0]) * e);
    };
    for (int64_t first = 0; first < s.columns; first += kGroup) {
      const int columns = static_cast<int>(s.columns - first < kGroup ? s.columns - first : kGroup);
      const int64_t group = first / kGroup;
      add_group(s.groups[group], words, static_cast<uint32_t>(first), columns, calls.h);
      if (group % kFoldRadix == kFoldRadix - 1) close_fold();
    }
    close_fold();
    for (int lane = 0; lane < V::lanes; ++lane) {
      for (int place = 0; place < e; ++place) s.sums[begin + lane * e + place] = calls.total[place][lane];
    }
  }
}

template <class V, class Real>
constexpr RealKernels<Real> real_kernels() {
  return {widen<Real>, subtract<Real>, project_tile<V, Real>, sum_columns<V, Real>, accumulate<Real>, scale_add<Real>};
}

}  // namespace
}  // namespace ferret::cpu

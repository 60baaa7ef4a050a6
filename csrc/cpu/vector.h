// The vector paths: one algorithm over a vector type V (avx2.h, avx512.h, neon.h), compiled once per instruction set.
//
// project keeps columns in the lanes; a few consecutive elements q make a table of the subset sums of their -2 q, and each lane's
// next random bits pick its entry: one look-up serves these elements of every lane's column. A set bit is the sign -1, so a column's
// sum is the sum of all q plus its entries, modulo 2^32 on the way and exact at the end.
// reconstruct keeps calls (runs of elements) in the lanes; the words of four columns are transposed as 4x4 bit blocks, so that
// a nibble holds one element's bits of four columns, and the tables hold the subset sums of four coordinates.
#pragma once

#include <type_traits>

#include "elementwise.h"
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

template <int elements>  // a call
struct TileCalls {
  Call<One> call[kTile / elements];
  FERRET_HD const Call<One>& operator[](int i) const { return call[i]; }
};
template <int elements>
FERRET_HD TileCalls<elements> calls_of_tile(const PhiloxKeys& keys, Basis basis, uint64_t tile) {
  TileCalls<elements> calls;
  for (int i = 0; i < kTile / elements; ++i) calls.call[i] = {keys, basis, One{tile * (kTile / elements) + i}};
  return calls;
}

// The columns k, k + 1, .. in the lanes.
template <class V>
FERRET_HD Column<Halves<V>> columns_of(const PhiloxKeys& keys, uint64_t t, uint32_t k) {
  return {keys, t, Halves<V>::split(V::add(V::set1(k), V::iota()))};
}
// The calls t, t + 1, .. in the lanes; t is a multiple of their number.
template <class V>
FERRET_HD Call<Halves<V>> calls_of(const PhiloxKeys& keys, Basis basis, uint64_t t) {
  return {keys, basis, Halves<V>::split(V::add(V::set1(static_cast<uint32_t>(t)), V::iota()))};
}

// Of two calls at a time: while Philox works on a pair, the words of the pair before are looked up.
template <class V>
void rademacher_tile_sums(const int32_t* q, int32_t total, uint64_t tile, int begin, int end, Stream stream,
                          uint32_t first, int count, double* values) {
  using I = typename V::I;
  constexpr int bits = V::table_bits, look_ups = (32 + bits - 1) / bits;
  alignas(64) int32_t tables[kWordsPerTile][look_ups][1 << bits];
  alignas(64) int32_t words[8][V::lanes];
  const int first_pair = begin / 256, last_pair = (end + 255) / 256;
  int32_t doubled[kTile + kPad];  // a table may read past the tile, into what is never looked up
  for (int j = first_pair * 256; j < last_pair * 256; ++j) doubled[j] = -2 * q[j];
  memset(doubled + last_pair * 256, 0, sizeof(int32_t) * kPad);
  for (int word = first_pair * 8; word < last_pair * 8; ++word) {
    for (int n = 0; n < look_ups; ++n) {
      V::template store_subset_sums<bits>(tables[word][n], doubled + 32 * word + bits * n);
    }
  }
  const PhiloxKeys keys(stream.seed);
  const auto calls = calls_of_tile<128>(keys, stream.basis, tile);

  I sums[2] = {V::set1(static_cast<uint32_t>(total)), V::set1(0u)};
  const auto look_up_words = [&](int pair, int word) FERRET_INLINE {
    const auto& table = tables[pair * 8 + word];
    const I w = V::load(words[word]);
    unroll(Count<look_ups>(), [&](auto n) FERRET_INLINE {
      sums[n % 2] = V::add(sums[n % 2], V::template look_up<bits>(table[n], V::template shift_right<bits * n>(w)));
    });
    V::fence(sums[0]);  // else all look-ups are gathered in one place, and Philox's state is spilled
    V::fence(sums[1]);
  };
  const auto take_sums = [&](double* to) FERRET_INLINE {
    V::store_double(to, V::add(sums[0], sums[1]));
    sums[0] = V::set1(static_cast<uint32_t>(total));
    sums[1] = V::set1(0u);
  };
  int before = -1;  // the pair whose words are there
  for (int i = 0; i < count; i += V::lanes) {
    const auto columns = columns_of<V>(keys, tile * (kTile / 128), first + static_cast<uint32_t>(i));
    for (int pair = first_pair; pair < last_pair; ++pair) {
      I w[2][4];
      if (before < 0) {
        philox_pair<V>(keys, calls[2 * pair], columns, calls[2 * pair + 1], columns, w);
      } else {
        philox_pair<V>(keys, calls[2 * pair], columns, calls[2 * pair + 1], columns, w,
                       [&](int word) FERRET_INLINE { look_up_words(before, word); });
        if (pair == first_pair) take_sums(values + i - V::lanes);
      }
      for (int word = 0; word < 8; ++word) V::store(words[word], w[word / 4][word % 4]);
      before = pair;
    }
  }
  for (int word = 0; word < 8; ++word) look_up_words(before, word);
  take_sums(values + (count - 1) / V::lanes * V::lanes);
}

// For up to V::few_columns columns tables do not pay: as many bits as there are lanes are the mask of an addition. All tiles of a run
// are done at once, so that its calls fill the lanes of Philox. values[tile][i] of the tiles that have a q.

using CallBits = uint32_t[4][kRun * 4];  // [word][call of the run]

// values[c] = the sum of the tile's q with the signs of column c.
template <class V, int columns>
FERRET_HD void add_signed(const int32_t* q, int32_t total, const CallBits* bits, int tile, const Prefetch* ahead,
                          double* values) {
  typename V::I set[columns];  // sums of those with the sign -1
  for (auto& sum : set) sum = V::set1(0u);
  for (int m = 0; m < kWordsPerTile; ++m) {
    if (ahead != nullptr) {
      ahead[0](2 * m, 2 * m + 2);
      ahead[1](2 * m, 2 * m + 2);
    }
    unroll(Count<32 / V::lanes>(), [&](auto part) FERRET_INLINE {
      const auto x = V::load(q + 32 * m + V::lanes * part);
      for (int c = 0; c < columns; ++c) {
        set[c] = V::template add_where<part>(set[c], bits[c][m % 4] + 4 * tile + m / 4, x);
      }
    });
  }
  uint32_t sums[columns];
  if constexpr (columns % 4 == 0) {
    for (int c = 0; c < columns; c += 4) V::reduce_add4(set + c, sums + c);
  } else {
    for (int c = 0; c < columns; ++c) sums[c] = V::reduce_add(set[c]);
  }
  for (int c = 0; c < columns; ++c) values[c] = static_cast<int32_t>(static_cast<uint32_t>(total) - 2 * sums[c]);
}

template <class V>
void rademacher_run_sums(const int32_t* const (&q)[kRun], const int32_t (&total)[kRun], uint64_t first_tile,
                         Stream stream, uint32_t first, int count, const Prefetch (*ahead)[2],
                         double (*values)[V::few_columns]) {
  using I = typename V::I;
  const uint64_t t = first_tile * 4;
  const PhiloxKeys keys(stream.seed);
  alignas(64) CallBits bits[V::few_columns];
  for (int call = 0; call < kRun * 4; call += V::lanes) {
    const auto calls = calls_of<V>(keys, stream.basis, t + static_cast<uint64_t>(call));
    for (int i = 0; i < count; i += 2) {
      const Column<One> column0 = {keys, t, One{first + i}}, column1 = {keys, t, One{first + i + 1}};
      I w[2][4];
      philox_pair<V>(keys, calls, column0, calls, column1, w);
      for (int word = 0; word < 8; ++word) V::store(bits[i + word / 4][word % 4] + call, w[word / 4][word % 4]);
    }
  }
  for (int tile = 0; tile < kRun; ++tile) {
    if (q[tile] == nullptr) continue;
    int i = 0;
    const auto add = [&](auto columns) {
      if constexpr (columns <= V::few_columns) {
        for (; i + columns <= count; i += columns) {
          add_signed<V, columns>(q[tile], total[tile], bits + i, tile, i == 0 ? ahead[tile] : nullptr,
                                 values[tile] + i);
        }
      }
    };
    add(std::integral_constant<int, 8>());
    add(std::integral_constant<int, 4>());
    add(std::integral_constant<int, 2>());
    add(std::integral_constant<int, 1>());
  }
}

template <class V>
void uniform_tile_sums(const int32_t* q, int32_t total, uint64_t tile, int begin, int end, Stream stream,
                       uint32_t first, int count, double* values) {
  using I = typename V::I;
  const int first_call = begin / 32 * 2, last_call = (end + 31) / 32 * 2;
  int32_t pairs[kTile / 4][2][2];  // [word][even bytes, odd bytes][high, low]
  for (int m = first_call * 4; m < last_call * 4; ++m) {
    for (int odd = 0; odd < 2; ++odd) {
      const PairHalves pair(q[4 * m + odd], q[4 * m + odd + 2]);
      pairs[m][odd][0] = pair.high;
      pairs[m][odd][1] = pair.low;
    }
  }
  const PhiloxKeys keys(stream.seed);
  const auto calls = calls_of_tile<16>(keys, stream.basis, tile);
  const I even_bytes = V::set1(0x00FF00FFu);
  for (int i = 0; i < count; i += V::lanes) {
    const auto columns = columns_of<V>(keys, tile * (kTile / 16), first + static_cast<uint32_t>(i));
    I high = V::set1(0u), low = V::set1(0u);
    for (int call = first_call; call < last_call; call += 2) {
      I w[2][4];
      philox_pair<V>(keys, calls[call], columns, calls[call + 1], columns, w);
      for (int word = 0; word < 8; ++word) {
        const auto& pair = pairs[call * 4 + word];
        const I x = w[word / 4][word % 4];
        const I bytes[2] = {V::bit_and(x, even_bytes), V::bit_and(V::template shift_right<8>(x), even_bytes)};
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
void gaussian_tile_sums(const int32_t* q, int32_t, uint64_t tile, int begin, int end, Stream stream, uint32_t first,
                        int count, double* values) {
  using I = typename V::I;
  const int first_call = begin / 8 * 2, last_call = (end + 7) / 8 * 2;
  const PhiloxKeys keys(stream.seed);
  const auto calls = calls_of_tile<4>(keys, stream.basis, tile);
  for (int i = 0; i < count; i += V::lanes) {
    const auto columns = columns_of<V>(keys, tile * (kTile / 4), first + static_cast<uint32_t>(i));
    WideSum<V> sum;
    sum.clear();
    for (int call = first_call; call < last_call; call += 2) {
      I w[2][4], b[8];
      philox_pair<V>(keys, calls[call], columns, calls[call + 1], columns, w);
      for (int i = 0; i < 2; ++i) box_muller<V, 2>(w[i], b + 4 * i);
      for (int e = 0; e < 8; ++e) sum.add_product(b[e], V::set1(static_cast<uint32_t>(q[4 * call + e])));
    }
    sum.store(values + i);
  }
}

// to_integers of elementwise.h; what is rare (tiny elements, one that rounds up to 2^22) is left to it.
template <class V>
FERRET_HD TileState to_integers_of(const float* x, TileIntegers<float>& tile) {
  typename V::I magnitudes = V::set1(0u);
  for (int i = 0; i < kTile; i += V::lanes) {
    magnitudes = V::max_unsigned(magnitudes, V::bit_and(V::load(x + i), V::set1(0x7FFFFFFFu)));
  }
  const float largest = bits_to_float(V::reduce_max(magnitudes));
  if (largest == 0) return TileState::zero;
  if (!(largest - largest == 0)) return TileState::not_finite;
  const int n = exponent_of(largest);
  if (kDeltaBits - n > 127) return to_integers(x, tile);
  const float scale = power_of_two(kDeltaBits - n, float());
  if (round_to_int(largest * scale) == 1 << kDeltaBits) return to_integers(x, tile);
  typename V::I total = V::set1(0u);
  for (int i = 0; i < kTile; i += V::lanes) {
    const auto q = V::round(V::multiply(V::as_float(V::load(x + i)), V::set1(scale)));
    total = V::add(total, q);
    V::store(tile.q[0] + i, q);
  }
  tile.total[0] = static_cast<int32_t>(V::reduce_add(total));
  tile.unit = power_of_two(n - kDeltaBits, double());
  return TileState::finite;
}

template <class V>
FERRET_HD TileState to_integers_of(const double* x, TileIntegers<double>& tile) {
  return to_integers(x, tile);
}

template <class V, class Real>
void project_run(const RunProduct<Real>& p) {
  constexpr int limbs = Working<Real>::limbs;
  TileIntegers<Real> tiles[kRun];
  TileState states[kRun];
  for (int i = 0; i < kRun; ++i) {
    states[i] = p.x[i] == nullptr ? TileState::zero : to_integers_of<V>(p.x[i], tiles[i]);
  }

  const auto add = [&](int i, const auto& sums_of_limb) {
    if (states[i] == TileState::not_finite) poison<Real>(p.count, p.sums);
    if (states[i] != TileState::finite) return;
    const double* values[limbs];
    for (int limb = 0; limb < limbs; ++limb) values[limb] = sums_of_limb(limb);
    add_tile_values<Real>(values, p.count, tiles[i].unit, p.sums);
  };
  if constexpr (V::few_columns > 0) {
    if (p.stream.basis == Basis::rademacher && p.count <= V::few_columns) {
      double values[limbs][kRun][V::few_columns];
      for (int limb = 0; limb < limbs; ++limb) {
        const int32_t* q[kRun] = {};
        int32_t total[kRun] = {};
        for (int i = 0; i < kRun; ++i) {
          if (states[i] == TileState::finite) q[i] = tiles[i].q[limb], total[i] = tiles[i].total[limb];
        }
        rademacher_run_sums<V>(q, total, p.tile, p.stream, p.first, p.count, p.ahead, values[limb]);
      }
      for (int i = 0; i < kRun; ++i) add(i, [&](int limb) { return values[limb][i]; });
      return;
    }
  }
  const auto tile_sums = p.stream.basis == Basis::rademacher ? rademacher_tile_sums<V>
                         : p.stream.basis == Basis::uniform  ? uniform_tile_sums<V>
                                                             : gaussian_tile_sums<V>;
  alignas(64) double values[limbs][kColumnBatch + kPad];
  for (int i = 0; i < kRun; ++i) {
    const int begin = clamp(p.begin - i * kTile, 0, kTile), end = clamp(p.end - i * kTile, 0, kTile);
    for (const Prefetch& ahead : p.ahead[i]) ahead(0, kTile * 4 / 64);
    add(i, [&](int limb) {
      tile_sums(tiles[i].q[limb], tiles[i].total[limb], p.tile + i, begin, end, p.stream, p.first, p.count,
                values[limb]);
      return values[limb];
    });
  }
}

// ---- reconstruct: H of the elements of `lanes` consecutive calls, as h[place in the call][lane] ----
//
// A group object holds what all calls share of 64 columns. add() has h = fma(G, scale, h) for its group, or, where the group opens a
// fold, h = fma(G, scale, 0).

template <class V, class Real>
using Lanes = Real[V::lanes];

// G = hi + lo * 2^-23 from exact float64 sums, rounded once to Real.
template <class V, class Real>
FERRET_HD void fold_exact(const double* hi, const double* lo, Real scale, bool open, Real* h) {
  for (int i = 0; i < V::lanes; ++i) {
    const double value = Working<Real>::limbs == 2 ? hi[i] + lo[i] * 0x1p-23 : hi[i];
    h[i] = fused_multiply_add(static_cast<Real>(value), scale, open ? Real(0) : h[i]);
  }
}

// Words as 4x4 bit blocks: afterwards nibble n of x[r] holds bit 4n + r of the former x[0], x[1], x[2], x[3].
template <class V>
FERRET_HD void transpose_nibbles(typename V::I (&x)[4]) {
  for (int r = 0; r < 4; r += 2) V::template exchange<1>(x[r], x[r + 1], V::set1(0x55555555u));
  for (int r = 0; r < 2; ++r) V::template exchange<2>(x[r], x[r + 2], V::set1(0x33333333u));
}

// What the nibbles of a row pick from one table after the other, added up for each of the 8 nibbles.
template <class V>
struct NibbleSums {
  typename V::I sums[8];

  FERRET_HD explicit NibbleSums(uint32_t start) {
    for (auto& sum : sums) sum = V::set1(start);
  }
  FERRET_HD void add(const int32_t* table, typename V::I row) {
    unroll(Count<8>(), [&](auto n) FERRET_INLINE {
      sums[n] = V::add(sums[n], V::template look_up<4>(table, V::template shift_right<4 * n>(row)));
    });
  }
  FERRET_HD void get(typename V::I (&to)[8]) const {
    for (int n = 0; n < 8; ++n) to[n] = sums[n];
  }
};

template <class V, class Real>
class RademacherGroup {
  using I = typename V::I;
  static constexpr int limbs = Working<Real>::limbs;

 public:
  RademacherGroup(const Group<Real>& group, int columns) : scale_(group.scale), quads_((columns + 3) / 4) {
    for (int limb = 0; limb < limbs; ++limb) {
      total_[limb] = 0;
      for (int quad = 0; quad < quads_; ++quad) {
        int32_t doubled[4];
        for (int c = 0; c < 4; ++c) {
          doubled[c] = -2 * group.c[limb][4 * quad + c];
          total_[limb] += static_cast<uint32_t>(group.c[limb][4 * quad + c]);
        }
        V::template store_subset_sums<4>(tables_[limb][quad], doubled);
      }
    }
  }

  void add(const PhiloxKeys& keys, const Call<Halves<V>>& calls, const Column<One>* columns, const Prefetch& ahead,
           bool open, Lanes<V, Real>* h) const {
    alignas(64) int32_t nibbles[16][kGroup / 4][V::lanes];  // [word * 4 + row][quad]
    for (int quad = 0; quad < quads_; ++quad) {
      I w[2][2][4];  // [pair of columns][column][word]
      for (int pair = 0; pair < 2; ++pair) {
        const Column<One>* column = columns + 4 * quad + 2 * pair;
        philox_pair<V>(keys, calls, column[0], calls, column[1], w[pair]);
      }
      for (int word = 0; word < 4; ++word) {
        I rows[4] = {w[0][0][word], w[0][1][word], w[1][0][word], w[1][1][word]};
        transpose_nibbles<V>(rows);
        for (int r = 0; r < 4; ++r) V::store(nibbles[word * 4 + r][quad], rows[r]);
      }
    }
    for (int row = 0; row < 16; ++row) {
      ahead(8 * row, 8 * (row + 1));
      I sums[limbs][8];
      for (int limb = 0; limb < limbs; ++limb) {
        NibbleSums<V> nibble_sums(total_[limb]);
        for (int quad = 0; quad < quads_; ++quad) nibble_sums.add(tables_[limb][quad], V::load(nibbles[row][quad]));
        nibble_sums.get(sums[limb]);
      }
      for (int n = 0; n < 8; ++n) {
        Real* to = h[row / 4 * 32 + 4 * n + row % 4];
        if constexpr (limbs == 1) {
          V::fold(sums[0][n], scale_, open, to);
        } else {
          double values[2][V::lanes];
          V::store_double(values[0], sums[0][n]);
          V::store_double(values[1], sums[1][n]);
          fold_exact<V>(values[0], values[1], scale_, open, to);
        }
      }
    }
  }

 private:
  alignas(64) int32_t tables_[limbs][kGroup / 4][16];
  uint32_t total_[limbs];
  Real scale_;
  int quads_;
};

template <class V, class Real>
class UniformGroup {
  using I = typename V::I;
  static constexpr int limbs = Working<Real>::limbs;

 public:
  UniformGroup(const Group<Real>& group, int columns) : scale_(group.scale), pairs_((columns + 1) / 2) {
    for (int limb = 0; limb < limbs; ++limb) {
      total_[limb] = 0;
      for (int pair = 0; pair < pairs_; ++pair) {
        const int32_t* c = group.c[limb] + 2 * pair;
        total_[limb] += static_cast<int64_t>(c[0]) + c[1];
        const PairHalves halves(c[0], c[1]);
        high_[limb][pair] = static_cast<uint32_t>(halves.high);
        low_[limb][pair] = static_cast<uint32_t>(halves.low);
      }
    }
  }

  void add(const PhiloxKeys& keys, const Call<Halves<V>>& calls, const Column<One>* columns, const Prefetch&, bool open,
           Lanes<V, Real>* h) const {
    alignas(64) int32_t words[4][kGroup][V::lanes];
    for (int k = 0; k < 2 * pairs_; k += 2) {
      I w[2][4];
      philox_pair<V>(keys, calls, columns[k], calls, columns[k + 1], w);
      for (int word = 0; word < 8; ++word) V::store(words[word % 4][k + word / 4], w[word / 4][word % 4]);
    }
    const I byte = V::set1(255u);
    for (int word = 0; word < 4; ++word) {
      I high[limbs][4], low[limbs][4];  // [byte]
      for (int limb = 0; limb < limbs; ++limb) {
        for (int b = 0; b < 4; ++b) high[limb][b] = low[limb][b] = V::set1(0u);
      }
      for (int pair = 0; pair < pairs_; ++pair) {
        const I even = V::load(words[word][2 * pair]), odd = V::load(words[word][2 * pair + 1]);
        unroll(Count<4>(), [&](auto b) FERRET_INLINE {
          const I bytes = V::bit_or(V::bit_and(V::template shift_right<8 * b>(even), byte),
                                    V::template shift_left<16>(V::bit_and(V::template shift_right<8 * b>(odd), byte)));
          for (int limb = 0; limb < limbs; ++limb) {
            high[limb][b] = V::add(high[limb][b], V::multiply_pairs(bytes, V::set1(high_[limb][pair])));
            low[limb][b] = V::add(low[limb][b], V::multiply_pairs(bytes, V::set1(low_[limb][pair])));
          }
        });
      }
      for (int b = 0; b < 4; ++b) {
        double values[2][V::lanes];
        for (int limb = 0; limb < limbs; ++limb) {
          int32_t highs[V::lanes], lows[V::lanes];
          V::store(highs, high[limb][b]);
          V::store(lows, low[limb][b]);
          for (int i = 0; i < V::lanes; ++i) values[limb][i] = uniform_sum(highs[i], lows[i], total_[limb]);
        }
        fold_exact<V>(values[0], values[1], scale_, open, h[4 * word + b]);
      }
    }
  }

 private:
  uint32_t high_[limbs][kGroup / 2], low_[limbs][kGroup / 2];
  int64_t total_[limbs];
  Real scale_;
  int pairs_;
};

template <class V, class Real>
class GaussianGroup {
  using I = typename V::I;
  static constexpr int limbs = Working<Real>::limbs;

 public:
  GaussianGroup(const Group<Real>& group, int columns) : group_(group), columns_(columns) {}

  void add(const PhiloxKeys& keys, const Call<Halves<V>>& calls, const Column<One>* columns, const Prefetch&, bool open,
           Lanes<V, Real>* h) const {
    WideSum<V> sums[limbs][4];
    for (auto& limb : sums) {
      for (auto& sum : limb) sum.clear();
    }
    for (int k = 0; k < columns_; k += 2) {
      I w[2][4];
      philox_pair<V>(keys, calls, columns[k], calls, columns[k + 1], w);
      for (int i = 0; i < 2; ++i) {
        I b[4];
        box_muller<V, 2>(w[i], b);
        for (int limb = 0; limb < limbs; ++limb) {
          const I factor = V::set1(static_cast<uint32_t>(group_.c[limb][k + i]));
          for (int e = 0; e < 4; ++e) sums[limb][e].add_product(b[e], factor);
        }
      }
    }
    for (int e = 0; e < 4; ++e) {
      double values[2][V::lanes];
      for (int limb = 0; limb < limbs; ++limb) sums[limb][e].store(values[limb]);
      fold_exact<V>(values[0], values[1], group_.scale, open, h[e]);
    }
  }

 private:
  const Group<Real>& group_;
  int columns_;
};

// The sums of a fold of 64 groups are closed before the next one opens; a single fold needs no second array.
template <class V, class Real, template <class, class> class BasisGroup>
void sum_columns_of(const SpanSum<Real>& s) {
  const int e = elements_per_call(s.stream.basis), step = e * V::lanes;
  const uint64_t first_call = s.span * kSpan / e;
  const int first_step = s.begin / step * step, last_step = (s.end + step - 1) / step * step;  // lanes are not in order
  const int64_t groups = (s.columns + kGroup - 1) / kGroup;
  const PhiloxKeys keys(s.stream.seed);
  Column<One> column[kGroup];
  Real total[kSpan];
  for (int64_t g = 0; g < groups; ++g) {
    const int columns = static_cast<int>(s.columns - g * kGroup < kGroup ? s.columns - g * kGroup : kGroup);
    for (int k = 0; k < (columns + 3) / 4 * 4; ++k) {
      column[k] = {keys, first_call, One{static_cast<uint32_t>(g * kGroup + k)}};
    }
    const BasisGroup<V, Real> group(s.groups[g], columns);
    for (int begin = first_step; begin < last_step; begin += step) {
      const auto calls = calls_of<V>(keys, s.stream.basis, first_call + static_cast<uint64_t>(begin / e));
      group.add(keys, calls, column, g == 0 && begin == first_step ? s.ahead : Prefetch{}, g % kFoldRadix == 0,
                reinterpret_cast<Lanes<V, Real>*>(s.sums + begin));
    }
    const bool closes = g % kFoldRadix == kFoldRadix - 1 || g == groups - 1;
    if (closes && groups > kFoldRadix) {
      for (int i = first_step; i < last_step; ++i) total[i] = (g < kFoldRadix ? Real(0) : total[i]) + s.sums[i];
    }
  }
  if (groups > kFoldRadix) memcpy(s.sums + first_step, total + first_step, sizeof(Real) * (last_step - first_step));
}

template <class V, class Real>
void sum_columns(const SpanSum<Real>& s) {
  switch (s.stream.basis) {
    case Basis::rademacher: return sum_columns_of<V, Real, RademacherGroup>(s);
    case Basis::uniform: return sum_columns_of<V, Real, UniformGroup>(s);
    case Basis::gaussian: return sum_columns_of<V, Real, GaussianGroup>(s);
  }
}

template <class V, class Real>
void to_element_order(Basis basis, const Real* sums, Real* elements) {
  const int e = elements_per_call(basis);
  for (int begin = 0; begin < kSpan; begin += e * V::lanes) {
    const auto* h = reinterpret_cast<const Lanes<V, Real>*>(sums + begin);
    int place = 0;
    if constexpr (std::is_same_v<Real, float>) {
      for (; place + V::lanes <= e; place += V::lanes) V::transpose(h[place], elements + begin + place, e);
    }
    for (; place < e; ++place) {
      for (int lane = 0; lane < V::lanes; ++lane) elements[begin + lane * e + place] = h[place][lane];
    }
  }
}

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

template <class V, class Real>
constexpr RealKernels<Real> real_kernels() {
  return {widen<Real>,          subtract<Real>,   project_run<V, Real>,
          sum_columns<V, Real>, accumulate<Real>, to_element_order<V, Real>,
          scale_add<Real>};
}

}  // namespace
}  // namespace ferret::cpu

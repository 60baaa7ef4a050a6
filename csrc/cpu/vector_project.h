// project over a vector type V: values[i] = sum over a tile of q_j b(j, first + i).
//
// Columns are in the lanes; a few consecutive elements q make a table of the subset sums of their -2 q, and each lane's next random
// bits pick its entry: one look-up serves these elements of every lane's column. A set bit is the sign -1, so a column's sum is the sum
// of all q plus its entries, modulo 2^32 on the way and exact at the end.
#pragma once

#include "vector_dots.h"

namespace ferret::cpu {
namespace {

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
FERRET_HD void add_signed(const int32_t* q, int32_t total, const CallBits* bits, int tile, LinesAhead& ahead,
                          double* values) {
  typename V::I set[columns];  // sums of those with the sign -1
  for (auto& sum : set) sum = V::set1(0u);
  for (int m = 0; m < kWordsPerTile; ++m) {
    ahead();
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
                         Stream stream, uint32_t first, int count, LinesAhead ahead, double (*values)[V::few_columns]) {
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
          add_signed<V, columns>(q[tile], total[tile], bits + i, tile, ahead, values[tile] + i);
        }
      }
    };
    add(std::integral_constant<int, 8>());
    add(std::integral_constant<int, 4>());
    add(std::integral_constant<int, 2>());
    add(std::integral_constant<int, 1>());
  }
}

// sum q u over a tile and the columns first, first + 1, .. for bytes u, as sums of three signed digits' products: q = a + 2^8 b + 2^16 c.
template <class V>
void uniform_tile_dots(const int32_t* q, int32_t total, uint64_t tile, int begin, int end, Stream stream,
                       uint32_t first, int count, double* values) {
  using I = typename V::I;
  const int first_call = begin / 32 * 2, last_call = (end + 31) / 32 * 2;
  int8_t digits[3][kTile];
  for (int j = first_call * 16; j < last_call * 16; ++j) {
    const int32_t a = static_cast<int8_t>(q[j]), b = static_cast<int8_t>((q[j] - a) >> 8);
    digits[0][j] = static_cast<int8_t>(a);
    digits[1][j] = static_cast<int8_t>(b);
    digits[2][j] = static_cast<int8_t>((((q[j] - a) >> 8) - b) >> 8);
  }
  const PhiloxKeys keys(stream.seed);
  const auto calls = calls_of_tile<16>(keys, stream.basis, tile);
  for (int i = 0; i < count; i += V::lanes) {
    const auto columns = columns_of<V>(keys, tile * (kTile / 16), first + static_cast<uint32_t>(i));
    I sums[3] = {V::set1(0u), V::set1(0u), V::set1(0u)};
    for (int call = first_call; call < last_call; call += 2) {
      I w[2][4];
      philox_pair<V>(keys, calls[call], columns, calls[call + 1], columns, w);
      for (int word = 0; word < 8; ++word) {
        for (int m = 0; m < 3; ++m) {
          uint32_t four;
          memcpy(&four, digits[m] + 16 * call + 4 * word, sizeof four);
          sums[m] = V::dot(sums[m], w[word / 4][word % 4], V::set1(four));
        }
      }
    }
    int32_t lanes[3][V::lanes];
    for (int m = 0; m < 3; ++m) V::store(lanes[m], sums[m]);
    for (int lane = 0; lane < V::lanes; ++lane) {
      const double sum = lanes[0][lane] + 256.0 * lanes[1][lane] + 65536.0 * lanes[2][lane];
      values[i + lane] = 2.0 * sum - 255.0 * static_cast<double>(total);
    }
  }
}

template <class V>
void uniform_tile_sums(const int32_t* q, int32_t total, uint64_t tile, int begin, int end, Stream stream,
                       uint32_t first, int count, double* values) {
  if constexpr (V::dot_columns > 0)
    return uniform_tile_dots<V>(q, total, tile, begin, end, stream, first, count, values);
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
          high = V::add_products(high, bytes[odd], V::set1(static_cast<uint32_t>(pair[odd][0])));
          low = V::add_products(low, bytes[odd], V::set1(static_cast<uint32_t>(pair[odd][1])));
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
  const auto load = [x](int i) FERRET_INLINE { return V::as_float(V::load(x + i)); };
  const TileScale found = scale_of(largest_magnitude<V>(load));
  if (!found.simple) return to_integers(x, tile);
  if (found.state != TileState::finite) return found.state;
  typename V::I total = V::set1(0u);
  for (int i = 0; i < kTile; i += V::lanes) {
    const auto q = V::round(V::multiply(load(i), V::set1(found.scale)));
    total = V::add(total, q);
    V::store(tile.q[0] + i, q);
  }
  tile.total[0] = static_cast<int32_t>(V::reduce_add(total));
  tile.unit = found.unit;
  return TileState::finite;
}

template <class V>
FERRET_HD TileState to_integers_of(const double* x, TileIntegers<double>& tile) {
  return to_integers(x, tile);
}

template <class V, class Real>
int project_runs(const RunProduct<Real>& p) {
  if constexpr (V::dot_columns > 0 && std::is_same_v<Real, float>) {
    if (p.stream.basis == Basis::rademacher && p.count <= V::dot_columns) {
      if (const int done = project_runs_by_dots<V>(p); done > 0) return done;
    }
  }
  constexpr int limbs = Working<Real>::limbs;
  TileIntegers<Real> tiles[kRun];
  TileState states[kRun];
  for (int i = 0; i < kRun; ++i) {
    alignas(64) Real buffer[kTile];
    states[i] = to_integers_of<V>(in_working_precision(p, i, buffer), tiles[i]);
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
        rademacher_run_sums<V>(q, total, p.tile, p.stream, p.first, p.count, LinesAhead(p.ahead), values[limb]);
      }
      for (int i = 0; i < kRun; ++i) add(i, [&](int limb) { return values[limb][i]; });
      return 1;
    }
  }
  const auto tile_sums = p.stream.basis == Basis::rademacher ? rademacher_tile_sums<V>
                         : p.stream.basis == Basis::uniform  ? uniform_tile_sums<V>
                                                             : gaussian_tile_sums<V>;
  alignas(64) double values[limbs][kColumnBatch + kPad];
  for (int i = 0; i < kRun; ++i) {
    const int begin = clamp(p.begin - i * kTile, 0, kTile), end = clamp(p.end - i * kTile, 0, kTile);
    for (const Prefetch& ahead : p.ahead) ahead(i * ahead.lines / kRun, (i + 1) * ahead.lines / kRun);
    add(i, [&](int limb) {
      tile_sums(tiles[i].q[limb], tiles[i].total[limb], p.tile + i, begin, end, p.stream, p.first, p.count,
                values[limb]);
      return values[limb];
    });
  }
  return 1;
}

}  // namespace
}  // namespace ferret::cpu

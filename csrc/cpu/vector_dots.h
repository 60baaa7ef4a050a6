// project with few columns on processors that add up products of bytes (V: avx512vnni.h): the signs are bytes 1 and -1, and a run's integers
// three digits of a byte, q + 2^22 = a + 2^8 b + 2^16 c with a, b, c >= 0. Sums of products are exact, and what 2^22 adds to a tile's is
// 2^22 (512 - 2 (number of set bits)).
//
// Philox works on the run's 16 calls, four a tile, so quarter i of its words belongs to tile i; in digits, signs and sums lane i of each
// quarter does.
#pragma once

#include "vector_scale.h"

namespace ferret::cpu {
namespace {

// A run's integers by pieces of 16: digit[word][n][m] holds byte m of the piece of each tile whose bits are piece n of that word of the
// tile's four calls, which is n / 2 * 128 + word * 32 + n % 2 * 16 elements into the tile, four of its elements a quarter.
struct alignas(64) RunDigits {
  uint8_t digit[4][8][3][64];
};

using RunBits = uint32_t[4][kRun * 4];  // [word][call of the run]

// Runs of T in memory as float32; `difference`: before - now. Elements are counted from the run at work.
template <class V, class T, bool difference>
struct RunSource {
  static constexpr bool by_halves = !difference && sizeof(T) == 2;  // magnitudes are compared as they lie

  const T* now;
  const T* before;

  FERRET_HD explicit RunSource(const RunProduct<float>& p)
      : now(static_cast<const T*>(p.now)), before(static_cast<const T*>(p.before)) {}
  FERRET_HD void advance() {
    now += kRunElements;
    if constexpr (difference) before += kRunElements;
  }
  FERRET_HD typename V::F load(int i) const {
    const auto x = V::load_floats(now + i);
    if constexpr (difference) return V::sub(V::load_floats(before + i), x);
    return x;
  }
  // The largest magnitude so far and in the elements [i, i + 64), by lanes, and that of all lanes.
  FERRET_HD typename V::I largest_of_64(int i, typename V::I so_far) const {
    if constexpr (by_halves) {
      return V::largest_of_64(now + i, so_far);
    } else {
      return largest_of_four<V>([&](int j) FERRET_INLINE { return load(j); }, i, so_far);
    }
  }
  FERRET_HD static float reduce_max(typename V::I largest) {
    if constexpr (by_halves) {
      return to_float(T{V::reduce_max16(largest)});
    } else {
      return bits_to_float(V::reduce_max(largest));
    }
  }
};

// bits[0] and bits[1] = those of columns[0] and columns[1]; largest[i] = the largest magnitude of tile i, tile <= i < tile + tiles.
// Philox is a chain of multiplications that leaves loads and half of the arithmetic idle, which is what a search takes.
template <class V, int tiles, class Source>
FERRET_HD void make_pair(const PhiloxKeys& keys, const Call<Halves<V>>& calls, const Column<One>* columns,
                         const Source x, int tile, float (&largest)[kRun], LinesAhead& ahead, RunBits* bits) {
  typename V::I w[2][4], so_far;
  LinesAhead lines(ahead);  // which the compiler knows to be its own
  philox_pair<V>(keys, calls, columns[0], calls, columns[1], w, [&](auto round) FERRET_INLINE {
    unroll(Count<tiles>(), [&](auto i) FERRET_INLINE {
      constexpr int step = round * tiles + i, n = step % 8;
      if (n == 0) so_far = V::set1(0u);
      so_far = x.largest_of_64((tile + step / 8) * kTile + n * 64, so_far);
      lines();
      if (n == 7) largest[tile + step / 8] = Source::reduce_max(so_far);
    });
    if constexpr (tiles > 0) V::fence(so_far);
  });
  ahead = lines;
  for (int word = 0; word < 8; ++word) V::store(bits[word / 4][word % 4], w[word / 4][word % 4]);
}

// bits[i] = those of columns[i]; an even number of columns is made. With `seek` the largest magnitudes of all tiles are found
// beside the first pairs, as few tiles a pair as there are pairs for. The next run is asked for there and with the first products, 32 times
// each.
template <class V, class Source>
FERRET_HD void make_bits(const PhiloxKeys& keys, const Call<Halves<V>>& calls, const Column<One>* columns, int count,
                         bool seek, const Source x, float (&largest)[kRun], LinesAhead& ahead, RunBits* bits) {
  int tile = seek ? 0 : kRun;
  for (int i = 0; i < count; i += 2) {
    const auto make = [&](auto tiles) FERRET_INLINE {
      make_pair<V, tiles>(keys, calls, columns + i, x, tile, largest, ahead, bits + i);
      tile += tiles;
    };
    if (tile == kRun) {
      make(std::integral_constant<int, 0>());
    } else if (count > 6) {
      make(std::integral_constant<int, kRun / 4>());
    } else if (count > 2) {
      make(std::integral_constant<int, kRun / 2>());
    } else {
      make(std::integral_constant<int, kRun>());
    }
  }
}

// The sums of q with the signs of up to 4 columns (lane) by tile (quarter), modulo 2^32; digits(word, n, to) are the next ones.
template <class V, int columns, class Digits>
FERRET_HD typename V::I dot_columns(const RunBits* bits, Digits digits) {
  using I = typename V::I;
  I sums[columns][3], set[columns];
  for (int c = 0; c < columns; ++c) {
    set[c] = V::set1(0u);
    for (auto& sum : sums[c]) sum = V::set1(0u);
  }
  for (int word = 0; word < 4; ++word) {
    I transposed[columns];
    for (int c = 0; c < columns; ++c) {
      transposed[c] = V::transpose_pieces(V::load(bits[c][word]));
      set[c] = V::add(set[c], V::count_bits(transposed[c]));
    }
    unroll(Count<8>(), [&](auto n) FERRET_INLINE {
      I digit[3];
      digits(word, n, digit);
      for (int c = 0; c < columns; ++c) {
        const I signs = V::template signs_of_piece<n>(transposed[c]);
        for (int m = 0; m < 3; ++m) sums[c][m] = V::dot(sums[c][m], digit[m], signs);
      }
    });
  }
  I joined[4];
  for (int i = 0; i < 4; ++i) {
    const int c = i < columns ? i : 0;
    joined[i] = V::add(V::add(sums[c][0], V::template shift_left<8>(sums[c][1])),
                       V::add(V::template shift_left<16>(sums[c][2]), V::template shift_left<23>(set[c])));
  }
  return V::add(V::sum_over_quarters(joined), V::set1(0x80000000u));  // less 2^22 * 512
}

// As above, of digits that are there.
template <class V, int columns>
typename V::I dot_columns(const RunBits* bits, const RunDigits& digits) {
  return dot_columns<V, columns>(bits, [&](int word, auto n, typename V::I(&digit)[3]) FERRET_INLINE {
    for (int m = 0; m < 3; ++m) digit[m] = V::load(digits.digit[word][n][m]);
  });
}

// As above, of the digits of the run's tiles under their scales, which are left in `digits` for further columns.
template <class V, int columns, bool further, class Source>
FERRET_HD typename V::I dot_first_columns(const RunBits* bits, const Source x, const float (&scales)[kRun],
                                          RunDigits& digits, LinesAhead& ahead) {
  typename V::F scale[kRun];  // neither this nor x lies in memory that the compiler thinks the digits may overwrite
  for (int i = 0; i < kRun; ++i) scale[i] = V::set1(scales[i]);
  return dot_columns<V, columns>(bits, [&](int word, auto n, typename V::I(&digit)[3]) FERRET_INLINE {
    typename V::I q[kRun];
    for (int i = 0; i < kRun; ++i) {
      // The fused addition rounds x * scale to an integer, since floats from 2^23 to 2^24 are integers, and leaves q + 2^22 in the
      // low 23 bits.
      q[i] =
          V::as_int(V::fused(x.load(i * kTile + 32 * word + n / 2 * 128 + n % 2 * 16), scale[i], V::set1(0x1.8p23f)));
    }
    V::take_digits(q, digit);
    for (int m = 0; further && m < 3; ++m) V::store(digits.digit[word][n][m], digit[m]);
    ahead();
  });
}

// False where a tile needs the general way to integers.
FERRET_HD bool take_scales(const float (&largest)[kRun], float (&scale)[kRun], double (&unit)[kRun]) {
  for (int i = 0; i < kRun; ++i) {
    const TileScale found = scale_of(largest[i]);
    if (!found.simple) return false;
    scale[i] = found.scale, unit[i] = found.unit;
  }
  return true;
}

inline constexpr int kDotBatch = 16;  // columns whose bits are made together

// The runs before the first that has a tile which needs the general way to integers; returns how many.
template <class V, class T, bool difference>
int project_runs_by_dots(const RunProduct<float>& p) {
  const PhiloxKeys keys(p.stream.seed);
  Column<One> columns[V::dot_columns];  // for all runs, as those of one node have the high half of t in common
  for (int i = 0; i < (p.count + 1) / 2 * 2; ++i) {
    columns[i] = {keys, p.tile * 4, One{p.first + static_cast<uint32_t>(i)}};
  }
  alignas(64) RunBits bits[kDotBatch];
  RunDigits digits;
  RunSource<V, T, difference> x(p);
  Prefetch lines[2] = {p.ahead[0], p.ahead[1]};
  // Half a run, where others take more: lines asked for so steadily need less of a lead.
  for (auto& range : lines) range.further = 32 * range.lines;
  for (int run = 0; run < p.runs; ++run) {
    const uint64_t t = (p.tile + static_cast<uint64_t>(run) * kRun) * 4;
    const auto calls = calls_of<V>(keys, p.stream.basis, t);
    LinesAhead ahead(lines);
    float largest[kRun], scale[kRun];
    double unit[kRun];
    for (int batch = 0; batch < p.count; batch += kDotBatch) {
      const int count = p.count - batch < kDotBatch ? p.count - batch : kDotBatch;
      make_bits<V>(keys, calls, columns + batch, count, batch == 0, x, largest, ahead, bits);
      if (batch == 0 && !take_scales(largest, scale, unit)) return run;
      for (int i = 0; i < count; i += 4) {
        const int rest = count - i;
        const auto sums = batch + i > 0
                              ? rest > 2 ? dot_columns<V, 4>(bits + i, digits) : dot_columns<V, 2>(bits + i, digits)
                          : rest > 4 ? dot_first_columns<V, 4, true>(bits, x, scale, digits, ahead)
                          : rest > 2 ? dot_first_columns<V, 4, false>(bits, x, scale, digits, ahead)
                                     : dot_first_columns<V, 2, false>(bits, x, scale, digits, ahead);
        V::add_quarters(sums, unit, p.sums + batch + i, rest);
      }
    }
    x.advance();
    for (auto& range : lines) range.from += 64 * range.lines;
  }
  return p.runs;
}

template <class V>
int project_runs_by_dots(const RunProduct<float>& p) {
  const auto go = [&](auto difference) {
    switch (p.dtype) {
      case Dtype::float32: return project_runs_by_dots<V, float, difference>(p);
      case Dtype::bfloat16: return project_runs_by_dots<V, bfloat16_t, difference>(p);
      case Dtype::float16: return project_runs_by_dots<V, float16_t, difference>(p);
      default: return 0;
    }
  };
  return p.before == nullptr ? go(std::false_type()) : go(std::true_type());
}

}  // namespace
}  // namespace ferret::cpu

// reconstruct over a vector type V: H of the elements of `lanes` consecutive calls, as h[place in the call][lane].
//
// Calls (runs of elements) are in the lanes; the words of four columns are transposed as 4x4 bit blocks, so that a nibble holds one
// element's bits of four columns, and the tables hold the subset sums of four coordinates.
//
// A group object holds what all calls share of 64 columns. add() has h = fma(G, scale, h) for its group, or, where the group opens a
// fold, h = fma(G, scale, 0).
#pragma once

#include <type_traits>

#include "kernels.h"
#include "vector_sums.h"

namespace ferret::cpu {
namespace {

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
            high[limb][b] = V::add_products(high[limb][b], bytes, V::set1(high_[limb][pair]));
            low[limb][b] = V::add_products(low[limb][b], bytes, V::set1(low_[limb][pair]));
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
      column[k] = {keys, first_call, One{s.groups[g].column[k]}};
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
      for (; place + V::lanes <= e; place += V::lanes) {
        float* const to = elements + begin + place;
        V::transpose(h[place], [=](int lane, typename V::F x) FERRET_INLINE { V::store(to + e * lane, V::as_int(x)); });
      }
    }
    for (; place < e; ++place) {
      for (int lane = 0; lane < V::lanes; ++lane) elements[begin + lane * e + place] = h[place][lane];
    }
  }
}

template <class V, class Real>
bool scale_add_in_order(Basis basis, const Real* sums, Real factor, bool overwrite, Real* param) {
  const int e = elements_per_call(basis);
  if constexpr (std::is_same_v<Real, float>) {
    if (e % V::lanes != 0) return false;
    for (int begin = 0; begin < kSpan; begin += e * V::lanes) {
      const auto* h = reinterpret_cast<const Lanes<V, float>*>(sums + begin);
      for (int place = 0; place < e; place += V::lanes) {
        float* const to = param + begin + place;
        V::transpose(h[place], [=](int lane, typename V::F x) FERRET_INLINE {
          const auto before = overwrite ? V::set1(0.0f) : V::as_float(V::load(to + e * lane));
          V::store(to + e * lane, V::as_int(V::fused(x, V::set1(factor), before)));
        });
      }
    }
    return true;
  }
  return false;
}

}  // namespace
}  // namespace ferret::cpu

// The portable path: plain loops over the definition, for processors without a vector path and as the yardstick of the
// others' tests.
#include "elementwise.h"

namespace ferret::cpu {
namespace {

// I = sum q_j b(j, k) over a tile, exact. A call covers `e` elements; the words of a call serve all of them.
int64_t tile_sum(const int32_t* q, uint64_t tile, int begin, int end, Stream stream, uint32_t k) {
  const int e = elements_per_call(stream.basis);
  int64_t sum = 0;
  for (int first = begin / e * e; first < end; first += e) {
    const Words words = stream_words(stream.seed, stream.basis, (tile * kTile + first) / e, k);
    for (int i = 0; i < e; ++i) sum += static_cast<int64_t>(q[first + i]) * basis_integer(stream.basis, words, i);
  }
  return sum;
}

template <class Real>
int project_runs(const RunProduct<Real>& p) {
  for (int i = 0; i < kRun; ++i) {
    Real buffer[kTile];
    TileIntegers<Real> tile;
    const TileState state = to_integers(in_working_precision(p, i, buffer), tile);
    if (state == TileState::not_finite) poison<Real>(p.count, p.sums);
    if (state != TileState::finite) continue;
    const int begin = clamp(p.begin - i * kTile, 0, kTile), end = clamp(p.end - i * kTile, 0, kTile);
    for (int c = 0; c < p.count; ++c) {
      double value[2];
      for (int limb = 0; limb < Working<Real>::limbs; ++limb) {
        const uint32_t k = p.first + static_cast<uint32_t>(c);
        value[limb] = static_cast<double>(tile_sum(tile.q[limb], p.tile + i, begin, end, p.stream, k));
      }
      const double* values[] = {&value[0], &value[1]};
      add_tile_values<Real>(values, 1, tile.unit, p.sums + c);
    }
  }
  return 1;
}

// H of one element, steps 3 and 4 of reconstruct: `integers` holds b(j, k) of this element for a group's columns.
template <class Real>
struct ElementSum {
  Real h = 0, total = 0;

  void add_group(const Group<Real>& group, const int32_t* integers, int columns) {
    int64_t sum[2] = {0, 0};
    for (int limb = 0; limb < Working<Real>::limbs; ++limb) {
      for (int k = 0; k < columns; ++k) sum[limb] += static_cast<int64_t>(group.c[limb][k]) * integers[k];
    }
    Real value = static_cast<Real>(sum[0]);
    if constexpr (Working<Real>::limbs == 2) value += static_cast<Real>(sum[1]) * Real(0x1p-23);
    h = fused_multiply_add(value, group.scale, h);
  }
  void close_fold() {
    total += h;
    h = 0;
  }
};

// The elements of one call.
template <class Real>
void sum_call(const SpanSum<Real>& s, uint64_t t, Real* sums) {
  const int e = elements_per_call(s.stream.basis);
  ElementSum<Real> elements[128];
  for (int64_t first = 0; first < s.columns; first += kGroup) {
    const int columns = static_cast<int>(clamp<int64_t>(s.columns - first, 0, kGroup));
    Words words[kGroup];
    for (int k = 0; k < columns; ++k) {
      words[k] = stream_words(s.stream.seed, s.stream.basis, t, s.groups[first / kGroup].column[k]);
    }
    for (int i = 0; i < e; ++i) {
      int32_t integers[kGroup];
      for (int k = 0; k < columns; ++k) integers[k] = basis_integer(s.stream.basis, words[k], i);
      elements[i].add_group(s.groups[first / kGroup], integers, columns);
      if (first / kGroup % kFoldRadix == kFoldRadix - 1) elements[i].close_fold();
    }
  }
  for (int i = 0; i < e; ++i) {
    elements[i].close_fold();
    sums[i] = elements[i].total;
  }
}

template <class Real>
void sum_columns(const SpanSum<Real>& s) {
  const int e = elements_per_call(s.stream.basis);
  for (int first = s.begin / e * e; first < s.end; first += e) {
    sum_call(s, (s.span * kSpan + first) / e, s.sums + first);
  }
}

template <class Real>
void to_element_order(Basis, const Real* sums, Real* elements) {
  memcpy(elements, sums, kSpan * sizeof(Real));
}

template <class Real>
bool scale_add_in_order(Basis, const Real*, Real, bool, Real*) {
  return false;
}

uint32_t philox_checksum(uint64_t seed, uint32_t columns, uint64_t calls) {
  uint32_t result = 0;
  for (uint32_t k = 0; k < columns; ++k) {
    for (uint64_t t = 0; t < calls; ++t) result ^= checksum_of(seed, t, k);
  }
  return result;
}

void rounding_of_span(uint64_t seed, uint64_t span, uint16_t* random) {
  for (int i = 0; i < kSpan; ++i) {
    const Words words = rounding_words(seed, (span * kSpan + i) / kRoundingElements);
    random[i] = static_cast<uint16_t>(rounding_bits(words, i % kRoundingElements));
  }
}

template <class Real>
constexpr RealKernels<Real> kernels() {
  return {widen<Real>,      subtract<Real>,         project_runs<Real>,       sum_columns<Real>,
          accumulate<Real>, to_element_order<Real>, scale_add_in_order<Real>, scale_add<Real>};
}

}  // namespace

const Kernels kScalarKernels = {"scalar", philox_checksum, rounding_of_span, kernels<float>(), kernels<double>()};

}  // namespace ferret::cpu

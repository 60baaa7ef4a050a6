// param = fma(T, C, param), T the weighted sum of the updates' H of docs/streams.md; and single columns of a basis.
//
// A task is a span of kSpan stream elements of one block: all columns of all updates are summed before the parameters of the
// span are read and written, once.
#include <cmath>
#include <limits>

#include "dispatch.h"

namespace ferret::cpu {
namespace {

// The coordinates of one (update, block) as integers.
template <class Real>
struct Coordinates {
  std::vector<Group<Real>> groups;
  int exponent = 0;  // n*
};

template <class Real>
int largest_exponent(const Real* x, int64_t n) {
  Real largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(x[i]));
  return largest > 0 ? exponent_of(largest) : std::numeric_limits<int>::min();
}

template <class Real>
Coordinates<Real> to_coordinates(const Gammas<Real>& gammas, int64_t columns) {
  constexpr int limit = Working<Real>::max_block_exponent;
  Coordinates<Real> result;
  std::vector<Real> gamma(columns);
  for (int64_t k = 0; k < columns; ++k) gamma[k] = gammas.value(k);
  result.groups.resize((columns + kGroup - 1) / kGroup);
  const int exponent = largest_exponent(gamma.data(), columns);
  if (exponent == std::numeric_limits<int>::min()) return result;
  result.exponent = clamp(exponent, -limit, limit);
  for (int64_t first = 0; first < columns; first += kGroup) {
    Group<Real>& group = result.groups[first / kGroup];
    const int64_t count = std::min<int64_t>(kGroup, columns - first);
    const int n = std::max(largest_exponent(gamma.data() + first, count), result.exponent - Working<Real>::group_range);
    const Scale<Real> scale(kCoordinateBits, n);
    for (int64_t k = 0; k < count; ++k) {
      const Limbs limbs = to_fixed_point(scale(gamma[first + k]), kCoordinateBits);
      group.c[0][k] = limbs.hi;
      if constexpr (Working<Real>::limbs == 2) group.c[1][k] = limbs.lo;
      group.column[k] = gammas.column(first + k);
    }
    group.scale = power_of_two(n - kCoordinateBits - result.exponent, Real());
  }
  return result;
}

template <class Real>
struct BlockUpdates {
  BlockPieces pieces;
  uint64_t first_span = 0;
  int64_t first_task = 0;
  std::vector<Coordinates<Real>> coordinates;  // [N]
  std::vector<Real> weights;                   // [N], in units of the largest block exponent
  Real factor = 0;                             // C
};

template <class Real>
BlockUpdates<Real> prepare(const ApplyJob& job, int64_t b) {
  const Block& block = job.plan.blocks[b];
  BlockUpdates<Real> result;
  int exponent = job.num_updates == 0 ? 0 : -Working<Real>::max_block_exponent;
  for (int64_t i = 0; i < job.num_updates; ++i) {
    const auto gammas = job.gammas.of<Real>(i, job.total, b, job.plan.num_blocks, block.start);
    result.coordinates.push_back(to_coordinates(gammas, block.columns));
    exponent = std::max(exponent, result.coordinates.back().exponent);
  }
  for (int64_t i = 0; i < job.num_updates; ++i) {
    const Scale<double> relative(result.coordinates[i].exponent, exponent);
    result.weights.push_back(static_cast<Real>(relative(job.updates[i].weight)));
  }
  const double largest = std::numeric_limits<Real>::max();
  result.factor =
      static_cast<Real>(clamp(apply_factor(job.basis, block.numel, job.alpha, exponent), -largest, largest));
  return result;
}

// Of the first piece that lies in a range; ranges across pieces are few.
inline Prefetch parameters(const ApplyJob& job, const BlockPieces& pieces, Range range) {
  const Piece* piece = pieces.find(range.begin);
  const uint64_t first = std::max(range.begin, static_cast<uint64_t>(piece->offset));
  const uint64_t last = std::min(range.end, end_of(*piece));
  if (first >= last) return {};
  const auto size = static_cast<int>(size_of(job.params[piece->tensor].dtype));
  return {element_of(job.params, *piece, first), static_cast<int>(last - first) * size / 64, kSpan * size / 4 * 3};
}

// A span's parameters, if they lie beside each other as Real.
template <class Real>
Real* as_they_lie(const ApplyJob& job, const BlockPieces& pieces, Range span) {
  const Piece* piece = pieces.find(span.begin);
  if (piece == pieces.end || job.params[piece->tensor].dtype != dtype_of(Real())) return nullptr;
  const auto first = static_cast<uint64_t>(piece->offset), last = end_of(*piece);
  return first <= span.begin && span.end <= last ? reinterpret_cast<Real*>(element_of(job.params, *piece, span.begin))
                                                 : nullptr;
}

template <class Real>
void apply_span(const ApplyJob& job, const Block& block, const BlockUpdates<Real>& updates, uint64_t span,
                const RealKernels<Real>& kernels) {
  const uint64_t start = span * kSpan;
  const Range range = updates.pieces.elements();
  const int begin = static_cast<int>(std::max(range.begin, start) - start);
  const int end = static_cast<int>(std::min(range.end, start + kSpan) - start);
  const Prefetch ahead = job.overwrite ? Prefetch{} : parameters(job, updates.pieces, {start + begin, start + end});
  const bool alone = job.num_updates == 1 && updates.weights[0] == 1;  // fma(H, 1, 0) is H, which is never -0
  alignas(64) Real sums[kSpan], total[kSpan];
  if (end - begin < kSpan) std::fill(sums, sums + kSpan, Real(0));
  if (job.num_updates == 0) std::fill(total, total + kSpan, Real(0));
  for (int64_t i = 0; i < job.num_updates; ++i) {
    const Stream stream = {job.updates[i].seed, job.basis};
    kernels.sum_columns({updates.coordinates[i].groups.data(), block.columns, stream, span, i == 0 ? ahead : Prefetch{},
                         begin, end, sums});
    if (!alone) kernels.accumulate(sums, kSpan, updates.weights[i], i == 0, total);
  }
  const Real* const result = alone ? sums : total;
  Real* const whole = as_they_lie<Real>(job, updates.pieces, {start, start + kSpan});
  if (whole != nullptr && kernels.scale_add_in_order(job.basis, result, updates.factor, job.overwrite, whole)) return;
  Real* const elements = alone ? total : sums;
  kernels.to_element_order(job.basis, result, elements);
  alignas(64) uint16_t random[kSpan];
  bool drawn = false;
  for_each_overlap(updates.pieces, {start, start + kSpan}, [&](const Piece& piece, uint64_t first, uint64_t last) {
    const Dtype dtype = job.params[piece.tensor].dtype;
    const bool by_chance = job.rounding.stochastic && size_of(dtype) == 2;
    if (by_chance && !drawn) active_kernels().rounding_of_span(job.rounding.seed, span, random);
    drawn |= by_chance;
    kernels.scale_add(elements + (first - start), static_cast<int64_t>(last - first), updates.factor, job.overwrite,
                      dtype, element_of(job.params, piece, first), by_chance ? random + (first - start) : nullptr);
  });
}

template <class Real>
bool all_finite(const ApplyJob& job) {
  if (job.gammas.values != nullptr) {
    const Real* gammas = static_cast<const Real*>(job.gammas.values);
    return std::all_of(gammas, gammas + job.num_updates * job.total, [](Real x) { return std::isfinite(x); });
  }
  const float largest = static_cast<float>(job.gammas.packing.largest_level());
  return std::all_of(job.gammas.scales, job.gammas.scales + job.num_updates * job.plan.num_blocks,
                     [=](float scale) { return std::isfinite(scale * largest); });
}

// What cannot be rebuilt is NaN, as in project.
template <class Real>
void fill_nan(const ApplyJob& job, const RealKernels<Real>& kernels) {
  const Real zeros[kSpan] = {};
  const Real nan = std::numeric_limits<Real>::quiet_NaN();
  for (const Piece* p = job.plan.pieces; p != job.plan.pieces + job.plan.num_pieces; ++p) {
    const Dtype dtype = job.params[p->tensor].dtype;
    for (int64_t done = 0; done < p->length; done += kSpan) {
      const uint64_t first = static_cast<uint64_t>(p->offset + done);
      kernels.scale_add(zeros, std::min<int64_t>(kSpan, p->length - done), nan, true, dtype,
                        element_of(job.params, *p, first), nullptr);
    }
  }
}

template <class Real>
bool apply_in(const ApplyJob& job, const Threads& threads) {
  const auto& kernels = kernels_of<Real>(active_kernels());
  if (!all_finite<Real>(job)) {
    if (job.overwrite) fill_nan(job, kernels);
    return job.overwrite;
  }
  const auto pieces = pieces_by_block(job.plan);
  std::vector<BlockUpdates<Real>> blocks(job.plan.num_blocks);
  for_each_task(threads, job.plan.num_blocks, [&](int64_t b) { blocks[b] = prepare<Real>(job, b); });
  int64_t count = 0;
  for (int64_t b = 0; b < job.plan.num_blocks; ++b) {
    blocks[b].pieces = pieces[b];
    blocks[b].first_task = count;
    if (pieces[b].empty()) continue;
    const Range elements = pieces[b].elements();
    blocks[b].first_span = elements.begin / kSpan;
    count += static_cast<int64_t>((elements.end - 1) / kSpan - blocks[b].first_span) + 1;
  }
  for_each_task(threads, count, [&](int64_t task) {
    const auto next = std::upper_bound(blocks.begin(), blocks.end(), task,
                                       [](int64_t i, const BlockUpdates<Real>& b) { return i < b.first_task; });
    const BlockUpdates<Real>& updates = *(next - 1);
    const Block& block = job.plan.blocks[&updates - blocks.data()];
    apply_span(job, block, updates, updates.first_span + (task - updates.first_task), kernels);
  });
  return true;
}

}  // namespace

bool apply(const ApplyJob& job, const Threads& threads) {
  return job.wide ? apply_in<double>(job, threads) : apply_in<float>(job, threads);
}

void basis(const BasisJob& job, const Threads& threads) {
  constexpr int64_t chunk = 1 << 14;
  const int e = elements_per_call(job.stream.basis);
  const double unit = power_of_two(-basis_exponent(job.stream.basis), double());
  const double root = std::sqrt(static_cast<double>(job.numel));
  const auto& narrow = active_kernels().narrow;
  const auto& wide = active_kernels().wide;
  for_each_task(threads, (job.count + chunk - 1) / chunk, [&](int64_t task) {
    Words words = {};
    uint64_t call = ~uint64_t{0};
    for (int64_t i = task * chunk; i < std::min((task + 1) * chunk, job.count); ++i) {
      const uint64_t j = static_cast<uint64_t>(job.offset + i);
      if (j / e != call) words = stream_words(job.stream.seed, job.stream.basis, call = j / e, job.k);
      const double value = basis_integer(job.stream.basis, words, static_cast<int>(j % e)) * unit / root;
      const float rounded = static_cast<float>(value);
      void* to = static_cast<char*>(job.out.data) + i * size_of(job.out.dtype);
      job.out.dtype == Dtype::float64 ? wide.scale_add(&value, 1, 1.0, true, job.out.dtype, to, nullptr)
                                      : narrow.scale_add(&rounded, 1, 1.0f, true, job.out.dtype, to, nullptr);
    }
  });
}

}  // namespace ferret::cpu

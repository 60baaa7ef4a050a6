// A single column of a basis, for tests and teaching: v_k[j] = b(j, k) 2^-s / sqrt(d), in float64 and rounded once to
// the working precision of the output, then to its dtype. A warp takes 128 elements.
#include "lanes.cuh"

namespace ferret::cuda {
namespace {

struct BasisParams {
  uint64_t seed;
  uint32_t column;
  Piece piece;
  uint64_t first_span;
  int64_t items;
  double unit, root;  // 2^-s, sqrt(d)
  TensorRef out;
};

template <Basis basis>
__global__ void __launch_bounds__(kThreads) basis_kernel(BasisParams p) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const auto places = owned_places<basis>(lane);
  for (int64_t item = int64_t{blockIdx.x} * kWarps + warp; item < p.items; item += int64_t{gridDim.x} * kWarps) {
    const uint64_t span = p.first_span + item;
    int32_t b[kOwned];
    owned_integers<basis>(p.seed, span, p.column, lane, b);
    double wide[kOwned];
    float narrow[kOwned];
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      wide[i] = b[i] * p.unit / p.root;
      narrow[i] = static_cast<float>(wide[i]);
    }
    for_each_run<kSpan>(&p.piece, {0, 1, {0, 0}}, span * kSpan, [&](const Run& run) {
      p.out.dtype == Dtype::float64 ? store(p.out, run, places, wide) : store(p.out, run, places, narrow);
    });
  }
}

void (*basis_kernel_of(Basis basis))(BasisParams) {
  switch (basis) {
    case Basis::rademacher: return basis_kernel<Basis::rademacher>;
    case Basis::uniform: return basis_kernel<Basis::uniform>;
    case Basis::gaussian: return basis_kernel<Basis::gaussian>;
  }
  return nullptr;
}

}  // namespace

Status basis(const BasisJob& job, CUstream_st* stream) {
  const Basis kind = job.stream.basis;
  const BlockPieces pieces = {0, 1, {static_cast<uint64_t>(job.offset), static_cast<uint64_t>(job.offset + job.count)}};
  const Range spans = spans_of(pieces, kSpanShift);
  const BasisParams params = {job.stream.seed,
                              job.k,
                              {0, 0, job.count, job.offset, 0},
                              spans.begin,
                              size(spans),
                              power_of_two(-basis_exponent(kind), double()),
                              square_root(static_cast<double>(job.numel)),
                              job.out};
  return launch("basis_kernel", basis_kernel_of(kind), divide_up(params.items, kWarps), stream, params);
}

}  // namespace ferret::cuda

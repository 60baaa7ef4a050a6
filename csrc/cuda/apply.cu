// param = fma(T, C, param), T the weighted sum of the updates' H (docs/streams.md, "reconstruct and apply").
//
// Two small kernels turn coordinates into integers (prepare.cuh). Then a warp takes 128 stream elements of one block:
// for 32 columns at a time its lanes make the words, one Philox call each, and share them through shared memory; a lane
// sums its own four elements over all columns and updates, and reads and writes their parameters once. Warps never wait
// for each other. Groups of 64 columns are summed exactly in int64; groups and updates are folded in the contract's order.
// Rademacher bases in float32 go to the matrix units instead (path.h, matrix_apply.cuh).
#include "lanes.cuh"
#include "matrix_apply.cuh"
#include "path.h"
#include "workspace.cuh"

namespace ferret::cuda {
namespace {

constexpr int64_t kCtas = 1 << 16;  // enough to share out any work evenly

// ---- 32 columns of one update, as one warp sees them ----

template <Basis basis>
constexpr int kCallsPerSpan = kSpan / elements_per_call(basis);

template <Basis basis, class Real>
struct Chunk {
  static constexpr int shared_calls = basis == Basis::gaussian ? 1 : kWarp * kCallsPerSpan<basis>;
  alignas(16) Words words[shared_calls];  // [column][call]; a gaussian lane makes its own
  alignas(16) int32_t c[Working<Real>::limbs][kWarp];
  uint32_t column[kWarp];
};

struct Columns {
  uint64_t seed;
  uint64_t span;
  int64_t first;
  int count;  // <= 32
};

template <Basis basis, class Real>
__device__ __forceinline__ void fill(const Columns& columns, const Integers<Real>& integers, int lane,
                                     Chunk<basis, Real>& chunk) {
  const bool used = lane < columns.count;
  for (int limb = 0; limb < Working<Real>::limbs; ++limb) {
    chunk.c[limb][lane] = used ? integers.limbs[limb][columns.first + lane] : 0;
  }
  chunk.column[lane] = used ? integers.columns[columns.first + lane] : 0;
  if constexpr (basis != Basis::gaussian) {
    constexpr int calls = kCallsPerSpan<basis>;
    if constexpr (calls > 1) __syncwarp();  // a lane reads what others wrote
    for (int i = lane; i < columns.count * calls; i += kWarp) {
      chunk.words[i] = stream_words(columns.seed, basis, columns.span * calls + i % calls, chunk.column[i / calls]);
    }
  }
}

// The raw numbers of the lane's elements in the chunk's column k. A rademacher bit stays where it is in its word: it
// counts 2^lane, so -2^31 in the last lane, until raw_sum divides that out.
template <Basis basis, class Real>
__device__ __forceinline__ void owned_raw(const Columns& columns, const Chunk<basis, Real>& chunk, int k, int lane,
                                          int32_t (&raw)[kOwned]) {
  if constexpr (basis == Basis::gaussian) {
    owned_integers<basis>(columns.seed, columns.span, chunk.column[k], lane, raw);
  } else if constexpr (basis == Basis::uniform) {
    const uint32_t word = chunk.words[k * kCallsPerSpan<basis> + lane / 4].w[lane % 4];
#pragma unroll
    for (int i = 0; i < kOwned; ++i) raw[i] = static_cast<int32_t>((word >> (8 * i)) & 255u);
  } else {
    const Words words = chunk.words[k];
#pragma unroll
    for (int i = 0; i < kOwned; ++i) raw[i] = static_cast<int32_t>(words.w[i] & (1u << lane));
  }
}

template <Basis basis>
__device__ __forceinline__ int64_t raw_sum(int64_t sum, int lane) {
  if constexpr (basis != Basis::rademacher) return sum;
  return (lane == kWarp - 1 ? -sum : sum) >> lane;
}

// sums += c * raw over all columns of a chunk.
template <Basis basis, class Real>
__device__ __forceinline__ void add_chunk(const Columns& columns, const Chunk<basis, Real>& chunk, int lane,
                                          int64_t (&sums)[Working<Real>::limbs][kOwned]) {
#pragma unroll 4
  for (int k = 0; k < columns.count; ++k) {
    int32_t raw[kOwned];
    owned_raw(columns, chunk, k, lane, raw);
#pragma unroll
    for (int limb = 0; limb < Working<Real>::limbs; ++limb) {
#pragma unroll
      for (int i = 0; i < kOwned; ++i) sums[limb][i] = multiply_add(chunk.c[limb][k], raw[i], sums[limb][i]);
    }
  }
}

// ---- columns -> groups -> H ----

// G of the lane's elements, for the group of columns that starts at `first`.
template <Basis basis, class Real>
__device__ __forceinline__ void sum_group(Columns columns, int64_t end, const Integers<Real>& integers, int lane,
                                          Chunk<basis, Real>& chunk, Real (&group)[kOwned]) {
  constexpr int limbs = Working<Real>::limbs;
  int64_t raw[limbs][kOwned] = {};
  int32_t sum_c[2] = {};
  const int64_t group_end = min(columns.first + kGroup, end);
  for (; columns.first < group_end; columns.first += kWarp) {
    columns.count = static_cast<int>(min(group_end - columns.first, int64_t{kWarp}));
    __syncwarp();
    fill(columns, integers, lane, chunk);
    __syncwarp();
    add_chunk(columns, chunk, lane, raw);
    for (int limb = 0; limb < limbs; ++limb) sum_c[limb] += __reduce_add_sync(kAllLanes, chunk.c[limb][lane]);
  }
#pragma unroll
  for (int i = 0; i < kOwned; ++i) {
    const int64_t hi = from_raw<basis>(raw_sum<basis>(raw[0][i], lane), sum_c[0]);
    if constexpr (limbs == 2) {
      group[i] = join_limbs(hi, from_raw<basis>(raw_sum<basis>(raw[1][i], lane), sum_c[1]), kCoordinateBits);
    } else {
      group[i] = static_cast<Real>(hi);
    }
  }
}

// H of the lane's elements for one update.
template <Basis basis, class Real>
__device__ __forceinline__ void sum_update(const ApplyParams& p, const ApplyBlock& block, int64_t update, uint64_t span,
                                           int lane, Chunk<basis, Real>& chunk, Real (&sum)[kOwned]) {
  const Integers<Real> integers(p, block, update);
  GroupFold<kOwned, Real> fold;
  for (int64_t first = 0, g = 0; first < block.block.columns; first += kGroup, ++g) {
    Real group[kOwned];
    sum_group({p.updates[update].seed, span, first, 0}, block.block.columns, integers, lane, chunk, group);
    fold.add(group, integers.scales[g], g);
  }
  fold.close();
#pragma unroll
  for (int i = 0; i < kOwned; ++i) sum[i] = fold.sum[i];
}

// ---- spans ----

template <Basis basis, class Real>
__device__ __forceinline__ void apply_span(const ApplyParams& p, int64_t item, int lane, Chunk<basis, Real>& chunk) {
  const ApplyBlock& block = p.block_of(item);
  const uint64_t span = block.first_group_of_spans + (item - block.first_item);
  const auto places = owned_places<basis>(lane);
  const bool poisoned = *p.coordinates.not_finite != 0;

  Real x[kOwned] = {};
  if (!p.overwrite) {
    for_each_run<kSpan>(p.pieces, block.pieces, span * kSpan,
                        [&](const Run& run) { load(p.params[run.tensor], run, places, x); });
  }
  Real total[kOwned] = {};
  for (int64_t i = 0; i < p.num_updates && !poisoned; ++i) {
    Real sum[kOwned];
    sum_update(p, block, i, span, lane, chunk, sum);
    add_update(p, block, i, sum, total);
  }
  add_total(p, block, total, x);
  if (p.rounding.stochastic) {
    for_each_run<kSpan>(p.pieces, block.pieces, span * kSpan,
                        [&](const Run& run) { round_by_chance(p, span * kSpan, run, places, x); });
  }
  for_each_run<kSpan>(p.pieces, block.pieces, span * kSpan,
                      [&](const Run& run) { store(p.params[run.tensor], run, places, x); });
}

// At least 4 CTAs a multiprocessor: registers for that suffice without spills.
template <Basis basis, class Real>
__global__ void __launch_bounds__(kThreads, 4) apply_kernel(ApplyParams p) {
  __shared__ Chunk<basis, Real> chunks[kWarps];
  if (*p.coordinates.not_finite != 0 && !p.overwrite) return;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / kWarp;
  for (int64_t item = int64_t{blockIdx.x} * kWarps + warp; item < p.items; item += int64_t{gridDim.x} * kWarps) {
    apply_span(p, item, tid % kWarp, chunks[warp]);
  }
}

// At least 3 CTAs a multiprocessor: registers for 4 do not suffice on every architecture.
template <int columns>
__global__ void __launch_bounds__(kThreads, 3) apply_matrix_kernel(ApplyParams p) {
  using Spans = MatrixSpans<columns>;
  __shared__ typename Spans::Shared shared[kWarps];
  if (*p.coordinates.not_finite != 0 && !p.overwrite) return;
  const int tid = static_cast<int>(threadIdx.x), warp = tid / kWarp;
  for (int64_t item = int64_t{blockIdx.x} * kWarps + warp; item < p.items; item += int64_t{gridDim.x} * kWarps) {
    Spans::apply(p, item, tid % kWarp, shared[warp]);
  }
}

// ---- host ----

// The blocks that one kernel takes: those with K_l in [least, most], in items of 2^shift elements.
struct Takes {
  int64_t least, most;
  int shift;
};

constexpr Takes kOrdinary = {1, INT64_MAX, kSpanShift}, kFew = {1, 16, MatrixSpans<16>::item_shift},
                kMany = {17, INT64_MAX, MatrixSpans<kGroup>::item_shift};

struct ApplyLaunches {
  Workspace workspace;
  PrepareParams prepare = {};
  ApplyParams ordinary = {};        // on the ordinary units,
  ApplyParams few = {}, many = {};  // or on the matrix units

  ApplyLaunches(const ApplyJob& job, void* base);
};

std::vector<ApplyBlock> block_table(const Plan& plan, const Takes& takes, int64_t* items) {
  std::vector<ApplyBlock> blocks;
  blocks.reserve(plan.num_blocks);
  const auto pieces = pieces_by_block(plan);
  int64_t groups = 0;
  *items = 0;
  for (int64_t b = 0; b < plan.num_blocks; ++b) {
    const int64_t columns = plan.blocks[b].columns;
    if (columns >= takes.least && columns <= takes.most) {
      const Range spans = spans_of(pieces[b], takes.shift);
      blocks.push_back({plan.blocks[b], pieces[b], b, spans.begin, *items, groups});
      *items += size(spans);
    }
    groups += divide_up(columns, kGroup);
  }
  return blocks;
}

std::vector<int64_t> first_groups(const Plan& plan, int64_t* groups) {
  std::vector<int64_t> first;
  *groups = 0;
  for (int64_t b = 0; b < plan.num_blocks; ++b) {
    first.push_back(*groups);
    *groups += divide_up(plan.blocks[b].columns, kGroup);
  }
  return first;
}

// Room for what prepare.cuh makes. The flag is a table: it must be 0 before.
template <class Real>
Coordinates lay_out_coordinates(const ApplyJob& job, int64_t groups, Workspace& workspace) {
  const int32_t zero = 0;
  Coordinates result = {};
  result.not_finite = const_cast<int32_t*>(workspace.table(&zero, 1));
  for (int limb = 0; limb < Working<Real>::limbs; ++limb) {
    result.integers[limb] = workspace.room<int32_t>(job.num_updates * job.total);
  }
  result.columns = workspace.room<uint32_t>(job.num_updates * job.total);
  result.scales = workspace.room<Real>(job.num_updates * groups);
  result.exponents = workspace.room<int32_t>(job.num_updates * job.plan.num_blocks);
  result.weights = workspace.room<Real>(job.num_updates * job.plan.num_blocks);
  result.factors = workspace.room<Real>(job.plan.num_blocks);
  return result;
}

ApplyLaunches::ApplyLaunches(const ApplyJob& job, void* base) : workspace(base) {
  const Plan& plan = job.plan;
  int64_t groups, tensors = 0;
  for (int64_t i = 0; i < plan.num_pieces; ++i) tensors = std::max(tensors, plan.pieces[i].tensor + 1);
  const Update* updates = workspace.table(job.updates, job.num_updates);
  const Block* blocks = workspace.table(plan.blocks, plan.num_blocks);
  const int64_t* groups_of_blocks = workspace.table(first_groups(plan, &groups));
  const Piece* pieces = workspace.table(plan.pieces, plan.num_pieces);
  const TensorRef* params = workspace.table(job.params, tensors);

  const ApplyParams all = {nullptr, 0, plan.num_blocks, pieces,       params, updates, job.num_updates, job.total,
                           groups,  0, job.overwrite,   job.rounding, {}};
  const auto list = [&](const Takes& takes) {
    ApplyParams part = all;
    const auto listed = block_table(plan, takes, &part.items);
    part.blocks = workspace.table(listed);
    part.listed = static_cast<int64_t>(listed.size());
    return part;
  };
  const bool matrix = takes_matrix_units(job.basis, job.wide);
  if (matrix) {
    few = list(kFew), many = list(kMany);
  } else {
    ordinary = list(kOrdinary);
  }
  const Coordinates to = job.wide ? lay_out_coordinates<double>(job, groups, workspace)
                                  : lay_out_coordinates<float>(job, groups, workspace);
  ordinary.coordinates = few.coordinates = many.coordinates = to;
  prepare = {blocks, groups_of_blocks, plan.num_blocks, updates, job.num_updates, job.gammas, job.total,
             groups, job.basis,        job.alpha,       to};
}

template <class Real>
void (*apply_kernel_of(Basis basis))(ApplyParams) {
  switch (basis) {
    case Basis::rademacher: return apply_kernel<Basis::rademacher, Real>;
    case Basis::uniform: return apply_kernel<Basis::uniform, Real>;
    case Basis::gaussian: return apply_kernel<Basis::gaussian, Real>;
  }
  return nullptr;
}

template <class Real>
Status run(const ApplyLaunches& launches, Basis basis, CUstream_st* stream) {
  const PrepareParams& prepare = launches.prepare;
  Status status =
      launch("quantise_kernel", quantise_kernel<Real>, prepare.num_updates * prepare.num_blocks, stream, prepare);
  if (!status.ok()) return status;
  status = launch("weigh_kernel", weigh_kernel<Real>, divide_up(prepare.num_blocks, kThreads), stream, prepare);
  if (!status.ok()) return status;
  const auto start = [&](const char* where, void (*kernel)(ApplyParams), const ApplyParams& params) {
    const int64_t ctas = std::min(divide_up(params.items, kWarps), kCtas);
    if (status.ok()) status = launch(where, kernel, ctas, stream, params);
  };
  start("apply_kernel", apply_kernel_of<Real>(basis), launches.ordinary);
  start("apply_matrix_kernel", apply_matrix_kernel<16>, launches.few);
  start("apply_matrix_kernel", apply_matrix_kernel<kGroup>, launches.many);
  return status;
}

}  // namespace

size_t apply_workspace(const ApplyJob& job) { return ApplyLaunches(job, nullptr).workspace.bytes(); }

Status apply(const ApplyJob& job, void* workspace, size_t bytes, CUstream_st* stream) {
  if (!path_is_known()) return unknown_path();
  const ApplyLaunches launches(job, workspace);
  const Status status = launches.workspace.upload(bytes, stream);
  if (!status.ok()) return status;
  return job.wide ? run<double>(launches, job.basis, stream) : run<float>(launches, job.basis, stream);
}

}  // namespace ferret::cuda

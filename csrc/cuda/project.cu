// gamma_k = S_k * factor (docs/streams.md, "project"): tiles become integers, integers are summed exactly, tiles are
// folded.
//
// A CTA takes one (block, unit, batch of up to 128 columns), where a unit is a node of the fold tree, or one stage of
// tiles at level 0. It walks its tiles four at a time, a stage: a warp turns a tile into integers in shared memory,
// then every thread sums the Philox calls of one column, or a part of them when columns are few, then one thread a
// column folds the four values. Nodes' sums go to the workspace and are folded to the root by fold_kernel. Which level
// the units have, how columns are batched and calls are shared out changes no bit: integer sums have no order, and
// float64 sums only the tree's.
#include "fold.cuh"
#include "matrix.cuh"
#include "path.h"
#include "stage.cuh"
#include "workspace.cuh"

namespace ferret::cuda {
namespace {

constexpr int kStageShift = 11;                 // log2 of a stage's elements
constexpr int kMaxLevel = 3;                    // of the units
constexpr int64_t kManyUnits = 8192;            // CTAs, so many that the last of them hardly count
constexpr int64_t kMaxSums = int64_t{1} << 23;  // node sums, 64 MB, unless even the top level has more
static_assert(kStage * kTile == 1 << kStageShift);

struct ProjectBlock {
  Block block;
  BlockPieces pieces;
  Range units;
  int64_t first_item;  // a unit has one item a batch of columns
  int64_t first_sum;   // of the block's first node
};

struct ProjectParams {
  const ProjectBlock* blocks;  // [L]
  int64_t num_blocks;
  Deltas deltas;
  RoundKeys keys;
  int level;
  int64_t items;
  double* sums;  // [block][node][column]
};

__host__ __device__ constexpr int unit_shift(int level) { return level == 0 ? kStageShift : node_shift(level); }

// This thread's share of the raw sums of a stage.
template <Basis basis, class Real>
__device__ __forceinline__ void sum_calls(const RoundKeys& keys, uint64_t first_tile, uint32_t column,
                                          const Share& share, const TileHeader<Real>* headers,
                                          cuda::Stage<basis, Real>& stage) {
  using Shape = Layout<basis>;
  constexpr int limbs = Working<Real>::limbs;
  if (!share.active) return;
  for (int tile = share.tile; tile < kStage; tile += share.tile_step) {
    int64_t sums[limbs] = {};
    if (headers[tile].has_integers()) {
      for (int call = share.call; call < Shape::calls; call += share.call_step) {
        const Words words = stream_words(keys, basis, (first_tile + tile) * Shape::calls + call, column);
#pragma unroll
        for (int limb = 0; limb < limbs; ++limb) {
          add_call<basis>(words, &stage.q[limb][tile * Shape::tile_stride + call * Shape::call_stride], sums[limb]);
        }
      }
    }
#pragma unroll
    for (int limb = 0; limb < limbs; ++limb) stage.sums[limb][share.slot(share.call, tile)] = sums[limb];
  }
}

// A tile's value for the thread's column.
template <Basis basis, class Real>
__device__ __forceinline__ double tile_value(const cuda::Stage<basis, Real>& stage, const TileHeader<Real>& header,
                                             int tile, const Share& share) {
  if (!header.has_integers()) return header.exponent == kZeroExponent ? 0.0 : Limits<double>::nan;
  int64_t sums[2] = {};
#pragma unroll
  for (int limb = 0; limb < Working<Real>::limbs; ++limb) {
    int64_t raw = 0;
    for (int part = 0; part < share.call_step; ++part) raw += stage.sums[limb][share.slot(part, tile)];
    sums[limb] = from_raw<basis>(raw >> Layout<basis>::scale_bits, header.sum[limb]);
  }
  const double value =
      Working<Real>::limbs == 2 ? join_limbs(sums[0], sums[1], kDeltaBits) : static_cast<double>(sums[0]);
  return value * power_of_two(header.exponent - kDeltaBits, double());
}

// What sums a stage and gives its tiles' values: this on the ordinary units, or Matrix.
template <Basis basis, class Real>
struct Simt {
  using Stage = cuda::Stage<basis, Real>;
  static constexpr int calls = Layout<basis>::calls;

  __device__ __forceinline__ static void sum(const Deltas& deltas, const RoundKeys& keys, Runs<kTile>& runs,
                                             uint64_t first_tile, uint32_t first_column, const Share& share, int turn,
                                             Stage& stage) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    runs.seek((first_tile + warp) * kTile);
    quantise_tile(deltas, runs, warp, stage, stage.headers[turn][warp]);
    __syncthreads();
    sum_calls(keys, first_tile, first_column + share.column, share, stage.headers[turn], stage);
    __syncthreads();
  }

  __device__ __forceinline__ static double value(const Stage& stage, int turn, int tile, const Share& share) {
    return tile_value(stage, stage.headers[turn][tile], tile, share);
  }
};

// ---- units ----

template <class Sums>
__device__ __forceinline__ void project_unit(const ProjectParams& p, int64_t item, int& turn,
                                             typename Sums::Stage& stage) {
  const ProjectBlock& block =
      p.blocks[find_last(p.num_blocks, item, [&](int64_t b) { return p.blocks[b].first_item; })];
  const int64_t columns = block.block.columns, batches = (columns + kBatch - 1) / kBatch;
  const uint64_t unit = block.units.begin + (item - block.first_item) / batches;
  const int64_t first_column = (item - block.first_item) % batches * kBatch;
  const Share share(static_cast<int>(min(columns - first_column, int64_t{kBatch})), Sums::calls);
  const bool folds = static_cast<int>(threadIdx.x) < share.columns;
  double* sums = p.sums + block.first_sum + first_column + share.column;

  const int tiles_shift = unit_shift(p.level) - node_shift(0);
  const Range tiles = nodes_of(block.pieces.elements, 0);
  const uint64_t begin = max(unit << tiles_shift, tiles.begin / kStage * kStage);
  const uint64_t end = min((unit + 1) << tiles_shift, tiles.end);
  FoldTree<kMaxLevel> tree;
  Runs<kTile> runs(p.deltas.pieces, block.pieces);
  for (uint64_t first = begin; first < end; first += kStage, turn ^= 1) {
    Sums::sum(p.deltas, p.keys, runs, first, static_cast<uint32_t>(first_column), share, turn, stage);
    if (!folds) continue;
    for (int tile = 0; tile < kStage; ++tile) {
      const double value = Sums::value(stage, turn, tile, share);
      if (p.level > 0) {
        tree.add(first + tile, value);
      } else if (first + tile >= tiles.begin && first + tile < tiles.end) {
        sums[static_cast<int64_t>(first + tile - tiles.begin) * columns] = value;
      }
    }
  }
  if (folds && p.level > 0) sums[static_cast<int64_t>(unit - block.units.begin) * columns] = tree.root();
}

// At least 4 CTAs a multiprocessor in float32 and 2 in float64, which has more to hold: registers for that suffice
// without spills.
template <Basis basis, class Real>
__global__ void __launch_bounds__(kThreads, Working<Real>::limbs == 1 ? 4 : 2) project_kernel(ProjectParams p) {
  __shared__ Stage<basis, Real> stage;
  int turn = 0;
  for (int64_t item = blockIdx.x; item < p.items; item += gridDim.x) {
    project_unit<Simt<basis, Real>>(p, item, turn, stage);
  }
}

__global__ void __launch_bounds__(kThreads, 4) project_matrix_kernel(ProjectParams p) {
  __shared__ MatrixStage stage;
  int turn = 0;
  for (int64_t item = blockIdx.x; item < p.items; item += gridDim.x) project_unit<Matrix>(p, item, turn, stage);
}

// ---- host ----

int64_t batches_of(const Block& block) { return divide_up(block.columns, kBatch); }

// Units of the highest level that still makes many of them; smaller units cost more room and folding.
int choose_level(const Plan& plan) {
  const auto pieces = pieces_by_block(plan);
  const auto total = [&](auto count) {
    int64_t sum = 0;
    for (int64_t b = 0; b < plan.num_blocks; ++b) sum += count(plan.blocks[b], pieces[b]);
    return sum;
  };
  const auto few_items = [&](int level) {
    return total([=](const Block& block, const BlockPieces& at) {
             return size(spans_of(at, unit_shift(level))) * batches_of(block);
           }) < kManyUnits;
  };
  const auto fits = [&](int level) {
    return total([=](const Block& block, const BlockPieces& at) {
             return size(spans_of(at, node_shift(level))) * block.columns;
           }) <= kMaxSums;
  };
  int level = kMaxLevel;
  while (level > 0 && few_items(level) && fits(level - 1)) --level;
  return level;
}

// The sums of one level: where a block's begin, and how many there are.
struct LevelSums {
  int level;
  std::vector<int64_t> first;
  int64_t count = 0;
  int64_t most_nodes = 0;  // of a block
};

LevelSums lay_out_sums(const Plan& plan, const std::vector<BlockPieces>& pieces, int level) {
  LevelSums sums{level, {}};
  for (int64_t b = 0; b < plan.num_blocks; ++b) {
    const int64_t nodes = level == kTopLevel ? 1 : size(spans_of(pieces[b], node_shift(level)));
    sums.first.push_back(sums.count);
    sums.count += nodes * plan.blocks[b].columns;
    sums.most_nodes = std::max(sums.most_nodes, nodes);
  }
  return sums;
}

// The levels at which sums exist: the units', as many more as make chains of additions short, the root.
std::vector<LevelSums> lay_out_levels(const Plan& plan, const std::vector<BlockPieces>& pieces, int level) {
  std::vector<LevelSums> levels = {lay_out_sums(plan, pieces, level)};
  while (levels.back().most_nodes > kFoldRadix) levels.push_back(lay_out_sums(plan, pieces, levels.back().level + 1));
  levels.push_back(lay_out_sums(plan, pieces, kTopLevel));
  return levels;
}

std::vector<ProjectBlock> block_table(const Plan& plan, const std::vector<BlockPieces>& pieces, const LevelSums& sums,
                                      int64_t* items) {
  std::vector<ProjectBlock> blocks;
  blocks.reserve(plan.num_blocks);
  *items = 0;
  for (int64_t b = 0; b < plan.num_blocks; ++b) {
    const Range units = spans_of(pieces[b], unit_shift(sums.level));
    blocks.push_back({plan.blocks[b], pieces[b], units, *items, sums.first[b]});
    *items += size(units) * batches_of(plan.blocks[b]);
  }
  return blocks;
}

struct ProjectLaunches {
  Workspace workspace;
  ProjectParams project = {};
  std::vector<FoldParams> folds;

  ProjectLaunches(const ProjectJob& job, int level, void* base);
};

ProjectLaunches::ProjectLaunches(const ProjectJob& job, int level, void* base) : workspace(base) {
  const Plan& plan = job.plan;
  const auto pieces = pieces_by_block(plan);
  const auto levels = lay_out_levels(plan, pieces, level);
  int64_t tensors = 0;
  for (int64_t i = 0; i < plan.num_pieces; ++i) tensors = std::max(tensors, plan.pieces[i].tensor + 1);

  project.blocks = workspace.table(block_table(plan, pieces, levels[0], &project.items));
  project.num_blocks = plan.num_blocks;
  project.deltas.pieces = workspace.table(plan.pieces, plan.num_pieces);
  project.deltas.now = workspace.table(job.now, tensors);
  if (job.before != nullptr) project.deltas.before = workspace.table(job.before, tensors);
  project.keys = round_keys(job.stream.seed);
  project.level = levels[0].level;

  const Block* blocks = workspace.table(plan.blocks, plan.num_blocks);
  const BlockPieces* block_pieces = workspace.table(pieces);
  std::vector<const int64_t*> first;
  for (const LevelSums& level : levels) first.push_back(workspace.table(level.first));
  double* in = project.sums = workspace.room<double>(levels[0].count);
  for (size_t i = 1; i < levels.size(); ++i) {
    double* out = levels[i].level == kTopLevel ? nullptr : workspace.room<double>(levels[i].count);
    folds.push_back({blocks, block_pieces, plan.num_blocks, levels[i - 1].level, levels[i].level, first[i - 1],
                     first[i], levels[i].count, in, out, job.gamma, job.stream.basis, job.wide});
    in = out;
  }
}

template <class Real>
void (*project_kernel_of(Basis basis))(ProjectParams) {
  if (takes_matrix_units(basis, Working<Real>::limbs == 2)) return project_matrix_kernel;
  switch (basis) {
    case Basis::rademacher: return project_kernel<Basis::rademacher, Real>;
    case Basis::uniform: return project_kernel<Basis::uniform, Real>;
    case Basis::gaussian: return project_kernel<Basis::gaussian, Real>;
  }
  return nullptr;
}

Status run(const ProjectLaunches& launches, const ProjectJob& job, size_t bytes, CUstream_st* stream) {
  if (!path_is_known()) return unknown_path();
  Status status = launches.workspace.upload(bytes, stream);
  if (!status.ok()) return status;
  const auto kernel =
      job.wide ? project_kernel_of<double>(job.stream.basis) : project_kernel_of<float>(job.stream.basis);
  status = launch("project_kernel", kernel, launches.project.items, stream, launches.project);
  for (const FoldParams& fold : launches.folds) {
    if (!status.ok()) return status;
    status = launch("fold_kernel", fold_kernel, divide_up(fold.count, kThreads), stream, fold);
  }
  return status;
}

}  // namespace

size_t project_workspace(const ProjectJob& job) {
  return ProjectLaunches(job, choose_level(job.plan), nullptr).workspace.bytes();
}

Status project(const ProjectJob& job, void* workspace, size_t bytes, CUstream_st* stream) {
  return run(ProjectLaunches(job, choose_level(job.plan), workspace), job, bytes, stream);
}

}  // namespace ferret::cuda

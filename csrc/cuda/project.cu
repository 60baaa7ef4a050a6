// gamma_k = S_k * factor (docs/streams.md, "project"): tiles become integers, integers are summed exactly, tiles are folded.
//
// A CTA takes one (block, unit, batch of up to 128 columns), where a unit is a node of the fold tree, or one stage of tiles at
// level 0. It walks its tiles four at a time, a stage: a warp turns a tile into integers in shared memory, then every thread
// sums the Philox calls of one column, or a part of them when columns are few, then one thread a column folds the four values.
// Nodes' sums go to the workspace and are folded to the root by fold_kernel. Which level the units have, how columns are
// batched and calls are shared out changes no bit: integer sums have no order, and float64 sums only the tree's.
#include "fold.cuh"

namespace ferret::cuda {
namespace {

constexpr int kBatch = kThreads;      // columns of a CTA
constexpr int kStage = kWarps;        // tiles of a stage
constexpr int kStageShift = 11;       // log2 of a stage's elements
constexpr int kMaxLevel = 3;          // of the units
constexpr int64_t kManyUnits = 2048;  // CTAs that keep any GPU busy
constexpr int64_t kMaxSums = int64_t{1} << 23;  // node sums, 64 MB, unless even the top level has more
constexpr int kPerLane = kTile / kWarp;
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
  const Piece* pieces;
  const TensorRef* now;
  const TensorRef* before;  // or null
  uint64_t seed;
  int level;
  int64_t items;
  double* sums;  // [block][node][column]
};

__host__ __device__ constexpr int unit_shift(int level) { return level == 0 ? kStageShift : node_shift(level); }

// ---- a stage in shared memory ----

// Places of a tile's integers: threads of a warp that work on different calls or tiles read 16 bytes each from distinct banks.
template <Basis basis>
struct Layout {
  static constexpr int per_call = elements_per_call(basis);
  static constexpr int calls = kTile / per_call;
  static constexpr int call_stride = basis == Basis::rademacher ? per_call + 16 : per_call;
  static constexpr int tile_stride = calls * call_stride + (basis == Basis::gaussian ? 8 : 4);

  __device__ static int place(int element) { return element / per_call * call_stride + element % per_call; }
};

struct alignas(16) Quad {
  int32_t v[4];
};

template <class Real>
struct TileHeader {
  int exponent;  // n, kZeroExponent, or that of infinity and NaN
  int32_t sum[Working<Real>::limbs];  // of q

  __device__ bool has_integers() const { return exponent != kZeroExponent && is_finite_exponent<Real>(exponent); }
};

template <Basis basis, class Real>
struct Stage {
  static constexpr int limbs = Working<Real>::limbs;
  alignas(16) int32_t q[limbs][kStage * Layout<basis>::tile_stride];
  int64_t sums[limbs][kStage * kBatch];  // [part of the calls][tile][column], raw
  TileHeader<Real> headers[2][kStage];   // of this stage and of the one that may still be read
};

// Which part of a stage a thread sums: column tid % columns, and with few columns only some of the tiles and calls.
struct Share {
  int column, tile, call;
  int tile_step, call_step;
  int columns;
  bool active;

  __device__ Share(int columns, int calls) : columns(columns) {
    const int tid = static_cast<int>(threadIdx.x);
    int parts = 1;
    while (2 * parts * columns <= kThreads && 2 * parts <= kStage * calls) parts *= 2;
    tile_step = parts < kStage ? parts : kStage;
    call_step = parts / tile_step;
    column = tid % columns;
    tile = tid / columns % tile_step;
    call = tid / columns / tile_step;
    active = call < call_step;
  }
  __device__ int slot(int call_part, int at_tile) const { return (call_part * kStage + at_tile) * columns + column; }
};

// ---- tile -> integers ----

template <class Real>
__device__ __forceinline__ void load_tile(const ProjectParams& p, const BlockPieces& pieces, uint64_t tile, LanePlaces places,
                                          Real (&x)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) x[i] = 0;
  for_each_run(p.pieces, pieces, tile * kTile, kTile, [&](const Run& run) {
    if (p.before == nullptr) return load(p.now[run.tensor], run, places, x);
    Real now[kPerLane] = {};
    load(p.before[run.tensor], run, places, x);
    load(p.now[run.tensor], run, places, now);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] -= now[i];
  });
}

// A warp's tile as integers and their sums.
template <Basis basis, class Real>
__device__ __forceinline__ void quantise_tile(const ProjectParams& p, const BlockPieces& pieces, uint64_t tile, int warp,
                                              Stage<basis, Real>& stage, TileHeader<Real>& header) {
  const LanePlaces places = {static_cast<int>(threadIdx.x) % kWarp, kWarp};
  Real x[kPerLane];
  load_tile(p, pieces, tile, places, x);
  int n = kZeroExponent;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) n = max(n, exponent_or_zero(x[i]));
  n = __reduce_max_sync(kAllLanes, n);
  if (n != kZeroExponent) n = max(n, Working<Real>::min_tile_exponent);
  header.exponent = n;
  if (!header.has_integers()) return;

  int32_t sums[2] = {};
  const Scale<Real> scale(kDeltaBits, n);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const Limbs q = to_fixed_point(scale(x[i]), kDeltaBits);
    const int at = warp * Layout<basis>::tile_stride + Layout<basis>::place(places[i]);
    stage.q[0][at] = q.hi;
    sums[0] += q.hi;
    if constexpr (Working<Real>::limbs == 2) {
      stage.q[1][at] = q.lo;
      sums[1] += q.lo;
    }
  }
  for (int limb = 0; limb < Working<Real>::limbs; ++limb) header.sum[limb] = __reduce_add_sync(kAllLanes, sums[limb]);
}

// ---- integers x basis ----

// sum += raw . q over one call.
__device__ __forceinline__ void add_call(Kind<Basis::rademacher>, const Words& words, const int32_t* q, int32_t& sum) {
  const auto* quads = reinterpret_cast<const Quad*>(q);
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const Quad quad = quads[i];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (words.w[i / 8] & (1u << (4 * (i % 8) + j))) sum += quad.v[j];
    }
  }
}

__device__ __forceinline__ void add_call(Kind<Basis::uniform>, const Words& words, const int32_t* q, int64_t& sum) {
  const auto* quads = reinterpret_cast<const Quad*>(q);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Quad quad = quads[i];
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += int64_t{quad.v[j]} * static_cast<int32_t>((words.w[i] >> (8 * j)) & 255u);
  }
}

__device__ __forceinline__ void add_call(Kind<Basis::gaussian>, const Words& words, const int32_t* q, int64_t& sum) {
  const Quad quad = *reinterpret_cast<const Quad*>(q);
  const IntegerPair first = box_muller(words.w[0], words.w[1]), second = box_muller(words.w[2], words.w[3]);
  sum += int64_t{quad.v[0]} * first.b[0] + int64_t{quad.v[1]} * first.b[1];
  sum += int64_t{quad.v[2]} * second.b[0] + int64_t{quad.v[3]} * second.b[1];
}

// This thread's share of the raw sums of a stage.
template <Basis basis, class Real>
__device__ __forceinline__ void sum_calls(uint64_t seed, uint64_t first_tile, uint32_t column, const Share& share,
                                          const TileHeader<Real>* headers, Stage<basis, Real>& stage) {
  using Shape = Layout<basis>;
  constexpr int limbs = Working<Real>::limbs;
  if (!share.active) return;
  for (int tile = share.tile; tile < kStage; tile += share.tile_step) {
    typename Kind<basis>::Sum sums[limbs] = {};
    if (headers[tile].has_integers()) {
      for (int call = share.call; call < Shape::calls; call += share.call_step) {
        const Words words = stream_words(seed, basis, (first_tile + tile) * Shape::calls + call, column);
        for (int limb = 0; limb < limbs; ++limb) {
          add_call(Kind<basis>(), words, &stage.q[limb][tile * Shape::tile_stride + call * Shape::call_stride], sums[limb]);
        }
      }
    }
    for (int limb = 0; limb < limbs; ++limb) stage.sums[limb][share.slot(share.call, tile)] = sums[limb];
  }
}

// A tile's value for the thread's column.
template <Basis basis, class Real>
__device__ __forceinline__ double tile_value(const Stage<basis, Real>& stage, const TileHeader<Real>& header, int tile,
                                             const Share& share) {
  if (!header.has_integers()) return header.exponent == kZeroExponent ? 0.0 : Limits<double>::nan;
  int64_t sums[2] = {};
  for (int limb = 0; limb < Working<Real>::limbs; ++limb) {
    int64_t raw = 0;
    for (int part = 0; part < share.call_step; ++part) raw += stage.sums[limb][share.slot(part, tile)];
    sums[limb] = from_raw<basis>(raw, header.sum[limb]);
  }
  const double value =
      Working<Real>::limbs == 2 ? join_limbs(sums[0], sums[1], kDeltaBits) : static_cast<double>(sums[0]);
  return value * power_of_two(header.exponent - kDeltaBits, double());
}

// ---- units ----

template <Basis basis, class Real>
__device__ __forceinline__ void project_unit(const ProjectParams& p, int64_t item, int& turn, Stage<basis, Real>& stage) {
  const ProjectBlock& block = p.blocks[find_last(p.num_blocks, item, [&](int64_t b) { return p.blocks[b].first_item; })];
  const int64_t columns = block.block.columns, batches = (columns + kBatch - 1) / kBatch;
  const uint64_t unit = block.units.begin + (item - block.first_item) / batches;
  const int64_t first_column = (item - block.first_item) % batches * kBatch;
  const Share share(static_cast<int>(min(columns - first_column, int64_t{kBatch})), Layout<basis>::calls);
  const bool folds = static_cast<int>(threadIdx.x) < share.columns;
  double* sums = p.sums + block.first_sum + first_column + share.column;

  const int warp = static_cast<int>(threadIdx.x) / kWarp, tiles_shift = unit_shift(p.level) - node_shift(0);
  const Range tiles = nodes_of(block.pieces.elements, 0);
  const uint64_t begin = max(unit << tiles_shift, tiles.begin / kStage * kStage);
  const uint64_t end = min((unit + 1) << tiles_shift, tiles.end);
  FoldTree<kMaxLevel> tree;
  for (uint64_t first = begin; first < end; first += kStage, turn ^= 1) {
    TileHeader<Real>* headers = stage.headers[turn];
    quantise_tile(p, block.pieces, first + warp, warp, stage, headers[warp]);
    __syncthreads();
    sum_calls(p.seed, first, static_cast<uint32_t>(first_column + share.column), share, headers, stage);
    __syncthreads();
    if (!folds) continue;
    for (int tile = 0; tile < kStage; ++tile) {
      const double value = tile_value(stage, headers[tile], tile, share);
      if (p.level > 0) {
        tree.add(first + tile, value);
      } else if (first + tile >= tiles.begin && first + tile < tiles.end) {
        sums[static_cast<int64_t>(first + tile - tiles.begin) * columns] = value;
      }
    }
  }
  if (folds && p.level > 0) sums[static_cast<int64_t>(unit - block.units.begin) * columns] = tree.root();
}

template <Basis basis, class Real>
__global__ void __launch_bounds__(kThreads) project_kernel(ProjectParams p) {
  __shared__ Stage<basis, Real> stage;
  int turn = 0;
  for (int64_t item = blockIdx.x; item < p.items; item += gridDim.x) project_unit(p, item, turn, stage);
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
  project.pieces = workspace.table(plan.pieces, plan.num_pieces);
  project.now = workspace.table(job.now, tensors);
  if (job.before != nullptr) project.before = workspace.table(job.before, tensors);
  project.seed = job.stream.seed;
  project.level = levels[0].level;

  const Block* blocks = workspace.table(plan.blocks, plan.num_blocks);
  const BlockPieces* block_pieces = workspace.table(pieces);
  std::vector<const int64_t*> first;
  for (const LevelSums& level : levels) first.push_back(workspace.table(level.first));
  double* in = project.sums = workspace.room<double>(levels[0].count);
  for (size_t i = 1; i < levels.size(); ++i) {
    double* out = levels[i].level == kTopLevel ? nullptr : workspace.room<double>(levels[i].count);
    folds.push_back({blocks, block_pieces, plan.num_blocks, levels[i - 1].level, levels[i].level, first[i - 1], first[i],
                     levels[i].count, in, out, job.gamma, job.stream.basis, job.wide});
    in = out;
  }
}

template <class Real>
void (*select_kernel(Basis basis))(ProjectParams) {
  switch (basis) {
    case Basis::rademacher: return project_kernel<Basis::rademacher, Real>;
    case Basis::uniform: return project_kernel<Basis::uniform, Real>;
    case Basis::gaussian: return project_kernel<Basis::gaussian, Real>;
  }
  return nullptr;
}

Status run(const ProjectLaunches& launches, const ProjectJob& job, size_t bytes, CUstream_st* stream) {
  Status status = launches.workspace.upload(bytes, stream);
  if (!status.ok()) return status;
  const auto kernel = job.wide ? select_kernel<double>(job.stream.basis) : select_kernel<float>(job.stream.basis);
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

// gamma_k = S_k * factor, S_k the sum of a block's tiles folded by the radix-64 tree of docs/streams.md.
//
// A task is (block, node of the tree, batch of columns); it folds its node's tiles in order. The nodes' sums are then folded up
// to the root. Which level the tasks take, how columns are batched and which thread runs a task changes no bit.
#include "dispatch.h"

namespace ferret::cpu {
namespace {

constexpr int64_t kPartialLimit = int64_t{1} << 21;  // float64 node sums kept per block

template <class Real>
struct BlockProduct {
  const ProjectJob& job;
  const RealKernels<Real>& kernels;
  BlockPieces pieces;
  Range elements;

  // The elements of the run that begins at `origin`, as far as they lie in `range`: where they lie, with the runs behind them, if one piece
  // has them all, else in `buffer`, in the working precision.
  void find(uint64_t origin, Range range, Real* buffer, RunProduct<Real>& run) const {
    const uint64_t end = range.end;
    range = {std::max(origin, range.begin), std::min(origin + kRunElements, end)};
    Range covered = {range.end, range.begin};
    for_each_overlap(pieces, range, [&](const Piece& piece, uint64_t first, uint64_t last) {
      const auto n = static_cast<int64_t>(last - first);
      const Dtype dtype = job.now[piece.tensor].dtype;
      const Dtype dtype_before = job.before == nullptr ? dtype : job.before[piece.tensor].dtype;
      const char* now = element_of(job.now, piece, first);
      const char* before = job.before == nullptr ? nullptr : element_of(job.before, piece, first);
      if (n == kRunElements && dtype == dtype_before) {
        const auto bytes = static_cast<int>(kRunElements * size_of(dtype));
        run.now = now, run.before = before, run.dtype = dtype;
        run.runs = static_cast<int>((std::min(end_of(piece), end) - origin) / kRunElements);
        const int further = bytes / 4 * 5;  // more than a run, by which these are ahead already
        run.ahead[0] = {now + bytes, bytes / 64, further};
        if (before != nullptr) run.ahead[1] = {before + bytes, bytes / 64, further};
      } else {
        if (run.now == nullptr) std::fill(buffer, buffer + kRunElements, Real(0));
        run.now = buffer, run.dtype = dtype_of(Real());
        Real* to = buffer + (first - origin);
        kernels.widen(now, dtype, n, to);
        if (before != nullptr) kernels.subtract(before, dtype_before, n, to);
      }
      covered = {std::min(covered.begin, first), std::max(covered.end, last)};
    });
    run.begin = static_cast<int>(covered.begin - origin);
    run.end = static_cast<int>(covered.end - origin);
  }

  // The tiles of a run, and of runs behind it, that lie in `tiles`. Returns the number of runs.
  int add_runs(uint64_t run, Range tiles, uint32_t first, int count, double* sums) const {
    alignas(64) Real buffer[kRunElements];
    const uint64_t tile = run * kRun;
    RunProduct<Real> product = {nullptr, nullptr, 1, {}, {}, tile, 0, 0, job.stream, first, count, sums};
    find(tile * kTile, {tiles.begin * kTile, tiles.end * kTile}, buffer, product);
    return product.now == nullptr ? 1 : kernels.project_runs(product);
  }

  // sums[0, count) = the node's value for the columns first, first + 1, ..
  void sum_node(int level, uint64_t node, uint32_t first, int count, double* sums) const {
    std::fill(sums, sums + count, 0.0);
    const Range all = nodes_of(elements, level - 1);
    const Range children = {std::max(all.begin, node * kFoldRadix), std::min(all.end, (node + 1) * kFoldRadix)};
    if (level == 1) {
      for (uint64_t run = children.begin / kRun; run * kRun < children.end;) {
        run += static_cast<uint64_t>(add_runs(run, children, first, count, sums));
      }
      return;
    }
    double child_sums[kColumnBatch + kPad];
    for (uint64_t child = children.begin; child < children.end; ++child) {
      sum_node(level - 1, child, first, count, child_sums);
      for (int k = 0; k < count; ++k) sums[k] += child_sums[k];
    }
  }
};

struct BlockTasks {
  int level;
  Range nodes;
  int64_t batch;  // columns a task
  int64_t batches;
  int64_t first_task;
  std::vector<double> sums;  // [nodes][columns]
};

int64_t size(Range range) { return static_cast<int64_t>(range.end - range.begin); }

std::vector<BlockTasks> split(const ProjectJob& job, const std::vector<BlockPieces>& pieces, int threads) {
  std::vector<BlockTasks> tasks(job.plan.num_blocks);
  int64_t nodes = 0;
  for (int64_t b = 0; b < job.plan.num_blocks; ++b) {
    BlockTasks& t = tasks[b];
    t.level = 1;
    if (pieces[b].empty()) continue;
    const int64_t columns = job.plan.blocks[b].columns;
    while (size(nodes_of(pieces[b].elements(), t.level)) > std::max<int64_t>(1, kPartialLimit / columns)) ++t.level;
    t.nodes = nodes_of(pieces[b].elements(), t.level);
    t.sums.resize(size(t.nodes) * columns);
    nodes += size(t.nodes);
  }
  // Wide batches share a tile's tables among more columns; narrow ones give every thread work when there are few nodes.
  const int64_t batch = nodes >= 4 * threads ? kColumnBatch : 64;
  int64_t count = 0;
  for (int64_t b = 0; b < job.plan.num_blocks; ++b) {
    BlockTasks& t = tasks[b];
    t.batch = batch;
    t.batches = (job.plan.blocks[b].columns + batch - 1) / batch;
    t.first_task = count;
    count += size(t.nodes) * t.batches;
  }
  return tasks;
}

// The root's value in sums[0, columns), folding level by level in place.
void fold(BlockTasks& t, int64_t columns) {
  for (Range nodes = t.nodes; size(nodes) > 1;) {
    const Range parents = {nodes.begin / kFoldRadix, (nodes.end - 1) / kFoldRadix + 1};
    for (int64_t k = 0; k < columns; ++k) {
      for (uint64_t parent = parents.begin; parent < parents.end; ++parent) {
        const uint64_t first = std::max(nodes.begin, parent * kFoldRadix);
        const uint64_t last = std::min(nodes.end, (parent + 1) * kFoldRadix);
        double sum = 0;
        for (uint64_t node = first; node < last; ++node) sum += t.sums[(node - nodes.begin) * columns + k];
        t.sums[(parent - parents.begin) * columns + k] = sum;
      }
    }
    nodes = parents;
  }
}

template <class Real>
void project_in(const ProjectJob& job, const Threads& threads) {
  const auto& kernels = kernels_of<Real>(active_kernels());
  const auto pieces = pieces_by_block(job.plan);
  auto tasks = split(job, pieces, threads.count);
  const auto count = tasks.empty() ? 0 : tasks.back().first_task + size(tasks.back().nodes) * tasks.back().batches;

  for_each_task(threads, count, [&](int64_t task) {
    const auto next = std::upper_bound(tasks.begin(), tasks.end(), task,
                                       [](int64_t i, const BlockTasks& t) { return i < t.first_task; });
    BlockTasks& t = *(next - 1);
    const int64_t b = &t - tasks.data();
    const int64_t columns = job.plan.blocks[b].columns;
    const int64_t node = (task - t.first_task) / t.batches, first = (task - t.first_task) % t.batches * t.batch;
    const int width = static_cast<int>(std::min(t.batch, columns - first));
    const BlockProduct<Real> product{job, kernels, pieces[b], pieces[b].elements()};
    product.sum_node(t.level, t.nodes.begin + node, static_cast<uint32_t>(first), width,
                     &t.sums[node * columns + first]);
  });

  for_each_task(threads, job.plan.num_blocks, [&](int64_t b) {
    const Block& block = job.plan.blocks[b];
    const double factor = project_factor(job.stream.basis, block.numel, block.columns);
    Real* gamma = static_cast<Real*>(job.gamma) + block.start;
    fold(tasks[b], block.columns);
    for (int64_t k = 0; k < block.columns; ++k) {
      gamma[k] = pieces[b].empty() ? Real(0) : static_cast<Real>(tasks[b].sums[k] * factor);
    }
  });
}

}  // namespace

void project(const ProjectJob& job, const Threads& threads) {
  job.wide ? project_in<double>(job, threads) : project_in<float>(job, threads);
}

}  // namespace ferret::cpu

#pragma once

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <exception>

#include "cpu.h"
#include "kernels.h"

namespace ferret::cpu {

const Kernels& active_kernels();

// The default floating-point environment for the duration of a task: a caller may have set flush-to-zero or another rounding,
// either of which would change bits.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint() {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatingPoint() { std::fesetenv(&saved_); }
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
  DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;

 private:
  std::fenv_t saved_;
};

// f(task) for every task in [0, tasks), on all threads; a thread takes runs of tasks so that the counter stays cool.
// What a task throws (memory may run out) ends the others and is thrown here, since it must not leave a thread of the caller's pool.
template <class F>
void for_each_task(const Threads& threads, int64_t tasks, F f) {
  if (tasks <= 0) return;
  const int64_t run = std::max<int64_t>(1, tasks / (64 * std::max(1, threads.count)));
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const auto worker = [&] {
    const DefaultFloatingPoint environment;
    try {
      for (int64_t begin = next.fetch_add(run); begin < tasks; begin = next.fetch_add(run)) {
        for (int64_t task = begin; task < std::min(begin + run, tasks); ++task) f(task);
      }
    } catch (...) {
      next.store(tasks);
      if (!failed.exchange(true)) error = std::current_exception();
    }
  };
  if (threads.count <= 1 || tasks == 1) {
    worker();
  } else {
    threads.run(worker);
  }
  if (error) std::rethrow_exception(error);
}

inline uint64_t end_of(const Piece& piece) { return static_cast<uint64_t>(piece.offset + piece.length); }

// The pieces of one block, and the stream elements they span.
struct BlockPieces {
  const Piece* begin;
  const Piece* end;

  bool empty() const { return begin == end; }
  Range elements() const { return {static_cast<uint64_t>(begin->offset), end_of(end[-1])}; }
  // The first piece that ends behind `element`.
  const Piece* find(uint64_t element) const {
    return std::partition_point(begin, end, [=](const Piece& p) { return end_of(p) <= element; });
  }
};

std::vector<BlockPieces> pieces_by_block(const Plan& plan);

// f(piece, first, last) for the stream elements of [begin, end) that a piece holds.
template <class F>
void for_each_overlap(const BlockPieces& pieces, Range range, F f) {
  for (const Piece* p = pieces.find(range.begin); p != pieces.end; ++p) {
    const uint64_t first = std::max(range.begin, static_cast<uint64_t>(p->offset));
    const uint64_t last = std::min(range.end, end_of(*p));
    if (first >= range.end) break;
    f(*p, first, last);
  }
}

inline char* element_of(const TensorRef* tensors, const Piece& piece, uint64_t element) {
  const TensorRef& tensor = tensors[piece.tensor];
  const int64_t index = piece.start + static_cast<int64_t>(element - static_cast<uint64_t>(piece.offset));
  return static_cast<char*>(tensor.data) + index * size_of(tensor.dtype);
}

}  // namespace ferret::cpu

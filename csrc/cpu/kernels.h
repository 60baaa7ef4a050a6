// The part of the CPU backend that is written once per instruction set. Everything else (which tile, which thread, which
// piece of which tensor) is in project.cpp and apply.cpp.
#pragma once

#include "../core/job.h"

namespace ferret::cpu {

inline constexpr int kRun = 4;  // tiles that are done together
inline constexpr int kRunElements = kRun * kTile;
inline constexpr int kColumnBatch = 512;  // columns that share one set of look-up tables of a tile
inline constexpr int kSpan = 2048;        // elements that share one pass over the coordinates
inline constexpr int kPad = 16;           // buffers over columns are readable and writable up to a multiple of it

// Memory that is read soon. Arithmetic comes in long stretches without a load, in which memory would idle were it not asked for.
// A line is asked into the second-level cache long before it is asked into the first: of requests into the first only some 16 can be under
// way, too few for memory's latency.
struct Prefetch {
  const char* from = nullptr;
  int lines = 0;    // of 64 bytes, into the first-level cache
  int further = 0;  // bytes; the lines so far behind them, into the second

  FERRET_HD void operator()(int first, int last) const {
    for (int line = first; line < last && line < lines; ++line) ask(from + 64 * line, further);
  }
  FERRET_HD static void ask(const char* line, int64_t further) {
    __builtin_prefetch(line);
    __builtin_prefetch(line + further, 0, 2);
  }
};

// The lines of two ranges in 64 calls, so that memory works beside the arithmetic and not in turn with it.
class LinesAhead {
 public:
  FERRET_HD explicit LinesAhead(const Prefetch (&ranges)[2])
      : next_(&ranges[1]), step_((ranges[0].lines + ranges[1].lines + 63) & ~63) {
    take(ranges[0]);
  }
  FERRET_HD void operator()() {
    if (line_ == last_) {
      if (next_ == nullptr || next_->lines == 0) return;
      take(*next_);
      next_ = nullptr;
    }
    const char* const stop = line_ + step_;  // a range is a whole number of steps
    do {
      Prefetch::ask(line_, further_);
      line_ += 64;
    } while (line_ != stop);
  }

 private:
  FERRET_HD void take(const Prefetch& range) {
    line_ = range.from, last_ = line_ + 64 * range.lines, further_ = range.further;
  }

  const Prefetch* next_;
  int64_t step_;  // bytes a call
  const char* line_;
  const char* last_;
  int64_t further_;
};

// Runs of tiles of the working precision against the columns [first, first + count): the elements of `dtype` at `now`, or those at
// `before` less those. Zero outside the block.
template <class Real>
struct RunProduct {
  const void* now;     // [runs][kRunElements]
  const void* before;  // or null
  int runs;            // of one node of the tree; all but the first are whole
  Dtype dtype;
  Prefetch ahead[2];  // what the second run reads in place of these
  uint64_t tile;      // stream index / kTile of the first, a multiple of kRun
  int begin, end;     // the part of the first run that may be nonzero
  Stream stream;
  uint32_t first;
  int count;     // <= kColumnBatch
  double* sums;  // [count]; receives += each tile's value of each column, tile by tile
};

// One group of up to 64 columns as integers: g ~ (c[0] + c[1] * 2^-23) * scale, in units of the block's power of two.
template <class Real>
struct Group {
  int32_t c[Working<Real>::limbs][kGroup];
  uint32_t column[kGroup];  // of the basis
  Real scale;
};

// One update's sum over its columns for the elements [kSpan * span, kSpan * (span + 1)), in an order of the path's own.
template <class Real>
struct SpanSum {
  const Group<Real>* groups;  // [ceil(columns / 64)]; coordinates past the last column are 0
  int64_t columns;
  Stream stream;
  uint64_t span;
  Prefetch ahead;  // the parameters that are read next
  int begin, end;  // the part of the span that is wanted; of the rest some is computed too, some left alone
  Real* sums;      // [kSpan]
};

template <class Real>
struct RealKernels {
  void (*widen)(const void* from, Dtype dtype, int64_t n, Real* to);
  void (*subtract)(const void* from, Dtype dtype, int64_t n, Real* inout);  // inout = from - inout
  int (*project_runs)(const RunProduct<Real>&);  // returns how many of them it has done, at least one
  void (*sum_columns)(const SpanSum<Real>&);
  void (*accumulate)(const Real* sums, int64_t n, Real weight, bool first,
                     Real* total);                                          // total = fma(sums, weight, total or 0)
  void (*to_element_order)(Basis basis, const Real* sums, Real* elements);  // [kSpan] both
  // That and scale_add in one pass, for parameters of Real [kSpan]. False, and nothing done, where the path or basis has none.
  bool (*scale_add_in_order)(Basis basis, const Real* sums, Real factor, bool overwrite, Real* param);
  // random: of stochastic rounding to 16 bits; null rounds to nearest
  void (*scale_add)(const Real* sums, int64_t n, Real factor, bool overwrite, Dtype dtype, void* param,
                    const uint16_t* random);
};

struct Kernels {
  const char* name;
  uint32_t (*philox_checksum)(uint64_t seed, uint32_t columns, uint64_t calls);  // see cpu.h
  void (*rounding_of_span)(uint64_t seed, uint64_t span, uint16_t* random);      // [kSpan], of stochastic rounding
  RealKernels<float> narrow;
  RealKernels<double> wide;
};

template <class Real>
const RealKernels<Real>& kernels_of(const Kernels& kernels);
template <>
inline const RealKernels<float>& kernels_of(const Kernels& kernels) {
  return kernels.narrow;
}
template <>
inline const RealKernels<double>& kernels_of(const Kernels& kernels) {
  return kernels.wide;
}

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#endif

}  // namespace ferret::cpu

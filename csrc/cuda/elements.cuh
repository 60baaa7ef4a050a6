// Device code that project, apply and basis share: which tensor holds a stream element, and how it is read and written.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#include "launch.h"

namespace ferret::cuda {

inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Every kind's integer is b = scale * raw + bias of its raw bits, so sum(b x) = scale * sum(raw x) + bias * sum(x).
template <Basis>
struct Kind;
template <>
struct Kind<Basis::rademacher> {
  static constexpr int scale = -2, bias = 1;
};
template <>
struct Kind<Basis::uniform> {
  static constexpr int scale = 2, bias = -255;
};
template <>
struct Kind<Basis::gaussian> {
  static constexpr int scale = 1, bias = 0;
};

// a b + c in one instruction. A compiler that sees that b is not negative would take three.
__device__ __forceinline__ int64_t multiply_add(int32_t a, int32_t b, int64_t c) {
#if defined(__CUDA_ARCH__)
  asm("" : "+r"(b));
#endif
  return int64_t{a} * b + c;
}

// The exact sum over b from the sum over raw bits.
template <Basis basis>
__device__ __forceinline__ int64_t from_raw(int64_t raw_sum, int64_t sum) {
  return Kind<basis>::scale * raw_sum + Kind<basis>::bias * sum;
}

// The last i in [0, n) with key(i) <= value, for keys in ascending order from key(0) <= value.
template <class Key>
__device__ __forceinline__ int64_t find_last(int64_t n, int64_t value, Key key) {
  int64_t low = 0;
  for (int64_t high = n; high - low > 1;) {
    const int64_t middle = low + (high - low) / 2;
    (key(middle) <= value ? low : high) = middle;
  }
  return low;
}

// Positions [lo, hi) of a span of stream elements are the elements at + position of a tensor.
struct Run {
  int64_t tensor;
  int64_t at;
  int lo, hi;

  __device__ __forceinline__ bool has(int position) const {
    return static_cast<unsigned>(position - lo) < static_cast<unsigned>(hi - lo);
  }
};

// The runs of a span of a block, in ascending order. Most spans have one, of the piece that the span before had.
template <int length>
struct Runs {
  const Piece* pieces;
  BlockPieces block;
  int64_t begin = 0;
  int64_t at = 0;    // the piece of the first run
  int64_t left = 0;  // how many elements it has from `begin` on
  Run first = {};

  __device__ __forceinline__ Runs(const Piece* pieces, const BlockPieces& block) : pieces(pieces), block(block) {}

  // Goes to the span that starts at `start`.
  __device__ __forceinline__ void seek(uint64_t start) {
    const int64_t by = static_cast<int64_t>(start) - begin;
    begin += by;
    if (first.lo == 0 && first.hi == length && by >= 0 && by + length <= left) {
      first.at += by;
      left -= by;
      return;
    }
    at = block.first + find_last(block.last - block.first, begin,
                                 [&](int64_t i) { return i == 0 ? begin : pieces[block.first + i].offset; });
    if (at < block.last) first = run_of(at);
    left = at < block.last ? pieces[at].offset + pieces[at].length - begin : 0;
  }

  // Empty where the piece has none of the span's elements, as that before a gap.
  __device__ __forceinline__ Run run_of(int64_t p) const {
    const Piece piece = pieces[p];
    const int64_t lo = piece.offset - begin, hi = lo + piece.length;
    return {piece.tensor, piece.start - lo, static_cast<int>(clamp(lo, int64_t{0}, int64_t{length})),
            static_cast<int>(clamp(hi, int64_t{0}, int64_t{length}))};
  }

  template <class Visit>
  __device__ __forceinline__ void each(Visit visit) const {
    Run run = first;
    for (int64_t p = at; p < block.last;) {
      visit(run);
      if (run.hi == length || ++p == block.last) return;
      run = run_of(p);
    }
  }
};

// Calls visit(run) for every piece that owns elements of [start, start + length).
template <int length, class Visit>
__device__ __forceinline__ void for_each_run(const Piece* pieces, const BlockPieces& block, uint64_t start,
                                             Visit visit) {
  Runs<length> runs(pieces, block);
  runs.seek(start);
  runs.each(visit);
}

// A lane's share of a span: rows of consecutive elements, in ascending order, `step` apart.
template <int row_length, int step>
struct LanePlaces {
  static constexpr int row = row_length;
  int first;

  __device__ __forceinline__ int operator[](int i) const { return first + i / row * step + i % row; }
};

// A tensor's elements from `first` on. The address was read from a table, so only we know that it is one of global
// memory.
template <class T>
__device__ __forceinline__ T* elements_at(void* data, int64_t first) {
  T* at = static_cast<T*>(data) + first;
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(at));
#endif
  return at;
}

// Consecutive elements, of which one instruction reads or writes up to 16 bytes where they are aligned.
template <class T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Vector {
  T x[n];
};

template <class T, int n>
__device__ __forceinline__ bool is_aligned(const T* at) {
  return reinterpret_cast<uintptr_t>(at) % alignof(Vector<T, n>) == 0;
}

// Writes a vector in as few instructions as there are: the compiler takes an assignment apart into elements.
template <class T, int n>
__device__ __forceinline__ void write(const Vector<T, n>& vector, T* to) {
  constexpr int bytes = n * sizeof(T);
#if defined(__CUDA_ARCH__)
  if constexpr (bytes % 8 == 0) {
    uint32_t words[bytes / 4];
    memcpy(words, &vector, bytes);
    const size_t at = __cvta_generic_to_global(to);
    if constexpr (bytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < bytes / 4; i += 4) {
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at + 4 * i), "r"(words[i]), "r"(words[i + 1]),
                     "r"(words[i + 2]), "r"(words[i + 3])
                     : "memory");
      }
    } else {
      static_assert(bytes == 8);
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(words[0]), "r"(words[1]) : "memory");
    }
    return;
  }
#endif
  memcpy(to, &vector, bytes);
}

// Where a run has all of a lane's elements, as it has nearly everywhere, they are not asked for one by one.
template <int n, class Places>
__device__ __forceinline__ bool has_all(const Run& run, Places places) {
  return run.has(places[0]) && run.has(places[n - 1]);
}

template <class T, int n, int row, int step, class Real>
__device__ __forceinline__ void load_as(void* data, const Run& run, LanePlaces<row, step> places, Real (&x)[n]) {
  using Row = Vector<T, row>;
  static_assert(n % row == 0 && (row == n || step * sizeof(T) % alignof(Row) == 0));
  const T* from = elements_at<T>(data, run.at + places[0]);
  const bool all = has_all<n>(run, places);
  if (row > 1 && all && is_aligned<T, row>(from)) {
#pragma unroll
    for (int first = 0; first < n; first += row) {
      const auto vector = *reinterpret_cast<const Row*>(from + (places[first] - places[0]));
#pragma unroll
      for (int i = 0; i < row; ++i) x[first + i] = static_cast<Real>(to_float(vector.x[i]));
    }
  } else if (all) {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = static_cast<Real>(to_float(from[places[i] - places[0]]));
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (run.has(places[i])) x[i] = static_cast<Real>(to_float(from[places[i] - places[0]]));
    }
  }
}

// x[i] = the element at places[i], in the working precision, where the run has it.
template <int n, class Places, class Real>
__device__ __forceinline__ void load(const TensorRef& tensor, const Run& run, Places places, Real (&x)[n]) {
  switch (tensor.dtype) {
    case Dtype::float32: return load_as<float>(tensor.data, run, places, x);
    case Dtype::bfloat16: return load_as<bfloat16_t>(tensor.data, run, places, x);
    case Dtype::float16: return load_as<float16_t>(tensor.data, run, places, x);
    case Dtype::float64:  // makes the working precision float64
      if constexpr (std::is_same<Real, double>::value) return load_as<double>(tensor.data, run, places, x);
  }
}

template <class T, int n, int row, int step, class Real>
__device__ __forceinline__ void store_as(void* data, const Run& run, LanePlaces<row, step> places, const Real (&x)[n]) {
  T* to = elements_at<T>(data, run.at + places[0]);
  const bool all = has_all<n>(run, places);
  if (row > 1 && all && is_aligned<T, row>(to)) {
#pragma unroll
    for (int first = 0; first < n; first += row) {
      Vector<T, row> vector;
#pragma unroll
      for (int i = 0; i < row; ++i) store_rounded(x[first + i], &vector.x[i]);
      write(vector, to + (places[first] - places[0]));
    }
  } else if (all) {
#pragma unroll
    for (int i = 0; i < n; ++i) store_rounded(x[i], &to[places[i] - places[0]]);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (run.has(places[i])) store_rounded(x[i], &to[places[i] - places[0]]);
    }
  }
}

// The reverse of load, rounded once to the tensor's dtype.
template <int n, class Places, class Real>
__device__ __forceinline__ void store(const TensorRef& tensor, const Run& run, Places places, const Real (&x)[n]) {
  switch (tensor.dtype) {
    case Dtype::float32: return store_as<float>(tensor.data, run, places, x);
    case Dtype::bfloat16: return store_as<bfloat16_t>(tensor.data, run, places, x);
    case Dtype::float16: return store_as<float16_t>(tensor.data, run, places, x);
    case Dtype::float64:
      if constexpr (std::is_same<Real, double>::value) return store_as<double>(tensor.data, run, places, x);
  }
}

// std::numeric_limits as constants, since its functions belong to the host.
template <class Real>
struct Limits {
  static constexpr int max_exponent = std::numeric_limits<Real>::max_exponent;
  static constexpr Real largest = std::numeric_limits<Real>::max();
  static constexpr Real nan = std::numeric_limits<Real>::quiet_NaN();
};

// exponent_of as a number to take the maximum of: zero lies below all others, infinity and NaN above.
inline constexpr int kZeroExponent = std::numeric_limits<int>::min();

template <class Real>
__device__ __forceinline__ int exponent_or_zero(Real x) {
  return x == 0 ? kZeroExponent : exponent_of(std::fabs(x));
}

template <class Real>
__device__ __forceinline__ bool is_finite_exponent(int n) {
  return n <= Limits<Real>::max_exponent;
}

}  // namespace ferret::cuda

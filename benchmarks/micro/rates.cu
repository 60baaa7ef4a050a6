// What the GPU's pipes give at best, as lines of JSON: instructions that the kernels are made of, Philox, products of
// the integer matrix units, memory.
//
//   nvcc -O3 -std=c++17 -arch=native -I csrc benchmarks/micro/rates.cu -o rates && ./rates
//
// Every thread runs independent chains of one operation, unrolled, with operands that the compiler does not know; a
// result is stored under a condition that never holds. A rate is that of the median of some launches. "mixed" rates tell
// whether two pipes work side by side: a figure near the slower of the two alone says yes, near their harmonic sum no.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "core/stream.h"

namespace {

using ferret::Words;

constexpr int kThreads = 256, kCtasPerSm = 8;
constexpr int kLoops = 2048;  // of a thread, each with all its chains once

void check(cudaError_t code, const char* where) {
  if (code == cudaSuccess) return;
  std::fprintf(stderr, "rates: CUDA error %d (%s) in %s\n", code, cudaGetErrorString(code), where);
  std::exit(1);
}

struct Inputs {
  uint32_t a, b;  // not known to the compiler
  uint32_t* sink;
};

__device__ __forceinline__ void keep(const Inputs& in, uint32_t x) {
  if (x == 0x9E3779B9u && in.a == 0x12345678u) *in.sink = x;
}

// ---- one instruction; each operation turns a chain's value into its next ----

struct Lop3 {
  static constexpr const char* name = "LOP3";
  __device__ static uint32_t step(uint32_t x, uint32_t a, uint32_t b) {
    asm volatile("lop3.b32 %0, %0, %1, %2, 0x96;" : "+r"(x) : "r"(a), "r"(b));
    return x;
  }
};
struct Shift {
  static constexpr const char* name = "SHF";
  __device__ static uint32_t step(uint32_t x, uint32_t a, uint32_t b) {
    asm volatile("shf.l.wrap.b32 %0, %0, %1, %2;" : "+r"(x) : "r"(a), "r"(b));
    return x;
  }
};
struct Imad {
  static constexpr const char* name = "IMAD";
  __device__ static uint32_t step(uint32_t x, uint32_t a, uint32_t b) {
    asm volatile("mad.lo.u32 %0, %0, %1, %2;" : "+r"(x) : "r"(a), "r"(b));
    return x;
  }
};
struct ImadHigh {
  static constexpr const char* name = "IMAD.HI";
  __device__ static uint32_t step(uint32_t x, uint32_t a, uint32_t b) {
    asm volatile("mad.hi.u32 %0, %0, %1, %2;" : "+r"(x) : "r"(a), "r"(b));
    return x;
  }
};
struct ImadWide {
  static constexpr const char* name = "IMAD.WIDE";
  __device__ static uint64_t step(uint64_t x, uint32_t, uint32_t) {  // needs both halves, so neither is left out
    const auto low = static_cast<uint32_t>(x), high = static_cast<uint32_t>(x >> 32);
    asm volatile("mul.wide.u32 %0, %1, %2;" : "=l"(x) : "r"(low), "r"(high));
    return x;
  }
};
struct Popc {
  static constexpr const char* name = "POPC";
  __device__ static uint32_t step(uint32_t x, uint32_t, uint32_t) {
    asm volatile("popc.b32 %0, %0;" : "+r"(x));
    return x;
  }
};
struct Fma {
  static constexpr const char* name = "FFMA";
  __device__ static float step(float x, uint32_t a, uint32_t b) {
    asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(x) : "f"(__uint_as_float(a)), "f"(__uint_as_float(b)));
    return x;
  }
};
struct Dadd {
  static constexpr const char* name = "DADD";
  __device__ static double step(double x, uint32_t a, uint32_t) {
    asm volatile("add.rn.f64 %0, %0, %1;" : "+d"(x) : "d"(static_cast<double>(a)));
    return x;
  }
};
// Two of Philox's instructions side by side, in its proportion.
struct WideAndLop3 {
  static constexpr const char* name = "mixed: IMAD.WIDE and LOP3, one each";
  __device__ static uint64_t step(uint64_t x, uint32_t a, uint32_t b) {
    uint32_t low = static_cast<uint32_t>(x);
    asm volatile("lop3.b32 %0, %0, %1, %2, 0x96;" : "+r"(low) : "r"(static_cast<uint32_t>(x >> 32)), "r"(b));
    uint64_t product;
    asm volatile("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(low), "r"(a));
    return product;
  }
};

template <class Operation, class Value>
__global__ void __launch_bounds__(kThreads) chains_kernel(Inputs in) {
  constexpr int chains = 8;
  Value x[chains];
  // Other operands for every thread, else the uniform data path would do the work; the same ones in every round, because
  // making new ones would be timed too.
  const uint32_t own = in.a + threadIdx.x, other = in.b + 2 * threadIdx.x;
  for (int i = 0; i < chains; ++i) x[i] = static_cast<Value>(own + i) * static_cast<Value>(0x9E3779B97F4A7C15u);
#pragma unroll 32
  for (int loop = 0; loop < kLoops; ++loop) {
#pragma unroll
    for (int i = 0; i < chains; ++i) x[i] = Operation::step(x[i], own + i, other);
  }
  uint32_t all = 0;
  for (int i = 0; i < chains; ++i) all ^= static_cast<uint32_t>(x[i]) ^ static_cast<uint32_t>(uint64_t(x[i]) >> 32);
  keep(in, all);
}

// ---- Philox, as the kernels call it ----

template <int columns>
__global__ void __launch_bounds__(kThreads) philox_kernel(Inputs in) {
  uint32_t all = 0;
  const uint64_t seed = (uint64_t{in.a} << 32) | in.b;
  for (int loop = 0; loop < kLoops / 16; ++loop) {
#pragma unroll
    for (int i = 0; i < columns; ++i) {
      const Words words = ferret::stream_words(seed, ferret::Basis::rademacher, loop, in.b + columns * threadIdx.x + i);
      all ^= words.w[0] ^ words.w[1] ^ words.w[2] ^ words.w[3];
    }
  }
  keep(in, all);
}

// ---- matrix units ----

__device__ __forceinline__ void mma_int8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bits(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

enum class Unit { int8, bits };

template <Unit unit>
__device__ __forceinline__ void product(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  unit == Unit::int8 ? mma_int8(d, a, b0, b1) : mma_bits(d, a, b0, b1);
}

template <Unit unit>
__global__ void __launch_bounds__(kThreads) mma_kernel(Inputs in) {
  constexpr int chains = 4;
  int32_t d[chains][4] = {};
  const uint32_t a[4] = {in.a, in.b, in.a + threadIdx.x, in.b + threadIdx.x};
  for (int loop = 0; loop < kLoops / 4; ++loop) {
#pragma unroll
    for (int i = 0; i < chains; ++i) product<unit>(d[i], a, in.b, in.a);
  }
  uint32_t all = 0;
  for (int i = 0; i < chains; ++i) all ^= d[i][0] ^ d[i][1] ^ d[i][2] ^ d[i][3];
  keep(in, all);
}

// The random numbers of a product and the product. int8: one call a thread serves eight products, one a bit of the
// words' bytes; bits: one call is one A fragment.
template <Unit unit>
__global__ void __launch_bounds__(kThreads) philox_mma_kernel(Inputs in) {
  int32_t d[2][4] = {};
  const uint64_t seed = (uint64_t{in.a} << 32) | in.b;
  for (int loop = 0; loop < kLoops / 32; ++loop) {
    const Words words = ferret::stream_words(seed, ferret::Basis::rademacher, loop, in.b + threadIdx.x);
    if constexpr (unit == Unit::bits) {
#pragma unroll
      for (int plane = 0; plane < 3; ++plane) product<unit>(d[plane % 2], words.w, in.a + plane, in.b + loop);
    } else {
#pragma unroll
      for (int bit = 0; bit < 8; ++bit) {
        const uint32_t mask = 0x01010101u << bit;
        const uint32_t a[4] = {words.w[0] & mask, words.w[1] & mask, words.w[2] & mask, words.w[3] & mask};
        product<unit>(d[bit % 2], a, in.a + bit, in.b + loop);
      }
    }
  }
  uint32_t all = 0;
  for (int i = 0; i < 2; ++i) all ^= d[i][0] ^ d[i][1] ^ d[i][2] ^ d[i][3];
  keep(in, all);
}

// ---- memory ----

struct Arrays {
  const uint4* from;
  uint4* to;
  size_t count;
  Inputs in;
};

template <bool writes>
__global__ void __launch_bounds__(kThreads) stream_kernel(Arrays arrays) {
  constexpr int ahead = 4;
  uint32_t all = 0;
  const size_t stride = size_t{gridDim.x} * kThreads;
  for (size_t i = size_t{blockIdx.x} * kThreads + threadIdx.x; i < arrays.count; i += ahead * stride) {
    uint4 x[ahead];
#pragma unroll
    for (int j = 0; j < ahead; ++j) x[j] = i + j * stride < arrays.count ? arrays.from[i + j * stride] : uint4{};
#pragma unroll
    for (int j = 0; j < ahead; ++j) {
      if constexpr (writes) {
        if (i + j * stride < arrays.count) arrays.to[i + j * stride] = x[j];
      } else {
        all ^= x[j].x ^ x[j].y ^ x[j].z ^ x[j].w;
      }
    }
  }
  if constexpr (!writes) keep(arrays.in, all);
}

// ---- host ----

struct Bench {
  int multiprocessors = 0;
  Inputs inputs = {};
  cudaEvent_t begin, end;

  Bench() {
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0), "the device's attributes");
    check(cudaMalloc(&inputs.sink, sizeof(uint32_t)), "cudaMalloc");
    inputs.a = 0x85EBCA6Bu, inputs.b = 0xC2B2AE35u;
    check(cudaEventCreate(&begin), "cudaEventCreate"), check(cudaEventCreate(&end), "cudaEventCreate");
  }

  int ctas() const { return multiprocessors * kCtasPerSm; }
  double threads() const { return static_cast<double>(ctas()) * kThreads; }

  // `work` units a launch; a line of JSON.
  template <class Params>
  void run(const char* name, const char* unit, double work, void (*kernel)(Params), Params params) {
    std::vector<double> seconds;
    for (int i = 0; i < 9; ++i) {
      check(cudaEventRecord(begin), "cudaEventRecord");
      kernel<<<ctas(), kThreads>>>(params);
      check(cudaGetLastError(), name);
      check(cudaEventRecord(end), "cudaEventRecord");
      check(cudaEventSynchronize(end), name);
      float milliseconds;
      check(cudaEventElapsedTime(&milliseconds, begin, end), name);
      if (i >= 2) seconds.push_back(milliseconds * 1e-3);  // the first two warm up
    }
    std::sort(seconds.begin(), seconds.end());
    std::printf("{\"name\": \"%s\", \"unit\": \"%s\", \"per_second\": %.4e, \"slowest\": %.4e, \"fastest\": %.4e}\n",
                name, unit, work / seconds[seconds.size() / 2], work / seconds.back(), work / seconds.front());
    std::fflush(stdout);
  }

  template <class Operation, class Value = uint32_t>
  void chains(double per_step = 1) {
    run(Operation::name, "thread instructions", threads() * kLoops * 8.0 * per_step, chains_kernel<Operation, Value>,
        inputs);
  }
};

void memory(Bench& bench) {
  Arrays arrays = {nullptr, nullptr, size_t{1} << 27, bench.inputs};  // 2 GiB each
  void *from, *to;
  if (cudaMalloc(&from, arrays.count * sizeof(uint4)) != cudaSuccess ||
      cudaMalloc(&to, arrays.count * sizeof(uint4)) != cudaSuccess) {
    std::fprintf(stderr, "rates: no memory for the copy\n");
    return;
  }
  check(cudaMemset(from, 0x5A, arrays.count * sizeof(uint4)), "cudaMemset");
  arrays.from = static_cast<const uint4*>(from), arrays.to = static_cast<uint4*>(to);
  const double bytes = static_cast<double>(arrays.count) * sizeof(uint4);
  bench.run("copy", "bytes read and written", 2 * bytes, stream_kernel<true>, arrays);
  bench.run("read", "bytes", bytes, stream_kernel<false>, arrays);
}

}  // namespace

int main() {
  Bench bench;
  memory(bench);
  bench.chains<Lop3>();
  bench.chains<Shift>();
  bench.chains<Imad>();
  bench.chains<ImadHigh>();
  bench.chains<ImadWide, uint64_t>();
  bench.chains<Popc>();
  bench.chains<Fma, float>();
  bench.chains<Dadd, double>();
  bench.chains<WideAndLop3, uint64_t>(2);
  const double calls = bench.threads() * (kLoops / 16);
  bench.run("Philox, 1 call at a time", "words", 4 * calls, philox_kernel<1>, bench.inputs);
  bench.run("Philox, 2 calls", "words", 4 * 2 * calls, philox_kernel<2>, bench.inputs);
  bench.run("Philox, 4 calls", "words", 4 * 4 * calls, philox_kernel<4>, bench.inputs);
  const double products = bench.threads() / 32 * (kLoops / 4) * 4;
  bench.run("int8 mma m16n8k32", "multiply-adds", products * 16 * 8 * 32, mma_kernel<Unit::int8>, bench.inputs);
  bench.run("1-bit mma m16n8k256", "multiply-adds", products * 16 * 8 * 256, mma_kernel<Unit::bits>, bench.inputs);
  const double elements = bench.threads() * (kLoops / 32) * 128;
  bench.run("mixed: Philox, masks and 8 int8 mma", "basis elements", elements, philox_mma_kernel<Unit::int8>,
            bench.inputs);
  bench.run("mixed: Philox and 3 1-bit mma", "basis elements", elements, philox_mma_kernel<Unit::bits>, bench.inputs);
  return 0;
}

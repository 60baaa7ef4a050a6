// A tiny CUDA for tests: just enough to compile the kernels as C++ and run them on the host, bit for bit.
//
// The threads of a CTA are fibres that switch at barriers and warp collectives; CTAs run one after another, so
// __shared__ variables are statics. A warp runs as far as it can before the next one does, and `reversed` runs threads,
// warps and CTAs in the opposite order: a result that changes with it has a race. A barrier that not all threads reach
// ends the program.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, gridDim;

template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}

namespace emulator {

inline bool reversed = false;
constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;

enum class State { running, at_warp_barrier, at_cta_barrier, done };

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  State state;
  int64_t exchange;  // what the thread brings to a warp collective
};

class Cta {
 public:
  void run(unsigned threads, const std::function<void()>& body) {
    body_ = &body;
    while (fibres_.size() < threads) fibres_.emplace_back();
    fibres_.resize(threads);
    for (Fibre& fibre : fibres_) start(fibre);
    const unsigned warps = threads / kWarp;
    do {
      for (unsigned i = 0; i < warps; ++i) run_warp((reversed ? warps - 1 - i : i) * kWarp);
    } while (release_cta());
  }

  void wait(State barrier) {
    fibres_[current_].state = barrier;
    switch_fibre(&fibres_[current_].context, &scheduler_, nullptr, 0);
  }

  // All lanes bring a value; use(of_lane) may look at all of them.
  template <class Use>
  void share(int64_t value, Use use) {
    const unsigned first = current_ / kWarp * kWarp;
    fibres_[current_].exchange = value;
    wait(State::at_warp_barrier);
    use([&](unsigned lane) { return fibres_[first + lane].exchange; });
    wait(State::at_warp_barrier);
  }

  // Each lane gets the fold of all values.
  template <class Fold>
  int64_t collect(int64_t value, Fold fold) {
    int64_t result = 0;
    share(value, [&](auto of_lane) {
      result = of_lane(0);
      for (unsigned lane = 1; lane < kWarp; ++lane) result = fold(result, of_lane(lane));
    });
    return result;
  }

 private:
  static void enter();

  static void switch_fibre(ucontext_t* from, ucontext_t* to, [[maybe_unused]] const void* stack,
                           [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    static const void* main_stack = nullptr;
    static size_t main_bytes = 0;
    const bool to_main = stack == nullptr;
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, to_main ? main_stack : stack, to_main ? main_bytes : bytes);
    swapcontext(from, to);
    const void* left;
    size_t left_bytes;
    __sanitizer_finish_switch_fiber(fake, &left, &left_bytes);
    if (to_main) main_stack = left, main_bytes = left_bytes;
#else
    swapcontext(from, to);
#endif
  }

  void start(Fibre& fibre) {
    fibre.state = State::running;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = fibre.stack.size();
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, enter, 0);
  }

  void resume(unsigned i) {
    if (fibres_[i].state != State::running) return;
    current_ = i;
    threadIdx = dim3(i, 0, 0);
    switch_fibre(&scheduler_, &fibres_[i].context, fibres_[i].stack.data(), kStackBytes);
  }

  bool release(size_t begin, size_t end, State barrier) {
    for (size_t i = begin; i < end; ++i) {
      if (fibres_[i].state != barrier) return false;
    }
    for (size_t i = begin; i < end; ++i) fibres_[i].state = State::running;
    return true;
  }

  void run_warp(unsigned first) {
    do {
      for (unsigned i = 0; i < kWarp; ++i) resume(first + (reversed ? kWarp - 1 - i : i));
    } while (release(first, first + kWarp, State::at_warp_barrier));
  }

  // False when all threads are done.
  bool release_cta() {
    if (release(0, fibres_.size(), State::at_cta_barrier)) return true;
    for (const Fibre& fibre : fibres_) {
      if (fibre.state == State::done) continue;
      std::fprintf(stderr, "emulator: not all threads reach a barrier\n");
      std::abort();
    }
    return false;
  }

  std::vector<Fibre> fibres_;
  ucontext_t scheduler_;
  const std::function<void()>* body_ = nullptr;
  unsigned current_ = 0;
};

inline Cta cta;

inline void Cta::enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  (*cta.body_)();
  cta.wait(State::done);
}

}  // namespace emulator

inline void __syncthreads() { emulator::cta.wait(emulator::State::at_cta_barrier); }
inline void __syncwarp() { emulator::cta.wait(emulator::State::at_warp_barrier); }

inline int __reduce_max_sync(unsigned, int value) {
  return static_cast<int>(emulator::cta.collect(value, [](int64_t a, int64_t b) { return max(a, b); }));
}
inline int __reduce_add_sync(unsigned, int value) {
  return static_cast<int>(emulator::cta.collect(value, [](int64_t a, int64_t b) { return a + b; }));
}

inline int __shfl_xor_sync(unsigned, int value, unsigned mask) {
  const unsigned from = (threadIdx.x % emulator::kWarp) ^ mask;
  int result = 0;
  emulator::cta.share(value, [&](auto of_lane) { result = static_cast<int>(of_lane(from)); });
  return result;
}

// Byte i of the result is the byte of `b:a` that digit i of the selector names.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = (uint64_t{b} << 32) | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>((bytes >> (8 * (selector >> (4 * i) & 7))) & 255) << (8 * i);
  return result;
}

// D += A B, u8 times s8, lane by lane as the fragments lie (PTX ISA, "Matrix fragments for mma.m16n8k32").
struct MmaFragments {
  uint32_t a[4], b[2];

  // A[row, k] and B[k, column] are in the lane of quad row % 8, or column, and of place k % 16 / 4.
  static unsigned lane_of(unsigned quad, unsigned k) { return 4 * (quad % 8) + k % 16 / 4; }
  int a_at(unsigned row, unsigned k) const { return static_cast<uint8_t>(a[row / 8 + 2 * (k / 16)] >> (8 * (k % 4))); }
  int b_at(unsigned k) const { return static_cast<int8_t>(b[k / 16] >> (8 * (k % 4))); }
};

inline void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaFragments own;
  std::memcpy(own.a, a, sizeof own.a), std::memcpy(own.b, b, sizeof own.b);
  const unsigned lane = threadIdx.x % emulator::kWarp, g = lane / 4, t = lane % 4;
  emulator::cta.share(reinterpret_cast<int64_t>(&own), [&](auto of_lane) {
    for (unsigned r = 0; r < 4; ++r) {
      const unsigned row = g + 8 * (r / 2), column = 2 * t + r % 2;
      for (unsigned k = 0; k < 32; ++k) {
        const auto* from_a = reinterpret_cast<const MmaFragments*>(of_lane(MmaFragments::lane_of(row, k)));
        const auto* from_b = reinterpret_cast<const MmaFragments*>(of_lane(MmaFragments::lane_of(column, k)));
        d[r] += from_a->a_at(row, k) * from_b->b_at(k);
      }
    }
  });
}

// Four matrices [8, 8] of 16 bits: the lane 8 i + r brings the address of row r of matrix i, and lane 4 g + t gets of each the
// column g of the rows 2 t and 2 t + 1 (PTX ISA, "ldmatrix", .trans).
inline void load_transposed(const void* row, uint32_t (&x)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    std::fprintf(stderr, "emulator: a row of ldmatrix is not aligned to 16 bytes\n");
    std::abort();
  }
  const unsigned lane = threadIdx.x % emulator::kWarp, g = lane / 4, t = lane % 4;
  emulator::cta.share(reinterpret_cast<int64_t>(row), [&](auto of_lane) {
    for (unsigned i = 0; i < 4; ++i) {
      const auto at = [&](unsigned r) { return uint32_t{reinterpret_cast<const uint16_t*>(of_lane(8 * i + r))[g]}; };
      x[i] = at(2 * t) | at(2 * t + 1) << 16;
    }
  });
}

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };

inline const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaSuccess ? "no error" : "invalid argument";
}

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments, size_t,
                             struct CUstream_st*) {
  gridDim = grid;
  for (unsigned i = 0; i < grid.x; ++i) {
    blockIdx = dim3(emulator::reversed ? grid.x - 1 - i : i, 0, 0);
    emulator::cta.run(block.x, [&] { kernel(*static_cast<Params*>(arguments[0])); });
  }
  return cudaSuccess;
}

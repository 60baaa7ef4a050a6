// Products of 8-bit integers on the matrix units, and integers as digits of 8 bits for them.
//
// Fragments are as in the PTX ISA, "Matrix fragments for mma.m16n8k32": with g = lane / 4 and t = lane % 4, register r of
// A [16, 32] holds row g + 8 (r % 2) and the four places k from 4 t + 16 (r / 2) on; register r of B [32, 8] the same
// places and column g; register r of D [16, 8] row g + 8 (r / 2) and column 2 t + r % 2.
#pragma once

#include "elements.cuh"

namespace ferret::cuda {

inline constexpr int kDigits = 4;  // of 8 bits

// On the host the emulator has both.
//   D += A B
//   x[i] = the columns g of rows 2 t and 2 t + 1 of matrix i, four of [8, 8] of 16 bits: lane 8 i + r says where its row r is
#if defined(__CUDACC__)
__device__ __forceinline__ void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void load_transposed(const void* row, uint32_t (&x)[4]) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(at)
               : "memory");
}
#endif

// v in signed digits of base 256, the lowest first, for |v| < 2^30: adding 128 to each makes them bytes without a sign.
__device__ __forceinline__ uint32_t signed_digits(int32_t v) {
  return (static_cast<uint32_t>(v) + 0x00808080u) ^ 0x00808080u;
}

// y[n] = byte n of x[0], x[1], x[2], x[3].
__device__ __forceinline__ void transpose_bytes(const uint32_t (&x)[4], uint32_t (&y)[4]) {
  const uint32_t low01 = __byte_perm(x[0], x[1], 0x5140), high01 = __byte_perm(x[0], x[1], 0x7362);
  const uint32_t low23 = __byte_perm(x[2], x[3], 0x5140), high23 = __byte_perm(x[2], x[3], 0x7362);
  y[0] = __byte_perm(low01, low23, 0x5410), y[1] = __byte_perm(low01, low23, 0x7632);
  y[2] = __byte_perm(high01, high23, 0x5410), y[3] = __byte_perm(high01, high23, 0x7632);
}

}  // namespace ferret::cuda

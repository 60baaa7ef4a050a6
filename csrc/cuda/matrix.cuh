// The inner part of project on the int8 matrix units: rademacher, float32, 16 columns at a time.
//
// A warp takes a tile of 512 elements. The four lanes of a quad make the tile's four Philox calls of a column, so that a
// lane's word is four bytes of eight bits each. A word under the mask 0x01010101 << i is four operands of 8 bits, each 0
// or 2^i: no shift is needed, because the integer q that bit i meets is taken as q 2^(7 - i), in four signed digits of
// 8 bits. So every product is 2^7 times what it stands for, and exact.
//
//   A[16, 32]  u8  bits: rows are columns k of the basis, row r the words of column r
//   B[32, 8]   s8  digits: column n < 4 is digit n of q 2^(7 - i); columns 4 to 7 are not used
//   D[16, 8]  s32  at most 2^21 in size: 64 elements of a tile have the same i, so 64 (1 + 2 + .. + 128) 128
//
// 16 products, two words and eight masks at a time, cover a tile. Fragments are as in the PTX ISA, "Matrix fragments for
// mma.m16n8k32": with g = lane / 4 and t = lane % 4, register r of A holds row g + 8 (r % 2) and the four places k from
// 4 t + 16 (r / 2) on; register r of B the same places and column g; register r of D row g + 8 (r / 2) and column
// 2 t + r % 2. A place k only says which bit meets which digit, so lane t's places are what its own words need.
#pragma once

#include "stage.cuh"

namespace ferret::cuda {

inline constexpr int kMatrixColumns = 16;                // rows of A
inline constexpr int kDigits = 4;                        // of 8 bits
inline constexpr int kPairDigits = 16 * kDigits + 16;    // 32-bit words of digits of two words, with padding
inline constexpr int kCallDigits = 2 * kPairDigits + 4;  // of the four words of a call
inline constexpr int kTileDigits = 4 * kCallDigits;      // of the four calls of a tile

// D += A B. On the host the emulator has it.
#if defined(__CUDACC__)
__device__ __forceinline__ void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Where a digit of the elements 32 word + 8 b + bit is, as the bytes b = 0 .. 3 of a 32-bit word. The two words of a
// product lie side by side, as its fragment of B has them; the padding lets lanes store and load without bank conflicts.
__device__ __forceinline__ int digits_at(int word, int digit, int bit) {
  return word / 4 * kCallDigits + word % 4 / 2 * kPairDigits + 16 * digit + 2 * bit + word % 2;
}

struct alignas(8) Fragment {
  uint32_t b[2];
};

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

struct MatrixStage {
  alignas(16) uint32_t digits[kWarps][kTileDigits];
  int32_t parts[2][kStage][2][kBatch];  // [turn][tile][digits 0 and 1, or 2 and 3][column]
  TileHeader<float> headers[2][kStage];
};

struct Matrix {
  using Stage = MatrixStage;
  static constexpr int calls = 1;  // a thread's share of a stage is not used

  // A warp's tile as digits and their sum. A lane has the elements of bit lane % 8 of every fourth word, from word
  // lane / 8 on.
  __device__ __forceinline__ static void quantise(const Deltas& deltas, const BlockPieces& pieces, uint64_t tile,
                                                  int lane, uint32_t* digits, TileHeader<float>& header) {
    float x[4][4];
    load_words(deltas, pieces, tile, lane, x);
    int size = kNoSize<float>;
#pragma unroll
    for (int i = 0; i < 16; ++i) size = max(size, size_of(x[i / 4][i % 4]));
    const int n = tile_exponent<float>(size);
    header.exponent = n;
    if (!header.has_integers()) return;

    int32_t sum = 0;
    const Scale<float> scale(kDeltaBits, n);
#pragma unroll
    for (int call = 0; call < 4; ++call) {
      uint32_t by_element[4], by_digit[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int32_t q = to_limbs(scale(x[call][b])).hi;
        sum += q;
        by_element[b] = signed_digits(q * (1 << (7 - lane % 8)));
      }
      transpose_bytes(by_element, by_digit);
#pragma unroll
      for (int digit = 0; digit < kDigits; ++digit) {
        digits[digits_at(4 * call + lane / 8, digit, lane % 8)] = by_digit[digit];
      }
    }
    header.sum[0] = __reduce_add_sync(kAllLanes, sum);
  }

  // x[call][b] = the element 128 call + 32 (lane / 8) + 8 b + lane % 8.
  __device__ __forceinline__ static void load_words(const Deltas& deltas, const BlockPieces& pieces, uint64_t tile,
                                                    int lane, float (&x)[4][4]) {
    for (int i = 0; i < 16; ++i) x[i / 4][i % 4] = 0;
    for_each_run(deltas.pieces, pieces, tile * kTile, kTile, [&](const Run& run) {
#pragma unroll
      for (int call = 0; call < 4; ++call) {
        const LanePlaces places = {128 * call + 32 * (lane / 8) + lane % 8, 8};
        if (deltas.before == nullptr) {
          load(deltas.now[run.tensor], run, places, x[call]);
        } else {
          float now[4] = {};
          load(deltas.before[run.tensor], run, places, x[call]);
          load(deltas.now[run.tensor], run, places, now);
#pragma unroll
          for (int b = 0; b < 4; ++b) x[call][b] -= now[b];
        }
      }
    });
  }

  // The sums of 16 columns over a tile: both columns' words are this lane's call of the tile.
  __device__ __forceinline__ static void multiply(const Words& words, const Words& words8, const Fragment (&b)[2][8],
                                                  int32_t (&d)[4]) {
    int32_t parts[2][4] = {};
#pragma unroll
    for (int bit = 0; bit < 8; ++bit) {
      const uint32_t mask = 0x01010101u << bit;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int word = 2 * half;
        const uint32_t a[4] = {words.w[word] & mask, words8.w[word] & mask, words.w[word + 1] & mask,
                               words8.w[word + 1] & mask};
        mma_m16n8k32(parts[half], a, b[half][bit].b);
      }
    }
    for (int i = 0; i < 4; ++i) d[i] = parts[0][i] + parts[1][i];
  }

  // A stage's raw sums of `columns` columns from `first_column` on; a warp makes those of its own tile.
  __device__ __forceinline__ static void sum(const Deltas& deltas, const RoundKeys& keys, const BlockPieces& pieces,
                                             uint64_t first_tile, uint32_t first_column, const Share& share, int turn,
                                             Stage& stage) {
    const int tid = static_cast<int>(threadIdx.x), warp = tid / kWarp, lane = tid % kWarp, g = lane / 4, t = lane % 4;
    const uint64_t tile = first_tile + warp;
    __syncwarp();  // digits of the stage before have been read
    quantise(deltas, pieces, tile, lane, stage.digits[warp], stage.headers[turn][warp]);
    __syncwarp();
    if (stage.headers[turn][warp].has_integers()) {
      Fragment b[2][8];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int bit = 0; bit < 8; ++bit) {
          const uint32_t* at = &stage.digits[warp][digits_at(4 * t + 2 * half, g % kDigits, bit)];
          b[half][bit] = *reinterpret_cast<const Fragment*>(at);
        }
      }
      int32_t* parts = stage.parts[turn][warp][t % 2];
#pragma unroll 1
      for (int first = 0; first < share.columns; first += kMatrixColumns) {
        const int column = first + g;
        int32_t d[4];
        multiply(stream_words(keys, Basis::rademacher, 4 * tile + t, first_column + column),
                 stream_words(keys, Basis::rademacher, 4 * tile + t, first_column + column + 8), b, d);
        if (t < 2) {
          parts[column] = d[0] + 256 * d[1];
          parts[column + 8] = d[2] + 256 * d[3];
        }
      }
    }
    __syncthreads();
  }

  // A tile's value for the thread's column.
  __device__ __forceinline__ static double value(const Stage& stage, int turn, int tile, const Share& share) {
    const TileHeader<float>& header = stage.headers[turn][tile];
    if (!header.has_integers()) return header.exponent == kZeroExponent ? 0.0 : Limits<double>::nan;
    const auto& parts = stage.parts[turn][tile];
    const int64_t raw = parts[0][share.column] + int64_t{parts[1][share.column]} * 65536;
    const int64_t sum = from_raw<Basis::rademacher>(raw >> 7, header.sum[0]);
    return static_cast<double>(sum) * power_of_two(header.exponent - kDeltaBits, double());
  }
};

}  // namespace ferret::cuda

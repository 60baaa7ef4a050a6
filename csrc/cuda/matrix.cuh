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
// 16 products, two words and eight masks at a time, cover a tile. A place k only says which bit meets which digit, so lane
// t's places are what its own words need (mma.cuh).
#pragma once

#include "mma.cuh"
#include "stage.cuh"

namespace ferret::cuda {

inline constexpr int kMatrixColumns = 16;                // rows of A
inline constexpr int kLeastMatrixColumns = 4;            // fewer are faster on the ordinary units
inline constexpr int kPairDigits = 16 * kDigits + 16;    // 32-bit words of digits of two words, with padding
inline constexpr int kCallDigits = 2 * kPairDigits + 4;  // of the four words of a call
inline constexpr int kTileDigits = 4 * kCallDigits;      // of the four calls of a tile

// Where a digit of the elements 32 word + 8 b + bit is, as the bytes b = 0 .. 3 of a 32-bit word. The two words of a
// product lie side by side, as its fragment of B has them; the padding lets lanes store and load without bank conflicts.
__device__ __forceinline__ int digits_at(int word, int digit, int bit) {
  return word / 4 * kCallDigits + word % 4 / 2 * kPairDigits + 16 * digit + 2 * bit + word % 2;
}

// A lane has the elements of bit lane % 8 of every fourth word, from word lane / 8 on: four words of four bytes.
struct WordPlaces {
  int first;

  __device__ __forceinline__ int operator[](int i) const { return first + 128 * (i / 4) + 8 * (i % 4); }
};

struct alignas(8) Fragment {
  uint32_t b[2];
};

struct MatrixStage {
  alignas(16) uint32_t digits[kWarps][kTileDigits];
  int32_t parts[2][kStage][2][kBatch];  // [turn][tile][digits 0 and 1, or 2 and 3][column]
  TileHeader<float> headers[2][kStage];
};

struct Matrix {
  using Stage = MatrixStage;
  static constexpr int calls = 1;  // a thread's share of a stage is not used

  // A warp's tile as digits and their sum.
  __device__ __forceinline__ static void quantise(const Deltas& deltas, const BlockPieces& pieces, uint64_t tile,
                                                  int lane, uint32_t* digits, TileHeader<float>& header) {
    float x[kPerLane];
    load_tile(deltas, pieces, tile, WordPlaces{32 * (lane / 8) + lane % 8}, x);
    int size = kNoSize<float>;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) size = max(size, size_of(x[i]));
    size = __reduce_max_sync(kAllLanes, size);
    const int n = tile_exponent(size, float());
    header.exponent = n;
    if (!header.has_integers()) return;

    const TileScale<float> scale(n, size, x);
    uint32_t sum = 0;
#pragma unroll
    for (int call = 0; call < 4; ++call) {
      uint32_t by_element[4], by_digit[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const auto raw = static_cast<uint32_t>(scale.raw(x[4 * call + b]));
        sum += raw;
        by_element[b] = shifted_digits(raw, lane);
      }
      transpose_bytes(by_element, by_digit);
#pragma unroll
      for (int digit = 0; digit < kDigits; ++digit) {
        digits[digits_at(4 * call + lane / 8, digit, lane % 8)] = by_digit[digit];
      }
    }
    sum -= kPerLane * static_cast<uint32_t>(scale.offset);
    header.sum[0] = __reduce_add_sync(kAllLanes, static_cast<int32_t>(sum));
  }

  // signed_digits(q 2^(7 - i)), i the lane's bit, where raw = q + offset: one multiply-add takes the offset away, too.
  __device__ __forceinline__ static uint32_t shifted_digits(uint32_t raw, int lane) {
    uint32_t factor = 1u << (7 - lane % 8), rest = 0x00808080u - TileScale<float>::offset * factor;
#if defined(__CUDA_ARCH__)
    asm("" : "+r"(factor), "+r"(rest));  // or it would be two or three instructions
#endif
    return (raw * factor + rest) ^ 0x00808080u;
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

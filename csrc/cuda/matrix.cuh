// The inner part of project on the int8 matrix units: rademacher, float32, 16 columns at a time.
//
// A warp takes a tile of 512 elements. The four lanes of a quad make the tile's four Philox calls of a column, so that a
// lane's word is four bytes of eight bits each. A word under the mask 0x01010101 << i is four operands of 8 bits, each 0
// or 2^i: no shift is needed, because the integer q that bit i meets is taken as q 2^(7 - i), in four signed digits of
// 8 bits. So every product is 2^7 times what it stands for, and exact.
//
//   A[16, 32]  u8  bits: rows are columns k of the basis, row r the words of column r
//   B[32, 8]   s8  digits: column n < 4 is digit n of q 2^(7 - i) for an even bit i, column n >= 4 digit n - 4 for bit i + 1
//   D[16, 8]   s32  two of them: one for the even bits, whose columns 0 to 3 count, one for the odd bits, whose columns 4 to
//              7 do. At most 2^21 in size: 64 elements of a tile have the same i, so 64 (1 + 2 + .. + 128) 128
//
// 16 products, two words and eight masks at a time, cover a tile. A place k only says which bit meets which digit, so lane
// t's places are what its own words need (mma.cuh).
#pragma once

#include "mma.cuh"
#include "stage.cuh"

namespace ferret::cuda {

inline constexpr int kMatrixColumns = 16;  // rows of A

// Digits in shared memory: a matrix for each word of a call and pair of bits, as load_transposed wants it. Row 2 call + h has
// the elements of the bytes 2 h and 2 h + 1 of the call's word, in a place of 16 bits a digit, bit 2 m before bit 2 m + 1.
// The padding lets lanes store and load without bank conflicts.
struct alignas(16) DigitRow {
  uint32_t v[4];
};

inline constexpr int kWordRows = 4 * 8 + 2, kTileRows = 4 * kWordRows;

__device__ __forceinline__ int digit_row(int word, int m, int row) { return word * kWordRows + 8 * m + row; }

// 2^(7 - bit), in memory lest the compiler should shift: a multiply-add leaves the pipe alone that has most to do.
__constant__ uint32_t bit_factors[8] = {128, 64, 32, 16, 8, 4, 2, 1};

struct MatrixStage {
  DigitRow digits[kWarps][kTileRows];
  int32_t parts[2][kStage][2][kBatch];  // [turn][tile][digits 0 and 1, or 2 and 3][column]
  TileHeader<float> headers[2][kStage];
};

struct Matrix {
  using Stage = MatrixStage;
  static constexpr int calls = 1;  // a thread's share of a stage is not used

  // A warp's tile as digits and their sum. Two lanes have the elements of a word, two bytes each.
  __device__ __forceinline__ static void quantise(const Deltas& deltas, const Runs<kTile>& runs, int lane,
                                                  DigitRow* digits, TileHeader<float>& header) {
    float x[kPerLane];
    load_tile(deltas, runs, LanePlaces<kPerLane, kPerLane>{kPerLane * lane}, x);
    const int size = __reduce_max_sync(kAllLanes, largest_size(x));
    const int n = tile_exponent(size, float());
    header.exponent = n;
    if (!header.has_integers()) return;

    const TileScale<float> scale(n, size, x);
    const int word = lane / 2, h = lane % 2;
    uint32_t sum = 0;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      DigitRow row;
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        uint32_t shifted[2];
#pragma unroll
        for (int byte = 0; byte < 2; ++byte) {
          const auto raw = static_cast<uint32_t>(scale.raw(x[8 * byte + 2 * m + odd]));
          sum += raw;
          shifted[byte] = shifted_digits(raw, 2 * m + odd);
        }
        row.v[2 * odd] = __byte_perm(shifted[0], shifted[1], 0x5140);  // digits 0 and 1 of both
        row.v[2 * odd + 1] = __byte_perm(shifted[0], shifted[1], 0x7362);
      }
      digits[digit_row(word % 4, m, 2 * (word / 4) + h)] = row;
    }
    sum -= kPerLane * static_cast<uint32_t>(scale.offset);
    header.sum[0] = __reduce_add_sync(kAllLanes, static_cast<int32_t>(sum));
  }

  // signed_digits(q 2^(7 - bit)) of raw = q + offset, whose offset the constant takes away.
  __device__ __forceinline__ static uint32_t shifted_digits(uint32_t raw, int bit) {
    constexpr auto offset = static_cast<uint32_t>(TileScale<float>::offset);
    return (raw * bit_factors[bit] + (0x00808080u - (offset << (7 - bit)))) ^ 0x00808080u;
  }

  // B for the words 2 half and 2 half + 1 and the bits 2 m and 2 m + 1.
  struct Fragments {
    uint32_t b[2][4][2];  // [half][m]

    __device__ __forceinline__ Fragments(const DigitRow* digits, int lane) {
      const int matrix = lane / 8, row = lane % 8;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int m = 0; m < 4; m += 2) {
          uint32_t four[4];
          load_transposed(&digits[digit_row(2 * half + matrix % 2, m + matrix / 2, row)], four);
          b[half][m][0] = four[0], b[half][m][1] = four[1], b[half][m + 1][0] = four[2], b[half][m + 1][1] = four[3];
        }
      }
    }
  };

  // The sums of 16 columns over a tile: both columns' words are this lane's call of the tile. Lane t of a quad gets digits
  // 2 (t % 2) and the next, as one number, of rows g and g + 8.
  __device__ __forceinline__ static void multiply(const Words& words, const Words& words8, const Fragments& fragments,
                                                  int lane, int32_t (&sums)[2]) {
    int32_t d[2][4] = {};  // [odd]
#pragma unroll
    for (int bit = 0; bit < 8; ++bit) {
      const uint32_t mask = 0x01010101u << bit;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int word = 2 * half;
        const uint32_t a[4] = {words.w[word] & mask, words8.w[word] & mask, words.w[word + 1] & mask,
                               words8.w[word + 1] & mask};
        mma_m16n8k32(d[bit % 2], a, fragments.b[half][bit / 2]);
      }
    }
    const bool odd = lane % 4 >= 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t low = odd ? d[1][2 * i] : d[0][2 * i], high = odd ? d[1][2 * i + 1] : d[0][2 * i + 1];
      const int32_t own = low + 256 * high;
      sums[i] = own + __shfl_xor_sync(kAllLanes, own, 2);
    }
  }

  // A stage's raw sums of `columns` columns from `first_column` on; a warp makes those of its own tile.
  __device__ __forceinline__ static void sum(const Deltas& deltas, const RoundKeys& keys, Runs<kTile>& runs,
                                             uint64_t first_tile, uint32_t first_column, const Share& share, int turn,
                                             Stage& stage) {
    const int tid = static_cast<int>(threadIdx.x), warp = tid / kWarp, lane = tid % kWarp, g = lane / 4, t = lane % 4;
    const uint64_t tile = first_tile + warp;
    runs.seek(tile * kTile);
    __syncwarp();  // digits of the stage before have been read
    quantise(deltas, runs, lane, stage.digits[warp], stage.headers[turn][warp]);
    __syncwarp();
    if (stage.headers[turn][warp].has_integers()) {
      const Fragments fragments(stage.digits[warp], lane);
      int32_t* parts = stage.parts[turn][warp][t % 2];
#pragma unroll 1
      for (int first = 0; first < share.columns; first += kMatrixColumns) {
        const int column = first + g;
        int32_t sums[2];
        multiply(stream_words(keys, Basis::rademacher, 4 * tile + t, first_column + column),
                 stream_words(keys, Basis::rademacher, 4 * tile + t, first_column + column + 8), fragments, lane, sums);
        if (t < 2) parts[column] = sums[0], parts[column + 8] = sums[1];
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

// The inner part of apply on the int8 matrix units: rademacher, float32, a group of columns at a time.
//
// Sums go over columns, so a product's operands of 8 bits must be bits of one element and several columns. A lane makes
// the Philox calls of four columns of one span, and takes byte n of their words w together: a word then holds the bits
// of eight elements, byte b those of column b. Under the mask 0x01010101 << i it is four operands, each 0 or 2^i, of the
// four columns and the element i of the eight. What comes out is 2^i times what it stands for, and exact.
//
//   A[16, 32]  u8  bits: row r = 4 w + n is element 8 r + i of a span; places are columns
//   B[32, 8]   s8  digits of coordinates: column n < 4 is digit n for the first span of a pair, n >= 4 digit n - 4 for
//                  the second; zero where A holds the other span
//   D[16, 8]  s32  2^i times a digit's sum over the group, at most 2^20 in size; one D for each i
//
// There are two shapes. With 64 columns a lane's span is lane / 16, and a pair of spans takes four products for each i; a
// warp has two such pairs, one after the other, since what a group's coordinates take is paid once for both. With up to 16
// columns in all a warp has eight spans, a lane's is lane / 4, and one product has both spans of a pair, the first in its
// places 0 to 15.
#pragma once

#include "apply_work.cuh"
#include "mma.cuh"

namespace ferret::cuda {

inline constexpr int kSpanBits = 7;
inline constexpr int kRows = 16;      // of a span: eight elements each
inline constexpr int kRowLength = 8;  // elements of a row

// The keys for four calls of a lane: the compiler is not to keep them from pass to pass, for which registers do not suffice,
// nor to count them up for each call, for which half of them do.
__device__ __forceinline__ RoundKeys keys_of_pass(uint64_t seed) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(seed));
#endif
  RoundKeys keys = round_keys(seed);
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) asm("" : "+r"(keys.k[round][0]));
#endif
  return keys;
}

struct alignas(16) Words4 {
  uint32_t v[4];
};

template <int columns>
struct MatrixSpans {
  static_assert(columns == kGroup || columns == 16);
  static constexpr bool few = columns < kGroup;
  static constexpr int quads = columns / 4;    // a lane makes the words of one
  static constexpr int spans = kWarp / quads;  // whose words a warp makes at a time
  static constexpr int passes = few ? 1 : 2;
  static constexpr int pairs = passes * spans / 2;              // of a warp
  static constexpr int item_shift = kSpanBits + (few ? 3 : 2);  // log2 of a warp's elements
  static_assert(2 * pairs << kSpanBits == 1 << item_shift);
  static constexpr int span_words = kRows * quads + quads;  // with padding, so that no two lanes meet in a bank

  struct Shared {
    alignas(16) uint32_t words[spans * span_words];  // [span][row][quad]
    alignas(16) uint32_t digits[kDigits][quads];
    Words4 indices[quads];                                        // of the columns of a group
    float closed[few ? 1 : pairs * kRowLength][few ? 1 : kWarp];  // by lane: of more than 64 groups those before
  };

  // Row `row` of a span; a lane's share of it starts at `quad`.
  __device__ __forceinline__ static const uint32_t* row_of(const Shared& shared, int span, int row, int quad) {
    return &shared.words[span * span_words + row * quads + quad];
  }

  // Puts down the columns of a group and the digits of their coordinates, four columns a lane, and returns the coordinates'
  // sum; columns from `count` on have the coordinate 0.
  __device__ __forceinline__ static int32_t put_columns(const int32_t* coordinates, const uint32_t* columns_of,
                                                        int count, int lane, Shared& shared) {
    int32_t sum = 0;
    if (lane < quads) {
      Words4 indices, by_digit;
      uint32_t digits[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        const int k = 4 * lane + b;
        const int32_t c = k < count ? coordinates[k] : 0;
        indices.v[b] = k < count ? columns_of[k] : 0;
        sum += c;
        digits[b] = signed_digits(c);
      }
      transpose_bytes(digits, by_digit.v);
      shared.indices[lane] = indices;
#pragma unroll
      for (int n = 0; n < kDigits; ++n) shared.digits[n][lane] = by_digit.v[n];
    }
    return __reduce_add_sync(kAllLanes, sum);
  }

  // The words of the next spans.
  __device__ __forceinline__ static void fill(const RoundKeys& keys, uint64_t first_span, int lane, Shared& shared) {
    const int quad = lane % quads, span = lane / quads;
    const Words4 indices = shared.indices[quad];
    uint32_t by_column[4][4];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const Words words = stream_words(keys, Basis::rademacher, first_span + span, indices.v[b]);
#pragma unroll
      for (int w = 0; w < 4; ++w) by_column[w][b] = words.w[w];
    }
    uint32_t* to = &shared.words[span * span_words + quad];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint32_t by_row[4];
      transpose_bytes(by_column[w], by_row);
#pragma unroll
      for (int n = 0; n < 4; ++n) to[(4 * w + n) * quads] = by_row[n];
    }
  }

  // With few columns sums have room for a factor of 8: bits 4 to 7 of a byte are moved to its lower half, and what comes
  // out is left as it is, 2^(i % 4) times the sum. Otherwise the factor of 2^i is taken out at once.
  __device__ __forceinline__ static uint32_t operands(uint32_t word, int i) {
    return few ? (i < 4 ? word : word >> 4) & (0x01010101u << i % 4) : word & (0x01010101u << i);
  }
  __device__ __forceinline__ static constexpr int shift_left(int i) { return few ? i % 4 : 0; }

  // D += A B for all eight elements of a row: upper are words of row g, lower of row g + 8.
  __device__ __forceinline__ static void multiply(uint32_t upper0, uint32_t lower0, uint32_t upper1, uint32_t lower1,
                                                  const uint32_t (&b)[2], int32_t (&d)[kRowLength][4]) {
#pragma unroll
    for (int i = 0; i < kRowLength; ++i) {
      const uint32_t a[4] = {operands(upper0, i), operands(lower0, i), operands(upper1, i), operands(lower1, i)};
      mma_m16n8k32(d[i], a, b);
    }
  }

  // All products of a pair of spans.
  __device__ __forceinline__ static void multiply_pair(const Shared& shared, int pair, int lane,
                                                       int32_t (&d)[kRowLength][4]) {
    const int g = lane / 4, t = lane % 4;
    if constexpr (columns == kGroup) {
#pragma unroll
      for (int span = 0; span < 2; ++span) {
        const auto upper = *reinterpret_cast<const Words4*>(row_of(shared, span, g, 4 * t));
        const auto lower = *reinterpret_cast<const Words4*>(row_of(shared, span, g + 8, 4 * t));
        auto digits = *reinterpret_cast<const Words4*>(&shared.digits[g % kDigits][4 * t]);
#pragma unroll
        for (int m = 0; m < 4; ++m) digits.v[m] = g / kDigits == span ? digits.v[m] : 0;
#pragma unroll
        for (int m = 0; m < 4; m += 2) {
          const uint32_t b[2] = {digits.v[m], digits.v[m + 1]};
          multiply(upper.v[m], lower.v[m], upper.v[m + 1], lower.v[m + 1], b, d);
        }
      }
    } else {
      const uint32_t digits = shared.digits[g % kDigits][t];
      const uint32_t b[2] = {g < kDigits ? digits : 0, g < kDigits ? 0 : digits};
      const int first = 2 * pair, second = first + 1;
      multiply(*row_of(shared, first, g, t), *row_of(shared, first, g + 8, t), *row_of(shared, second, g, t),
               *row_of(shared, second, g + 8, t), b, d);
    }
  }

  // G 2^shift_left(i) of the lane's row of the pair. Lanes t = 0 and 1 hold digits 0, 1 and 2, 3 of the first span's sums,
  // 2 and 3 those of the second span; of rows g and g + 8 each puts one together.
  __device__ __forceinline__ static void join_digits(const int32_t (&d)[kRowLength][4], int32_t sum, int lane,
                                                     float (&group)[kRowLength]) {
    const bool high = lane % 2 == 1;
    const uint32_t own = high ? 65536 : 1, other = high ? 1 : 65536;
#pragma unroll
    for (int i = 0; i < kRowLength; ++i) {
      const int right = few ? 0 : i;
      const int32_t upper = (d[i][0] + 256 * d[i][1]) >> right, lower = (d[i][2] + 256 * d[i][3]) >> right;
      const auto theirs = static_cast<uint32_t>(__shfl_xor_sync(kAllLanes, high ? upper : lower, 1));
      const uint32_t raw = static_cast<uint32_t>(high ? lower : upper) * own + theirs * other;
      group[i] = static_cast<float>(static_cast<int32_t>((static_cast<uint32_t>(sum) << shift_left(i)) - 2 * raw));
    }
  }

  // Where the lane's rows are, one a pair, from the first span of the warp on.
  using Places = LanePlaces<kRowLength, 2 << kSpanBits>;
  static constexpr int owned = pairs * kRowLength;

  __device__ __forceinline__ static Places places_of(int lane) {
    const int g = lane / 4, t = lane % 4;
    return {((t / 2) << kSpanBits) + kRowLength * (g + 8 * (t % 2))};
  }

  // Words, products and sums of one group of one update: use(pair, G).
  template <class Use>
  __device__ __forceinline__ static void sum_group(const Integers<float>& integers, uint64_t seed, uint64_t first_span,
                                                   int64_t g, int64_t count, int lane, Shared& shared, Use use) {
    const int64_t first = g * columns;
    const int32_t here = static_cast<int32_t>(min(count - first, int64_t{columns}));
    __syncwarp();  // the group before has been read
    const int32_t sum = put_columns(integers.limbs[0] + first, integers.columns + first, here, lane, shared);
#pragma unroll
    for (int pass = 0; pass < passes; ++pass) {
      __syncwarp();
      fill(keys_of_pass(seed), first_span + pass * spans, lane, shared);
      __syncwarp();
#pragma unroll
      for (int pair = 0; pair < spans / 2; ++pair) {
        int32_t d[kRowLength][4] = {};
        float group[kRowLength];
        multiply_pair(shared, pair, lane, d);
        join_digits(d, sum, lane, group);
        use(pass * (spans / 2) + pair, group);
      }
    }
  }

  // Folds the groups summed since the last call into those before, which only this lane reads; `sum` is 0 again, or with
  // `last` the sum of all. Registers do not suffice for sums that few blocks have.
  __device__ __forceinline__ static void close(float (&sum)[owned], bool first, int lane, Shared& shared,
                                               bool last = false) {
#pragma unroll
    for (int i = 0; i < owned; ++i) {
      float& before = shared.closed[i][lane];
      const float all = first ? sum[i] : before + sum[i];
      if (!last) before = all;
      sum[i] = last ? all : 0;
    }
  }

  // H of the lane's rows, for one update. Up to 64 groups need no fold.
  __device__ __forceinline__ static void sum_update(const ApplyParams& p, const ApplyBlock& block, int64_t update,
                                                    uint64_t first_span, int lane, Shared& shared,
                                                    float (&sum)[owned]) {
    const Integers<float> integers(p, block, update);
    const uint64_t seed = p.updates[update].seed;
    const int64_t count = block.block.columns;
    if constexpr (few) {
      float scales[4];
      for (int i = 0; i < 4; ++i) scales[i] = integers.scales[0] * (1.0f / static_cast<float>(1 << i));
      sum_group(integers, seed, first_span, 0, count, lane, shared, [&](int pair, const auto& group) {
#pragma unroll
        for (int i = 0; i < kRowLength; ++i) sum[pair * kRowLength + i] = group[i] * scales[shift_left(i)];
      });
    } else {
#pragma unroll
      for (int i = 0; i < owned; ++i) sum[i] = 0;
#pragma unroll 1
      for (int64_t g = 0; g * columns < count; ++g) {
        if (g > 0 && g % kFoldRadix == 0) close(sum, g == kFoldRadix, lane, shared);
        sum_group(integers, seed, first_span, g, count, lane, shared, [&](int pair, const auto& group) {
#pragma unroll
          for (int i = 0; i < kRowLength; ++i) {
            float& at = sum[pair * kRowLength + i];
            at = fused_multiply_add(group[i], integers.scales[g], at);
          }
        });
      }
      if (count > kFoldRadix * columns) close(sum, false, lane, shared, true);
    }
  }

  __device__ __forceinline__ static void apply(const ApplyParams& p, int64_t item, int lane, Shared& shared) {
    const ApplyBlock& block = p.block_of(item);
    const uint64_t first_span = (block.first_group_of_spans + (item - block.first_item)) * (passes * spans);
    const Places places = places_of(lane);
    float x[owned] = {}, total[owned] = {};
    for (int64_t update = 0; update < p.num_updates; ++update) {
      float sum[owned];
      sum_update(p, block, update, first_span, lane, shared, sum);
      add_update(p, block, update, sum, total);
    }
    // Not from first_span, which would lie in a register meanwhile.
    const uint64_t start = (block.first_group_of_spans + (item - block.first_item)) << item_shift;
    Runs<1 << item_shift> runs(p.pieces, block.pieces);
    runs.seek(start);
    if (!p.overwrite) {
      runs.each([&](const Run& run) { load(p.params[run.tensor], run, places, x); });
    }
    add_total(p, block, total, x);
    if (p.rounding.stochastic) {
      runs.each([&](const Run& run) { round_by_chance(p, start, run, places, x); });
    }
    runs.each([&](const Run& run) { store(p.params[run.tensor], run, places, x); });
  }
};

}  // namespace ferret::cuda

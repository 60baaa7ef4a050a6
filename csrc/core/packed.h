// Coordinates in a few bits each (docs/streams.md, "Packed coordinates"): how codes stand in bytes, and what they mean.
#pragma once

#include "block_plan.h"

namespace ferret {

struct Packing {
  int32_t bits;    // of a level, which is one of the 2^bits odd numbers around 0
  int32_t choice;  // a coordinate belongs to one of 2^choice columns, and its code says which

  FERRET_HD int width() const { return bits + choice; }
  FERRET_HD int64_t bytes(int64_t codes) const { return (codes * width() + 7) / 8; }
  FERRET_HD int largest_level() const { return (1 << bits) - 1; }
};

inline constexpr int kMaxLevelBits = 8;
inline constexpr int kMaxChoice = 16;  // a code of at most 24 bits touches 4 bytes

FERRET_HD uint32_t read_code(const uint8_t* codes, Packing packing, int64_t index) {
  const int64_t first = index * packing.width(), last = first + packing.width() - 1;
  uint32_t bytes = 0;
  for (int64_t at = last / 8; at >= first / 8; --at) bytes = bytes << 8 | codes[at];
  return bytes >> (first % 8) & ((1u << packing.width()) - 1);
}

FERRET_HD int level_of(uint32_t code, Packing packing) {
  return 2 * static_cast<int>(code & ((1u << packing.bits) - 1)) - packing.largest_level();
}

// The coordinates of one update and block, as floats or packed.
template <class Real>
struct Gammas {
  const Real* values = nullptr;    // [K_l], or null:
  const uint8_t* codes = nullptr;  // of the whole update; the block's begin with code number `start`
  int64_t start = 0;
  float scale = 0;
  Packing packing = {};

  FERRET_HD Real value(int64_t k) const {
    if (values != nullptr) return values[k];
    return static_cast<Real>(scale * static_cast<float>(level_of(read_code(codes, packing, start + k), packing)));
  }
  // The column of the basis that coordinate k belongs to.
  FERRET_HD uint32_t column(int64_t k) const {
    if (values != nullptr) return static_cast<uint32_t>(k);
    const uint32_t candidate = read_code(codes, packing, start + k) >> packing.bits;
    return static_cast<uint32_t>(k) << packing.choice | candidate;
  }
};

// What a job has of N updates to L blocks, K coordinates each.
struct AllGammas {
  const void* values = nullptr;    // [N, K] working precision, or null:
  const uint8_t* codes = nullptr;  // [N, bytes]
  const float* scales = nullptr;   // [N, L]
  Packing packing = {};

  template <class Real>
  FERRET_HD Gammas<Real> of(int64_t update, int64_t total, int64_t block, int64_t num_blocks, int64_t start) const {
    if (values != nullptr) return {static_cast<const Real*>(values) + update * total + start};
    return {nullptr, codes + update * packing.bytes(total), start, scales[update * num_blocks + block], packing};
  }
};

}  // namespace ferret

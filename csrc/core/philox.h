// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include <cstdint>

// Always inlined: the same header is compiled for several instruction sets, and the linker must not merge their copies.
#if defined(__CUDACC__)
#define FERRET_HD __host__ __device__ __forceinline__
#else
#define FERRET_HD inline __attribute__((always_inline))
#endif

namespace ferret {

inline constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u;
inline constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
inline constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
inline constexpr int kPhiloxRounds = 10;

struct Words {
  uint32_t w[4];
};

// The key of every round, for kernels that make many calls under one seed.
struct RoundKeys {
  uint32_t k[kPhiloxRounds][2];
};

FERRET_HD RoundKeys round_keys(uint64_t seed) {
  RoundKeys keys;
  for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
    keys.k[round][0] = static_cast<uint32_t>(seed) + round * kPhiloxWeyl0;
    keys.k[round][1] = static_cast<uint32_t>(seed >> 32) + round * kPhiloxWeyl1;
  }
  return keys;
}

FERRET_HD Words philox_round(Words ctr, uint32_t key0, uint32_t key1) {
  const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * ctr.w[0];
  const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * ctr.w[2];
  return {{static_cast<uint32_t>(product1 >> 32) ^ ctr.w[1] ^ key0, static_cast<uint32_t>(product1),
           static_cast<uint32_t>(product0 >> 32) ^ ctr.w[3] ^ key1, static_cast<uint32_t>(product0)}};
}

FERRET_HD Words philox4x32_10(Words ctr, const RoundKeys& keys) {
  for (int round = 0; round < kPhiloxRounds; ++round) ctr = philox_round(ctr, keys.k[round][0], keys.k[round][1]);
  return ctr;
}

FERRET_HD Words philox4x32_10(Words ctr, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    ctr = philox_round(ctr, key0, key1);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return ctr;
}

}  // namespace ferret

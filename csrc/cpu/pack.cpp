// Floats -> codes and scales, and back (docs/streams.md, "Packed coordinates"). There are few coordinates, so plain loops do.
#include <cmath>

#include "dispatch.h"

namespace ferret::cpu {
namespace {

constexpr int64_t kCodesAtOnce = 8;  // fill whole bytes, whatever their width

// What a level is worth, as a share of the coordinates' root mean square: the step at which a uniform quantiser of a normal
// variable loses least.
double step_of(int bits) { return bits == 8 ? 0.030762 : bits == 4 ? 0.335201 : 0.995687; }

struct Chosen {
  uint32_t candidate;
  float gamma;
};

// The first of the largest magnitudes.
Chosen choose(const float* candidates, uint32_t count) {
  uint32_t best = 0;
  for (uint32_t i = 1; i < count; ++i) {
    if (std::abs(candidates[i]) > std::abs(candidates[best])) best = i;
  }
  return {best, candidates[best]};
}

uint32_t code_of(Chosen chosen, double step, Packing packing) {
  const double middle = packing.largest_level() / 2 + 1;
  const double place = step > 0 ? std::floor(chosen.gamma / step) + middle : middle;
  const auto level = static_cast<uint32_t>(clamp<double>(place, 0, packing.largest_level()));
  return chosen.candidate << packing.bits | level;
}

// The scale keeps the inner product of the coordinates with what is read back: sum gamma^2 over all candidates.
float pack_block(const float* gammas, int64_t count, Packing packing, uint32_t* codes) {
  const uint32_t candidates = 1u << packing.choice;
  double squares = 0, product = 0;
  for (int64_t i = 0; i < count * candidates; ++i) squares += static_cast<double>(gammas[i]) * gammas[i];
  const double step = step_of(packing.bits) * std::sqrt(squares / static_cast<double>(count * candidates));
  for (int64_t k = 0; k < count; ++k) {
    const Chosen chosen = choose(gammas + k * candidates, candidates);
    codes[k] = code_of(chosen, step, packing);
    product += static_cast<double>(level_of(codes[k], packing)) * chosen.gamma;
  }
  return product > 0 ? static_cast<float>(squares / product) : 0.0f;
}

void write_codes(const uint32_t* codes, int64_t first, int64_t last, Packing packing, uint8_t* bytes) {
  uint64_t waiting = 0;
  int bits = 0;
  uint8_t* to = bytes + first / 8 * packing.width();
  for (int64_t k = first; k < last; ++k) {
    waiting |= static_cast<uint64_t>(codes[k]) << bits;
    for (bits += packing.width(); bits >= 8; bits -= 8, waiting >>= 8) *to++ = static_cast<uint8_t>(waiting);
  }
  if (bits > 0) *to = static_cast<uint8_t>(waiting);
}

}  // namespace

void pack(const PackJob& job, const Threads& threads) {
  std::vector<uint32_t> codes(job.total);
  for_each_task(threads, job.num_blocks, [&](int64_t b) {
    const Block& block = job.blocks[b];
    const float* gammas = job.gammas + (block.start << job.packing.choice);
    job.scales[b] = pack_block(gammas, block.columns, job.packing, codes.data() + block.start);
  });
  constexpr int64_t run = 4096 * kCodesAtOnce;
  for_each_task(threads, (job.total + run - 1) / run, [&](int64_t task) {
    write_codes(codes.data(), task * run, std::min(job.total, (task + 1) * run), job.packing, job.codes);
  });
}

void unpack(const UnpackJob& job, const Threads& threads) {
  for_each_task(threads, job.num_blocks, [&](int64_t b) {
    const Block& block = job.blocks[b];
    const auto gammas = job.packed.of<float>(0, 0, b, job.num_blocks, block.start);
    for (int64_t k = 0; k < block.columns; ++k) {
      job.values[block.start + k] = gammas.value(k);
      job.columns[block.start + k] = gammas.column(k);
    }
  });
}

}  // namespace ferret::cpu

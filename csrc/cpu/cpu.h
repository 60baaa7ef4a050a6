// The CPU backend: jobs of core/job.h on the caller's threads, with the instruction set chosen at run time.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "../core/job.h"

namespace ferret::cpu {

// Runs worker() on `count` threads at once and returns when all have returned. Workers take their tasks from a common counter,
// so fewer threads than promised are harmless.
struct Threads {
  int count;
  std::function<void(const std::function<void()>& worker)> run;
};

// Results do not depend on `threads`. A non-finite element makes its block's coordinates NaN.
void project(const ProjectJob& job, const Threads& threads);

// If a coordinate is not finite: with `overwrite` all elements become NaN; else false, with every parameter untouched. Memory is
// taken before the first element is written, so std::bad_alloc leaves every parameter untouched too.
bool apply(const ApplyJob& job, const Threads& threads);

void basis(const BasisJob& job, const Threads& threads);

void pack(const PackJob& job, const Threads& threads);
void unpack(const UnpackJob& job, const Threads& threads);

// The exclusive or of all words of the calls [0, calls) of the columns [0, columns) of a rademacher basis: how fast the active path
// makes random words and nothing else, the yardstick of the benchmarks.
uint32_t philox_checksum(uint64_t seed, uint32_t columns, uint64_t calls);

// Names of the paths this processor can run, best last.
std::vector<std::string> available_isas();

// The path in use: the best one, or what FERRET_CPU_ISA or set_isa names. Throws std::runtime_error on an unknown or
// unavailable name.
std::string active_isa();
void set_isa(const std::string& name);

}  // namespace ferret::cpu

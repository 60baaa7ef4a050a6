// Which units the kernels use: rademacher bases in float32 are products on the int8 matrix units, which take far fewer
// instructions (docs/performance.md); FERRET_CUDA_PATH=simt keeps them on the ordinary ones, where all else is. Bits do
// not depend on it. Read at every call, so that both can be compared in one process.
#pragma once

#include <cstdlib>
#include <string>

#include "launch.h"

namespace ferret::cuda {

inline std::string wanted_path() {
  const char* path = std::getenv("FERRET_CUDA_PATH");
  return path == nullptr || *path == '\0' ? "mma" : path;
}

inline bool path_is_known() { return wanted_path() == "simt" || wanted_path() == "mma"; }
inline Status unknown_path() { return check(cudaErrorInvalidValue, "FERRET_CUDA_PATH, which must be simt or mma"); }

inline bool takes_matrix_units(Basis basis, bool wide) {
  return wanted_path() != "simt" && basis == Basis::rademacher && !wide;
}

}  // namespace ferret::cuda

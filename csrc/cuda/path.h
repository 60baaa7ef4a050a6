// Which units the kernels use: FERRET_CUDA_PATH=mma takes rademacher blocks in float32 to the int8 matrix units, where
// they have enough columns; the default is simt until both are measured. Bits do not depend on it. Read at every call, so
// that both can be compared in one process.
#pragma once

#include <cstdlib>
#include <string>

#include "launch.h"

namespace ferret::cuda {

inline std::string wanted_path() {
  const char* path = std::getenv("FERRET_CUDA_PATH");
  return path == nullptr || *path == '\0' ? "simt" : path;
}

inline bool path_is_known() { return wanted_path() == "simt" || wanted_path() == "mma"; }
inline Status unknown_path() { return check(cudaErrorInvalidValue, "FERRET_CUDA_PATH, which must be simt or mma"); }

inline bool takes_matrix_units(Basis basis, bool wide) {
  return wanted_path() == "mma" && basis == Basis::rademacher && !wide;
}

}  // namespace ferret::cuda

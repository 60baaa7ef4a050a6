#include "neon.h"

namespace ferret::cpu {

const Kernels kNeonKernels = {"neon", philox_checksum<Neon>, real_kernels<Neon, float>(), real_kernels<Neon, double>()};

}  // namespace ferret::cpu

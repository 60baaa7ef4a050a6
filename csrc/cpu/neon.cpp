#include "neon.h"

namespace ferret::cpu {

const Kernels kNeonKernels = {"neon", philox_checksum<Neon>, rounding_of_span<Neon>, real_kernels<Neon, float>(),
                              real_kernels<Neon, double>()};

}  // namespace ferret::cpu

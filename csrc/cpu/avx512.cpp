#include "avx512.h"

#include "vector.h"

namespace ferret::cpu {

const Kernels kAvx512Kernels = {"avx512", philox_checksum<Avx512>, rounding_of_span<Avx512>,
                                real_kernels<Avx512, float>(), real_kernels<Avx512, double>()};

}  // namespace ferret::cpu

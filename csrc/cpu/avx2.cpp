#include "avx2.h"

#include "vector.h"

namespace ferret::cpu {

const Kernels kAvx2Kernels = {"avx2", philox_checksum<Avx2>, rounding_of_span<Avx2>, real_kernels<Avx2, float>(),
                              real_kernels<Avx2, double>()};

}  // namespace ferret::cpu

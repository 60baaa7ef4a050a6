#include "avx512vnni.h"

#include "vector.h"

namespace ferret::cpu {

const Kernels kAvx512VnniKernels = {"avx512vnni", philox_checksum<Avx512Vnni>, rounding_of_span<Avx512Vnni>,
                                    real_kernels<Avx512Vnni, float>(), real_kernels<Avx512Vnni, double>()};

}  // namespace ferret::cpu

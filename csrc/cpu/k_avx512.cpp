// Kernels for AVX-512 F, BW, VL and DQ.
#define SG_SIMD "cpu/simd_avx512.h"
#include "cpu/kernels.inl"

namespace sg {

const Kernels* kernels_avx512() {
  static constexpr Kernels table = kernel_table("avx512");
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    kernels_avx2() != nullptr;
  return here ? &table : nullptr;
}

}  // namespace sg

// Kernels for AVX2, FMA and F16C.
#define SG_SIMD "cpu/simd_avx2.h"
#include "cpu/kernels.inl"

namespace sg {

const Kernels* kernels_avx2() {
  static constexpr Kernels table = kernel_table("avx2");
  const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return here ? &table : nullptr;
}

}  // namespace sg

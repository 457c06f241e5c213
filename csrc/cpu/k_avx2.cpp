// Kernels for AVX2, FMA and F16C.
#include "cpu/simd_avx2.h"
#include "cpu/kernels.inl"

namespace sg {

const Kernels* kernels_avx2() {
  static constexpr Kernels table = kernel_table("avx2");
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? &table : nullptr;
}

}  // namespace sg

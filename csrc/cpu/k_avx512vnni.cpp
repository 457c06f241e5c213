// Kernels for AVX-512 with dot products of bytes (VNNI), without those of BF16: Cascade Lake, Ice Lake.
#define SG_SIMD "cpu/simd_avx512.h"
#include "cpu/kernels.inl"

namespace sg {

const Kernels* kernels_avx512vnni() {
  static constexpr Kernels table = kernel_table("avx512vnni");
  return __builtin_cpu_supports("avx512vnni") && kernels_avx512() != nullptr ? &table : nullptr;
}

}  // namespace sg

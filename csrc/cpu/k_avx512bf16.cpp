// Kernels for AVX-512 with dot products of BF16 and of bytes (VNNI); every processor with the former has the latter.
#define SG_SIMD "cpu/simd_avx512.h"
#include "cpu/kernels.inl"

namespace sg {

const Kernels* kernels_avx512bf16() {
  static constexpr Kernels table = kernel_table("avx512bf16");
  return __builtin_cpu_supports("avx512bf16") && kernels_avx512vnni() != nullptr ? &table : nullptr;
}

}  // namespace sg

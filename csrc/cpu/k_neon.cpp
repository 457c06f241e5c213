// Kernels for arm64, which always has NEON.
#define SG_SIMD "cpu/simd_neon.h"
#include "cpu/kernels.inl"

namespace sg {

const Kernels* kernels_neon() {
  static constexpr Kernels table = kernel_table("neon");
  return &table;
}

}  // namespace sg

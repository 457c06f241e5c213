// Kernels in plain C++, for every processor.
#define SG_SIMD "cpu/simd_generic.h"
#include "cpu/kernels.inl"

namespace sg {

const Kernels* kernels_generic() {
  static constexpr Kernels table = kernel_table("generic");
  return &table;
}

}  // namespace sg

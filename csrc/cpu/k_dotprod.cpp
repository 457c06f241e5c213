// Kernels for arm64 with dot products of bytes.
#define SG_SIMD "cpu/simd_neon.h"
#include "cpu/arm_features.h"
#include "cpu/kernels.inl"

namespace sg {

const Kernels* kernels_dotprod() {
  static constexpr Kernels table = kernel_table("dotprod");
  return has_arm_feature(ArmFeature::Dotprod) ? &table : nullptr;
}

}  // namespace sg

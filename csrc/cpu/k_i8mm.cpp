// Kernels for arm64 with dot products of BF16 and of unsigned with signed bytes, which came together.
#define SG_SIMD "cpu/simd_neon.h"
#include "cpu/arm_features.h"
#include "cpu/kernels.inl"

namespace sg {

const Kernels* kernels_i8mm() {
  static constexpr Kernels table = kernel_table("i8mm");
  const bool here = has_arm_feature(ArmFeature::I8mm) && has_arm_feature(ArmFeature::BF16);
  return here && kernels_dotprod() != nullptr ? &table : nullptr;
}

}  // namespace sg

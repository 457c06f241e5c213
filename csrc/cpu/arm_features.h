// What an arm64 processor has beyond armv8-a. Asked in isa.cpp, by the units that need it.
#pragma once

namespace sg {

enum class ArmFeature { Dotprod, I8mm, BF16 };

bool has_arm_feature(ArmFeature feature);

}  // namespace sg

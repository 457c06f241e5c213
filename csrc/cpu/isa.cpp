// Which kernels this processor runs.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/arm_features.h"
#include "cpu/kernels.h"

#if defined(SG_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(SG_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace sg {

namespace {

struct Level {
  const char* name;
  const Kernels* (*kernels)();
};

// Those of this build, the best first.
constexpr Level kLevels[] = {
#if defined(SG_X86)
    {"avx512bf16", kernels_avx512bf16},
    {"avx512vnni", kernels_avx512vnni},
    {"avx512", kernels_avx512},
    {"avx2", kernels_avx2},
#elif defined(SG_ARM64)
    {"i8mm", kernels_i8mm},
    {"dotprod", kernels_dotprod},
    {"neon", kernels_neon},
#endif
    {"generic", kernels_generic}};
static_assert(sizeof(kLevels) / sizeof(Level) <= kMostLevels);

std::string names() {
  std::string all;
  for (const Level& level : kLevels) all += (all.empty() ? "" : ", ") + std::string(level.name);
  return all;
}

}  // namespace

int available_kernels(const Kernels* (&tables)[kMostLevels]) {
  int count = 0;
  for (const Level& level : kLevels) {
    const Kernels* kernels = level.kernels();
    if (kernels != nullptr) tables[count++] = kernels;
  }
  return count;
}

const Kernels* select_kernels(const char* limit) {
  bool allowed = limit == nullptr;
  const Kernels* best = nullptr;
  for (const Level& level : kLevels) {
    allowed = allowed || std::strcmp(level.name, limit) == 0;
    if (allowed && best == nullptr) best = level.kernels();
  }
  if (!allowed) throw std::invalid_argument("instruction set: expected one of " + names() + ", got " + limit);
  return best;
}

#if defined(SG_ARM64)
namespace {

#if defined(__linux__)
// Bits of linux/arch/arm64/include/uapi/asm/hwcap.h; older headers lack the names.
constexpr unsigned long kDotprod = 1ul << 20;                  // of AT_HWCAP
constexpr unsigned long kI8mm = 1ul << 13, kBf16 = 1ul << 14;  // of AT_HWCAP2
bool has_dotprod() { return (getauxval(AT_HWCAP) & kDotprod) != 0; }
bool has_i8mm() { return (getauxval(AT_HWCAP2) & kI8mm) != 0; }
bool has_bf16() { return (getauxval(AT_HWCAP2) & kBf16) != 0; }
#elif defined(__APPLE__)
bool has(const char* name) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has("hw.optional.arm.FEAT_I8MM"); }
bool has_bf16() { return has("hw.optional.arm.FEAT_BF16"); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
bool has_bf16() { return false; }
#endif

}  // namespace

bool has_arm_feature(ArmFeature feature) {
  switch (feature) {
    case ArmFeature::Dotprod:
      return has_dotprod();
    case ArmFeature::I8mm:
      return has_i8mm();
    case ArmFeature::BF16:
      return has_bf16();
  }
  return false;
}
#endif

}  // namespace sg

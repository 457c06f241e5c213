// Which kernels this processor runs.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace sg {

#ifndef SG_X86
const Kernels* kernels_avx2() { return nullptr; }
const Kernels* kernels_avx512() { return nullptr; }
const Kernels* kernels_avx512bf16() { return nullptr; }
#endif

const Kernels* select_kernels(const char* limit) {
  struct Level {
    const char* name;
    const Kernels* (*kernels)();
  };
  static constexpr Level levels[] = {{"avx512bf16", kernels_avx512bf16},
                                     {"avx512", kernels_avx512},
                                     {"avx2", kernels_avx2},
                                     {"generic", kernels_generic}};
  bool allowed = limit == nullptr;
  const Kernels* best = nullptr;
  for (const Level& level : levels) {
    allowed = allowed || std::strcmp(level.name, limit) == 0;
    if (allowed && best == nullptr) best = level.kernels();
  }
  if (!allowed)
    throw std::invalid_argument("instruction set: expected avx512bf16, avx512, avx2 or generic, got " +
                                std::string(limit));
  return best;
}

}  // namespace sg

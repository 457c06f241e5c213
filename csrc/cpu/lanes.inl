// Rows whose length is not a multiple of 16: the last vector of a row has fewer lanes. Included by a unit after its
// simd header.
#pragma once
#include "common/dtypes.h"

namespace sg {
namespace {

// Up to 16 lanes; the whole vector is the common case, and masked stores are slow on some processors.
SG_INLINE F16 load_lanes(const float* p, int lanes) { return lanes >= 16 ? load(p) : load_n(p, lanes); }
SG_INLINE void store_lanes(float* p, F16 x, int lanes) {
  if (lanes >= 16) {
    store(p, x);
  } else {
    store_n(p, x, lanes);
  }
}

// Operand elements from index i on: f32 or bf16.
SG_INLINE void store_operand(void* p, DType type, int64_t i, F16 x, int lanes) {
  if (type == DType::F32) return store_lanes(static_cast<float*>(p) + i, x, lanes);
  uint16_t* to = static_cast<uint16_t*>(p) + i;
  if (lanes >= 16) {
    store_bf16(to, x);
  } else {
    store_bf16_n(to, x, lanes);
  }
}

}  // namespace
}  // namespace sg

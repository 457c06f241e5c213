// Activations in 8 bits, for integer weights to meet: see ActivationBlock in kernels.h. Included by a unit after its
// simd header.
//
// A group of 16 values is its largest magnitude / 127 times codes rounded to nearest even. What rounds is a vector of
// values at a time, wherever it comes from: a norm, a gated product, or memory.
#pragma once
#include "cpu/kernels.h"

namespace sg {
namespace {

// Below, a group counts as this large, so that nothing is divided by zero.
constexpr float kLeastMagnitude = 1e-30f;

// 16 groups are eight blocks.
SG_INLINE void quantize_groups(const F16 (&x)[16], ActivationBlock* to) {
  F16 each[16];
  SG_UNROLL
  for (int i = 0; i < 16; i++) each[i] = max(x[i], sub(zero(), x[i]));
  const F16 most = reduce_max_each(each);
  alignas(64) float scales[16], inverses[16], sums[16];
  store(scales, mul(most, set1(1.0f / 127.0f)));
  store(inverses, div(set1(127.0f), max(most, set1(kLeastMagnitude))));
  SG_UNROLL
  for (int i = 0; i < 16; i++) {
    each[i] = round(mul(x[i], set1(inverses[i])));
    store_i8(to[i / 2].codes + i % 2 * 16, each[i]);
  }
  store(sums, reduce_add_each(each));  // of whole numbers: exact in any order
  for (int i = 0; i < 8; i++) {
    const float low = sums[2 * i], high = sums[2 * i + 1];
    to[i].scales[0] = scales[2 * i], to[i].scales[1] = scales[2 * i + 1];
    to[i].negative_sums[0] = -int32_t(low), to[i].negative_sums[1] = -int32_t(high);
    to[i].sum = scales[2 * i] * low + scales[2 * i + 1] * high;
  }
}

// A row of `width` values, a multiple of 32; values(i) is those from i on. The last eight blocks may be fewer.
template <class F>
SG_INLINE void quantize_row(int width, ActivationBlock* to, F values) {
  F16 x[16];
  int i = 0;
  for (; i + 256 <= width; i += 256, to += 8) {
    SG_UNROLL
    for (int j = 0; j < 16; j++) x[j] = values(i + 16 * j);
    quantize_groups(x, to);
  }
  if (i == width) return;
  ActivationBlock last[8];
  for (int j = 0; j < 16; j++) x[j] = i + 16 * j < width ? values(i + 16 * j) : zero();
  quantize_groups(x, last);
  memcpy(static_cast<void*>(to), last, sizeof(ActivationBlock) * size_t((width - i) / 32));
}

}  // namespace
}  // namespace sg

// Rounding float weights to integers, a group of values with one scale (and zero point) at a time. Included by a unit
// after its simd header.
//
//   8 bits            d = most / 127, q = round(x / d) + 128
//   4 bits            d and z such that 0 and the group's range fit 0 .. 15
//   4 bits symmetric  d = (the value of largest magnitude) / -8, which becomes code 0, so that all 16 codes are of use
#include "cpu/packed.h"

namespace sg {
namespace {

// The values of a group, as far as its scale depends on them.
struct Range {
  float low = 0, high = 0;  // zero is always within: it stays exact

  void take(const float* x, int n) {
    for (int i = 0; i < n; i++) {
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
    }
  }
};

inline uint16_t float_to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7bff);  // beyond the largest half: that one
  if (magnitude < 0x38800000) {                                 // subnormal: a multiple of 2^-24
    const float scaled = float_from_bits(magnitude) * 16777216.0f;
    return uint16_t(sign | uint32_t(__builtin_rintf(scaled)));
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return uint16_t(sign | ((magnitude + 0xfff + odd - 0x38000000) >> 13));
}

inline int clamped(float q, int most) { return q < 0 ? 0 : q > float(most) ? most : int(q); }

RowHead head_of(DType type, bool symmetric, const Range& range) {
  RowHead head{};
  const bool is_low = -range.low > range.high;
  const float most = is_low ? range.low : range.high;  // of largest magnitude
  if (type == DType::Q8_0 || type == DType::INT8) {
    head.d = float_to_half((is_low ? -most : most) / 127.0f);
    head.zero = 128;
  } else if (type == DType::Q4_0 || symmetric) {
    head.d = float_to_half(most / -8.0f);
    head.zero = 8;
  } else {
    head.d = float_to_half((range.high - range.low) / 15.0f);
    const float d = half_to_float(head.d);
    head.zero = uint8_t(d == 0 ? 0 : clamped(__builtin_rintf(-range.low / d), 15));
  }
  return head;
}

void round_values(DType type, const RowHead& head, const float* x, int n, uint8_t* codes) {
  const float d = half_to_float(head.d), inverse = d == 0 ? 0.0f : 1.0f / d;
  const int most = type == DType::Q4_0 || type == DType::INT4 ? 15 : 255;
  for (int i = 0; i < n; i++) codes[i] = uint8_t(clamped(__builtin_rintf(x[i] * inverse) + float(head.zero), most));
}

}  // namespace
}  // namespace sg

// simd_common.h for arm64: an F16 is four registers. Baseline armv8-a, with dot products of bytes (dotprod; unsigned
// times signed: i8mm) and of bf16 where the unit is compiled for them.
#pragma once
#include <arm_neon.h>

#include "cpu/simd_common.h"

namespace sg {
namespace {

// 32 registers: a tile of 4 rows leaves 16 to weights and inputs, also where two vectors of weights meet 2 rows.
constexpr int kTileRows = 4, kTileSums = 4;
#ifdef __ARM_FEATURE_DOTPROD
constexpr int kIntRows = 4;
#else
constexpr int kIntRows = 2;
#endif

struct F16 {
  float32x4_t v[4];
};
struct Pairs {
  uint32x4_t v[4];
};

// An F16 made quarter by quarter: f(i) is lanes 4 i .. 4 i + 3.
template <class F>
SG_INLINE F16 quarters(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}

SG_INLINE F16 set1(float f) {
  return quarters([&](int) { return vdupq_n_f32(f); });
}
SG_INLINE F16 zero() { return set1(0.0f); }
SG_INLINE F16 load(const float* p) {
  return quarters([&](int i) { return vld1q_f32(p + 4 * i); });
}
SG_INLINE void store(float* p, F16 x) {
  SG_UNROLL
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
}

SG_INLINE F16 add(F16 a, F16 b) {
  return quarters([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
SG_INLINE F16 sub(F16 a, F16 b) {
  return quarters([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
SG_INLINE F16 mul(F16 a, F16 b) {
  return quarters([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
SG_INLINE F16 div(F16 a, F16 b) {
  return quarters([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
// NOTE: not vmaxq and vminq, which give NaN where either operand is one.
SG_INLINE float32x4_t max4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
SG_INLINE float32x4_t min4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
SG_INLINE F16 max(F16 a, F16 b) {
  return quarters([&](int i) { return max4(a.v[i], b.v[i]); });
}
SG_INLINE F16 min(F16 a, F16 b) {
  return quarters([&](int i) { return min4(a.v[i], b.v[i]); });
}
SG_INLINE F16 fma(F16 a, F16 b, F16 c) {
  return quarters([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}

SG_INLINE F16 load_n(const float* p, int n) {
  float all[16] = {};
  for (int i = 0; i < n; i++) all[i] = p[i];
  return load(all);
}
SG_INLINE void store_n(float* p, F16 x, int n) {
  float all[16];
  store(all, x);
  for (int i = 0; i < n; i++) p[i] = all[i];
}

SG_INLINE F16 select_lanes(F16 x, int begin, int end, F16 other) {
  constexpr int32_t kLanes[4] = {0, 1, 2, 3};
  const int32x4_t first = vld1q_s32(kLanes);
  return quarters([&](int i) {
    const int32x4_t lane = vaddq_s32(first, vdupq_n_s32(4 * i));
    const uint32x4_t keep = vandq_u32(vcgeq_s32(lane, vdupq_n_s32(begin)), vcltq_s32(lane, vdupq_n_s32(end)));
    return vbslq_f32(keep, x.v[i], other.v[i]);
  });
}

SG_INLINE F16 load_bf16(const uint16_t* p) {
  return quarters([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}

// 8 floats as bf16.
SG_INLINE uint16x8_t narrow_bf16(float32x4_t low, float32x4_t high) {
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
  return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(low), high));
#else
  const auto rounded = [](float32x4_t x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t nearest = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vbslq_u32(vceqq_f32(x, x), nearest, quiet);
  };
  return vcombine_u16(vshrn_n_u32(rounded(low), 16), vshrn_n_u32(rounded(high), 16));
#endif
}
SG_INLINE void store_bf16(uint16_t* p, F16 x) {
  vst1q_u16(p, narrow_bf16(x.v[0], x.v[1]));
  vst1q_u16(p + 8, narrow_bf16(x.v[2], x.v[3]));
}
SG_INLINE F16 load_bf16_n(const uint16_t* p, int n) {
  uint16_t all[16] = {};
  for (int i = 0; i < n; i++) all[i] = p[i];
  return load_bf16(all);
}
SG_INLINE void store_bf16_n(uint16_t* p, F16 x, int n) {
  uint16_t all[16];
  store_bf16(all, x);
  for (int i = 0; i < n; i++) p[i] = all[i];
}

SG_INLINE float32x4_t power_of_two(int32x4_t n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
SG_INLINE float32x4_t exp4(float32x4_t x) {
  const float32x4_t clamped = min4(vdupq_n_f32(kExpHigh), max4(vdupq_n_f32(kExpLow), x));
  const float32x4_t n = vrndnq_f32(vmulq_f32(clamped, vdupq_n_f32(kLog2E)));
  float32x4_t r = vfmsq_f32(clamped, n, vdupq_n_f32(kLn2High));
  r = vfmsq_f32(r, n, vdupq_n_f32(kLn2Low));
  float32x4_t poly = vdupq_n_f32(kExpPoly[0]);
  SG_UNROLL
  for (int i = 1; i < 6; i++) poly = vfmaq_f32(vdupq_n_f32(kExpPoly[i]), poly, r);
  poly = vaddq_f32(vfmaq_f32(r, vmulq_f32(poly, r), r), vdupq_n_f32(1.0f));
  // 2^n in two factors: n reaches -150 and 128, where one factor would not be a float.
  const int32x4_t exponent = vcvtq_s32_f32(n), half = vshrq_n_s32(exponent, 1);
  return vmulq_f32(vmulq_f32(poly, power_of_two(half)), power_of_two(vsubq_s32(exponent, half)));
}
SG_INLINE F16 exp(F16 x) {
  return quarters([&](int i) { return exp4(x.v[i]); });
}

SG_INLINE float32x4_t exp2_4(float32x4_t x) {
  x = max4(vdupq_n_f32(kExp2Low), x);
  const float32x4_t n = vrndnq_f32(x), r = vsubq_f32(x, n);
  float32x4_t poly = vdupq_n_f32(kExp2Poly[0]);
  SG_UNROLL
  for (int i = 1; i < 5; i++) poly = vfmaq_f32(vdupq_n_f32(kExp2Poly[i]), poly, r);
  poly = vfmaq_f32(vdupq_n_f32(1.0f), poly, r);
  // In two factors, as above.
  const int32x4_t exponent = vcvtq_s32_f32(n), half = vshrq_n_s32(exponent, 1);
  return vmulq_f32(vmulq_f32(poly, power_of_two(half)), power_of_two(vsubq_s32(exponent, half)));
}
SG_INLINE F16 exp2(F16 x) {
  return quarters([&](int i) { return exp2_4(x.v[i]); });
}

SG_INLINE float reduce_add(F16 x) {
  const float32x4_t v = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(v), vget_high_f32(v));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
SG_INLINE float reduce_max(F16 x) {
  const float32x4_t v = max4(max4(x.v[0], x.v[2]), max4(x.v[1], x.v[3]));
  const float a = vgetq_lane_f32(v, 0), b = vgetq_lane_f32(v, 1), c = vgetq_lane_f32(v, 2), d = vgetq_lane_f32(v, 3);
  const float ac = a > c ? a : c, bd = b > d ? b : d;
  return ac > bd ? ac : bd;
}

SG_INLINE Pairs load_pairs(const uint16_t* p) {
  return {{vreinterpretq_u32_u16(vld1q_u16(p)), vreinterpretq_u32_u16(vld1q_u16(p + 8)),
           vreinterpretq_u32_u16(vld1q_u16(p + 16)), vreinterpretq_u32_u16(vld1q_u16(p + 24))}};
}
SG_INLINE Pairs set1_pair(const uint16_t* p) {
  uint32_t bits;
  memcpy(&bits, p, 4);
  const uint32x4_t v = vdupq_n_u32(bits);
  return {{v, v, v, v}};
}
SG_INLINE void store_pairs(uint16_t* p, Pairs x) {
  SG_UNROLL
  for (int i = 0; i < 4; i++) vst1q_u16(p + 8 * i, vreinterpretq_u16_u32(x.v[i]));
}
SG_INLINE Pairs join_pairs(F16 a, F16 b) {
  const auto join = [](float32x4_t low, float32x4_t high) {
    return vsriq_n_u32(vreinterpretq_u32_f32(high), vreinterpretq_u32_f32(low), 16);
  };
  return {{join(a.v[0], b.v[0]), join(a.v[1], b.v[1]), join(a.v[2], b.v[2]), join(a.v[3], b.v[3])}};
}
SG_INLINE void hold(F16&) {}  // they stay
SG_INLINE void hold(Pairs&) {}

SG_INLINE F16 dot2(F16 c, Pairs a, Pairs b) {
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
  return quarters(
      [&](int i) { return vbfdotq_f32(c.v[i], vreinterpretq_bf16_u32(a.v[i]), vreinterpretq_bf16_u32(b.v[i])); });
#else
  const auto first = [](uint32x4_t pair) { return vreinterpretq_f32_u32(vshlq_n_u32(pair, 16)); };
  const auto second = [](uint32x4_t pair) { return vreinterpretq_f32_u32(vandq_u32(pair, vdupq_n_u32(0xffff0000))); };
  return quarters([&](int i) {
    const float32x4_t sum = vfmaq_f32(c.v[i], first(a.v[i]), first(b.v[i]));
    return vfmaq_f32(sum, second(a.v[i]), second(b.v[i]));
  });
#endif
}

// ---- integers -------------------------------------------------------------------------------------------------------

struct Quads {
  uint8x16_t v[4];
};

template <class F>
SG_INLINE Quads quads_of(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}

SG_INLINE Quads load_quads(const uint8_t* p) {
  return quads_of([&](int i) { return vld1q_u8(p + 16 * i); });
}
SG_INLINE void store_quads(uint8_t* p, Quads x) {
  SG_UNROLL
  for (int i = 0; i < 4; i++) vst1q_u8(p + 16 * i, x.v[i]);
}
template <int kMask>
SG_INLINE Quads low_bits(Quads x) {
  return quads_of([&](int i) { return vandq_u8(x.v[i], vdupq_n_u8(uint8_t(kMask))); });
}
template <int kMask>
SG_INLINE Quads or_bits(Quads x, Quads y) {
  return quads_of([&](int i) { return vorrq_u8(x.v[i], vandq_u8(y.v[i], vdupq_n_u8(uint8_t(kMask)))); });
}
// Byte by byte here: nothing crosses.
template <int kBits>
SG_INLINE Quads right(Quads x) {
  return quads_of([&](int i) { return vshrq_n_u8(x.v[i], kBits); });
}
template <int kBits>
SG_INLINE Quads left(Quads x) {
  return quads_of([&](int i) { return vshlq_n_u8(x.v[i], kBits); });
}

SG_INLINE int8x16_t set1_quad(const int8_t* p) {
  int32_t bits;
  memcpy(&bits, p, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(bits));
}

#ifdef __ARM_FEATURE_DOTPROD
struct I16 {
  int32x4_t v[4];
};
// Codes below 128 are the same as signed bytes. Where there is no product of unsigned with signed bytes, 8-bit codes
// turn signed, so that their bias has nothing to take off.
#ifdef __ARM_FEATURE_MATMUL_INT8
constexpr bool turns_signed(int) { return false; }
SG_INLINE int32x4_t dot_bytes(int32x4_t c, uint8x16_t w, int8x16_t x) { return vusdotq_s32(c, w, x); }
#else
constexpr bool turns_signed(int bias) { return bias == 7; }
SG_INLINE int32x4_t dot_bytes(int32x4_t c, uint8x16_t w, int8x16_t x) {
  return vdotq_s32(c, vreinterpretq_s8_u8(w), x);
}
#endif
template <int kBias>
SG_INLINE I16 start_dot(const int32_t* negative_sum) {
  const int32_t n = kBias == 0 || turns_signed(kBias) ? 0 : *negative_sum * (1 << kBias);
  const int32x4_t v = vdupq_n_s32(n);
  return {{v, v, v, v}};
}
template <int kBias>
SG_INLINE I16 dot4(I16 c, Quads w, const int8_t* x) {
  const int8x16_t values = set1_quad(x);
  SG_UNROLL
  for (int i = 0; i < 4; i++) {
    const uint8x16_t codes = turns_signed(kBias) ? veorq_u8(w.v[i], vdupq_n_u8(0x80)) : w.v[i];
    c.v[i] = dot_bytes(c.v[i], codes, values);
  }
  return c;
}
template <int kBias>
SG_INLINE F16 finish_dot(I16 c, const int32_t*) {
  return quarters([&](int i) { return vcvtq_f32_s32(c.v[i]); });
}
#else
// Sums of 16 bits, four for each output (one byte of each quad), as long as they hold what they sum up. 8-bit codes
// turn signed, so that two of their products fit, and go on in sums of 32 bits: the first four vectors.
struct I16 {
  int16x8_t v[8];
};
template <int kBias>
SG_INLINE I16 start_dot(const int32_t*) {
  const int16x8_t v = vdupq_n_s16(0);
  return {{v, v, v, v, v, v, v, v}};
}
template <int kBias>
SG_INLINE I16 dot4(I16 c, Quads w, const int8_t* x) {
  const int8x16_t values = set1_quad(x);
  SG_UNROLL
  for (int i = 0; i < 4; i++) {
    if (kBias == 7) {
      const int8x16_t codes = vreinterpretq_s8_u8(veorq_u8(w.v[i], vdupq_n_u8(0x80)));
      const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(values)), high = vmull_high_s8(codes, values);
      c.v[i] = vreinterpretq_s16_s32(vpadalq_s16(vreinterpretq_s32_s16(c.v[i]), vpaddq_s16(low, high)));
    } else {
      const int8x16_t codes = vreinterpretq_s8_u8(w.v[i]);
      c.v[2 * i] = vmlal_s8(c.v[2 * i], vget_low_s8(codes), vget_low_s8(values));
      c.v[2 * i + 1] = vmlal_high_s8(c.v[2 * i + 1], codes, values);
    }
  }
  return c;
}
template <int kBias>
SG_INLINE F16 finish_dot(I16 c, const int32_t* negative_sum) {
  const int32x4_t start = vdupq_n_s32(kBias > 0 && kBias < 7 ? *negative_sum * (1 << kBias) : 0);
  return quarters([&](int i) {
    if (kBias == 7) return vcvtq_f32_s32(vreinterpretq_s32_s16(c.v[i]));
    const int32x4_t sum = vpaddq_s32(vpaddlq_s16(c.v[2 * i]), vpaddlq_s16(c.v[2 * i + 1]));
    return vcvtq_f32_s32(vaddq_s32(sum, start));
  });
}
#endif

SG_INLINE F16 load_half(const uint16_t* p) {
  return quarters([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
SG_INLINE F16 load_u8(const uint8_t* p) {
  const uint8x16_t x = vld1q_u8(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_high_u8(x);
  return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_high_u16(low)),
           vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_high_u16(high))}};
}
SG_INLINE F16 load_i8(const int8_t* p) {
  const int8x16_t x = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_high_s8(x);
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))}};
}
SG_INLINE F16 round(F16 x) {
  return quarters([&](int i) { return vrndnq_f32(x.v[i]); });
}
SG_INLINE int16x8_t narrow_integers(float32x4_t low, float32x4_t high) {
  return vcombine_s16(vmovn_s32(vcvtnq_s32_f32(low)), vmovn_s32(vcvtnq_s32_f32(high)));
}
SG_INLINE void store_i8(int8_t* p, F16 x) {
  const int16x8_t low = narrow_integers(x.v[0], x.v[1]), high = narrow_integers(x.v[2], x.v[3]);
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

// Four quarters to one vector: op over the lanes of x[0], x[1], x[2] and x[3].
template <class Op>
SG_INLINE float32x4_t reduce_four(const F16* x, Op op) {
  float32x4_t all[4];
  SG_UNROLL
  for (int i = 0; i < 4; i++) all[i] = op(op(x[i].v[0], x[i].v[2]), op(x[i].v[1], x[i].v[3]));
  const float32x4_t a = op(vuzp1q_f32(all[0], all[1]), vuzp2q_f32(all[0], all[1]));
  const float32x4_t b = op(vuzp1q_f32(all[2], all[3]), vuzp2q_f32(all[2], all[3]));
  return op(vuzp1q_f32(a, b), vuzp2q_f32(a, b));
}
SG_INLINE F16 reduce_max_each(const F16 (&x)[16]) {
  return quarters([&](int i) { return reduce_four(x + 4 * i, max4); });
}
SG_INLINE F16 reduce_add_each(const F16 (&x)[16]) {
  return quarters(
      [&](int i) { return reduce_four(x + 4 * i, [](float32x4_t a, float32x4_t b) { return vaddq_f32(a, b); }); });
}

}  // namespace
}  // namespace sg

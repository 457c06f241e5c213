// simd_common.h in plain C++ with the compilers' 128-bit vectors, which every 64-bit processor has: an F16 is four of
// them. The path of arm64, of old x86-64, and a second opinion for the tests.
#pragma once
#include "cpu/gguf_blocks.h"
#include "cpu/simd_common.h"

namespace sg {
namespace {

#ifdef __aarch64__
constexpr int kTileRows = 4, kTileSums = 4, kIntRows = 2;
#else
constexpr int kTileRows = 2, kTileSums = 2, kIntRows = 4;
#endif

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t Uint4 __attribute__((vector_size(16)));

struct F16 {
  Float4 v[4];
};
struct Pairs {
  Uint4 v[4];
};

// An F16 made quarter by quarter: f(i) is lanes 4 i .. 4 i + 3.
template <class F>
SG_INLINE F16 quarters(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}

SG_INLINE Float4 splat(float f) { return Float4{f, f, f, f}; }
SG_INLINE Float4 fma4(Float4 a, Float4 b, Float4 c) {
#ifdef __FP_FAST_FMAF
  return Float4{__builtin_fmaf(a[0], b[0], c[0]), __builtin_fmaf(a[1], b[1], c[1]), __builtin_fmaf(a[2], b[2], c[2]),
                __builtin_fmaf(a[3], b[3], c[3])};
#else
  return a * b + c;
#endif
}

SG_INLINE F16 set1(float f) {
  return quarters([&](int) { return splat(f); });
}
SG_INLINE F16 zero() { return set1(0.0f); }
SG_INLINE F16 load(const float* p) {
  F16 x;
  memcpy(&x, p, sizeof x);
  return x;
}
SG_INLINE void store(float* p, F16 x) { memcpy(p, &x, sizeof x); }

SG_INLINE F16 add(F16 a, F16 b) {
  return quarters([&](int i) { return a.v[i] + b.v[i]; });
}
SG_INLINE F16 sub(F16 a, F16 b) {
  return quarters([&](int i) { return a.v[i] - b.v[i]; });
}
SG_INLINE F16 mul(F16 a, F16 b) {
  return quarters([&](int i) { return a.v[i] * b.v[i]; });
}
SG_INLINE F16 div(F16 a, F16 b) {
  return quarters([&](int i) { return a.v[i] / b.v[i]; });
}
SG_INLINE F16 max(F16 a, F16 b) {
  return quarters([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
SG_INLINE F16 min(F16 a, F16 b) {
  return quarters([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
SG_INLINE F16 fma(F16 a, F16 b, F16 c) {
  return quarters([&](int i) { return fma4(a.v[i], b.v[i], c.v[i]); });
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
  return quarters([&](int i) {
    const Int4 lane = Int4{0, 1, 2, 3} + 4 * i;
    return (lane >= begin) & (lane < end) ? x.v[i] : other.v[i];
  });
}

SG_INLINE F16 load_bf16(const uint16_t* p) {
  return quarters([&](int i) { return (Float4)(Uint4{p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3]} << 16); });
}
SG_INLINE void store_bf16(uint16_t* p, F16 x) {
  for (int i = 0; i < 4; i++) {
    const Uint4 bits = (Uint4)x.v[i];
    const Uint4 rounded = bits + (((bits >> 16) & 1) + 0x7fff);
    const Uint4 result = (x.v[i] == x.v[i] ? rounded : bits | 0x400000) >> 16;
    for (int j = 0; j < 4; j++) p[4 * i + j] = uint16_t(result[j]);
  }
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

SG_INLINE Float4 exp4(Float4 x) {
  const Float4 low = splat(kExpLow), high = splat(kExpHigh);
  Float4 clamped = low > x ? low : x;
  clamped = high < clamped ? high : clamped;
  const Float4 shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Float4 n = (clamped * splat(kLog2E) + shift) - shift;
  const Float4 r = fma4(n, splat(-kLn2Low), fma4(n, splat(-kLn2High), clamped));
  Float4 poly = splat(kExpPoly[0]);
  SG_UNROLL
  for (int i = 1; i < 6; i++) poly = fma4(poly, r, splat(kExpPoly[i]));
  poly = fma4(poly * r, r, r) + splat(1.0f);
  // 2^n in two factors: n reaches -150 and 128, where one factor would not be a float.
  const Int4 exponent = __builtin_convertvector(x == x ? n : splat(0.0f), Int4), half = exponent >> 1;
  return poly * (Float4)((half + 127) << 23) * (Float4)((exponent - half + 127) << 23);
}
SG_INLINE F16 exp(F16 x) {
  return quarters([&](int i) { return exp4(x.v[i]); });
}

SG_INLINE Float4 exp2_4(Float4 x) {
  const Float4 low = splat(kExp2Low), shift = splat(12582912.0f);  // as in exp4
  x = low > x ? low : x;
  const Float4 n = (x + shift) - shift, r = x - n;
  Float4 poly = splat(kExp2Poly[0]);
  SG_UNROLL
  for (int i = 1; i < 5; i++) poly = fma4(poly, r, splat(kExp2Poly[i]));
  poly = fma4(poly, r, splat(1.0f));
  const Int4 exponent = __builtin_convertvector(x == x ? n : splat(0.0f), Int4), half = exponent >> 1;
  return poly * (Float4)((half + 127) << 23) * (Float4)((exponent - half + 127) << 23);
}
SG_INLINE F16 exp2(F16 x) {
  return quarters([&](int i) { return exp2_4(x.v[i]); });
}

SG_INLINE float reduce_add(F16 x) {
  const Float4 v = (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]);
  return (v[0] + v[2]) + (v[1] + v[3]);
}
SG_INLINE float larger(float a, float b) { return a > b ? a : b; }
SG_INLINE float reduce_max(F16 x) {
  const F16 halves = max(x, F16{{x.v[2], x.v[3], x.v[2], x.v[3]}});
  const Float4 v = halves.v[0] > halves.v[1] ? halves.v[0] : halves.v[1];
  return larger(larger(v[0], v[2]), larger(v[1], v[3]));
}

SG_INLINE Pairs load_pairs(const uint16_t* p) {
  Pairs x;
  memcpy(&x, p, sizeof x);
  return x;
}
SG_INLINE Pairs set1_pair(const uint16_t* p) {
  uint32_t bits;
  memcpy(&bits, p, 4);
  const Uint4 v = {bits, bits, bits, bits};
  return {{v, v, v, v}};
}
SG_INLINE void hold(F16&) {}  // registers are few
SG_INLINE void hold(Pairs&) {}

SG_INLINE Pairs join_pairs(F16 a, F16 b) {
  Pairs x;
  for (int i = 0; i < 4; i++) x.v[i] = ((Uint4)a.v[i] >> 16) | ((Uint4)b.v[i] & 0xffff0000);
  return x;
}
SG_INLINE void store_pairs(uint16_t* p, Pairs x) { memcpy(p, &x, sizeof x); }

SG_INLINE F16 dot2(F16 c, Pairs a, Pairs b) {
  return quarters([&](int i) {
    const Float4 a0 = (Float4)(a.v[i] << 16), b0 = (Float4)(b.v[i] << 16);
    const Float4 a1 = (Float4)(a.v[i] & 0xffff0000), b1 = (Float4)(b.v[i] & 0xffff0000);
    return fma4(a1, b1, fma4(a0, b0, c.v[i]));
  });
}

// ---- integers -------------------------------------------------------------------------------------------------------

struct I16 {
  Int4 v[4];
};
struct Quads {
  Uint4 v[4];
};

template <class F>
SG_INLINE Quads quads_of(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
SG_INLINE Uint4 splat_bits(uint32_t bits) { return Uint4{bits, bits, bits, bits}; }

SG_INLINE Quads load_quads(const uint8_t* p) {
  Quads x;
  memcpy(&x, p, sizeof x);
  return x;
}
SG_INLINE void store_quads(uint8_t* p, Quads x) { memcpy(p, &x, sizeof x); }
template <int kMask>
SG_INLINE Quads low_bits(Quads x) {
  return quads_of([&](int i) { return x.v[i] & splat_bits(0x01010101u * uint32_t(kMask)); });
}
template <int kMask>
SG_INLINE Quads or_bits(Quads x, Quads y) {
  return quads_of([&](int i) { return x.v[i] | (y.v[i] & splat_bits(0x01010101u * uint32_t(kMask))); });
}
// NOTE: 32-bit lanes here: what crosses from one byte to the next is masked by the caller all the same.
template <int kBits>
SG_INLINE Quads right(Quads x) {
  return quads_of([&](int i) { return x.v[i] >> kBits; });
}
template <int kBits>
SG_INLINE Quads left(Quads x) {
  return quads_of([&](int i) { return x.v[i] << kBits; });
}

// Products of 16 bits, since few processors multiply 32 of them at once: bytes 0 and 2 of a quad, then bytes 1 and 3.
// Their sums stay in 16 bits, two for each output, as long as these hold them; 8-bit codes turn signed, so that two of
// them do.
typedef int16_t Short8 __attribute__((vector_size(16)));
typedef uint16_t Ushort8 __attribute__((vector_size(16)));
constexpr bool sums_are_short(int bias) { return bias < 5; }
SG_INLINE Short8 even_bytes(Uint4 x) { return (Short8)((Ushort8)x << 8) >> 8; }  // signed
SG_INLINE Short8 odd_bytes(Uint4 x) { return (Short8)x >> 8; }
SG_INLINE Int4 widened(Int4 shorts) { return ((Int4)((Uint4)shorts << 16) >> 16) + (shorts >> 16); }

template <int kBias>
SG_INLINE I16 start_dot(const int32_t*) {
  return {};
}
template <int kBias>
SG_INLINE I16 dot4(I16 c, Quads w, const int8_t* x) {
  uint32_t bits;
  memcpy(&bits, x, 4);
  const Short8 even = even_bytes(splat_bits(bits)), odd = odd_bytes(splat_bits(bits));
  SG_UNROLL
  for (int i = 0; i < 4; i++) {
    const Uint4 codes = kBias == 7 ? w.v[i] ^ splat_bits(0x80808080u) : w.v[i];
    const Short8 pairs = even_bytes(codes) * even + odd_bytes(codes) * odd;
    c.v[i] = sums_are_short(kBias) ? (Int4)((Short8)c.v[i] + pairs) : c.v[i] + widened((Int4)pairs);
  }
  return c;
}
template <int kBias>
SG_INLINE F16 finish_dot(I16 c, const int32_t* negative_sum) {
  const int32_t start = kBias > 0 && kBias < 7 ? *negative_sum * (1 << kBias) : 0;
  return quarters([&](int i) {
    const Int4 sum = (sums_are_short(kBias) ? widened(c.v[i]) : c.v[i]) + start;
    return __builtin_convertvector(sum, Float4);
  });
}

SG_INLINE F16 load_half(const uint16_t* p) {
  return quarters([&](int i) {
    return Float4{half_to_float(p[4 * i]), half_to_float(p[4 * i + 1]), half_to_float(p[4 * i + 2]),
                  half_to_float(p[4 * i + 3])};
  });
}
template <class T>
SG_INLINE F16 load_numbers(const T* p) {
  return quarters(
      [&](int i) { return Float4{float(p[4 * i]), float(p[4 * i + 1]), float(p[4 * i + 2]), float(p[4 * i + 3])}; });
}
SG_INLINE F16 load_u8(const uint8_t* p) { return load_numbers(p); }
SG_INLINE F16 load_i8(const int8_t* p) { return load_numbers(p); }
SG_INLINE F16 round(F16 x) {
  return quarters([&](int i) {
    return Float4{__builtin_rintf(x.v[i][0]), __builtin_rintf(x.v[i][1]), __builtin_rintf(x.v[i][2]),
                  __builtin_rintf(x.v[i][3])};
  });
}
SG_INLINE void store_i8(int8_t* p, F16 x) {
  for (int i = 0; i < 16; i++) p[i] = int8_t(__builtin_rintf(x.v[i / 4][i % 4]));
}
SG_INLINE F16 reduce_max_each(const F16 (&x)[16]) {
  float each[16];
  for (int i = 0; i < 16; i++) each[i] = reduce_max(x[i]);
  return load(each);
}
SG_INLINE F16 reduce_add_each(const F16 (&x)[16]) {
  float each[16];
  for (int i = 0; i < 16; i++) each[i] = reduce_add(x[i]);
  return load(each);
}

}  // namespace
}  // namespace sg

// simd_common.h for AVX2 with FMA: an F16 is two registers.
#pragma once
#include <immintrin.h>

#include "cpu/simd_common.h"

namespace sg {
namespace {

constexpr int kTileRows = 4, kTileSums = 6, kIntRows = 4;

struct F16 {
  __m256 lo, hi;
};
struct Pairs {
  __m256i lo, hi;
};

SG_INLINE F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
SG_INLINE F16 set1(float f) { return {_mm256_set1_ps(f), _mm256_set1_ps(f)}; }
SG_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SG_INLINE void store(float* p, F16 x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}

SG_INLINE F16 add(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
SG_INLINE F16 sub(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
SG_INLINE F16 mul(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
SG_INLINE F16 div(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
SG_INLINE F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
SG_INLINE F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
SG_INLINE F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}

// Lanes first .. first + 7 of a mask whose lanes below n are set.
SG_INLINE __m256i lanes_below(int n, int first) {
  const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(first));
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
}

SG_INLINE F16 load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, lanes_below(n, 0)), _mm256_maskload_ps(p + 8, lanes_below(n, 8))};
}
SG_INLINE void store_n(float* p, F16 x, int n) {
  _mm256_maskstore_ps(p, lanes_below(n, 0), x.lo);
  _mm256_maskstore_ps(p + 8, lanes_below(n, 8), x.hi);
}

SG_INLINE __m256 select_half(__m256 x, int begin, int end, __m256 other, int first) {
  const __m256i keep = _mm256_andnot_si256(lanes_below(begin, first), lanes_below(end, first));
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(keep));
}
SG_INLINE F16 select_lanes(F16 x, int begin, int end, F16 other) {
  return {select_half(x.lo, begin, end, other.lo, 0), select_half(x.hi, begin, end, other.hi, 8)};
}

SG_INLINE __m256 widen_bf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
SG_INLINE F16 load_bf16(const uint16_t* p) {
  return {widen_bf16(_mm_loadu_si128((const __m128i*)p)), widen_bf16(_mm_loadu_si128((const __m128i*)(p + 8)))};
}

// The bf16 of each lane in the low half of its 32 bits.
SG_INLINE __m256i round_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
}
SG_INLINE void store_bf16(uint16_t* p, F16 x) {
  const __m256i mixed = _mm256_packus_epi32(round_bf16(x.lo), round_bf16(x.hi));  // 0-3, 8-11, 4-7, 12-15
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(mixed, 0xd8));
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

SG_INLINE __m256 exp_half(__m256 x) {
  const __m256 clamped = _mm256_min_ps(_mm256_set1_ps(kExpHigh), _mm256_max_ps(_mm256_set1_ps(kExpLow), x));
  const __m256 n =
      _mm256_round_ps(_mm256_mul_ps(clamped, _mm256_set1_ps(kLog2E)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2High), clamped);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2Low), r);
  __m256 poly = _mm256_set1_ps(kExpPoly[0]);
  SG_UNROLL
  for (int i = 1; i < 6; i++) poly = _mm256_fmadd_ps(poly, r, _mm256_set1_ps(kExpPoly[i]));
  poly = _mm256_add_ps(_mm256_fmadd_ps(_mm256_mul_ps(poly, r), r, r), _mm256_set1_ps(1.0f));
  // 2^n in two factors: n reaches -150 and 128, where one factor would not be a float.
  const __m256i exponent = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(exponent, 1), bias = _mm256_set1_epi32(127);
  const __m256i rest = _mm256_sub_epi32(exponent, half);
  poly = _mm256_mul_ps(poly, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
  return _mm256_mul_ps(poly, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}
SG_INLINE F16 exp(F16 x) { return {exp_half(x.lo), exp_half(x.hi)}; }

SG_INLINE __m256 exp2_half(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(kExp2Low), x);
  const __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm256_sub_ps(x, n);
  __m256 poly = _mm256_set1_ps(kExp2Poly[0]);
  SG_UNROLL
  for (int i = 1; i < 5; i++) poly = _mm256_fmadd_ps(poly, r, _mm256_set1_ps(kExp2Poly[i]));
  poly = _mm256_fmadd_ps(poly, r, _mm256_set1_ps(1.0f));
  // In two factors, as above.
  const __m256i exponent = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(exponent, 1), bias = _mm256_set1_epi32(127);
  const __m256i rest = _mm256_sub_epi32(exponent, half);
  poly = _mm256_mul_ps(poly, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23)));
  return _mm256_mul_ps(poly, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23)));
}
SG_INLINE F16 exp2(F16 x) { return {exp2_half(x.lo), exp2_half(x.hi)}; }

SG_INLINE float reduce_add(F16 x) {
  const __m256 eight = _mm256_add_ps(x.lo, x.hi);
  __m128 v = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}

SG_INLINE float reduce_max(F16 x) {
  const __m256 eight = _mm256_max_ps(x.lo, x.hi);
  __m128 v = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  v = _mm_max_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}

SG_INLINE Pairs load_pairs(const uint16_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 16))};
}
SG_INLINE Pairs set1_pair(const uint16_t* p) {
  int32_t bits;
  memcpy(&bits, p, 4);
  return {_mm256_set1_epi32(bits), _mm256_set1_epi32(bits)};
}

SG_INLINE __m256i join_half(__m256 a, __m256 b) {
  return _mm256_blend_epi16(_mm256_srli_epi32(_mm256_castps_si256(a), 16), _mm256_castps_si256(b), 0xaa);
}
SG_INLINE void hold(F16&) {}  // registers are few
SG_INLINE void hold(Pairs&) {}

SG_INLINE Pairs join_pairs(F16 a, F16 b) { return {join_half(a.lo, b.lo), join_half(a.hi, b.hi)}; }
SG_INLINE void store_pairs(uint16_t* p, Pairs x) {
  _mm256_storeu_si256((__m256i*)p, x.lo);
  _mm256_storeu_si256((__m256i*)(p + 16), x.hi);
}

SG_INLINE __m256 dot2_half(__m256 c, __m256i a, __m256i b) {
  const __m256i high = _mm256_set1_epi32(int(0xffff0000));
  const __m256 a0 = _mm256_castsi256_ps(_mm256_slli_epi32(a, 16));
  const __m256 b0 = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16));
  const __m256 a1 = _mm256_castsi256_ps(_mm256_and_si256(a, high));
  const __m256 b1 = _mm256_castsi256_ps(_mm256_and_si256(b, high));
  return _mm256_fmadd_ps(a1, b1, _mm256_fmadd_ps(a0, b0, c));
}
SG_INLINE F16 dot2(F16 c, Pairs a, Pairs b) { return {dot2_half(c.lo, a.lo, b.lo), dot2_half(c.hi, a.hi, b.hi)}; }

// ---- integers -------------------------------------------------------------------------------------------------------

struct I16 {
  __m256i lo, hi;
};
struct Quads {
  __m256i lo, hi;
};

SG_INLINE Quads load_quads(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
SG_INLINE void store_quads(uint8_t* p, Quads x) {
  _mm256_storeu_si256((__m256i*)p, x.lo);
  _mm256_storeu_si256((__m256i*)(p + 32), x.hi);
}
template <int kMask>
SG_INLINE Quads low_bits(Quads x) {
  const __m256i mask = _mm256_set1_epi8(char(kMask));
  return {_mm256_and_si256(x.lo, mask), _mm256_and_si256(x.hi, mask)};
}
template <int kMask>
SG_INLINE Quads or_bits(Quads x, Quads y) {
  const Quads bits = low_bits<kMask>(y);
  return {_mm256_or_si256(x.lo, bits.lo), _mm256_or_si256(x.hi, bits.hi)};
}
template <int kBits>
SG_INLINE Quads right(Quads x) {
  return {_mm256_srli_epi16(x.lo, kBits), _mm256_srli_epi16(x.hi, kBits)};
}
template <int kBits>
SG_INLINE Quads left(Quads x) {
  return {_mm256_slli_epi16(x.lo, kBits), _mm256_slli_epi16(x.hi, kBits)};
}

// Sums of 16 bits, two for each output, as long as they hold what they sum up; the bias goes into the sum of 32 bits.
// With 8-bit codes not even two products fit (2 x 127 x 127 would, 2 x 255 x 127 does not), so these turn signed, and
// the magnitude of one factor meets the other with its sign.
constexpr bool sums_are_short(int bias) { return bias < 5; }
template <int kBias>
SG_INLINE I16 start_dot(const int32_t*) {
  return {_mm256_setzero_si256(), _mm256_setzero_si256()};
}
template <int kBias>
SG_INLINE __m256i dot4_half(__m256i c, __m256i w, __m256i x) {
  if (kBias == 7) {
    w = _mm256_xor_si256(w, _mm256_set1_epi8(char(0x80)));
    x = _mm256_sign_epi8(x, w);
    w = _mm256_abs_epi8(w);
  }
  const __m256i pairs = _mm256_maddubs_epi16(w, x);
  if (sums_are_short(kBias)) return _mm256_add_epi16(c, pairs);
  return _mm256_add_epi32(c, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
template <int kBias>
SG_INLINE I16 dot4(I16 c, Quads w, const int8_t* x) {
  int32_t bits;
  memcpy(&bits, x, 4);
  const __m256i quad = _mm256_set1_epi32(bits);
  return {dot4_half<kBias>(c.lo, w.lo, quad), dot4_half<kBias>(c.hi, w.hi, quad)};
}
template <int kBias>
SG_INLINE F16 finish_dot(I16 c, const int32_t* negative_sum) {
  if (sums_are_short(kBias)) {
    const __m256i ones = _mm256_set1_epi16(1);
    c = {_mm256_madd_epi16(c.lo, ones), _mm256_madd_epi16(c.hi, ones)};
  }
  if (kBias > 0 && kBias < 7) {
    const __m256i start = _mm256_set1_epi32(*negative_sum * (1 << kBias));
    c = {_mm256_add_epi32(c.lo, start), _mm256_add_epi32(c.hi, start)};
  }
  return {_mm256_cvtepi32_ps(c.lo), _mm256_cvtepi32_ps(c.hi)};
}

SG_INLINE F16 load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
SG_INLINE F16 load_u8(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
SG_INLINE F16 load_i8(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
SG_INLINE F16 round(F16 x) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.lo, kMode), _mm256_round_ps(x.hi, kMode)};
}
SG_INLINE void store_i8(int8_t* p, F16 x) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.lo), _mm256_cvtps_epi32(x.hi));  // 0-3 8-11 4-7 12-15
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
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

// simd_common.h for AVX-512 (F, BW, VL, DQ), with AVX512-BF16 where the unit is compiled for it.
#pragma once
// gcc's own headers begin many AVX-512 intrinsics from an undefined register, and gcc 12 warns about it (PR 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

#include "cpu/simd_common.h"

namespace sg {
namespace {

constexpr int kTileRows = 12, kTileSums = 24;

struct F16 {
  __m512 v;
};
struct Pairs {
  __m512i v;
};

SG_INLINE F16 zero() { return {_mm512_setzero_ps()}; }
SG_INLINE F16 set1(float f) { return {_mm512_set1_ps(f)}; }
SG_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
SG_INLINE void store(float* p, F16 x) { _mm512_storeu_ps(p, x.v); }

SG_INLINE F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
SG_INLINE F16 sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
SG_INLINE F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
SG_INLINE F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
SG_INLINE F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
SG_INLINE F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
SG_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

SG_INLINE __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1); }

SG_INLINE F16 load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
SG_INLINE void store_n(float* p, F16 x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.v); }

SG_INLINE F16 select_lanes(F16 x, int begin, int end, F16 other) {
  return {_mm512_mask_mov_ps(other.v, first_lanes(end) & ~first_lanes(begin), x.v)};
}

SG_INLINE F16 widen_bf16(__m256i bits) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}

SG_INLINE __m256i narrow_bf16(F16 x) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(x.v);
#else
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet), 16));
#endif
}

SG_INLINE F16 load_bf16(const uint16_t* p) { return widen_bf16(_mm256_loadu_si256((const __m256i*)p)); }
SG_INLINE void store_bf16(uint16_t* p, F16 x) { _mm256_storeu_si256((__m256i*)p, narrow_bf16(x)); }
SG_INLINE F16 load_bf16_n(const uint16_t* p, int n) { return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }
SG_INLINE void store_bf16_n(uint16_t* p, F16 x, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16(x)); }

SG_INLINE F16 exp(F16 x) {
  const __m512 clamped = _mm512_min_ps(_mm512_set1_ps(kExpHigh), _mm512_max_ps(_mm512_set1_ps(kExpLow), x.v));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(clamped, _mm512_set1_ps(kLog2E)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2High), clamped);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2Low), r);
  __m512 poly = _mm512_set1_ps(kExpPoly[0]);
  SG_UNROLL
  for (int i = 1; i < 6; i++) poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(kExpPoly[i]));
  poly = _mm512_fmadd_ps(_mm512_mul_ps(poly, r), r, r);
  return {_mm512_scalef_ps(_mm512_add_ps(poly, _mm512_set1_ps(1.0f)), n)};
}

SG_INLINE float reduce_add(F16 x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  __m128 v = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  v = _mm_add_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)));
}

SG_INLINE float reduce_max(F16 x) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  __m128 v = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  v = _mm_max_ps(v, _mm_movehl_ps(v, v));
  return _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)));
}

SG_INLINE Pairs load_pairs(const uint16_t* p) { return {_mm512_loadu_si512(p)}; }
SG_INLINE Pairs set1_pair(const uint16_t* p) {
  int32_t bits;
  memcpy(&bits, p, 4);
  return {_mm512_set1_epi32(bits)};
}

SG_INLINE F16 dot2(F16 c, Pairs a, Pairs b) {
#ifdef __AVX512BF16__
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
#else
  const __m512i high = _mm512_set1_epi32(int(0xffff0000));
  const __m512 a0 = _mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16));
  const __m512 b0 = _mm512_castsi512_ps(_mm512_slli_epi32(b.v, 16));
  const __m512 a1 = _mm512_castsi512_ps(_mm512_and_si512(a.v, high));
  const __m512 b1 = _mm512_castsi512_ps(_mm512_and_si512(b.v, high));
  return {_mm512_fmadd_ps(a1, b1, _mm512_fmadd_ps(a0, b0, c.v))};
#endif
}

}  // namespace
}  // namespace sg

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

constexpr int kTileRows = 12, kTileSums = 24, kIntRows = 8;

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

SG_INLINE F16 exp2(F16 x) {
  const __m512 n = _mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x.v, n);
  __m512 poly = _mm512_set1_ps(kExp2Poly[0]);
  SG_UNROLL
  for (int i = 1; i < 5; i++) poly = _mm512_fmadd_ps(poly, r, _mm512_set1_ps(kExp2Poly[i]));
  return {_mm512_scalef_ps(_mm512_fmadd_ps(poly, r, _mm512_set1_ps(1.0f)), n)};
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

SG_INLINE Pairs join_pairs(F16 a, F16 b) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(a.v), 16);
  return {_mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_castps_si512(b.v))};
}
SG_INLINE void store_pairs(uint16_t* p, Pairs x) { _mm512_storeu_si512(p, x.v); }

// NOTE: gcc 12 reads such an operand from memory again for each use of it, if nothing says that it may be another.
SG_INLINE void hold(F16& x) { asm("" : "+v"(x.v)); }
SG_INLINE void hold(Pairs& x) { asm("" : "+v"(x.v)); }

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

// ---- integers -------------------------------------------------------------------------------------------------------

struct I16 {
  __m512i v;
};
struct Quads {
  __m512i v;
};

SG_INLINE Quads load_quads(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
SG_INLINE void store_quads(uint8_t* p, Quads x) { _mm512_storeu_si512(p, x.v); }
template <int kMask>
SG_INLINE Quads low_bits(Quads x) {
  return {_mm512_and_si512(x.v, _mm512_set1_epi8(char(kMask)))};
}
template <int kMask>
SG_INLINE Quads or_bits(Quads x, Quads y) {
  return {_mm512_ternarylogic_epi32(x.v, y.v, _mm512_set1_epi8(char(kMask)), 0xf8)};
}
template <int kBits>
SG_INLINE Quads right(Quads x) {
  return {_mm512_srli_epi16(x.v, kBits)};
}
template <int kBits>
SG_INLINE Quads left(Quads x) {
  return {_mm512_slli_epi16(x.v, kBits)};
}

SG_INLINE __m512i set1_quad(const int8_t* p) {
  int32_t bits;
  memcpy(&bits, p, 4);
  return _mm512_set1_epi32(bits);
}

#ifdef __AVX512VNNI__
template <int kBias>
SG_INLINE I16 start_dot(const int32_t* negative_sum) {
  if (kBias == 0) return {_mm512_setzero_si512()};
  return {_mm512_slli_epi32(_mm512_set1_epi32(*negative_sum), kBias)};
}
template <int kBias>
SG_INLINE I16 dot4(I16 c, Quads w, const int8_t* x) {
  return {_mm512_dpbusd_epi32(c.v, w.v, set1_quad(x))};
}
template <int kBias>
SG_INLINE F16 finish_dot(I16 c, const int32_t*) {
  return {_mm512_cvtepi32_ps(c.v)};
}
#else
// Sums of 16 bits, two for each output, as long as they hold what they sum up; the bias goes into the sum of 32 bits.
// With 8-bit codes not even two products fit (2 x 127 x 127 would, 2 x 255 x 127 does not), so these turn signed, and
// the magnitude of one factor meets the other with its sign.
constexpr bool sums_are_short(int bias) { return bias < 5; }
template <int kBias>
SG_INLINE I16 start_dot(const int32_t*) {
  return {_mm512_setzero_si512()};
}
template <int kBias>
SG_INLINE I16 dot4(I16 c, Quads w, const int8_t* x) {
  __m512i codes = w.v, values = set1_quad(x);
  if (kBias == 7) {
    const __m512i value = _mm512_xor_si512(w.v, _mm512_set1_epi8(char(0x80)));
    const __mmask64 negative = _mm512_movepi8_mask(value);
    codes = _mm512_abs_epi8(value);
    values = _mm512_mask_sub_epi8(values, negative, _mm512_setzero_si512(), values);
  }
  const __m512i pairs = _mm512_maddubs_epi16(codes, values);
  if (sums_are_short(kBias)) return {_mm512_add_epi16(c.v, pairs)};
  return {_mm512_add_epi32(c.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
}
template <int kBias>
SG_INLINE F16 finish_dot(I16 c, const int32_t* negative_sum) {
  __m512i sum = sums_are_short(kBias) ? _mm512_madd_epi16(c.v, _mm512_set1_epi16(1)) : c.v;
  if (kBias > 0 && kBias < 7) sum = _mm512_add_epi32(sum, _mm512_set1_epi32(*negative_sum * (1 << kBias)));
  return {_mm512_cvtepi32_ps(sum)};
}
#endif

SG_INLINE F16 load_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
SG_INLINE F16 load_u8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
SG_INLINE F16 load_i8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
SG_INLINE F16 round(F16 x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
SG_INLINE void store_i8(int8_t* p, F16 x) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}

// Halves the vectors at each level, with op between what is shuffled together: lanes of 32 bits, then of 128.
template <class Op>
SG_INLINE F16 reduce_each(const F16 (&x)[16], Op op) {
  __m512 quarters[4];
  SG_UNROLL
  for (int i = 0; i < 4; i++) {
    const __m512 *v = &x[4 * i].v, a = op(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 b = op(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    quarters[i] = op(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  const __m512 low =
      op(_mm512_shuffle_f32x4(quarters[0], quarters[1], 0x88), _mm512_shuffle_f32x4(quarters[0], quarters[1], 0xdd));
  const __m512 high =
      op(_mm512_shuffle_f32x4(quarters[2], quarters[3], 0x88), _mm512_shuffle_f32x4(quarters[2], quarters[3], 0xdd));
  return {op(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd))};
}
SG_INLINE F16 reduce_max_each(const F16 (&x)[16]) {
  return reduce_each(x, [](__m512 a, __m512 b) __attribute__((always_inline)) { return _mm512_max_ps(a, b); });
}
SG_INLINE F16 reduce_add_each(const F16 (&x)[16]) {
  return reduce_each(x, [](__m512 a, __m512 b) __attribute__((always_inline)) { return _mm512_add_ps(a, b); });
}

}  // namespace
}  // namespace sg

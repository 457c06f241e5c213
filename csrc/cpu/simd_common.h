// What the simd_*.h have in common. Each gives the same names in an anonymous namespace, so that the .inl files
// are written once and a unit (k_*.cpp) gets its own copy of everything; nothing here may have external linkage,
// because the linker would keep one copy of it, perhaps one with AVX-512 code.
//
//   F16                        16 floats
//   Pairs                      16 pairs of bf16; pair i is elements 2 i and 2 i + 1
//   zero() set1(f)
//   load(p) store(p, x)        unaligned; f32
//   load_bf16(p) store_bf16(p, x)     bf16 in memory, rounded to nearest even; AVX512-BF16 flushes denormals to zero
//   load_n(p, n) store_n(p, x, n) load_bf16_n(p, n) store_bf16_n(p, x, n)
//                              the first n lanes, 0 <= n <= 16: other lanes are zero, other memory is not touched
//   add sub mul div max min    max(a, b) and min(a, b) are b where one of the two is NaN
//   fma(a, b, c)               a * b + c, rounded once where the processor has it
//   select_lanes(x, b, e, y)   lanes b .. e - 1 of x, the others of y
//   exp(x)                     within 2 ulp; 0 for -inf, inf for inf, NaN for NaN
//   exp2(x)                    within 3 ulp for x < 128; 0 below -150, also for the largest negative number; 1 for 0
//   reduce_add(x) reduce_max(x)     lanes i and i + 8, then i + 4, i + 2, i + 1: one order everywhere
//   load_pairs(p) set1_pair(p) 16 pairs, or one pair in every lane, from memory
//   store_pairs(p, x)
//   join_pairs(a, b)           pairs (a[i], b[i]) of numbers that bf16 holds exactly
//   dot2(c, a, b)              c + a0 * b0 + a1 * b1, lane by lane
//   hold(x)                    x stays in a register from here on, where there are registers enough
//
//   I16                        16 dot products under way
//   Quads                      16 quads of bytes; quad i is bytes 4 i .. 4 i + 3
//   load_quads(p) store_quads(p, x)   64 bytes
//   low_bits<m>(x)             each byte & m                  or_bits<m>(x, y)   x | y & m, byte by byte
//   right<n>(x) left<n>(x)     16-bit lanes shifted: mask what crosses from byte to byte
//   start_dot<bias>(p) dot4<bias>(c, w, x) finish_dot<bias>(c, p)
//                              dot products of at most four quads of codes w = 2^bias + weight with signed bytes: dot4
//                              adds the sum of w[j] * x[j] over each quad of w and the one quad x, and finish_dot gives
//                              the sums, with the bias taken off, as floats, exact. p = -sum of all the x. bias 0:
//                              codes are the weights, below 32; else they are below 2^(bias + 1), and bias is 3, 4, 5,
//                              7. So bias 0, 3 and 4 leave sums that 16 bits hold, for processors that work so.
//   load_half(p) load_u8(p) load_i8(p)   16 numbers as floats
//   round(x)                   to nearest, ties to even
//   reduce_max_each(x) reduce_add_each(x)   lane i: over the lanes of x[i], 16 vectors; sums in an order of their own
//   store_i8(p, x)             16 floats within -128 .. 127, rounded to nearest even
//
//   kTileRows, kTileSums       the register file: a tile of a matrix product has at most kTileRows rows and kTileSums
//   F16
//                              accumulators
//   kIntRows                   rows of a tile of an integer product, times two accumulators
#pragma once
#include <cstdint>
#include <cstring>

#define SG_INLINE static inline __attribute__((always_inline))
#define SG_INLINE_MEMBER inline __attribute__((always_inline))

// Before a loop with a constant number of rounds whose arrays must become registers.
#ifdef __clang__
#define SG_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SG_UNROLL _Pragma("GCC unroll 16")
#endif

namespace sg {
namespace {

// Coefficients of exp(r) = 1 + r + r^2 (c[5] + c[4] r + ... + c[0] r^5) on |r| <= ln 2 / 2, and of the range reduction
// x = n ln 2 + r, with ln 2 in two parts so that n * kLn2High is exact.
constexpr float kExpPoly[6] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                               4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
constexpr float kLog2E = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
// 2^r = 1 + r (c[4] + c[3] r + ... + c[0] r^4) within 1e-7 on |r| <= 1/2.
constexpr float kExp2Poly[5] = {1.3264727e-3f, 9.6715130e-3f, 5.5507336e-2f, 2.4022242e-1f, 6.9314700e-1f};
constexpr float kExp2Low = -151.0f;
// exp is 0 below the first and inf above the second; beyond them x is clamped.
constexpr float kExpLow = -104.0f, kExpHigh = 89.0f;

}  // namespace
}  // namespace sg

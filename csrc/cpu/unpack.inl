// Blocks of integer weights, from memory to registers: codes one byte each, scales as floats. Included by a unit after
// its simd header; layouts are those of packed.h.
//
// Every type comes down to the same here, so that products know three cases and not ten types:
//
//   w = scale q + min           q unsigned, one scale and min for 32 columns
//   w = scale (q - 2^bias)      the same without a min; the bias goes into the integer sum
//   w = scale (q - 32)          with a scale for 16 columns (Q6_K)
//
// and 8-bit codes with a zero point are both: scale (q - 128) + min.
#include "cpu/packed.h"

namespace sg {
namespace {

// The bits above the fourth of a block's codes.
template <int kBits>
struct HighBits {
  Quads vectors[2];

  SG_INLINE_MEMBER explicit HighBits(const uint8_t* block) {
    if constexpr (kBits == 5 || kBits == 6) vectors[0] = load_quads(block + 4 * kQuadBytes);
    if constexpr (kBits == 6) vectors[1] = load_quads(block + 5 * kQuadBytes);
  }
};

template <int kBits>
SG_INLINE Quads shifted(Quads x) {
  if constexpr (kBits > 0) return left<kBits>(x);
  if constexpr (kBits < 0) return right<-kBits>(x);
  return x;
}

// Quad kQuad of a block, a code in each byte.
template <int kBits, int kQuad>
SG_INLINE Quads quad_of(const uint8_t* block, const HighBits<kBits>& high) {
  if constexpr (kBits == 8) return load_quads(block + kQuad * kQuadBytes);
  const Quads both = load_quads(block + kQuad / 2 * kQuadBytes);
  const Quads low = low_bits<15>(shifted<kQuad % 2 * -4>(both));
  if constexpr (kBits == 5) return or_bits<16>(low, shifted<4 - kQuad>(high.vectors[0]));
  if constexpr (kBits == 6) return or_bits<48>(low, shifted<4 - kQuad % 4 * 2>(high.vectors[kQuad / 4]));
  return low;
}

// What the 16 rows of a block are scaled with.
struct BlockScales {
  F16 scale, second;  // the second one where a scale is of 16 columns
  F16 min;            // where the type has any
};

template <Head kHead, int kBits>
SG_INLINE BlockScales scales_of(const uint8_t* head, int block_in_super) {
  const F16 d = load_half(reinterpret_cast<const uint16_t*>(head));
  if constexpr (kHead == Head::Scale) return {d, d, d};
  if constexpr (kHead == Head::ScaleMin) return {d, d, load_half(reinterpret_cast<const uint16_t*>(head + 32))};
  if constexpr (kHead == Head::ScaleZero)
    return {d, d, mul(d, sub(set1(kBits == 8 ? 128.0f : 0.0f), load_u8(head + 32)))};
  if constexpr (kHead == Head::K) {
    const F16 e = load_half(reinterpret_cast<const uint16_t*>(head + 32));
    const F16 min = mul(e, load_u8(head + 192 + 16 * block_in_super));
    return {mul(d, load_u8(head + 64 + 16 * block_in_super)), d, sub(zero(), min)};
  }
  const int8_t* scales = reinterpret_cast<const int8_t*>(head + 32) + 32 * block_in_super;
  return {mul(d, load_i8(scales)), mul(d, load_i8(scales + 16)), d};
}

// How far ahead of the blocks being unpacked their memory is asked for.
constexpr int kAhead = 4096;

}  // namespace
}  // namespace sg

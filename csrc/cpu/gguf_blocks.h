// Stored rows to float32: every element type of common/dtypes.h.
//
// Block formats follow ggml (https://github.com/ggml-org/ggml, ggml-common.h): a row is a run of blocks of 32 or 256
// elements, each with its scales. Rows may lie at any byte of a mapped file, so nothing is read through a wider
// pointer. Everything is in an anonymous namespace: each instruction set compiles its own copy.
#pragma once
#include <cstdint>
#include <cstring>

#include "common/dtypes.h"

namespace sg {
namespace {

inline float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t read_u16(const uint8_t* p) { return uint16_t(p[0] | p[1] << 8); }
inline float bf16_to_float(uint16_t bits) { return float_from_bits(uint32_t(bits) << 16); }

// The exponent's bias differs by 112, and multiplying also puts subnormals right; infinities and NaN need all bits set.
inline float half_to_float(uint16_t half) {
  const uint32_t magnitude = uint32_t(half & 0x7fff) << 13, sign = uint32_t(half & 0x8000) << 16;
  const float scaled = float_from_bits(magnitude) * float_from_bits(0x77800000);  // 2^112
  uint32_t bits;
  memcpy(&bits, &scaled, 4);
  if (magnitude >= 0x0f800000) bits |= 0x7f800000;
  return float_from_bits(bits | sign);
}

inline float read_half(const uint8_t* p) { return half_to_float(read_u16(p)); }

// Each format: kElements and kBytes of a block, and decode(block, out).

struct ElementF32 {
  static constexpr int kElements = 1, kBytes = 4;
  static inline void decode(const uint8_t* p, float* out) { memcpy(out, p, 4); }
};

struct ElementF16 {
  static constexpr int kElements = 1, kBytes = 2;
  static inline void decode(const uint8_t* p, float* out) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    *out = half_to_float(bits);
  }
};

struct ElementBF16 {
  static constexpr int kElements = 1, kBytes = 2;
  static inline void decode(const uint8_t* p, float* out) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    *out = bf16_to_float(bits);
  }
};

// Four bits: element i is the low half of byte i, element i + 16 the high half.
struct BlockQ4_0 {  // d half, 16 bytes
  static constexpr int kElements = 32, kBytes = 18;
  static inline void decode(const uint8_t* p, float* out) {
    const float d = read_half(p);
    for (int i = 0; i < 16; i++) {
      out[i] = d * float((p[2 + i] & 15) - 8);
      out[i + 16] = d * float((p[2 + i] >> 4) - 8);
    }
  }
};

struct BlockQ4_1 {  // d half, m half, 16 bytes
  static constexpr int kElements = 32, kBytes = 20;
  static inline void decode(const uint8_t* p, float* out) {
    const float d = read_half(p), m = read_half(p + 2);
    for (int i = 0; i < 16; i++) {
      out[i] = d * float(p[4 + i] & 15) + m;
      out[i + 16] = d * float(p[4 + i] >> 4) + m;
    }
  }
};

// Five bits: as four, and bit i of a 32-bit word is the fifth of element i.
inline uint32_t read_u32(const uint8_t* p) { return uint32_t(read_u16(p)) | uint32_t(read_u16(p + 2)) << 16; }
inline int fifth_bit(uint32_t bits, int i) { return int(bits >> i & 1) << 4; }

struct BlockQ5_0 {  // d half, 32 bits, 16 bytes
  static constexpr int kElements = 32, kBytes = 22;
  static inline void decode(const uint8_t* p, float* out) {
    const float d = read_half(p);
    const uint32_t high = read_u32(p + 2);
    for (int i = 0; i < 16; i++) {
      out[i] = d * float(((p[6 + i] & 15) | fifth_bit(high, i)) - 16);
      out[i + 16] = d * float(((p[6 + i] >> 4) | fifth_bit(high, i + 16)) - 16);
    }
  }
};

struct BlockQ5_1 {  // d half, m half, 32 bits, 16 bytes
  static constexpr int kElements = 32, kBytes = 24;
  static inline void decode(const uint8_t* p, float* out) {
    const float d = read_half(p), m = read_half(p + 2);
    const uint32_t high = read_u32(p + 4);
    for (int i = 0; i < 16; i++) {
      out[i] = d * float((p[8 + i] & 15) | fifth_bit(high, i)) + m;
      out[i + 16] = d * float((p[8 + i] >> 4) | fifth_bit(high, i + 16)) + m;
    }
  }
};

struct BlockQ8_0 {  // d half, 32 signed bytes
  static constexpr int kElements = 32, kBytes = 34;
  static inline void decode(const uint8_t* p, float* out) {
    const float d = read_half(p);
    for (int i = 0; i < 32; i++) out[i] = d * float(int8_t(p[2 + i]));
  }
};

// The 8 six-bit scales and 8 six-bit minima of a Q4_K or Q5_K block, in 12 bytes: the first four of each lie in the low
// bits of bytes 0-3 and 4-7; the last four have their low bits in bytes 8-11 and their high bits on top of the former.
struct ScaleMin {
  float scale, min;
};
inline ScaleMin scale_min(const uint8_t* p, int i, float d, float dmin) {
  if (i < 4) return {d * float(p[i] & 63), dmin * float(p[i + 4] & 63)};
  return {d * float((p[i + 4] & 15) | (p[i - 4] >> 6) << 4), dmin * float((p[i + 4] >> 4) | (p[i] >> 6) << 4)};
}

struct BlockQ4_K {  // d half, dmin half, 12 bytes of scales, 128 bytes: 64 elements in each 32
  static constexpr int kElements = 256, kBytes = 144;
  static inline void decode(const uint8_t* p, float* out) {
    const float d = read_half(p), dmin = read_half(p + 2);
    for (int group = 0; group < 4; group++) {
      const ScaleMin low = scale_min(p + 4, 2 * group, d, dmin), high = scale_min(p + 4, 2 * group + 1, d, dmin);
      const uint8_t* bytes = p + 16 + 32 * group;
      float* to = out + 64 * group;
      for (int i = 0; i < 32; i++) to[i] = low.scale * float(bytes[i] & 15) - low.min;
      for (int i = 0; i < 32; i++) to[i + 32] = high.scale * float(bytes[i] >> 4) - high.min;
    }
  }
};

struct BlockQ5_K {  // as Q4_K, with 32 bytes of fifth bits before the 128: bit g of byte i belongs to element 32 g + i
  static constexpr int kElements = 256, kBytes = 176;
  static inline void decode(const uint8_t* p, float* out) {
    const float d = read_half(p), dmin = read_half(p + 2);
    const uint8_t* fifth = p + 16;
    for (int group = 0; group < 8; group++) {
      const ScaleMin s = scale_min(p + 4, group, d, dmin);
      const uint8_t* bytes = p + 48 + 32 * (group / 2);
      const int shift = group % 2 * 4;
      for (int i = 0; i < 32; i++) {
        const int value = (bytes[i] >> shift & 15) | (fifth[i] >> group & 1) << 4;
        out[32 * group + i] = s.scale * float(value) - s.min;
      }
    }
  }
};

// 128 bytes of low four bits, 64 bytes of high two, 16 signed scales (one for 16 elements), d half. Each half of the
// block (128 elements: 64 low bytes, 32 high) is four runs of 32: low halves of the two rows of low bytes, then high
// halves.
struct BlockQ6_K {
  static constexpr int kElements = 256, kBytes = 210;
  static inline void decode(const uint8_t* p, float* out) {
    const float d = read_half(p + 208);
    for (int run = 0; run < 8; run++) {
      const int half = run / 4, quarter = run % 4;
      const uint8_t* low = p + 64 * half + 32 * (quarter % 2);
      const uint8_t* high = p + 128 + 32 * half;
      const int low_shift = quarter / 2 * 4, high_shift = quarter * 2;
      for (int i = 0; i < 32; i++) {
        const float scale = d * float(int8_t(p[192 + 2 * run + i / 16]));
        const int value = (low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4;
        out[32 * run + i] = scale * float(value - 32);
      }
    }
  }
};

template <class Format>
inline void decode_run(const uint8_t* row, int64_t first, int64_t count, float* out) {
  const uint8_t* p = row + first / Format::kElements * Format::kBytes;
  for (int64_t i = 0; i < count; i += Format::kElements, p += Format::kBytes) Format::decode(p, out + i);
}

// Elements first .. first + count - 1 of a row; both are multiples of the format's block.
inline void dequantize(DType type, const void* row, int64_t first, int64_t count, float* out) {
  const uint8_t* p = static_cast<const uint8_t*>(row);
  switch (type) {
    case DType::F32:
      return decode_run<ElementF32>(p, first, count, out);
    case DType::F16:
      return decode_run<ElementF16>(p, first, count, out);
    case DType::BF16:
      return decode_run<ElementBF16>(p, first, count, out);
    case DType::Q4_0:
      return decode_run<BlockQ4_0>(p, first, count, out);
    case DType::Q4_1:
      return decode_run<BlockQ4_1>(p, first, count, out);
    case DType::Q5_0:
      return decode_run<BlockQ5_0>(p, first, count, out);
    case DType::Q5_1:
      return decode_run<BlockQ5_1>(p, first, count, out);
    case DType::Q8_0:
      return decode_run<BlockQ8_0>(p, first, count, out);
    case DType::Q4_K:
      return decode_run<BlockQ4_K>(p, first, count, out);
    case DType::Q5_K:
      return decode_run<BlockQ5_K>(p, first, count, out);
    case DType::Q6_K:
      return decode_run<BlockQ6_K>(p, first, count, out);
    case DType::INT4:
    case DType::INT8:
      break;  // a group's size is not known here: packed.h
  }
}

}  // namespace
}  // namespace sg

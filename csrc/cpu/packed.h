// Integer weights in memory: how a panel of 16 output rows is packed, and how one row gets in and out of it.
//
// A panel is a run of superblocks along K, each a head and then blocks of 32 columns. The numbers of one kind stand
// side by side for the 16 rows, so that one vector meets 16 outputs:
//
//   type       superblock   head                                                    weight
//   Q4_0 Q5_0 Q8_0   32     d half[16]                                              d (q - bias), bias 8, 16, 128
//   Q4_1 Q5_1        32     d half[16], m half[16]                                  d q + m
//   INT4 INT8     group     d half[16], z u8[16]                                    d (q - z)
//   Q4_K Q5_K       256     d half[16], e half[16], scales u8[8][16], mins u8[8][16]      d scale q - e min
//   Q6_K            256     d half[16], scales i8[16][16] (one for 16 columns)      d scale (q - 32)
//
// A block is eight quads of columns; a quad is 64 bytes, [16 rows][4 columns]:
//
//   8 bits     the eight quads
//   4 bits     four vectors: quad 2 i in the low halves of their bytes, quad 2 i + 1 in the high ones
//   5 bits     as 4 bits, then one vector: bit i of a byte is the fifth bit of quad i
//   6 bits     as 4 bits, then two vectors: bits 2 i and 2 i + 1 of a byte of vector j belong to quad 4 j + i
//
// Codes and scales are the stored ones, so nothing is lost; a GGUF tensor takes the bytes of its file (Q4_K and Q5_K
// 2.8 % and 2.3 % more: their scales of six bits take eight).
#pragma once
#include <cstdint>
#include <cstring>

#include "common/dtypes.h"
#include "cpu/gguf_blocks.h"

namespace sg {
namespace {

constexpr int kBlockColumns = 32;
constexpr int kQuadBytes = 64;

enum class Head { Scale, ScaleMin, ScaleZero, K, K6 };

struct PackedLayout {
  int bits, columns;  // of a code; of a superblock
  Head head;
  int head_bytes;

  constexpr int code_bytes() const { return bits * kQuadBytes; }  // of a block
  constexpr int blocks() const { return columns / kBlockColumns; }
  constexpr int64_t super_bytes() const { return head_bytes + int64_t(blocks()) * code_bytes(); }
  constexpr int64_t panel_bytes(int k) const { return k / columns * super_bytes(); }
};

// group: columns that share a scale, of INT4 and INT8 alone.
inline constexpr PackedLayout packed_layout(DType type, int group) {
  switch (type) {
    case DType::Q4_0:
      return {4, 32, Head::Scale, 32};
    case DType::Q5_0:
      return {5, 32, Head::Scale, 32};
    case DType::Q8_0:
      return {8, 32, Head::Scale, 32};
    case DType::Q4_1:
      return {4, 32, Head::ScaleMin, 64};
    case DType::Q5_1:
      return {5, 32, Head::ScaleMin, 64};
    case DType::Q4_K:
      return {4, 256, Head::K, 320};
    case DType::Q5_K:
      return {5, 256, Head::K, 320};
    case DType::Q6_K:
      return {6, 256, Head::K6, 288};
    case DType::INT4:
      return {4, group, Head::ScaleZero, 48};
    case DType::INT8:
      return {8, group, Head::ScaleZero, 48};
    default:
      return {0, 0, Head::Scale, 0};
  }
}

// What is taken off a code before it is scaled, where the type says so.
inline constexpr int code_bias(DType type) {
  return type == DType::Q4_0 ? 8 : type == DType::Q5_0 ? 16 : type == DType::Q6_K ? 32 : type == DType::Q8_0 ? 128 : 0;
}

// What the head of a superblock says of one row.
struct RowHead {
  uint16_t d, m;
  uint8_t zero;
  uint8_t scales[16], mins[8];
};

inline void put_half(uint8_t* p, int lane, uint16_t bits) { memcpy(p + 2 * lane, &bits, 2); }
inline uint16_t get_half(const uint8_t* p, int lane) { return read_u16(p + 2 * lane); }

inline void put_head(const PackedLayout& layout, uint8_t* p, int lane, const RowHead& head) {
  put_half(p, lane, head.d);
  if (layout.head == Head::ScaleMin || layout.head == Head::K) put_half(p + 32, lane, head.m);
  if (layout.head == Head::ScaleZero) p[32 + lane] = head.zero;
  if (layout.head == Head::K) {
    for (int i = 0; i < 8; i++) p[64 + 16 * i + lane] = head.scales[i], p[192 + 16 * i + lane] = head.mins[i];
  }
  if (layout.head == Head::K6) {
    for (int i = 0; i < 16; i++) p[32 + 16 * i + lane] = head.scales[i];
  }
}

inline RowHead get_head(const PackedLayout& layout, const uint8_t* p, int lane) {
  RowHead head{};
  head.d = get_half(p, lane);
  if (layout.head == Head::ScaleMin || layout.head == Head::K) head.m = get_half(p + 32, lane);
  if (layout.head == Head::ScaleZero) head.zero = p[32 + lane];
  if (layout.head == Head::K) {
    for (int i = 0; i < 8; i++) head.scales[i] = p[64 + 16 * i + lane], head.mins[i] = p[192 + 16 * i + lane];
  }
  if (layout.head == Head::K6) {
    for (int i = 0; i < 16; i++) head.scales[i] = p[32 + 16 * i + lane];
  }
  return head;
}

// The codes of four columns of one row, a byte each, the first column's in the lowest.
using Quad = uint32_t;

constexpr Quad kHalves = 0x0f0f0f0f, kOnes = 0x01010101;  // of every byte: its low half, its lowest bit

inline Quad read_quad(const uint8_t* p) {
  Quad quad;
  memcpy(&quad, p, 4);
  return quad;
}

// The codes q[8] of one row of a block.
inline void put_codes(int bits, uint8_t* block, int lane, const Quad* q) {
  uint8_t* to = block + 4 * lane;
  if (bits == 8) {
    for (int i = 0; i < 8; i++) memcpy(to + i * kQuadBytes, q + i, 4);
    return;
  }
  for (int i = 0; i < 4; i++) {
    const Quad low = (q[2 * i] & kHalves) | (q[2 * i + 1] & kHalves) << 4;
    memcpy(to + i * kQuadBytes, &low, 4);
  }
  to += 4 * kQuadBytes;
  if (bits == 5) {
    Quad high = 0;
    for (int i = 0; i < 8; i++) high |= (q[i] >> 4 & kOnes) << i;
    memcpy(to, &high, 4);
  }
  if (bits == 6) {
    for (int j = 0; j < 2; j++) {
      Quad high = 0;
      for (int i = 0; i < 4; i++) high |= (q[4 * j + i] >> 4 & 3 * kOnes) << 2 * i;
      memcpy(to + j * kQuadBytes, &high, 4);
    }
  }
}

inline int get_code(int bits, const uint8_t* block, int lane, int c) {
  const int quad = c / 4, at = lane * 4 + c % 4;
  if (bits == 8) return block[quad * kQuadBytes + at];
  const int low = block[quad / 2 * kQuadBytes + at] >> quad % 2 * 4 & 15;
  const uint8_t* high = block + 4 * kQuadBytes + at;
  if (bits == 5) return low | (high[0] >> quad & 1) << 4;
  if (bits == 6) return low | (high[quad / 4 * kQuadBytes] >> quad % 4 * 2 & 3) << 4;
  return low;
}

// ---- stored blocks --------------------------------------------------------------------------------------------------

// `count` quads whose codes of four bits lie in the low halves of as many words, then as many in the high halves.
inline void read_halves(const uint8_t* p, int count, Quad* q) {
  for (int i = 0; i < count; i++) {
    const Quad word = read_quad(p + 4 * i);
    q[i] = word & kHalves, q[i + count] = word >> 4 & kHalves;
  }
}

// Bit i of a word of 32 bits becomes the fifth of code i.
inline void read_fifths(const uint8_t* p, Quad* q) {
  const uint32_t bits = read_u32(p);
  for (int i = 0; i < 8; i++) q[i] |= ((bits >> 4 * i & 15) * 0x00204081 & kOnes) << 4;  // four bits, one a byte
}

// Scales and mins of Q4_K and Q5_K: see scale_min in gguf_blocks.h.
inline void read_k_scales(const uint8_t* p, RowHead& head) {
  for (int i = 0; i < 4; i++) {
    head.scales[i] = p[i] & 63;
    head.mins[i] = p[i + 4] & 63;
    head.scales[i + 4] = uint8_t((p[i + 8] & 15) | (p[i] >> 6) << 4);
    head.mins[i + 4] = uint8_t((p[i + 8] >> 4) | (p[i + 4] >> 6) << 4);
  }
}

inline void read_k_codes(const uint8_t* p, Quad* q) {
  for (int i = 0; i < 4; i++) read_halves(p + 32 * i, 8, q + 16 * i);
}

inline void read_k_fifths(const uint8_t* p, Quad* q) {
  for (int i = 0; i < 8; i++) {
    for (int j = 0; j < 8; j++) q[8 * i + j] |= (read_quad(p + 4 * j) >> i & kOnes) << 4;
  }
}

inline void read_k6_codes(const uint8_t* p, Quad* q) {
  for (int half = 0; half < 2; half++, q += 32) {
    read_halves(p + 64 * half, 16, q);
    for (int i = 0; i < 4; i++) {
      for (int j = 0; j < 8; j++) {
        q[8 * i + j] |= (read_quad(p + 128 + 32 * half + 4 * j) >> 2 * i & 3 * kOnes) << 4;
      }
    }
  }
}

// A stored block of one row (GGUF's, 32 or 256 values): its head, and its codes as quads.
inline RowHead read_block(DType type, const uint8_t* p, Quad* codes) {
  RowHead head{};
  head.d = read_u16(p);
  switch (type) {
    case DType::Q4_0:
      read_halves(p + 2, 4, codes);
      break;
    case DType::Q4_1:
      head.m = read_u16(p + 2);
      read_halves(p + 4, 4, codes);
      break;
    case DType::Q5_0:
      read_halves(p + 6, 4, codes);
      read_fifths(p + 2, codes);
      break;
    case DType::Q5_1:
      head.m = read_u16(p + 2);
      read_halves(p + 8, 4, codes);
      read_fifths(p + 4, codes);
      break;
    case DType::Q8_0:
      for (int i = 0; i < 8; i++) codes[i] = read_quad(p + 2 + 4 * i) ^ 0x80808080;
      break;
    case DType::Q4_K:
      head.m = read_u16(p + 2);
      read_k_scales(p + 4, head);
      read_k_codes(p + 16, codes);
      break;
    case DType::Q5_K:
      head.m = read_u16(p + 2);
      read_k_scales(p + 4, head);
      read_k_codes(p + 48, codes);
      read_k_fifths(p + 16, codes);
      break;
    case DType::Q6_K:
      head.d = read_u16(p + 208);
      for (int i = 0; i < 16; i++) head.scales[i] = p[192 + i];
      read_k6_codes(p, codes);
      break;
    default:
      break;
  }
  return head;
}

// ---- values
// ----------------------------------------------------------------------------------------------------------

// Code q of column c of a superblock as a number: the same operations as in gguf_blocks.h, so the same bits.
inline float value_of(DType type, const RowHead& head, int c, int q) {
  const float d = half_to_float(head.d);
  switch (type) {
    case DType::Q4_1:
    case DType::Q5_1:
      return d * float(q) + half_to_float(head.m);
    case DType::INT4:
    case DType::INT8:
      return d * float(q - head.zero);
    case DType::Q4_K:
    case DType::Q5_K:
      return d * float(head.scales[c / 32]) * float(q) - half_to_float(head.m) * float(head.mins[c / 32]);
    case DType::Q6_K:
      return d * float(int8_t(head.scales[c / 16])) * float(q - 32);
    default:
      return d * float(q - code_bias(type));
  }
}

// Row `lane` of a panel to k floats.
inline void unpack_row(DType type, int group, const uint8_t* panel, int lane, int k, float* out) {
  const PackedLayout layout = packed_layout(type, group);
  for (int column = 0; column < k; column += layout.columns, panel += layout.super_bytes()) {
    const RowHead head = get_head(layout, panel, lane);
    for (int c = 0; c < layout.columns; c++) {
      const uint8_t* block = panel + layout.head_bytes + c / 32 * layout.code_bytes();
      out[column + c] = value_of(type, head, c, get_code(layout.bits, block, lane, c % 32));
    }
  }
}

}  // namespace
}  // namespace sg

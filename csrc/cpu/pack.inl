// Packing a matrix into panels of 16 rows; see LinearArgs for the layout and PackArgs for what comes in. Included by a
// unit after its simd header.
#include "cpu/gguf_blocks.h"
#include "cpu/kernels.h"
#include "cpu/round.inl"

namespace sg {
namespace {

constexpr int kPackColumns = 256;  // decoded at once: a whole number of blocks of every format, and even

// Which stored row holds row `row`.
SG_INLINE int64_t stored_row(const PackArgs& a, int row) {
  if (a.rope_heads == 0) return row;
  const int head_dim = a.n / a.rope_heads, half = head_dim / 2;
  const int head = row / head_dim, in_head = row % head_dim;
  return int64_t(head) * head_dim + in_head % half * 2 + in_head / half;
}

// `count` columns from `first` on of one row, as lane `lane` of the panel.
void put_f32(const float* values, int first, int count, int lane, float* panel) {
  for (int i = 0; i < count; i++) panel[int64_t(first + i) * 16 + lane] = values[i];
}

void put_bf16(const float* values, int first, int count, int lane, uint16_t* panel) {
  uint16_t rounded[kPackColumns];
  for (int i = 0; i < count; i += 16) store_bf16(rounded + i, load_n(values + i, count - i < 16 ? count - i : 16));
  uint16_t* to = panel + int64_t(first) * 16 + lane * 2;
  for (int i = 0; i + 1 < count; i += 2) memcpy(to + i * 16, rounded + i, 4);
  if (count % 2 == 1) to[(count - 1) * 16] = rounded[count - 1];
}

void pack_panel(const PackArgs& a, int64_t panel) {
  const int64_t base = panel * 16 - a.first_row;  // source row of lane 0
  const int64_t panel_size = a.dst_type == DType::F32 ? int64_t(a.k) * 16 : int64_t(a.k + 1) / 2 * 32;
  const int begin = base < 0 ? int(-base) : 0, end = a.n - base < 16 ? int(a.n - base) : 16;
  float values[kPackColumns];
  for (int first = 0; first < a.k; first += kPackColumns) {
    const int count = a.k - first < kPackColumns ? a.k - first : kPackColumns;
    for (int lane = begin; lane < end; lane++) {
      const int64_t row = stored_row(a, int(base + lane));
      dequantize(a.src_type, static_cast<const uint8_t*>(a.src) + row * a.src_row_bytes, first, count, values);
      if (a.dst_type == DType::F32) {
        put_f32(values, first, count, lane, static_cast<float*>(a.dst) + panel * panel_size);
      } else {
        put_bf16(values, first, count, lane, static_cast<uint16_t*>(a.dst) + panel * panel_size);
      }
    }
  }
}

// ---- integers -------------------------------------------------------------------------------------------------------

constexpr int kRoundColumns = 1024;  // rounded at a time: whole blocks; a longer group is read twice

// The codes of `count` columns of one row of a superblock.
void put_columns(const PackedLayout& layout, uint8_t* to, int lane, int count, const Quad* codes) {
  for (int c = 0; c < count; c += kBlockColumns, codes += kBlockColumns / 4, to += layout.code_bytes())
    put_codes(layout.bits, to, lane, codes);
}

// A stored superblock of one row whose codes stay as they are.
void repack_super(const PackArgs& a, const PackedLayout& layout, const uint8_t* stored, int lane, uint8_t* to) {
  Quad codes[64];
  if (layout.head != Head::ScaleZero) {
    put_head(layout, to, lane, read_block(a.src_type, stored, codes));
    return put_columns(layout, to + layout.head_bytes, lane, layout.columns, codes);
  }
  put_head(layout, to, lane, {read_u16(stored), 0, stored[2], {}, {}});  // d half, z u8, 0, a code each byte
  for (int b = 0; b < layout.blocks(); b++) {
    memcpy(codes, stored + 4 + b * kBlockColumns, kBlockColumns);
    put_codes(layout.bits, to + layout.head_bytes + b * layout.code_bytes(), lane, codes);
  }
}

// A superblock of one row of floats, rounded.
void round_super(const PackArgs& a, const PackedLayout& layout, const uint8_t* row, int column, int lane, uint8_t* to) {
  float values[kRoundColumns];
  Quad codes[kRoundColumns / 4];
  Range range;
  for (int c = 0; c < layout.columns; c += kRoundColumns) {
    const int count = layout.columns - c < kRoundColumns ? layout.columns - c : kRoundColumns;
    dequantize(a.src_type, row, column + c, count, values);
    range.take(values, count);
  }
  const RowHead head = head_of(a.dst_type, a.symmetric, range);
  put_head(layout, to, lane, head);
  to += layout.head_bytes;
  for (int c = 0; c < layout.columns; c += kRoundColumns) {
    const int count = layout.columns - c < kRoundColumns ? layout.columns - c : kRoundColumns;
    if (layout.columns > kRoundColumns) dequantize(a.src_type, row, column + c, count, values);
    round_values(a.dst_type, head, values, count, reinterpret_cast<uint8_t*>(codes));
    put_columns(layout, to + c / kBlockColumns * layout.code_bytes(), lane, count, codes);
  }
}

// Row by row for some columns at a time: a row is read in order, and what is written of the panel stays near.
void pack_int_panel(const PackArgs& a, int64_t panel) {
  const PackedLayout layout = packed_layout(a.dst_type, a.group);
  const int64_t base = panel * 16 - a.first_row;  // source row of lane 0
  uint8_t* panel_at = static_cast<uint8_t*>(a.dst) + panel * layout.panel_bytes(a.k);
  const int begin = base < 0 ? int(-base) : 0, end = a.n - base < 16 ? int(a.n - base) : 16;
  const int supers = a.k / layout.columns, stored = int(a.src_row_bytes / supers);  // bytes of a stored superblock
  const int step = layout.columns < kRoundColumns ? kRoundColumns / layout.columns : 1;
  for (int first = 0; first < supers; first += step) {
    const int last = first + step < supers ? first + step : supers;
    for (int lane = begin; lane < end; lane++) {
      const auto* row = static_cast<const uint8_t*>(a.src) + stored_row(a, int(base + lane)) * a.src_row_bytes;
      for (int s = first; s < last; s++) {
        uint8_t* to = panel_at + s * layout.super_bytes();
        if (is_integer(a.src_type)) {
          repack_super(a, layout, row + int64_t(s) * stored, lane, to);
        } else {
          round_super(a, layout, row, s * layout.columns, lane, to);
        }
      }
    }
  }
}

void pack(const PackArgs& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; item++) {
    if (is_integer(a.dst_type)) {
      pack_int_panel(a, a.first_row / 16 + item);
    } else {
      pack_panel(a, a.first_row / 16 + item);
    }
  }
}

}  // namespace
}  // namespace sg

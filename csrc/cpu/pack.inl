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

void put_super(const PackedLayout& layout, uint8_t* to, int lane, const RowHead& head, const uint8_t* codes) {
  put_head(layout, to, lane, head);
  for (int c = 0; c < layout.columns; c++) {
    uint8_t* block = to + layout.head_bytes + c / kBlockColumns * layout.code_bytes();
    put_code(layout.bits, block, lane, c % kBlockColumns, codes[c]);
  }
}

// A stored row whose codes stay as they are.
void repack_row(const PackArgs& a, const PackedLayout& layout, const uint8_t* row, int lane, uint8_t* panel) {
  const int stored = int(a.src_row_bytes / (a.k / layout.columns));  // bytes of a block
  uint8_t codes[256];
  for (int column = 0; column < a.k; column += layout.columns, row += stored, panel += layout.super_bytes()) {
    if (layout.head == Head::ScaleZero) {  // d half, z u8, 0, a code each byte
      const RowHead head{read_u16(row), 0, row[2], {}, {}};
      put_super(layout, panel, lane, head, row + 4);
    } else {
      const RowHead head = read_block(a.src_type, row, codes);
      put_super(layout, panel, lane, head, codes);
    }
  }
}

// A stored row of floats, rounded group by group.
void round_row(const PackArgs& a, const PackedLayout& layout, const uint8_t* row, int lane, uint8_t* panel) {
  constexpr int kMost = 1024;  // columns at a time; a longer group is read twice
  float values[kMost];
  uint8_t codes[kMost];
  for (int column = 0; column < a.k; column += layout.columns, panel += layout.super_bytes()) {
    Range range;
    for (int c = 0; c < layout.columns; c += kMost) {
      const int count = layout.columns - c < kMost ? layout.columns - c : kMost;
      dequantize(a.src_type, row, column + c, count, values);
      range.take(values, count);
    }
    const RowHead head = head_of(a.dst_type, a.symmetric, range);
    put_head(layout, panel, lane, head);
    for (int c = 0; c < layout.columns; c += kMost) {
      const int count = layout.columns - c < kMost ? layout.columns - c : kMost;
      dequantize(a.src_type, row, column + c, count, values);
      round_values(a.dst_type, head, values, count, codes);
      for (int i = 0; i < count; i++) {
        uint8_t* block = panel + layout.head_bytes + (c + i) / kBlockColumns * layout.code_bytes();
        put_code(layout.bits, block, lane, i % kBlockColumns, codes[i]);
      }
    }
  }
}

void pack_int_panel(const PackArgs& a, int64_t panel) {
  const PackedLayout layout = packed_layout(a.dst_type, a.group);
  const int64_t base = panel * 16 - a.first_row;  // source row of lane 0
  uint8_t* to = static_cast<uint8_t*>(a.dst) + panel * layout.panel_bytes(a.k);
  const int begin = base < 0 ? int(-base) : 0, end = a.n - base < 16 ? int(a.n - base) : 16;
  for (int lane = begin; lane < end; lane++) {
    const auto* row = static_cast<const uint8_t*>(a.src) + stored_row(a, int(base + lane)) * a.src_row_bytes;
    if (is_integer(a.src_type)) {
      repack_row(a, layout, row, lane, to);
    } else {
      round_row(a, layout, row, lane, to);
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

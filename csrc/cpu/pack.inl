// Packing a matrix into panels of 16 rows; see LinearArgs for the layout and PackArgs for what comes in. Included by a
// unit after its simd header.
#include "cpu/gguf_blocks.h"
#include "cpu/kernels.h"

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

void pack(const PackArgs& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; item++) pack_panel(a, a.first_row / 16 + item);
}

}  // namespace
}  // namespace sg

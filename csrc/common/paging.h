// Where a token's keys and values are: page arithmetic, written once.
//
// A page holds page_size tokens of all layers in one piece of memory, so that only pages in use are resident and a page
// is copied in one go:  [num_layers][K, V][num_kv_heads] tiles. A tile holds the page's tokens of one head. Within a
// tile (P = page_size, D = head_dim):
//
//   float32   K [D][P]             V [P][D]
//   bfloat16  K [D/2][P][2]        V [P/2][D][2]      for P == 1:  K [D]  V [D]
//   INT8      K [D][P]             V [P][D]           then the P scales of its tokens, float32, 4-byte aligned
//
// so that 16 tokens are 16 lanes of a dot product over D, and 16 dimensions are 16 lanes of the product with V.
#pragma once
#include <cstdint>

#include "common/dtypes.h"

namespace sg {

// Bytes of a tile's elements, without what follows them. Offsets may pass 2^31, hence int64_t.
inline constexpr int64_t tile_elements_bytes(DType kv_dtype, int page_size, int head_dim) {
  const int64_t elements = int64_t(page_size) * head_dim;
  return kv_dtype == DType::INT8 ? (elements + 3) / 4 * 4 : elements * operand_bytes(kv_dtype);
}

// Bytes of one tile: page_size tokens of one head, keys or values.
inline constexpr int64_t tile_bytes(DType kv_dtype, int page_size, int head_dim) {
  return tile_elements_bytes(kv_dtype, page_size, head_dim) + (kv_dtype == DType::INT8 ? int64_t(page_size) * 4 : 0);
}

// Element index within a tile of (token slot s, dimension d).
inline constexpr int64_t k_index_plain(int s, int d, int page_size) { return int64_t(d) * page_size + s; }
inline constexpr int64_t v_index_plain(int s, int d, int head_dim) { return int64_t(s) * head_dim + d; }
inline constexpr int64_t k_index_bf16(int s, int d, int page_size) {
  return (int64_t(d / 2) * page_size + s) * 2 + d % 2;
}
inline constexpr int64_t v_index_bf16(int s, int d, int page_size, int head_dim) {
  return page_size == 1 ? d : (int64_t(s / 2) * head_dim + d) * 2 + s % 2;
}

}  // namespace sg

// Writing a step's keys and values into their pages, and the element types of products. Included by every unit before
// attention.inl; the layouts are those of common/paging.h.
#pragma once
#include "common/paging.h"
#include "cpu/kernels.h"

namespace sg {
namespace {

void rope(const RopeArgs& a, int64_t begin, int64_t end);  // elementwise.inl

namespace attention {

constexpr int kPage = 16;  // tokens of a tile of keys as products take it: the lanes of an F16
constexpr int kMostHeadDim = 256;

// The two element types of products. A step of a product takes kWidth elements of the summed dimension at once.
struct InF32 {
  using Element = float;
  using Vector = F16;
  static constexpr int kWidth = 1;
  SG_INLINE Vector lines(const float* p) { return load(p); }
  SG_INLINE Vector broadcast(const float* p) { return set1(*p); }
  SG_INLINE F16 multiply(F16 sum, Vector a, Vector b) { return fma(a, b, sum); }
  SG_INLINE void store(float* p, F16 x) { sg::store(p, x); }
  SG_INLINE void store_first(float* p, F16 x, int n) { store_n(p, x, n); }
  SG_INLINE int64_t k_index(int s, int d, int page_size) { return k_index_plain(s, d, page_size); }
  SG_INLINE int64_t v_index(int s, int d, int, int head_dim) { return v_index_plain(s, d, head_dim); }
  SG_INLINE float element(int8_t code) { return float(code); }
  SG_INLINE void widen(float* to, const int8_t* codes, const int8_t*) { sg::store(to, load_i8(codes)); }
};

struct InBF16 {
  using Element = uint16_t;
  using Vector = Pairs;
  static constexpr int kWidth = 2;
  SG_INLINE Vector lines(const uint16_t* p) { return load_pairs(p); }
  SG_INLINE Vector broadcast(const uint16_t* p) { return set1_pair(p); }
  SG_INLINE F16 multiply(F16 sum, Vector a, Vector b) { return dot2(sum, a, b); }
  SG_INLINE void store(uint16_t* p, F16 x) { store_bf16(p, x); }
  SG_INLINE void store_first(uint16_t* p, F16 x, int n) { store_bf16_n(p, x, n); }
  SG_INLINE int64_t k_index(int s, int d, int page_size) { return k_index_bf16(s, d, page_size); }
  SG_INLINE int64_t v_index(int s, int d, int page_size, int head_dim) {
    return v_index_bf16(s, d, page_size, head_dim);
  }
  // Codes have 7 bits and a sign, so they are exact in bfloat16.
  SG_INLINE uint16_t element(int8_t code) {
    const float x = float(code);
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return uint16_t(bits >> 16);
  }
  // 16 pairs: of codes[i] and odd_codes[i].
  SG_INLINE void widen(uint16_t* to, const int8_t* codes, const int8_t* odd_codes) {
    store_pairs(to, join_pairs(load_i8(codes), load_i8(odd_codes)));
  }
};

// Operand elements from n floats.
template <class In>
SG_INLINE void convert(typename In::Element* to, const float* from, int n) {
  int i = 0;
  for (; i + 16 <= n; i += 16) In::store(to + i, load(from + i));
  if (i < n) In::store_first(to + i, load_n(from + i, n - i), n - i);
}

// Where the token at position p of the sequence in `table` is: its page and the slot in it.
struct Place {
  int64_t page;
  int slot;
};
SG_INLINE Place place_of(const int32_t* table, int p, int page_size) { return {table[p / page_size], p % page_size}; }

SG_INLINE const int32_t* table_of(const Batch& b, int seq) {
  return b.page_tables + b.slots[seq] * b.page_table_stride;
}

// One head of one page, in `pages`: the layer's keys or values.
SG_INLINE char* tile_at(const AttendArgs& a, void* pages, int64_t page, int head) {
  return static_cast<char*>(pages) + page * a.page_stride + head * tile_bytes(a.kv_dtype, a.page_size, a.head_dim);
}

// The head at x, turned to the position of `row` where that is ours to do: x itself, or `turned` [kMostHeadDim].
SG_INLINE const float* turned_head(const AttendArgs& a, int row, const float* x, float* turned) {
  if (!a.fused || a.rotary_dim == 0) return x;
  memcpy(turned, x, size_t(a.head_dim) * sizeof(float));
  const int64_t at = int64_t(row) * (a.rotary_dim / 2);
  rope({turned, a.head_dim, a.cos + at, a.sin + at, 1, a.head_dim, a.rotary_dim}, 0, 1);
  return turned;
}

// ---- a token's tiles ------------------------------------------------------------------------------------------------

template <class In>
void write_elements(const AttendArgs& a, const float* k, const float* v, char* k_tile, char* v_tile, int s,
                    bool clear_partner) {
  using Element = typename In::Element;
  Element key[kMostHeadDim], value[kMostHeadDim];
  convert<In>(key, k, a.head_dim);
  convert<In>(value, v, a.head_dim);
  Element* to_k = reinterpret_cast<Element*>(k_tile);
  Element* to_v = reinterpret_cast<Element*>(v_tile);
  for (int d = 0; d < a.head_dim; ++d) {
    to_k[In::k_index(s, d, a.page_size)] = key[d];
    to_v[In::v_index(s, d, a.page_size, a.head_dim)] = value[d];
  }
  if (!clear_partner) return;
  for (int d = 0; d < a.head_dim; ++d) to_v[In::v_index(s + 1, d, a.page_size, a.head_dim)] = 0;
}

// Codes of n values, scale * code being nearest to each; returns the scale.
SG_INLINE float quantize_head(const float* x, int n, int8_t* codes) {
  F16 most = zero();
  for (int i = 0; i < n; i += 16) {
    const F16 part = n - i < 16 ? load_n(x + i, n - i) : load(x + i);
    most = max(max(part, sub(zero(), part)), most);
  }
  const float largest = reduce_max(most), scale = largest / 127;
  const F16 factor = set1(scale > 0 ? 127 / largest : 0);
  for (int i = 0; i < n; i += 16) {
    const F16 part = n - i < 16 ? load_n(x + i, n - i) : load(x + i);
    store_i8(codes + i, max(min(mul(part, factor), set1(127)), set1(-127)));
  }
  return scale;
}

SG_INLINE void write_codes(const AttendArgs& a, const float* k, const float* v, char* k_tile, char* v_tile, int s) {
  int8_t key[kMostHeadDim + 16], value[kMostHeadDim + 16];
  const float scales[2] = {quantize_head(k, a.head_dim, key), quantize_head(v, a.head_dim, value)};
  for (int d = 0; d < a.head_dim; ++d) {
    k_tile[k_index_plain(s, d, a.page_size)] = char(key[d]);
    v_tile[v_index_plain(s, d, a.head_dim)] = char(value[d]);
  }
  const int64_t at = tile_elements_bytes(a.kv_dtype, a.page_size, a.head_dim) + s * 4;
  memcpy(k_tile + at, &scales[0], 4);
  memcpy(v_tile + at, &scales[1], 4);
}

// ---- storing --------------------------------------------------------------------------------------------------------

// Key and value of one row and one head, into the tiles of its page.
template <class In>
void store_head(const AttendArgs& a, int row, int head) {
  const Batch& b = *a.batch;
  const int seq = b.row_seq[row];
  const Place at = place_of(table_of(b, seq), b.row_pos[row], a.page_size);
  float turned[kMostHeadDim];
  const float* k = turned_head(a, row, a.k + row * a.k_stride + int64_t(head) * a.head_dim, turned);
  const float* v = a.v + row * a.v_stride + int64_t(head) * a.head_dim;
  char* k_tile = tile_at(a, a.k_pages, at.page, head);
  char* v_tile = tile_at(a, a.v_pages, at.page, head);
  if (a.kv_dtype == DType::INT8) return write_codes(a, k, v, k_tile, v_tile, at.slot);
  // NOTE: the partner only if no row of this step writes it, because another thread may just be doing so.
  const bool followed = row + 1 < b.num_rows && b.row_seq[row + 1] == seq;
  const bool clear_partner = In::kWidth == 2 && a.page_size > 1 && at.slot % 2 == 0 && !followed;
  write_elements<In>(a, k, v, k_tile, v_tile, at.slot, clear_partner);
}

template <class In>
void store_rows(const AttendArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int head = 0; head < a.num_kv_heads; ++head) store_head<In>(a, int(row), head);
  }
}

}  // namespace attention

void store_kv(const AttendArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == DType::F32) {
    attention::store_rows<attention::InF32>(a, begin, end);
  } else {
    attention::store_rows<attention::InBF16>(a, begin, end);
  }
}

}  // namespace
}  // namespace sg

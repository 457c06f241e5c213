// Writing a step's keys and values into their pages, and the element types that pages hold. Included by every unit
// before attention.inl; the layouts are those of common/paging.h.
#include "common/paging.h"
#include "cpu/kernels.h"

namespace sg {
namespace {
namespace attention {

// The two element types. A step of a product takes kWidth elements of the summed dimension at once.
struct InF32 {
  using Element = float;
  using Vector = F16;
  static constexpr int kWidth = 1;
  SG_INLINE Vector lines(const float* p) { return load(p); }
  SG_INLINE Vector broadcast(const float* p) { return set1(*p); }
  SG_INLINE F16 multiply(F16 sum, Vector a, Vector b) { return fma(a, b, sum); }
  SG_INLINE void store(float* p, F16 x) { sg::store(p, x); }
  SG_INLINE void store_first(float* p, F16 x, int n) { store_n(p, x, n); }
  SG_INLINE int64_t k_index(int s, int d, int page_size) { return k_index_f32(s, d, page_size); }
  SG_INLINE int64_t v_index(int s, int d, int, int head_dim) { return v_index_f32(s, d, head_dim); }
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
};

// Operand elements from n floats.
template <class In>
SG_INLINE void convert(typename In::Element* to, const float* from, int n) {
  int i = 0;
  for (; i + 16 <= n; i += 16) In::store(to + i, load(from + i));
  if (i < n) In::store_first(to + i, load_n(from + i, n - i), n - i);
}

// ---- storing --------------------------------------------------------------------------------------------------------

// Where the token at position p of the sequence in `table` is: its page and the slot in it.
struct Place {
  int64_t page;
  int slot;
};
SG_INLINE Place place_of(const int32_t* table, int p, int page_size) { return {table[p / page_size], p % page_size}; }

SG_INLINE const int32_t* table_of(const Batch& b, int seq) {
  return b.page_tables + b.slots[seq] * b.page_table_stride;
}

// One head's key and value, [head_dim] each, into slot s of their tiles.
template <class In>
SG_INLINE void store_head(const AttendArgs& a, const typename In::Element* k, const typename In::Element* v,
                          typename In::Element* k_tile, typename In::Element* v_tile, int s, bool clear_partner) {
  for (int d = 0; d < a.head_dim; ++d) {
    k_tile[In::k_index(s, d, a.page_size)] = k[d];
    v_tile[In::v_index(s, d, a.page_size, a.head_dim)] = v[d];
  }
  if (!clear_partner) return;
  for (int d = 0; d < a.head_dim; ++d) v_tile[In::v_index(s + 1, d, a.page_size, a.head_dim)] = 0;
}

template <class In>
void store_rows(const AttendArgs& a, int row, int end) {
  using Element = typename In::Element;
  const Batch& b = *a.batch;
  Element k[256], v[256];
  for (; row < end; ++row) {
    const int seq = b.row_seq[row];
    const Place at = place_of(table_of(b, seq), b.row_pos[row], a.page_size);
    // NOTE: only if no row of this step writes the partner, because another thread may just be doing it.
    const bool followed = row + 1 < b.num_rows && b.row_seq[row + 1] == seq;
    const bool clear_partner = In::kWidth == 2 && a.page_size > 1 && at.slot % 2 == 0 && !followed;
    for (int h = 0; h < a.num_kv_heads; ++h) {
      const int64_t tile = tile_offset(at.page, a.page_stride, h, a.page_size, a.head_dim);
      convert<In>(k, a.k + row * a.k_stride + h * a.head_dim, a.head_dim);
      convert<In>(v, a.v + row * a.v_stride + h * a.head_dim, a.head_dim);
      store_head<In>(a, k, v, static_cast<Element*>(a.k_pages) + tile, static_cast<Element*>(a.v_pages) + tile, at.slot,
                     clear_partner);
    }
  }
}

}  // namespace attention

void store_kv(const AttendArgs& a, int64_t begin, int64_t end) {
  if (a.dtype == DType::F32) {
    attention::store_rows<attention::InF32>(a, int(begin), int(end));
  } else {
    attention::store_rows<attention::InBF16>(a, int(begin), int(end));
  }
}

}  // namespace
}  // namespace sg

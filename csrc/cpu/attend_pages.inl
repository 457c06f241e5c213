// A block of an item's context: up to 128 tokens, as tiles that products take. Included by attention.inl.
//
// Pages whose tiles are so already are used in place. Others (8-bit codes, pages of another size, head dimensions that
// are no multiple of 16) are written to such tiles first, once for all rows of the item.
#pragma once
#include "cpu/kv_store.inl"

namespace sg {
namespace {
namespace attention {

constexpr int kBlock = kAttendBlock;
constexpr int kBlockPages = kBlock / kPage;

SG_INLINE int smaller(int a, int b) { return a < b ? a : b; }
SG_INLINE int larger_of(int a, int b) { return a > b ? a : b; }
SG_INLINE int rounded_up(int n, int step) { return (n + step - 1) / step * step; }

SG_INLINE bool whole_pages(const AttendArgs& a) { return a.page_size == kPage && a.head_dim % 16 == 0; }
SG_INLINE bool in_place(const AttendArgs& a) { return whole_pages(a) && a.kv_dtype != DType::INT8; }

// To the second-level cache: of those, a processor has more under way at once than of what goes to the first.
SG_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Where a sequence's pages are, of one key-value head; and tiles to copy a block to, null where none are needed.
template <class In>
struct Source {
  const AttendArgs& a;
  const int32_t* table;
  int head, limit;              // tokens from `limit` on are not to be touched
  int width;                    // head_dim rounded up to whole vectors
  typename In::Element* tiles;  // [keys, then values] of a block
  float* scales;                // [keys, values][kBlock]
};

// Up to kBlockPages consecutive pages of a block. Tokens from start on; `tokens` of them are the sequence's.
template <class In>
struct Block {
  int start, tokens, pages;
  const typename In::Element* k[kBlockPages];       // [head_dim / W, 16, W]
  const typename In::Element* v[kBlockPages];       // [16 / W, width, W]
  const typename In::Element* next_k[kBlockPages];  // of the following block; where it has none, its own values
  const typename In::Element* next_v[kBlockPages];
  const float* k_scales;  // [kBlock], of each token; null where keys are what they are
  const float* v_scales;
};

// ---- copies ---------------------------------------------------------------------------------------------------------

template <class In>
void copy_token(const Source<In>& source, const Place& at, int s, typename In::Element* k, typename In::Element* v) {
  using Element = typename In::Element;
  const AttendArgs& a = source.a;
  const char* k_tile = tile_at(a, a.k_pages, at.page, source.head);
  const char* v_tile = tile_at(a, a.v_pages, at.page, source.head);
  for (int d = 0; d < a.head_dim; ++d) {
    Element& to_k = k[In::k_index(s, d, kPage)];
    Element& to_v = v[In::v_index(s, d, kPage, source.width)];
    if (a.kv_dtype == DType::INT8) {
      to_k = In::element(int8_t(k_tile[k_index_plain(at.slot, d, a.page_size)]));
      to_v = In::element(int8_t(v_tile[v_index_plain(at.slot, d, a.head_dim)]));
    } else {
      to_k = reinterpret_cast<const Element*>(k_tile)[In::k_index(at.slot, d, a.page_size)];
      to_v = reinterpret_cast<const Element*>(v_tile)[In::v_index(at.slot, d, a.page_size, a.head_dim)];
    }
  }
}

// Scales of `tokens` tokens from slot at.slot on, in one page.
template <class In>
SG_INLINE void copy_scales(const Source<In>& source, const Place& at, int tokens, float* k_scales, float* v_scales) {
  const AttendArgs& a = source.a;
  if (a.kv_dtype != DType::INT8) return;
  const int64_t from = tile_elements_bytes(a.kv_dtype, a.page_size, a.head_dim) + at.slot * 4;
  memcpy(k_scales, tile_at(a, a.k_pages, at.page, source.head) + from, size_t(tokens) * 4);
  memcpy(v_scales, tile_at(a, a.v_pages, at.page, source.head) + from, size_t(tokens) * 4);
}

template <class In>
void copy_page(const Source<In>& source, int position, int tokens, typename In::Element* k, typename In::Element* v,
               float* k_scales, float* v_scales) {
  for (int s = 0; s < tokens; ++s) {
    const Place at = place_of(source.table, position + s, source.a.page_size);
    copy_token(source, at, s, k, v);
    copy_scales(source, at, 1, k_scales + s, v_scales + s);
  }
  if (In::kWidth == 1 || tokens % 2 == 0) return;
  for (int d = 0; d < source.width; ++d) v[In::v_index(tokens, d, kPage, source.width)] = 0;
}

// The page at `position`, of 16 tokens of codes. Those of slots that were never written are numbers, too.
template <class In>
void widen_page(const Source<In>& source, int position, int tokens, typename In::Element* k, typename In::Element* v,
                float* k_scales, float* v_scales) {
  constexpr int W = In::kWidth;
  const AttendArgs& a = source.a;
  const int64_t page = source.table[position / kPage];
  const int64_t following = source.table[smaller(position + kBlock, source.limit - 1) / kPage];
  const auto* k_codes = reinterpret_cast<const int8_t*>(tile_at(a, a.k_pages, page, source.head));
  const auto* v_codes = reinterpret_cast<const int8_t*>(tile_at(a, a.v_pages, page, source.head));
  const char* next_k = tile_at(a, a.k_pages, following, source.head);
  const char* next_v = tile_at(a, a.v_pages, following, source.head);
  for (int d = 0; d < a.head_dim; d += W) {
    In::widen(k + d * kPage, k_codes + d * kPage, k_codes + (d + W - 1) * kPage);
    if (d % 4 == 0) prefetch(next_k + d * kPage), prefetch(next_v + d * kPage);
  }
  for (int t = 0; t < kPage; t += W) {
    const int8_t* row = v_codes + t * a.head_dim;
    for (int d = 0; d < a.head_dim; d += 16)
      In::widen(v + t * a.head_dim + d * W, row + d, row + (W - 1) * a.head_dim + d);
  }
  copy_scales(source, {page, 0}, tokens, k_scales, v_scales);
}

// ---- blocks ---------------------------------------------------------------------------------------------------------

template <class In>
SG_INLINE const typename In::Element* tile_in_place(const Source<In>& source, void* pages, int position) {
  return reinterpret_cast<const typename In::Element*>(
      tile_at(source.a, pages, source.table[position / kPage], source.head));
}

template <class In>
SG_INLINE void point_at_page(const Source<In>& source, Block<In>& block, int i) {
  const int position = block.start + i * kPage, following = (block.start / kBlock + 1) * kBlock + i * kPage;
  block.k[i] = tile_in_place(source, source.a.k_pages, position);
  block.v[i] = tile_in_place(source, source.a.v_pages, position);
  const bool follows = following < source.limit;
  block.next_k[i] = follows ? tile_in_place(source, source.a.k_pages, following) : block.v[i];
  block.next_v[i] = follows ? tile_in_place(source, source.a.v_pages, following) : block.v[i];
}

template <class In>
void copy_to_tiles(const Source<In>& source, Block<In>& block, int i) {
  const AttendArgs& a = source.a;
  const int position = block.start + i * kPage, tokens = smaller(kPage, block.tokens - i * kPage);
  typename In::Element* k = source.tiles + int64_t(i) * kPage * a.head_dim;
  typename In::Element* v = source.tiles + int64_t(kBlock) * a.head_dim + int64_t(i) * kPage * source.width;
  float* k_scales = source.scales + i * kPage;
  if (whole_pages(a)) {
    widen_page(source, position, tokens, k, v, k_scales, k_scales + kBlock);
  } else {
    copy_page(source, position, tokens, k, v, k_scales, k_scales + kBlock);
  }
  block.k[i] = k;
  block.v[i] = block.next_k[i] = block.next_v[i] = v;
}

// Pages start / 16 ... of [start, end), which lies in one block.
template <class In>
SG_INLINE Block<In> load_block(const Source<In>& source, int start, int end) {
  Block<In> block;
  block.start = start;
  block.tokens = end - start;
  block.pages = rounded_up(block.tokens, kPage) / kPage;
  block.k_scales = block.v_scales = nullptr;
  if (source.tiles == nullptr) {
    for (int i = 0; i < block.pages; ++i) point_at_page(source, block, i);
    return block;
  }
  for (int i = 0; i < block.pages; ++i) copy_to_tiles(source, block, i);
  if (source.a.kv_dtype == DType::INT8) {
    // A token beyond the last has probability 0, which only a number leaves so.
    for (int t = block.tokens; t < block.pages * kPage; ++t) source.scales[t] = source.scales[kBlock + t] = 0;
    block.k_scales = source.scales;
    block.v_scales = source.scales + kBlock;
  }
  return block;
}

}  // namespace attention
}  // namespace
}  // namespace sg

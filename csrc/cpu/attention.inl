// Attention over pages: attending to all pages of each sequence. Included by every unit after its simd header; writing
// keys and values is in kv_store.inl, the layouts are those of common/paging.h.
//
// An item's rows are the queries of up to 16 positions (a tile, aligned to absolute multiples of 16) and of all query
// heads that share one key-value head, so that a page is read once for the whole group. Keys are turned into scores
// with tokens as lanes, values are summed with dimensions as lanes; no reduction is horizontal but a row's maximum.
//
// The arithmetic of a row depends on its query and its own pages alone, so a prompt's chunk and a decode give the same
// bits:
//   - blocks of 64 tokens, at absolute multiples of 64, in order: a running maximum, then o = o * alpha + p V, and each
//     element of o is one chain of multiply-adds over the tokens;
//   - every 512 tokens, at absolute multiples of 512, a fresh running state, merged into the row's total in order;
//   - a token that a row does not see gets probability exactly 0, which changes neither sums nor maxima. So it does not
//     matter which other rows made the tile visit its page.
// In bf16, queries and probabilities are rounded for the products; the sum of probabilities is of the unrounded ones.
//
// NOTE: 0 * NaN is NaN, so a value that no row sees must be finite wherever a tile multiplies it. Slots after the
// tile's last token are skipped, except the odd partner of an even last one in bf16, which store_kv zeroes.
#include "common/paging.h"
#include "cpu/kernels.h"
#include "cpu/kv_store.inl"
#include "cpu/lanes.inl"

namespace sg {
namespace {
namespace attention {

constexpr int kPage = 16;                                            // tokens of a tile of keys: the lanes of an F16
constexpr int kBlockPages = 4;                                       // pages between two updates of the running state
constexpr int kBlock = kPage * kBlockPages;                          // tokens
constexpr int kSplit = 512;                                          // tokens
constexpr int kTile = 16;                                            // positions of an item
constexpr int kRows = kTileSums >= 16 ? 4 : kTileSums >= 6 ? 3 : 2;  // queries at once
constexpr int kWide =
    kTileSums / kRows < kBlockPages ? kTileSums / kRows : kBlockPages;  // pages, or vectors of dimensions
static_assert(kWide >= 1 && kSplit % kBlock == 0);

SG_INLINE int smaller(int a, int b) { return a < b ? a : b; }
SG_INLINE int larger_of(int a, int b) { return a > b ? a : b; }
SG_INLINE int rounded_up(int n, int step) { return (n + step - 1) / step * step; }
SG_INLINE int lanes_from(int i, int n) { return smaller(16, n - i); }
constexpr float kNone = -__builtin_inff();

// ---- attending ------------------------------------------------------------------------------------------------------

// Pages whose tiles are as the kernel wants them are used in place; others are copied to such tiles block by block.
SG_INLINE bool in_place(const AttendArgs& a) { return a.page_size == kPage && a.head_dim % 16 == 0; }

// Running state of an item's rows.
struct State {
  float* maxima;  // [rows]
  float* sums;    // [rows, width + 16]: o, unnormalized, then the sum of probabilities as 16 partial sums
};

// One tile of queries, one key-value head. Row r is position first_pos + r / group, query head head * group + r %
// group.
template <class In>
struct Item {
  using Element = typename In::Element;
  const AttendArgs& a;
  const int32_t* table;
  int first_row, first_pos, head, group, rows;
  int width;       // head_dim rounded up to whole vectors
  Element* q;      // [rows, head_dim]
  Element* tiles;  // copies of a block's keys, then of its values; null where pages are used in place
  State split, total;

  int pos_of(int r) const { return first_pos + r / group; }
  int first_seen(int r) const { return a.window > 0 ? larger_of(0, pos_of(r) - a.window + 1) : 0; }
  int end() const { return pos_of(rows - 1) + 1; }
};

// Up to kBlockPages consecutive pages of a block. Tokens from start on; `tokens` of them are the sequence's.
template <class In>
struct Block {
  int start, tokens, pages;
  const typename In::Element* k[kBlockPages];     // [head_dim / W, 16, W]
  const typename In::Element* v[kBlockPages];     // [16 / W, width, W]
  const typename In::Element* next[kBlockPages];  // what is read next: keys of the following block, where it has any
};

template <class In>
void copy_token(const Item<In>& item, int position, int s, typename In::Element* k, typename In::Element* v) {
  using Element = typename In::Element;
  const AttendArgs& a = item.a;
  const Place at = place_of(item.table, position, a.page_size);
  const int64_t tile = tile_offset(at.page, a.page_stride, item.head, a.page_size, a.head_dim);
  const Element* from_k = static_cast<const Element*>(a.k_pages) + tile;
  const Element* from_v = static_cast<const Element*>(a.v_pages) + tile;
  for (int d = 0; d < a.head_dim; ++d) {
    k[In::k_index(s, d, kPage)] = from_k[In::k_index(at.slot, d, a.page_size)];
    v[In::v_index(s, d, kPage, item.width)] = from_v[In::v_index(at.slot, d, a.page_size, a.head_dim)];
  }
}

template <class In>
void copy_page(const Item<In>& item, int position, int tokens, typename In::Element* k, typename In::Element* v) {
  for (int s = 0; s < tokens; ++s) copy_token(item, position + s, s, k, v);
  if (In::kWidth == 1 || tokens % 2 == 0) return;
  for (int d = 0; d < item.width; ++d) v[In::v_index(tokens, d, kPage, item.width)] = 0;
}

template <class In>
SG_INLINE const typename In::Element* tile_in_place(const Item<In>& item, const void* pages, int position) {
  const AttendArgs& a = item.a;
  return static_cast<const typename In::Element*>(pages) +
         tile_offset(item.table[position / kPage], a.page_stride, item.head, kPage, a.head_dim);
}

// Pages start / 16 ... of [start, end), which lies in one block.
template <class In>
Block<In> load_block(const Item<In>& item, int start, int end) {
  using Element = typename In::Element;
  const AttendArgs& a = item.a;
  Block<In> block;
  block.start = start;
  block.tokens = end - start;
  block.pages = rounded_up(block.tokens, kPage) / kPage;
  const int64_t k_size = int64_t(kPage) * a.head_dim, v_size = int64_t(kPage) * item.width;
  for (int i = 0; i < block.pages; ++i) {
    const int position = start + i * kPage;
    if (item.tiles == nullptr) {
      const int following = (start / kBlock + 1) * kBlock + i * kPage;
      block.k[i] = tile_in_place(item, a.k_pages, position);
      block.v[i] = tile_in_place(item, a.v_pages, position);
      block.next[i] = following < item.end() ? tile_in_place(item, a.k_pages, following) : block.v[i];
    } else {
      Element* k = item.tiles + i * k_size;
      Element* v = item.tiles + kBlockPages * k_size + i * v_size;
      copy_page(item, position, smaller(kPage, end - position), k, v);
      block.k[i] = k;
      block.v[i] = block.next[i] = v;
    }
  }
  return block;
}

// scores[i][16 (page + j) + t] = q[i] . (key t of page + j), for R queries and N pages.
template <class In, int R, int N>
SG_INLINE void score_tile(const typename In::Element* q, int head_dim, const Block<In>& block, int page,
                          float (*scores)[kBlock]) {
  F16 sums[R][N];
  SG_UNROLL
  for (int i = 0; i < R; ++i) {
    SG_UNROLL
    for (int j = 0; j < N; ++j) sums[i][j] = zero();
  }
  const typename In::Element* k[N];
  SG_UNROLL
  for (int j = 0; j < N; ++j) k[j] = block.k[page + j];
  for (int d = 0; d < head_dim; d += In::kWidth) {
    typename In::Vector keys[N];
    SG_UNROLL
    for (int j = 0; j < N; ++j) {
      keys[j] = In::lines(k[j] + d * kPage);
      __builtin_prefetch(block.v[page + j] + d * kPage);  // its values come next; a tile of them is as long
    }
    SG_UNROLL
    for (int i = 0; i < R; ++i) {
      const typename In::Vector query = In::broadcast(q + i * head_dim + d);
      SG_UNROLL
      for (int j = 0; j < N; ++j) sums[i][j] = In::multiply(sums[i][j], query, keys[j]);
    }
  }
  SG_UNROLL
  for (int i = 0; i < R; ++i) {
    SG_UNROLL
    for (int j = 0; j < N; ++j) store(scores[i] + (page + j) * kPage, sums[i][j]);
  }
}

// o[i][16 (first + c) + lane] = o * alpha[i] + p[i] V, for R rows and C vectors of dimensions.
template <class In, int R, int C>
SG_INLINE void value_tile(const typename In::Element (*p)[kBlock], const float* alpha, const Block<In>& block,
                          int first, int width, float* o) {
  const int o_stride = width + 16;
  F16 sums[R][C];
  SG_UNROLL
  for (int i = 0; i < R; ++i) {
    SG_UNROLL
    for (int c = 0; c < C; ++c) sums[i][c] = mul(load(o + i * o_stride + (first + c) * 16), set1(alpha[i]));
  }
  for (int page = 0; page < block.pages; ++page) {
    const typename In::Element* v = block.v[page] + first * 16 * In::kWidth;
    const typename In::Element* next = block.next[page] + first * 16 * In::kWidth;
    const int tokens = smaller(kPage, block.tokens - page * kPage);
    for (int t = 0; t < tokens; t += In::kWidth) {
      typename In::Vector values[C];
      SG_UNROLL
      for (int c = 0; c < C; ++c) {
        values[c] = In::lines(v + t * width + c * 16 * In::kWidth);
        __builtin_prefetch(next + t * width + c * 16 * In::kWidth);
      }
      SG_UNROLL
      for (int i = 0; i < R; ++i) {
        const typename In::Vector weight = In::broadcast(p[i] + page * kPage + t);
        SG_UNROLL
        for (int c = 0; c < C; ++c) sums[i][c] = In::multiply(sums[i][c], weight, values[c]);
      }
    }
  }
  SG_UNROLL
  for (int i = 0; i < R; ++i) {
    SG_UNROLL
    for (int c = 0; c < C; ++c) store(o + i * o_stride + (first + c) * 16, sums[i][c]);
  }
}

SG_INLINE float exp_of(float x) {
  float all[16];
  store(all, exp(set1(x)));
  return all[0];
}

// cap * tanh(x / cap)
SG_INLINE F16 capped(F16 x, float cap) {
  const F16 one = set1(1), e = exp(mul(x, set1(2 / cap)));
  return mul(set1(cap), sub(one, div(set1(2), add(e, one))));
}

// Scores of one row to probabilities relative to its new running maximum; returns what earlier sums are to be
// multiplied with. Sees the block's tokens [begin, end).
template <class In>
SG_INLINE float soften(const AttendArgs& a, int pages, int begin, int end, const float* scores, float* maximum,
                       float* sum, typename In::Element* p) {
  if (begin >= end) {
    for (int i = 0; i < pages; ++i) In::store(p + i * kPage, zero());
    return 1;
  }
  F16 x[kBlockPages], top = set1(kNone);
  for (int i = 0; i < pages; ++i) {
    x[i] = mul(load(scores + i * kPage), set1(a.scale));
    if (a.softcap > 0) x[i] = capped(x[i], a.softcap);
    const int from = smaller(larger_of(begin - i * kPage, 0), kPage),
              to = smaller(larger_of(end - i * kPage, 0), kPage);
    if (from > 0 || to < kPage) x[i] = select_lanes(x[i], from, to, set1(kNone));
    top = max(top, x[i]);
  }
  const float highest = reduce_max(top), before = *maximum, now = highest > before ? highest : before;
  const float alpha = before == now ? 1 : exp_of(before - now);
  F16 total = mul(load(sum), set1(alpha));
  for (int i = 0; i < pages; ++i) {
    const F16 e = exp(sub(x[i], set1(now)));
    total = add(total, e);
    In::store(p + i * kPage, e);
  }
  store(sum, total);
  *maximum = now;
  return alpha;
}

// R rows from r on take in one block.
template <class In, int R>
__attribute__((noinline)) void attend_block(const Item<In>& item, const Block<In>& block, int r) {
  const AttendArgs& a = item.a;
  const typename In::Element* q = item.q + r * a.head_dim;
  float* sums = item.split.sums + r * (item.width + 16);
  alignas(64) float scores[R][kBlock];
  alignas(64) typename In::Element p[R][kBlock];
  float alpha[R];
  int page = 0;
  for (; page + kWide <= block.pages; page += kWide) score_tile<In, R, kWide>(q, a.head_dim, block, page, scores);
  for (; page < block.pages; ++page) score_tile<In, R, 1>(q, a.head_dim, block, page, scores);
  for (int i = 0; i < R; ++i) {
    const int begin = item.first_seen(r + i) - block.start;
    const int end = smaller(item.pos_of(r + i) + 1 - block.start, block.tokens);
    alpha[i] = soften<In>(a, block.pages, begin, end, scores[i], item.split.maxima + r + i,
                          sums + i * (item.width + 16) + item.width, p[i]);
  }
  const int vectors = item.width / 16;
  int c = 0;
  for (; c + kWide <= vectors; c += kWide) value_tile<In, R, kWide>(p, alpha, block, c, item.width, sums);
  for (; c < vectors; ++c) value_tile<In, R, 1>(p, alpha, block, c, item.width, sums);
}

// attend_block for a number of rows known at run time, 1 .. R.
template <class In, int R = kRows>
void attend_block_of(int rows, const Item<In>& item, const Block<In>& block, int r) {
  if (rows == R) {
    attend_block<In, R>(item, block, r);
  } else if constexpr (R > 1) {
    attend_block_of<In, R - 1>(rows, item, block, r);
  }
}

template <class In>
void clear(const Item<In>& item, State& state) {
  for (int r = 0; r < item.rows; ++r) state.maxima[r] = kNone;
  const int n = item.rows * (item.width + 16);
  for (int i = 0; i < n; i += 16) store(state.sums + i, zero());
}

// A row's split goes into its total. A row that saw nothing yet takes the split as it is.
SG_INLINE void merge_row(float* total_max, float* total, float split_max, const float* split, int n) {
  if (split_max == kNone) return;
  const float now = split_max > *total_max ? split_max : *total_max;
  const bool fresh = *total_max == kNone;
  const F16 old_factor = set1(exp_of(*total_max - now)), new_factor = set1(exp_of(split_max - now));
  for (int i = 0; i < n; i += 16) {
    const F16 x = load(split + i);
    store(total + i, fresh ? x : fma(x, new_factor, mul(load(total + i), old_factor)));
  }
  *total_max = now;
}

template <class In>
void merge(const Item<In>& item) {
  const int n = item.width + 16;
  for (int r = 0; r < item.rows; ++r) {
    merge_row(item.total.maxima + r, item.total.sums + r * n, item.split.maxima[r], item.split.sums + r * n, n);
  }
}

template <class In>
void attend_split(const Item<In>& item, int begin, int end) {
  for (int start = begin / kPage * kPage; start < end;) {
    const int next = smaller(end, (start / kBlock + 1) * kBlock);
    const Block<In> block = load_block(item, start, next);
    for (int r = 0; r < item.rows; r += kRows) attend_block_of<In>(smaller(kRows, item.rows - r), item, block, r);
    start = next;
  }
}

template <class In>
void load_queries(const Item<In>& item) {
  const AttendArgs& a = item.a;
  for (int r = 0; r < item.rows; ++r) {
    const float* q =
        a.q + (item.first_row + r / item.group) * a.q_stride + (item.head * item.group + r % item.group) * a.head_dim;
    convert<In>(item.q + r * a.head_dim, q, a.head_dim);
  }
}

template <class In>
void store_outputs(const Item<In>& item) {
  const AttendArgs& a = item.a;
  for (int r = 0; r < item.rows; ++r) {
    const int64_t out = (item.first_row + r / item.group) * a.out_stride +
                        (item.head * item.group + r % item.group) * int64_t(a.head_dim);
    const float* sums = item.total.sums + r * (item.width + 16);
    const F16 sum = set1(reduce_add(load(sums + item.width)));
    for (int d = 0; d < a.head_dim; d += 16) {
      store_operand(a.out, a.out_dtype, out + d, div(load(sums + d), sum), lanes_from(d, a.head_dim));
    }
  }
}

template <class In>
void attend_item(Item<In>& item) {
  load_queries(item);
  const int begin = item.first_seen(0), end = item.end();
  clear(item, item.total);
  for (int split = begin / kSplit * kSplit; split < end; split += kSplit) {
    clear(item, item.split);
    attend_split(item, larger_of(begin, split), smaller(end, split + kSplit));
    merge(item);
  }
  store_outputs(item);
}

// ---- items and scratch ----------------------------------------------------------------------------------------------

// Rows are numbered through; a tile belongs to the item of its first row. With long chunks most rows are not the first
// of a tile, so an item takes several.
SG_INLINE int rows_per_item(const Batch& b) { return b.num_rows > 4 * b.num_seqs ? 4 : 1; }

SG_INLINE int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Parts of the scratch, in bytes.
struct Layout {
  explicit Layout(const AttendArgs& a) {
    const int64_t rows = int64_t(kTile) * (a.num_heads / a.num_kv_heads), element = operand_bytes(a.dtype);
    width = rounded_up(a.head_dim, 16);
    maxima = aligned(rows * 4);
    sums = rows * (width + 16) * 4;
    queries = aligned(rows * a.head_dim * element);
    tiles = in_place(a) ? 0 : aligned(int64_t(kBlock) * (a.head_dim + width) * element);
  }
  int64_t bytes() const { return 2 * (maxima + sums) + queries + tiles + 64; }

  int width;
  int64_t maxima, sums, queries, tiles;
};

template <class In>
Item<In> make_item(const AttendArgs& a, void* scratch) {
  const Layout layout(a);
  char* at = reinterpret_cast<char*>(aligned(reinterpret_cast<int64_t>(scratch)));
  const auto take = [&](int64_t bytes) {
    at += bytes;
    return reinterpret_cast<float*>(at - bytes);
  };
  Item<In> item{a, nullptr, 0, 0, 0, a.num_heads / a.num_kv_heads, 0, layout.width, nullptr, nullptr, {}, {}};
  item.split = {take(layout.maxima), take(layout.sums)};
  item.total = {take(layout.maxima), take(layout.sums)};
  item.q = reinterpret_cast<typename In::Element*>(take(layout.queries));
  if (layout.tiles > 0) {
    memset(at, 0, size_t(layout.tiles));  // dimensions beyond head_dim are computed but never used; keep them numbers
    item.tiles = reinterpret_cast<typename In::Element*>(at);
  }
  return item;
}

template <class In>
void attend_rows(const AttendArgs& a, Item<In>& item, int row, int end) {
  const Batch& b = *a.batch;
  for (; row < end; ++row) {
    const int seq = b.row_seq[row], pos = b.row_pos[row];
    if (row != b.first_row[seq] && pos % kTile != 0) continue;
    const int left = b.first_row[seq] + b.counts[seq] - row;
    item.table = table_of(b, seq);
    item.first_row = row;
    item.first_pos = pos;
    item.rows = smaller(kTile - pos % kTile, left) * item.group;
    attend_item(item);
  }
}

template <class In>
void attend_items_in(const AttendArgs& a, int64_t begin, int64_t end, void* scratch) {
  const Batch& b = *a.batch;
  const int per_item = rows_per_item(b), chunks = rounded_up(b.num_rows, per_item) / per_item;
  Item<In> item = make_item<In>(a, scratch);
  for (int64_t i = begin; i < end; ++i) {
    // The last rows of a chunk see most: they go first, so that workers end together.
    const int row = (chunks - 1 - int(i / a.num_kv_heads)) * per_item;
    item.head = int(i % a.num_kv_heads);
    attend_rows(a, item, row, smaller(row + per_item, b.num_rows));
  }
}

}  // namespace attention

int64_t attend_items(const AttendArgs& a) {
  const int per_item = attention::rows_per_item(*a.batch);
  return int64_t(attention::rounded_up(a.batch->num_rows, per_item) / per_item) * a.num_kv_heads;
}

int64_t attend_scratch(const AttendArgs& a) { return attention::Layout(a).bytes(); }

void attend(const AttendArgs& a, int64_t begin, int64_t end, void* scratch) {
  if (a.dtype == DType::F32) {
    attention::attend_items_in<attention::InF32>(a, begin, end, scratch);
  } else {
    attention::attend_items_in<attention::InBF16>(a, begin, end, scratch);
  }
}

}  // namespace
}  // namespace sg

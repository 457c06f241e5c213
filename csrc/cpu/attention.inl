// Attention over pages: rows attend to all pages of their sequences. Included by every unit after its simd header;
// writing keys and values is in kv_store.inl, blocks of pages in attend_pages.inl, their arithmetic in
// attend_block.inl, the layouts are those of common/paging.h, and attend_plan.cpp cuts a step into items.
//
// An item's rows are the queries of a tile (attend.h) and of all query heads that share one key-value head, so that a
// page is read once for the whole group; ahead of the tiles, also the rows of several sequences over pages that they
// have in common.
//
// The arithmetic of a row depends on its query and its own pages alone, so a prompt's chunk and a decode give the same
// bits, whatever goes ahead with whom:
//   - blocks of 128 tokens, at absolute multiples of 128, in order: a running maximum, then o = o * alpha + p V, and
//   each
//     element of o is one chain of multiply-adds over the tokens;
//   - every 512 tokens, at absolute multiples of 512, a fresh running state, merged into the row's total in order;
//   - a token that a row does not see gets probability exactly 0, which changes neither sums nor maxima. So it does not
//     matter which other rows made the item visit its page.
// In bf16, queries and probabilities are rounded for the products; the sum of probabilities is of the unrounded ones.
// Of 8-bit pages, codes take part in the products; a key's scale meets the score, a value's its probability.
//
// NOTE: 0 * NaN is NaN, so a value that no row sees must be finite wherever an item multiplies it. Slots after the
// item's last token are skipped, except the odd partner of an even last one in bf16, which store_kv zeroes.
#include "cpu/attend_block.inl"
#include "cpu/lanes.inl"

namespace sg {
namespace {
namespace attention {

// What a worker computes at a time: rows of one key-value head. Row r of a tile is position pos + r / group, query head
// head * group + r % group.
template <class In>
struct Item {
  Source<In> source;
  int group, rows;
  const AttendTile* tile;   // whose rows they are; null for rows of several, which see all that they are given
  typename In::Element* q;  // see load_queries
  float* split;             // [rows, state_size]
  float* total;

  const AttendArgs& args() const { return source.a; }
  int64_t states_of(int count) const { return int64_t(count) * state_size(source.width); }
};

SG_INLINE int rows_of(const AttendTile& tile, int group) { return tile.positions * group; }

// The states of a tile's rows after `split`, where they go ahead.
template <class In>
SG_INLINE float* partial_of(const Item<In>& item, const AttendTile& tile, int split) {
  const AttendArgs& a = item.args();
  const int64_t unit = tile.partial + int64_t(split - tile.begin / kAttendSplit) * tile.positions;
  return a.partials + item.states_of(int(unit) * a.num_heads + item.source.head * rows_of(tile, item.group));
}

// ---- rows in and out ------------------------------------------------------------------------------------------------

// How many of the item's rows go together: as many as the registers hold, or nearly.
SG_INLINE int height_of(int rows) {
  const int turns = (rows + kRows - 1) / kRows;
  return (rows + turns - 1) / turns;
}

// The queries of a tile, which are the item's rows from `first` on, to where products take them: R rows that go
// together lie as [head_dim / W, R, W].
template <class In>
void load_queries(const Item<In>& item, const AttendTile& tile, int first) {
  const AttendArgs& a = item.args();
  constexpr int W = In::kWidth;
  const int height = height_of(item.rows);
  float turned[kMostHeadDim];
  typename In::Element q[kMostHeadDim];
  for (int r = 0; r < rows_of(tile, item.group); ++r) {
    const int row = tile.row + r / item.group, head = item.source.head * item.group + r % item.group;
    const float* from = a.q + row * a.q_stride + int64_t(head) * a.head_dim;
    // Two positions ahead: a head is too short a stream for the processor to see it coming.
    for (int d = 0; d < a.head_dim; d += 16) __builtin_prefetch(from + 2 * a.q_stride + d);
    convert<In>(q, turned_head(a, row, from, turned), a.head_dim);
    const int start = (first + r) / height * height, together = smaller(height, item.rows - start);
    typename In::Element* to = item.q + int64_t(start) * a.head_dim + (first + r - start) * W;
    for (int d = 0; d < a.head_dim; d += W) memcpy(to + d * together, q + d, W * sizeof *q);
  }
}

template <class In>
void store_outputs(const Item<In>& item, const AttendTile& tile, const float* states) {
  const AttendArgs& a = item.args();
  const int width = item.source.width;
  for (int r = 0; r < item.rows; ++r, states += state_size(width)) {
    const int row = tile.row + r / item.group, head = item.source.head * item.group + r % item.group;
    const int64_t at = row * a.out_stride + int64_t(head) * a.head_dim;
    const F16 factor = set1(1 / reduce_add(load(states + width)));
    for (int d = 0; d < a.head_dim; d += 16)
      store_operand(a.out, a.out_dtype, at + d, mul(load(states + d), factor), a.head_dim - d);
  }
}

template <class In>
SG_INLINE void take_tile(Item<In>& item, const AttendTile& tile, int limit) {
  item.tile = &tile;
  item.rows = rows_of(tile, item.group);
  item.source.table = table_of(*item.args().batch, tile.seq);
  item.source.limit = limit;
}

// ---- attending ------------------------------------------------------------------------------------------------------

template <class In>
SG_INLINE Seen seen_by(const Item<In>& item, const Block<In>& block, int r) {
  if (item.tile == nullptr) return {0, block.tokens};
  const int pos = item.tile->pos + r / item.group, window = item.args().window;
  return {(window > 0 ? larger_of(0, pos - window + 1) : 0) - block.start,
          smaller(pos + 1 - block.start, block.tokens)};
}

// Every row takes in one block.
template <class In>
void attend_rows(const Item<In>& item, const Block<In>& block, float* states) {
  const AttendArgs& a = item.args();
  const int height = height_of(item.rows);
  for (int r = 0; r < item.rows; r += height) {
    const int count = smaller(height, item.rows - r);
    Seen seen[kRows];
    for (int i = 0; i < count; ++i) seen[i] = seen_by(item, block, r + i);
    attend_block_of<In>(count,
                        {a, item.q + int64_t(r) * a.head_dim, states + item.states_of(r), seen,
                         r == 0 ? block.v : block.next_v, item.source.width},
                        block);
  }
}

// Tokens [begin, end) of one split.
template <class In>
void attend_range(const Item<In>& item, int begin, int end, float* states) {
  for (int start = begin / kPage * kPage; start < end;) {
    const int next = smaller(end, (start / kBlock + 1) * kBlock);
    attend_rows(item, load_block(item.source, start, next), states);
    start = next;
  }
}

// The states of a tile's rows after the tokens of one split, of which some or all may have gone ahead.
template <class In>
const float* attend_split(const Item<In>& item, const AttendTile& tile, int split) {
  const int begin = larger_of(tile.begin, split * kAttendSplit), end = smaller(tile.end(), (split + 1) * kAttendSplit);
  const int done = begin >= tile.own_begin ? end : smaller(end, larger_of(begin, tile.shared_end));
  float* states = done > begin ? partial_of(item, tile, split) : item.split;
  if (done == begin) clear_states(states, item.rows, item.source.width);
  if (done < end) attend_range(item, done, end, states);
  return states;
}

template <class In>
void attend_tile(Item<In>& item, const AttendTile& tile) {
  const AttendArgs& a = item.args();
  const int first = tile.begin / kAttendSplit, last = (tile.end() - 1) / kAttendSplit;
  take_tile(item, tile, tile.end());
  if (tile.shared_end < tile.own_begin) load_queries(item, tile, 0);
  if (a.fused && tile.own_begin == tile.end()) store_head<In>(a, tile.row, item.source.head);
  if (first == last) return store_outputs(item, tile, attend_split(item, tile, first));
  clear_states(item.total, item.rows, item.source.width);
  for (int split = first; split <= last; ++split)
    merge_states(item.total, attend_split(item, tile, split), item.rows, item.source.width);
  store_outputs(item, tile, item.total);
}

// ---- ahead of the tiles ---------------------------------------------------------------------------------------------

// A run of splits of one tile.
template <class In>
void attend_run(Item<In>& item, const AttendAhead& run, const AttendTile& tile) {
  const AttendArgs& a = item.args();
  take_tile(item, tile, run.end);
  load_queries(item, tile, 0);
  if (a.fused && run.end == tile.end()) store_head<In>(a, tile.row, item.source.head);
  for (int begin = run.begin; begin < run.end;) {
    const int split = begin / kAttendSplit, end = smaller(run.end, (split + 1) * kAttendSplit);
    float* states = partial_of(item, tile, split);
    clear_states(states, item.rows, item.source.width);
    attend_range(item, begin, end, states);
    begin = end;
  }
}

// Tokens of one split, from its beginning, for tiles that have their pages in common.
template <class In>
void attend_common(Item<In>& item, const AttendAhead& run) {
  const AttendPlan& plan = *item.args().plan;
  const int32_t* members = plan.members + run.first;
  take_tile(item, plan.tiles[members[0]], run.end);
  item.tile = nullptr;
  item.rows = 0;
  for (int i = 0; i < run.count; ++i) item.rows += rows_of(plan.tiles[members[i]], item.group);
  for (int i = 0, first = 0; i < run.count; ++i) {
    load_queries(item, plan.tiles[members[i]], first);
    first += rows_of(plan.tiles[members[i]], item.group);
  }
  clear_states(item.split, item.rows, item.source.width);
  attend_range(item, run.begin, run.end, item.split);
  const float* states = item.split;
  for (int i = 0; i < run.count; ++i) {
    const AttendTile& tile = plan.tiles[members[i]];
    const int64_t size = item.states_of(rows_of(tile, item.group));
    memcpy(partial_of(item, tile, run.begin / kAttendSplit), states, size_t(size) * sizeof(float));
    states += size;
  }
}

// ---- items and scratch ----------------------------------------------------------------------------------------------

SG_INLINE int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Parts of the scratch, in bytes.
struct Layout {
  explicit Layout(const AttendArgs& a) {
    const int group = a.num_heads / a.num_kv_heads;
    const int64_t rows = larger_of(kAttendTile * group, larger_of(kAheadRows, group));
    const int64_t element = operand_bytes(a.dtype);
    width = rounded_up(a.head_dim, 16);
    states = rows * state_size(width) * 4;
    queries = aligned(rows * a.head_dim * element);
    tiles = in_place(a) ? 0 : aligned(int64_t(kBlock) * (a.head_dim + width) * element);
  }
  int64_t bytes() const { return 2 * states + queries + tiles + 2 * kBlock * 4 + 64; }

  int width;
  int64_t states, queries, tiles;
};

template <class In>
Item<In> make_item(const AttendArgs& a, void* scratch) {
  using Element = typename In::Element;
  const Layout layout(a);
  char* at = reinterpret_cast<char*>(aligned(reinterpret_cast<int64_t>(scratch)));
  const auto take = [&](int64_t bytes) {
    at += bytes;
    return static_cast<void*>(at - bytes);
  };
  auto* split = static_cast<float*>(take(layout.states));
  auto* total = static_cast<float*>(take(layout.states));
  auto* q = static_cast<Element*>(take(layout.queries));
  auto* tiles = layout.tiles > 0 ? static_cast<Element*>(take(layout.tiles)) : nullptr;
  // Dimensions beyond head_dim are computed but never used; keep them numbers.
  if (tiles != nullptr && layout.width != a.head_dim) memset(tiles, 0, size_t(layout.tiles));
  auto* scales = static_cast<float*>(take(2 * kBlock * 4));
  return {{a, nullptr, 0, 0, layout.width, tiles, scales}, a.num_heads / a.num_kv_heads, 0, nullptr, q, split, total};
}

template <class In>
void attend_tiles_in(const AttendArgs& a, int64_t begin, int64_t end, void* scratch) {
  Item<In> item = make_item<In>(a, scratch);
  for (int64_t i = begin; i < end; ++i) {
    item.source.head = int(i % a.num_kv_heads);
    attend_tile(item, a.plan->tiles[i / a.num_kv_heads]);
  }
}

template <class In>
void attend_ahead_in(const AttendArgs& a, int64_t begin, int64_t end, void* scratch) {
  Item<In> item = make_item<In>(a, scratch);
  for (int64_t i = begin; i < end; ++i) {
    item.source.head = int(i % a.num_kv_heads);
    const AttendAhead& run = a.plan->ahead[i / a.num_kv_heads];
    const AttendTile& tile = a.plan->tiles[a.plan->members[run.first]];
    if (run.begin >= tile.own_begin) {
      attend_run(item, run, tile);
    } else {
      attend_common(item, run);
    }
  }
}

}  // namespace attention

int64_t attend_state(const AttendArgs& a) { return attention::state_size(attention::rounded_up(a.head_dim, 16)); }

int64_t attend_scratch(const AttendArgs& a) { return attention::Layout(a).bytes(); }

void attend_ahead(const AttendArgs& a, int64_t begin, int64_t end, void* scratch) {
  if (a.dtype == DType::F32) {
    attention::attend_ahead_in<attention::InF32>(a, begin, end, scratch);
  } else {
    attention::attend_ahead_in<attention::InBF16>(a, begin, end, scratch);
  }
}

void attend(const AttendArgs& a, int64_t begin, int64_t end, void* scratch) {
  if (a.dtype == DType::F32) {
    attention::attend_tiles_in<attention::InF32>(a, begin, end, scratch);
  } else {
    attention::attend_tiles_in<attention::InBF16>(a, begin, end, scratch);
  }
}

}  // namespace
}  // namespace sg

#include "cpu/attend_plan.h"

#include <algorithm>

namespace sg {

namespace {

// A decode is bound by reading pages up to about so many rows of a page; then by arithmetic.
constexpr int32_t kFreeRows = 8;
// An item is long where it takes more than this part of what a worker gets.
constexpr double kLongPart = 1.0 / 8;
constexpr int32_t kLongTokens = 768;     // below, a second share costs more than it gives
constexpr int32_t kSharedPositions = 4;  // taller tiles make enough of each page they read
constexpr int64_t kSavedTokens = 256;    // at least, over all sequences of a group
constexpr int32_t kNobody = -1;

int32_t splits(int32_t begin, int32_t end) { return (end - 1) / kAttendSplit - begin / kAttendSplit + 1; }

const int32_t* pages_of(const Batch& b, const AttendTile& tile) {
  return b.page_tables + b.slots[tile.seq] * b.page_table_stride;
}

}  // namespace

AttendPlanner::AttendPlanner(const Limits& limits) : limits_(limits) {
  tiles_.reserve(static_cast<size_t>(limits.max_rows));
  candidates_.reserve(static_cast<size_t>(limits.max_rows));
  members_.reserve(static_cast<size_t>(limits.max_rows) * 2);
}

const AttendPlan& AttendPlanner::plan(const Batch& batch) {
  units_ = 0;
  ahead_.clear();
  members_.clear();
  make_tiles(batch);
  if (limits_.shared_tokens > 0) find_common_pages(batch);
  if (limits_.workers > 1) cut_long_contexts();
  // What is longest goes first, so that workers end together.
  std::stable_sort(ahead_.begin(), ahead_.end(), [](const AttendAhead& a, const AttendAhead& b) {
    return int64_t(a.count) * (a.end - a.begin) > int64_t(b.count) * (b.end - b.begin);
  });
  plan_ = {tiles_.data(), ahead_.data(), members_.data(), static_cast<int32_t>(tiles_.size()),
           static_cast<int32_t>(ahead_.size())};
  return plan_;
}

void AttendPlanner::make_tiles(const Batch& b) {
  tiles_.clear();
  for (int32_t seq = 0; seq < b.num_seqs; ++seq) {
    const int32_t end = b.starts[seq] + b.counts[seq];
    for (int32_t pos = b.starts[seq]; pos < end;) {
      const int32_t next = std::min(end, (pos / kAttendTile + 1) * kAttendTile);
      const int32_t begin = limits_.window > 0 ? std::max(0, pos - limits_.window + 1) : 0;
      tiles_.push_back({seq, b.first_row[seq] + pos - b.starts[seq], pos, next - pos, begin, begin, next, kNobody});
      pos = next;
    }
  }
  std::stable_sort(tiles_.begin(), tiles_.end(), [this](const AttendTile& a, const AttendTile& b) {
    return cost(a, a.end() - a.begin) > cost(b, b.end() - b.begin);
  });
}

// The time of one head, in some unit.
double AttendPlanner::cost(const AttendTile& tile, int32_t tokens) const {
  return double(tokens) * std::max(kFreeRows, tile.positions * limits_.num_heads / limits_.num_kv_heads);
}

// Room for the states of every split of the tile; false where there is none.
bool AttendPlanner::take_units(AttendTile& tile) {
  if (tile.partial != kNobody) return true;
  const int32_t wanted = splits(tile.begin, tile.end()) * tile.positions;
  if (units_ + wanted > kUnits) return false;
  tile.partial = units_;
  units_ += wanted;
  return true;
}

// ---- common pages ---------------------------------------------------------------------------------------------------

// Sequences with the same first page are a run; a run is cut into groups that have a stretch of pages in common.
void AttendPlanner::find_common_pages(const Batch& b) {
  candidates_.clear();
  for (size_t i = 0; i < tiles_.size(); ++i) {
    const AttendTile& tile = tiles_[i];
    // NOTE: pages before the step's first row of a sequence are written; later ones may be written in this very share.
    if (tile.positions > kSharedPositions || tile.begin > 0 || b.starts[tile.seq] < limits_.shared_tokens) continue;
    candidates_.push_back({static_cast<int32_t>(i), 0, pages_of(b, tile)[0]});
  }
  std::stable_sort(candidates_.begin(), candidates_.end(),
                   [](const Candidate& a, const Candidate& b) { return a.first_page < b.first_page; });
  for (size_t begin = 0; begin < candidates_.size();) {
    size_t end = begin + 1;
    while (end < candidates_.size() && candidates_[end].first_page == candidates_[begin].first_page) ++end;
    share_run(b, begin, end);
    begin = end;
  }
}

// Candidates [begin, end) share a page at least. Those that have most in common with the first become a group, so that
// most reading is saved; then the rest, likewise.
void AttendPlanner::share_run(const Batch& b, size_t begin, size_t end) {
  while (end - begin >= 2) {
    sort_by_common(b, begin, end);
    const size_t count = best_group(begin, end);
    if (count > 1 && !add_shared(begin, begin + count, candidates_[begin + count - 1].common)) return;
    begin += count;
  }
}

// Those first that have most in common with the first, which stays where it is.
void AttendPlanner::sort_by_common(const Batch& b, size_t begin, size_t end) {
  const AttendTile& first = tiles_[static_cast<size_t>(candidates_[begin].tile)];
  const int32_t* pages = pages_of(b, first);
  for (size_t i = begin; i < end; ++i) {
    const AttendTile& tile = tiles_[static_cast<size_t>(candidates_[i].tile)];
    const int32_t most = std::min(b.starts[tile.seq], b.starts[first.seq]) / limits_.page_size;
    const auto differs = std::mismatch(pages, pages + most, pages_of(b, tile)).first;
    const auto tokens = static_cast<int32_t>(differs - pages) * limits_.page_size;
    candidates_[i].common = tokens / kAttendBlock * kAttendBlock;
  }
  std::stable_sort(candidates_.begin() + static_cast<ptrdiff_t>(begin),
                   candidates_.begin() + static_cast<ptrdiff_t>(end),
                   [](const Candidate& x, const Candidate& y) { return x.common > y.common; });
}

// How many of the candidates save most by going together; 1 where it is not worth it.
size_t AttendPlanner::best_group(size_t begin, size_t end) const {
  size_t best = 1;
  int64_t saved = kSavedTokens - 1;
  for (size_t count = 2; count <= end - begin; ++count) {
    const int64_t common = candidates_[begin + count - 1].common;
    if (common < limits_.shared_tokens) break;
    if (common * int64_t(count - 1) <= saved) continue;
    saved = common * int64_t(count - 1);
    best = count;
  }
  return best;
}

// False where the partials have no room left.
bool AttendPlanner::add_shared(size_t begin, size_t end, int32_t shared_end) {
  const int32_t group = limits_.num_heads / limits_.num_kv_heads;
  for (size_t i = begin; i < end;) {
    const auto first = static_cast<int32_t>(members_.size());
    int32_t rows = 0;
    for (; i < end; ++i) {
      AttendTile& tile = tiles_[static_cast<size_t>(candidates_[i].tile)];
      if (rows > 0 && rows + tile.positions * group > kAheadRows) break;
      if (!take_units(tile)) break;
      rows += tile.positions * group;
      tile.shared_end = shared_end;
      members_.push_back(candidates_[i].tile);
    }
    const auto count = static_cast<int32_t>(members_.size()) - first;
    if (count == 0) return false;
    for (int32_t at = 0; at < shared_end; at += kAttendSplit)
      ahead_.push_back({first, count, at, std::min(shared_end, at + kAttendSplit)});
  }
  return true;
}

// ---- long contexts --------------------------------------------------------------------------------------------------

void AttendPlanner::cut_long_contexts() {
  double total = 0;
  for (const AttendTile& tile : tiles_) total += cost(tile, tile.end() - tile.shared_end);
  const double fair = total * limits_.num_kv_heads / limits_.workers * kLongPart;
  for (AttendTile& tile : tiles_) {
    const int32_t left = tile.end() - tile.shared_end;
    if (left >= kLongTokens && cost(tile, left) > fair) cut(tile, fair);
  }
}

// Runs of splits that take about `fair`. A split that is partly shared stays with the tile, which goes on in it.
void AttendPlanner::cut(AttendTile& tile, double fair) {
  const bool shared = tile.shared_end > tile.begin;
  int32_t at = shared ? (tile.shared_end + kAttendSplit - 1) / kAttendSplit * kAttendSplit : tile.begin;
  if (at >= tile.end() || !take_units(tile)) return;
  tile.own_begin = at;
  const auto first = static_cast<int32_t>(members_.size());
  members_.push_back(static_cast<int32_t>(&tile - tiles_.data()));
  const int32_t run = std::max(1, static_cast<int32_t>(fair / cost(tile, kAttendSplit))) * kAttendSplit;
  while (at < tile.end()) {
    const int32_t next = std::min(tile.end(), at / kAttendSplit * kAttendSplit + run);
    ahead_.push_back({first, 1, at, next});
    at = next;
  }
}

}  // namespace sg

// How a step's attention is cut into items for the pool. It decides nothing about any bit: the arithmetic of a row is
// the same whichever items compute it (attention.inl).
//
// Usually an item is a tile (rows of one sequence) and a key-value head. Two things go ahead of the tiles, in a share
// of their own:
//   - pages that several sequences of a decode have in common, which are read once for all of them;
//   - contexts so long that a tile would keep one worker busy while others have nothing: runs of whole splits.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace sg {

class AttendPlanner {
 public:
  struct Limits {
    int32_t num_heads, num_kv_heads, page_size, window, workers;
    int32_t max_rows;       // of a step
    int32_t shared_tokens;  // at least, in common; 0: nothing is shared. See worth_sharing.
  };
  // What partials need, in units: positions x splits that go ahead at once. More is done without going ahead.
  static constexpr int32_t kUnits = 1024;

  explicit AttendPlanner(const Limits& limits);
  // From how many common tokens on reading them once is faster. Where several query heads meet each page anyway, pages
  // that the second-level cache holds cost little to read again.
  static int32_t worth_sharing(int32_t num_heads, int32_t num_kv_heads) {
    return num_heads <= 2 * num_kv_heads ? 128 : 2048;
  }
  int32_t window() const { return limits_.window; }
  // The plan of a batch; valid until the next call, and as long as this object stays where it is.
  const AttendPlan& plan(const Batch& batch);
  // The plan that was made last.
  const AttendPlan& current() const { return plan_; }

 private:
  void make_tiles(const Batch& batch);
  void find_common_pages(const Batch& batch);
  void share_run(const Batch& batch, std::size_t begin, std::size_t end);
  void sort_by_common(const Batch& batch, std::size_t begin, std::size_t end);
  std::size_t best_group(std::size_t begin, std::size_t end) const;
  bool add_shared(std::size_t begin, std::size_t end, int32_t shared_end);
  void cut_long_contexts();
  void cut(AttendTile& tile, double fair);
  bool take_units(AttendTile& tile);
  double cost(const AttendTile& tile, int32_t tokens) const;

  struct Candidate {
    int32_t tile, common;  // tokens in common with the run's first
    int32_t first_page;
  };

  Limits limits_;
  int32_t units_ = 0;
  std::vector<AttendTile> tiles_;
  std::vector<AttendAhead> ahead_;
  std::vector<int32_t> members_;
  std::vector<Candidate> candidates_;
  AttendPlan plan_{};
};

}  // namespace sg

// Matrix products. Included by a unit after its simd header; see LinearArgs in kernels.h for the layout of the weights.
//
// The innermost work is a tile: R rows of x times P panels of w, R * P accumulators in registers. A step along K reads
// 64 bytes of each panel (16 output rows x one float or one pair of bf16) and one float or pair of each row. An output
// element is one accumulator from zero to the last step, so its bits depend neither on the tile nor on the number of
// rows.
//
// With few rows (decode) the weights stream from memory once: an item is a run of panels, and neighbours are joined.
// With many (prefill) an item is a block of rows x 4 panels; a stretch of the panels stays in the second-level cache
// while the block's rows pass over it.
#include "cpu/kernels.h"
#include "cpu/lanes.inl"
#include "cpu/linear_int.inl"

namespace sg {
namespace {

constexpr int kBlockPanels = 4;    // panels of a prefill item
constexpr int kBlockRows = 96;     // at most, rows of a prefill item
constexpr int kBlockSteps = 2048;  // at most, steps along K before the next tile of rows (128 KiB of each panel)
constexpr int kFewRows = 12;       // up to here rows are decode
// Prefill tiles take all panels of a block at once where the registers allow, else as many rows as they hold.
constexpr int kPrefillTileRows = kTileSums >= 4 * kBlockPanels ? kTileSums / kBlockPanels : kTileRows;
constexpr int kEnoughItems = 64;  // so many items share out evenly among a few threads
// A tile of few rows is over so soon that the processor itself runs far enough ahead (prefetching then costs a tenth of
// the bandwidth); a tall one asks for the weights this many steps ahead.
constexpr int kPrefetchRows = 5, kPrefetchSteps = 12;

struct StepF32 {
  using Element = float;
  using Vector = F16;
  static constexpr int kWidth = 1;  // elements of a row per step
  SG_INLINE Vector weights(const float* w) { return load(w); }
  SG_INLINE Vector broadcast(const float* x) { return set1(*x); }
  SG_INLINE F16 multiply(F16 sum, Vector x, Vector w) { return fma(x, w, sum); }
};

struct StepBF16 {
  using Element = uint16_t;
  using Vector = Pairs;
  static constexpr int kWidth = 2;
  SG_INLINE Vector weights(const uint16_t* w) { return load_pairs(w); }
  SG_INLINE Vector broadcast(const uint16_t* x) { return set1_pair(x); }
  SG_INLINE F16 multiply(F16 sum, Vector x, Vector w) { return dot2(sum, x, w); }
};

// A stretch of the product: some rows x some panels x steps [first_step, last_step).
struct LinearBlock {
  const LinearArgs* args;
  int row, rows, panel, panels, steps, first_step, last_step;  // steps: of the whole K
  float* partial;  // [rows, kBlockPanels * 16] accumulators between stretches of K
};

// The accumulators of R rows x P panels. Everything is inlined, so that they are registers.
template <class Step, int R, int P>
struct Tile {
  using Element = typename Step::Element;
  static constexpr int kLine = 16 * Step::kWidth;  // elements of a panel per step
  F16 sums[R][P];

  // From zero, or from what the last stretch of K left in `partial`.
  SG_INLINE_MEMBER void start(const float* partial) {
    SG_UNROLL
    for (int r = 0; r < R; r++) {
      SG_UNROLL
      for (int p = 0; p < P; p++) {
        sums[r][p] = partial == nullptr ? zero() : load(partial + (r * kBlockPanels + p) * 16);
      }
    }
  }

  // One step of every row and panel.
  SG_INLINE_MEMBER void step(const Element* x, int64_t x_stride, const Element* w, int64_t panel_size) {
    typename Step::Vector weights[P];
    SG_UNROLL
    for (int p = 0; p < P; p++) weights[p] = Step::weights(w + p * panel_size);
    SG_UNROLL
    for (int r = 0; r < R; r++) {
      const typename Step::Vector value = Step::broadcast(x + r * x_stride);
      SG_UNROLL
      for (int p = 0; p < P; p++) sums[r][p] = Step::multiply(sums[r][p], value, weights[p]);
    }
  }

  // Steps first .. last - 1 of `steps`.
  SG_INLINE_MEMBER void run(int first, int last, int steps, const Element* x, int64_t x_stride, const Element* w) {
    const int64_t panel_size = int64_t(steps) * kLine;
    // Near the end of its panel each of the P streams goes on in the panel it will read next, P panels further.
    [[maybe_unused]] int64_t ahead = int64_t(kPrefetchSteps) * kLine;
    for (int s = first; s < last; s++) {
      const Element* line = w + int64_t(s) * kLine;
      if constexpr (R >= kPrefetchRows) {
        if (s == steps - kPrefetchSteps) ahead += (P - 1) * panel_size;
        SG_UNROLL
        for (int p = 0; p < P; p++) __builtin_prefetch(line + p * panel_size + ahead);
      }
      step(x + int64_t(s) * Step::kWidth, x_stride, line, panel_size);
    }
  }

  // The last step of an odd K: what stands behind the last element of x is not ours to read.
  SG_INLINE_MEMBER void half_step(int k, int steps, const Element* x, int64_t x_stride, const Element* w) {
    Element last[R][Step::kWidth] = {};
    for (int r = 0; r < R; r++) last[r][0] = x[r * x_stride + k - 1];
    step(last[0], Step::kWidth, w + int64_t(steps - 1) * kLine, int64_t(steps) * kLine);
  }

  SG_INLINE_MEMBER void save(float* partial) const {
    SG_UNROLL
    for (int r = 0; r < R; r++) {
      SG_UNROLL
      for (int p = 0; p < P; p++) store(partial + (r * kBlockPanels + p) * 16, sums[r][p]);
    }
  }

  // Adds the bias, then what out holds, and stores.
  SG_INLINE_MEMBER void finish(const LinearArgs& a, int row, int panel) const {
    SG_UNROLL
    for (int p = 0; p < P; p++) {
      const int column = (panel + p) * 16, lanes = a.n - column < 16 ? a.n - column : 16;
      const F16 bias = a.bias == nullptr ? zero() : load_lanes(a.bias + column, lanes);
      SG_UNROLL
      for (int r = 0; r < R; r++) {
        float* out = a.out + (row + r) * a.out_stride + column;
        F16 sum = a.bias == nullptr ? sums[r][p] : add(sums[r][p], bias);
        if (a.accumulate) sum = add(load_lanes(out, lanes), sum);
        store_lanes(out, sum, lanes);
      }
    }
  }
};

// One tile over the block's steps.
template <class Step, int R, int P>
__attribute__((noinline)) void linear_tile(const LinearBlock& block, int row, int panel) {
  const LinearArgs& a = *block.args;
  const auto* x = static_cast<const typename Step::Element*>(a.x) + row * a.x_stride;
  const auto* w = static_cast<const typename Step::Element*>(a.w) + int64_t(panel) * block.steps * 16 * Step::kWidth;
  float* partial = block.partial + ((row - block.row) * kBlockPanels + panel - block.panel) * 16;
  const bool is_last = block.last_step == block.steps, is_odd = is_last && a.k % Step::kWidth != 0;

  Tile<Step, R, P> tile;
  tile.start(block.first_step == 0 ? nullptr : partial);
  tile.run(block.first_step, block.last_step - int(is_odd), block.steps, x, a.x_stride, w);
  if (is_odd) tile.half_step(a.k, block.steps, x, a.x_stride, w);
  if (is_last) {
    tile.finish(a, row, panel);
  } else {
    tile.save(partial);
  }
}

// `tiles` tiles of R rows each, from `row` on, over all panels of the block: as many panels at once as the registers
// hold.
template <class Step, int R>
void linear_tiles(const LinearBlock& block, int row, int tiles) {
  const int end = block.panel + block.panels;
  for (int panel = block.panel; panel < end;) {
    const int left = end - panel;
    const int width = R * 4 <= kTileSums && left >= 4 ? 4 : R * 2 <= kTileSums && left >= 2 ? 2 : 1;
    for (int t = 0; t < tiles; t++) {
      if constexpr (R * 4 <= kTileSums)
        if (width == 4) linear_tile<Step, R, 4>(block, row + t * R, panel);
      if constexpr (R * 2 <= kTileSums)
        if (width == 2) linear_tile<Step, R, 2>(block, row + t * R, panel);
      if (width == 1) linear_tile<Step, R, 1>(block, row + t * R, panel);
    }
    panel += width;
  }
}

// linear_tiles for a number of rows known at run time, 1 .. R.
template <class Step, int R = kTileRows>
void linear_tiles_of(int rows_of_tile, const LinearBlock& block, int row, int tiles) {
  if (rows_of_tile == R) {
    linear_tiles<Step, R>(block, row, tiles);
  } else if constexpr (R > 1) {
    linear_tiles_of<Step, R - 1>(rows_of_tile, block, row, tiles);
  }
}

// Cuts the rows into tiles of nearly equal height.
template <class Step>
void linear_block(const LinearBlock& block) {
  const int most = block.rows <= kTileRows ? kTileRows : kPrefillTileRows;
  const int tiles = (block.rows + most - 1) / most, height = (block.rows + tiles - 1) / tiles;
  const int full = block.rows / height, rest = block.rows % height;
  linear_tiles_of<Step>(height, block, block.row, full);
  if (rest > 0) linear_tiles_of<Step>(rest, block, block.row + full * height, 1);
}

// Rows [row, row + rows) x panels [panel, end).
template <class Step>
void linear_range(const LinearArgs& a, int row, int rows, int panel, int end) {
  const int steps = (a.k + Step::kWidth - 1) / Step::kWidth;
  const int stretch = rows <= kTileRows ? steps : kBlockSteps;  // a single tile gains nothing from the cache
  float partial[kBlockRows * kBlockPanels * 16];
  for (; panel < end; panel += kBlockPanels) {
    const int panels = end - panel < kBlockPanels ? end - panel : kBlockPanels;
    for (int first = 0; first < steps; first += stretch) {
      const int last = steps - first < stretch ? steps : first + stretch;
      linear_block<Step>({&a, row, rows, panel, panels, steps, first, last, partial});
    }
  }
}

struct LinearPlan {
  int panels;       // of the whole matrix
  int item_panels;  // of one item
  int row_blocks;   // an item is one of them; they are numbered fastest
  int block_rows;
};

// Panels of a decode item: long streams where there are panels enough, and one by one in small matrices.
int stream_panels(int panels) {
  int count = 4 * kBlockPanels;
  while (count > 1 && panels < count * kFewItems) count /= 2;
  return count;
}

LinearPlan plan_linear(const LinearArgs& a) {
  const int panels = (a.n + 15) / 16;
  if (a.rows <= kFewRows) return {panels, stream_panels(panels), 1, a.rows};
  const int columns = (panels + kBlockPanels - 1) / kBlockPanels;
  int blocks = (a.rows + kBlockRows - 1) / kBlockRows;
  const int most = (a.rows + kFewRows - 1) / kFewRows;  // smaller blocks would read the weights too often
  if (blocks * columns < kEnoughItems) blocks = (kEnoughItems + columns - 1) / columns;
  if (blocks > most) blocks = most;
  const int rows = (a.rows + blocks - 1) / blocks;
  return {panels, kBlockPanels, (a.rows + rows - 1) / rows, rows};
}

int64_t linear_items(const LinearArgs& a) {
  if (a.rows == 0 || a.n == 0) return 0;
  if (is_integer(a.dtype)) return linear_int_items(a);
  const LinearPlan plan = plan_linear(a);
  return int64_t(plan.panels + plan.item_panels - 1) / plan.item_panels * plan.row_blocks;
}

void linear_rows(const LinearArgs& a, int row, int rows, int panel, int end) {
  if (a.dtype == DType::F32) {
    linear_range<StepF32>(a, row, rows, panel, end);
  } else {
    linear_range<StepBF16>(a, row, rows, panel, end);
  }
}

void linear(const LinearArgs& a, int64_t begin, int64_t end) {
  if (is_integer(a.dtype)) return linear_int(a, begin, end);
  const LinearPlan plan = plan_linear(a);
  if (plan.row_blocks == 1) {  // neighbouring items are one stretch of panels
    const int64_t last = end * plan.item_panels;
    return linear_rows(a, 0, a.rows, int(begin) * plan.item_panels, last < plan.panels ? int(last) : plan.panels);
  }
  for (int64_t item = begin; item < end; item++) {
    const int row = int(item % plan.row_blocks) * plan.block_rows;
    const int panel = int(item / plan.row_blocks) * plan.item_panels;
    const int last = panel + plan.item_panels < plan.panels ? panel + plan.item_panels : plan.panels;
    linear_rows(a, row, a.rows - row < plan.block_rows ? a.rows - row : plan.block_rows, panel, last);
  }
}

}  // namespace
}  // namespace sg

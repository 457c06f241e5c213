// Matrix products with integer weights. Included by a unit after its simd header.
//
// Per 32 columns: two integer sums of 16 columns each, exact; each is scaled with its activations' scale, their sum
// with the weights', and added to the output's float. So an output element is one chain over the blocks of K in order,
// and its bits depend neither on the number of rows nor on tiles. (Activations in groups of 16: with groups of 32 the
// divergence from the unquantized model was twice as large, measured on real models, for a tenth less arithmetic.)
//
// A tile is one panel with up to kIntRows rows over all of K: codes go from memory to registers (unpack.inl) and meet
// the tile's rows there. Further tiles of an item find the panel in a cache.
#include "cpu/kernels.h"
#include "cpu/lanes.inl"
#include "cpu/unpack.inl"

namespace sg {
namespace {

constexpr int kIntBlockRows = 96;  // at most, rows of an item
constexpr int kFewItems = 16;      // at least, where an item is over in microseconds: longer streams are read faster

// ---- products -------------------------------------------------------------------------------------------------------

// What w is made of: see unpack.inl. kShift: of the bias.
template <bool kHasMin, bool kIsFine, int kShift>
struct Kind {
  static constexpr bool kMin = kHasMin, kFine = kIsFine;
  static constexpr int kBias = kShift;
};

// A packed type, as far as a product can tell.
template <int kCodeBits, Head kSuperHead>
struct Type {
  static constexpr int kBits = kCodeBits;
  static constexpr Head kHead = kSuperHead;
  static constexpr bool kMin = kHead != Head::Scale && kHead != Head::K6;
  // 8-bit codes always have their bias: see dot4.
  static constexpr int kShift = kMin && kBits != 8 ? 0 : kBits - 1;
  using Kind = sg::Kind<kMin, kHead == Head::K6, kShift>;
};

// Products of R rows with a block, in two halves of 16 columns.
template <class Kind, int R>
struct BlockSums {
  I16 sums[R];
  F16 scaled[R];

  SG_INLINE_MEMBER void start(const ActivationBlock* x, int64_t x_stride, int half) {
    SG_UNROLL
    for (int r = 0; r < R; r++) sums[r] = start_dot<Kind::kBias>(x[r * x_stride].negative_sums + half);
  }

  SG_INLINE_MEMBER void quad(const ActivationBlock* x, int64_t x_stride, int i, Quads w) {
    SG_UNROLL
    for (int r = 0; r < R; r++) sums[r] = dot4<Kind::kBias>(sums[r], w, x[r * x_stride].codes + 4 * i);
  }

  // After half 0.
  SG_INLINE_MEMBER void turn(const ActivationBlock* x, int64_t x_stride) {
    SG_UNROLL
    for (int r = 0; r < R; r++) {
      const F16 first = finish_dot<Kind::kBias>(sums[r], x[r * x_stride].negative_sums);
      scaled[r] = mul(first, set1(x[r * x_stride].scales[0]));
    }
    start(x, x_stride, 1);
  }

  // After half 1: onto the outputs.
  SG_INLINE_MEMBER void finish(const ActivationBlock* x, int64_t x_stride, const BlockScales& w, F16 (&out)[R]) {
    SG_UNROLL
    for (int r = 0; r < R; r++) {
      const F16 second = finish_dot<Kind::kBias>(sums[r], x[r * x_stride].negative_sums + 1);
      const F16 scale = set1(x[r * x_stride].scales[1]);
      if constexpr (Kind::kFine) {
        out[r] = fma(mul(second, scale), w.second, fma(scaled[r], w.scale, out[r]));
      } else {
        out[r] = fma(fma(second, scale, scaled[r]), w.scale, out[r]);
      }
      if constexpr (Kind::kMin) out[r] = fma(set1(x[r * x_stride].sum), w.min, out[r]);
    }
  }
};

template <class Type, int R, int kQuad, int kEnd>
SG_INLINE void stream_quads(const ActivationBlock* x, int64_t x_stride, const uint8_t* block,
                            const HighBits<Type::kBits>& high, BlockSums<typename Type::Kind, R>& sums) {
  sums.quad(x, x_stride, kQuad, quad_of<Type::kBits, kQuad>(block, high));
  if constexpr (kQuad + 1 < kEnd) stream_quads<Type, R, kQuad + 1, kEnd>(x, x_stride, block, high, sums);
}

template <class Type, int R>
__attribute__((noinline)) void int_panel_rows(const LinearArgs& a, const uint8_t* panel, const ActivationBlock* x,
                                              float* partial) {
  const PackedLayout layout = packed_layout(a.dtype, a.group);
  F16 out[R];
  SG_UNROLL
  for (int r = 0; r < R; r++) out[r] = zero();
  const int supers = a.k / layout.columns, blocks = layout.blocks();
  for (int s = 0; s < supers; s++, panel += layout.super_bytes()) {
    const uint8_t* block = panel + layout.head_bytes;
    for (int b = 0; b < blocks; b++, x++, block += Type::kBits * kQuadBytes) {
      SG_UNROLL
      for (int j = 0; j < Type::kBits; j++) __builtin_prefetch(block + kAhead + j * kQuadBytes);
      const HighBits<Type::kBits> high(block);
      BlockSums<typename Type::Kind, R> sums;
      sums.start(x, a.x_stride, 0);
      stream_quads<Type, R, 0, 4>(x, a.x_stride, block, high, sums);
      sums.turn(x, a.x_stride);
      stream_quads<Type, R, 4, 8>(x, a.x_stride, block, high, sums);
      sums.finish(x, a.x_stride, scales_of<Type::kHead, Type::kBits>(panel, b), out);
    }
  }
  SG_UNROLL
  for (int r = 0; r < R; r++) store(partial + 16 * r, out[r]);
}

// int_panel_rows for a number of rows known at run time, 1 .. R.
template <class Type, int R = kIntRows>
void int_tile(const LinearArgs& a, const uint8_t* panel, const ActivationBlock* x, int rows, float* partial) {
  if (rows == R) {
    int_panel_rows<Type, R>(a, panel, x, partial);
  } else if constexpr (R > 1) {
    int_tile<Type, R - 1>(a, panel, x, rows, partial);
  }
}

// One panel x `rows` rows, in tiles of nearly equal height; to partial [rows][16].
template <class Type>
void int_panel(const LinearArgs& a, const uint8_t* panel, const ActivationBlock* x, int rows, float* partial) {
  const int tiles = (rows + kIntRows - 1) / kIntRows, height = (rows + tiles - 1) / tiles;
  for (int r = 0; r < rows; r += height) {
    const int count = rows - r < height ? rows - r : height;
    int_tile<Type>(a, panel, x + r * a.x_stride, count, partial + 16 * r);
  }
}

using IntPanel = void (*)(const LinearArgs&, const uint8_t* panel, const ActivationBlock*, int rows, float* partial);

IntPanel int_panel_of(DType type) {
  switch (type) {
    case DType::Q4_0:
      return int_panel<Type<4, Head::Scale>>;
    case DType::Q5_0:
      return int_panel<Type<5, Head::Scale>>;
    case DType::Q8_0:
      return int_panel<Type<8, Head::Scale>>;
    case DType::Q4_1:
      return int_panel<Type<4, Head::ScaleMin>>;
    case DType::Q5_1:
      return int_panel<Type<5, Head::ScaleMin>>;
    case DType::INT4:
      return int_panel<Type<4, Head::ScaleZero>>;
    case DType::INT8:
      return int_panel<Type<8, Head::ScaleZero>>;
    case DType::Q4_K:
      return int_panel<Type<4, Head::K>>;
    case DType::Q5_K:
      return int_panel<Type<5, Head::K>>;
    default:
      return int_panel<Type<6, Head::K6>>;
  }
}

// Adds the bias, then what out holds, and stores one panel's rows.
void finish_panel(const LinearArgs& a, int row, int rows, int panel, const float* partial) {
  const int column = panel * 16, lanes = a.n - column < 16 ? a.n - column : 16;
  const F16 bias = a.bias == nullptr ? zero() : load_lanes(a.bias + column, lanes);
  for (int r = 0; r < rows; r++) {
    float* out = a.out + (row + r) * a.out_stride + column;
    F16 sum = load(partial + 16 * r);
    if (a.bias != nullptr) sum = add(sum, bias);
    if (a.accumulate) sum = add(load_lanes(out, lanes), sum);
    store_lanes(out, sum, lanes);
  }
}

// Rows [row, row + rows) x panels [panel, end).
void int_range(const LinearArgs& a, int row, int rows, int panel, int end) {
  const int64_t panel_bytes = packed_layout(a.dtype, a.group).panel_bytes(a.k);
  const IntPanel run = int_panel_of(a.dtype);
  const auto* x = static_cast<const ActivationBlock*>(a.x) + row * a.x_stride;
  alignas(64) float partial[kIntBlockRows * 16];
  for (; panel < end; panel++) {
    run(a, static_cast<const uint8_t*>(a.w) + panel * panel_bytes, x, rows, partial);
    finish_panel(a, row, rows, panel, partial);
  }
}

struct IntPlan {
  int panels;       // of the whole matrix
  int item_panels;  // of one item
  int row_blocks;   // an item is one of them; they are numbered fastest
  int block_rows;
};

IntPlan plan_int(const LinearArgs& a) {
  const int panels = (a.n + 15) / 16;
  const int blocks = (a.rows + kIntBlockRows - 1) / kIntBlockRows, rows = (a.rows + blocks - 1) / blocks;
  int count = 16;
  while (count > 1 && panels * blocks < count * kFewItems) count /= 2;
  return {panels, count, blocks, rows};
}

int64_t linear_int_items(const LinearArgs& a) {
  const IntPlan plan = plan_int(a);
  return int64_t(plan.panels + plan.item_panels - 1) / plan.item_panels * plan.row_blocks;
}

void linear_int(const LinearArgs& a, int64_t begin, int64_t end) {
  const IntPlan plan = plan_int(a);
  for (int64_t item = begin; item < end; item++) {
    const int row = int(item % plan.row_blocks) * plan.block_rows;
    const int panel = int(item / plan.row_blocks) * plan.item_panels;
    const int last = panel + plan.item_panels < plan.panels ? panel + plan.item_panels : plan.panels;
    int_range(a, row, a.rows - row < plan.block_rows ? a.rows - row : plan.block_rows, panel, last);
  }
}

}  // namespace
}  // namespace sg

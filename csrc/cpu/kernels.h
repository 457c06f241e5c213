// The kernels of one instruction set, as a table of functions; chosen once, at run time (isa.cpp).
//
// A kernel gets a params struct and a half-open range of work items, which the pool shares among its workers. What an
// item is, is said at the struct. The result of an item never depends on how items are grouped into ranges, and a row's
// result never on the other rows: every reduction has one fixed order.
#pragma once
#include <cstdint>

#include "common/dtypes.h"
#include "cpu/attend.h"

namespace sg {

// Rows of one step, grouped by sequence. Row r belongs to sequence row_seq[r] and stands at position row_pos[r].
struct Batch {
  int32_t num_seqs, num_rows;
  const int32_t* slots;      // [num_seqs]
  const int32_t* starts;     // [num_seqs] position of the first row
  const int32_t* counts;     // [num_seqs]
  const int32_t* first_row;  // [num_seqs]
  const int32_t* row_seq;    // [num_rows]
  const int32_t* row_pos;    // [num_rows]
  const int32_t* page_tables;
  int64_t page_table_stride;  // page of position p of sequence s: page_tables[slots[s] * stride + p / page_size]
};

// 32 activations of a row in 8 bits: value i is scales[i / 16] * codes[i]. What integer weights meet.
struct ActivationBlock {
  int8_t codes[32];
  float scales[2];
  int32_t negative_sums[2];  // -(sum of the codes) of each half
  float sum;                 // of the values
  float unused[3];
};
static_assert(sizeof(ActivationBlock) == 64);

// out[r] = x[r] as an operand.  Item: one row.
struct ConvertArgs {
  const float* x;
  int64_t x_stride;
  void* out;           // f32 | bf16, or activation blocks where dtype is INT8
  int64_t out_stride;  // elements, or blocks
  int32_t width;       // a multiple of 32 for blocks
  DType dtype;         // of out
};

// out[r, n] (+)= sum_k x[r, k] * w[n, k] + bias[n].
// w is packed in panels of 16 output rows, N rounded up to 16 with zeros:  bf16 [N/16][K/2][16][2] (K rounded up to 2
// with zeros),  f32 [N/16][K][16],  integers as packed.h says.
// Item: kernel-defined; linear_items(args) says how many.
struct LinearArgs {
  const void* x;     // [rows, k] f32 | bf16 as dtype, or [rows, k / 32] activation blocks for integer weights
  int64_t x_stride;  // elements, or blocks
  const void* w;
  const float* bias;  // [n] or null
  float* out;         // [rows, n]
  int64_t out_stride;
  int32_t rows, n, k;
  bool accumulate;  // add to what out holds
  DType dtype;      // of w
  int32_t group;    // columns that share a scale: INT4 and INT8 alone
};

// out[r] = x[r, g] / sqrt(mean(x[r, g]^2) + eps) * (weight + offset), for each of `groups` equal parts g of a row.
// Item: one row.
struct RmsNormArgs {
  const float* x;
  int64_t x_stride;
  const float* weight;    // [width / groups]
  void* out;              // f32 | bf16, or activation blocks where dtype is INT8
  int64_t out_stride;     // elements, or blocks
  int32_t width, groups;  // a group is a multiple of 32 wide where it becomes blocks
  float eps, offset;
  DType dtype;  // of out
};

// out[r] = scale * row ids[r] of a matrix packed as a linear's w.  Item: one row.
struct EmbedArgs {
  const int32_t* ids;  // [rows]
  const void* w;
  float* out;
  int64_t out_stride;
  int32_t width;
  float scale;
  DType dtype;  // of w
  int32_t group;
};

// Turn heads in place: (a, b) at (i, i + rotary/2) -> (a cos - b sin, b cos + a sin).
// cos, sin: [rows, rotary_dim / 2], computed once per step.  Item: one row.
struct RopeArgs {
  float* x;
  int64_t x_stride;
  const float* cos;
  const float* sin;
  int32_t num_heads, head_dim, rotary_dim;
};

enum class Activation : int32_t { Silu = 0, GeluTanh = 1, Gelu = 2 };

// out = activation(gate) * up.  Item: one row.
struct GatedMulArgs {
  const float* gate;
  const float* up;
  int64_t gate_stride, up_stride;
  void* out;           // f32 | bf16, or activation blocks where dtype is INT8
  int64_t out_stride;  // elements, or blocks
  int32_t width;
  Activation activation;
  DType dtype;  // of out
};

// Unpack stored rows (any DType) to f32, then pack them as a linear's w.
// Item: one panel of 16 output rows.
struct PackArgs {
  const void* src;  // [n] rows of src_row_bytes
  int64_t src_row_bytes;
  DType src_type;
  void*
      dst;  // packed: f32, bf16, or integers, which are those of src_type, or rounded from floats; panel of row 0 first
  DType dst_type;
  int32_t n, k;
  int32_t first_row;   // where row 0 of src lands in dst (a multiple of 16 unless rows are packed side by side)
  int32_t rope_heads;  // 0, or undo the interleaved rope order: see streamgen.checkpoints.base.RawTensor
  int32_t group;       // columns that share a scale: INT4 and INT8 alone
  bool symmetric;      // rounding to INT4 and INT8: the zero point is the middle
};

struct Kernels {
  const char* name;  // that of the unit: k_*.cpp
  int64_t (*linear_items)(const LinearArgs&);
  void (*linear)(const LinearArgs&, int64_t begin, int64_t end);
  void (*rms_norm)(const RmsNormArgs&, int64_t begin, int64_t end);
  void (*convert)(const ConvertArgs&, int64_t begin, int64_t end);
  void (*embed)(const EmbedArgs&, int64_t begin, int64_t end);
  void (*rope)(const RopeArgs&, int64_t begin, int64_t end);
  void (*gated_mul)(const GatedMulArgs&, int64_t begin, int64_t end);
  // Item: one row. Writes keys and values of the step's rows into their pages.
  void (*store_kv)(const AttendArgs&, int64_t begin, int64_t end);
  // Items: (tile, key-value head), num_tiles * num_kv_heads of them; scratch: attend_scratch(args) bytes, one per
  // worker.
  int64_t (*attend_scratch)(const AttendArgs&);
  void (*attend)(const AttendArgs&, int64_t begin, int64_t end, void* scratch);
  // Before those, where the plan has any: num_ahead * num_kv_heads items, which write into partials.
  void (*attend_ahead)(const AttendArgs&, int64_t begin, int64_t end, void* scratch);
  int64_t (*attend_state)(const AttendArgs&);  // floats of a row's state in partials
  void (*pack)(const PackArgs&, int64_t begin, int64_t end);
  // Over one row of logits; fixed order.
  float (*row_max)(const float* x, int64_t n);
  double (*row_exp_sum)(const float* x, int64_t n, float max);  // sum of exp(x - max)
  // Reads n floats (a multiple of 64) as fast as the processor can: what bandwidth.cpp measures with.
  float (*read)(const float* x, int64_t n);
};

// One for each unit of this build; null where this processor does not run it.
const Kernels* kernels_generic();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512vnni();
const Kernels* kernels_avx512bf16();
const Kernels* kernels_neon();
const Kernels* kernels_dotprod();
const Kernels* kernels_i8mm();

// All that this processor runs, the best first; returns how many there are.
constexpr int kMostLevels = 8;
int available_kernels(const Kernels* (&tables)[kMostLevels]);

// The best table this processor runs, not above `limit` (a name, or null for no limit). Throws on an unknown name.
const Kernels* select_kernels(const char* limit);

}  // namespace sg

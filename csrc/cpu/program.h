// A model's program on the CPU: ops over buffers, run as one call per step.
//
// Built once, op by op, from streamgen.models.program.Program by backends/cpu.py. A step is cut into stages; the
// workers of the pool share the items of a stage and meet at its end. Consecutive ops whose rows do not touch each
// other (norms, rope, storing keys and values, products) form one stage.
//
// With few rows, meeting costs more than the work: ops that only make a linear's input (a norm, a gated product, the
// quantizing of an attention's output) are then done by every worker for itself, and the linear follows at once.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <variant>
#include <vector>

#include "common/paging.h"
#include "common/program.h"
#include "cpu/attend_plan.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/pool.h"
#include "cpu/sampling.h"

namespace sg {

// Columns [offset, offset + width) of a buffer.
struct View {
  int32_t buffer, offset, width;
};

// Rows of a packed matrix: their type, and the columns that share a scale (INT4 and INT8 alone).
struct Packed {
  const void* w;
  DType type;
  int32_t group;
};
struct EmbedOp {
  View out;
  Packed weight;
  float scale;
};
struct RmsNormOp {
  View x, out;
  const float* weight;
  float eps, offset;
  int32_t groups;
};
struct LinearOp {
  struct Part {  // columns [offset, offset + n) of out
    Packed weight;
    int32_t offset, n;
  };
  View x, out;
  std::vector<Part> parts;
  const float* bias;
  bool accumulate;
};
struct ConvertOp {  // what attention wrote as floats becomes an operand, where that has activation blocks
  View x;
};
struct RopeOp {
  View x;
  int32_t num_heads, head_dim, table;
};
struct StoreOp {  // first half of an Attend: keys and values into pages
  int32_t attend;
};
struct AttendOp {
  View q, k, v, out;
  int32_t layer, num_heads, num_kv_heads, head_dim, window;
  float scale, softcap;
};
struct GatedMulOp {
  View gate, up, out;
  Activation activation;
};
using Op = std::variant<EmbedOp, RmsNormOp, LinearOp, RopeOp, StoreOp, AttendOp, GatedMulOp, ConvertOp>;

// What holds a buffer's rows. An operand is there in every form that an op reads.
struct BufferForms {
  bool stream;     // float32
  bool dense;      // ProgramSizes::dtype
  bool quantized;  // activation blocks
};

struct ProgramSizes {
  DType dtype;     // F32 | BF16: dense weights and operands
  DType kv_dtype;  // of pages: dtype, or INT8
  int32_t max_rows, head_rows;
  int32_t num_layers, num_kv_heads, head_dim, page_size, num_pages;
  int32_t vocab;
};

// One step; arrays as in StepInputs and StepOutputs of backends/base.py.
struct StepArrays {
  int32_t* tokens;
  int64_t tokens_stride;
  const int32_t* page_tables;
  int64_t page_table_stride;
  int32_t num_slots;
  const int32_t *slots, *starts, *counts;
  int32_t num_seqs;
  SampleInputs sampling;
  int32_t num_samples;
  SampleOutputs outputs;
  float* logits;  // [num_logits, vocab]: of the rows whose SampleRow::logits says so
  int32_t num_logits;
};

class Program {
 public:
  Program(Pool& pool, const Kernels& kernels, const ProgramSizes& sizes);

  int add_buffer(int32_t width, BufferForms forms, bool head_only);
  int add_rope(std::vector<float> inv_freq, float scale);
  void add(const Op& op);
  // What was added so far runs on every row; what follows runs on the rows that sample.
  void split(View selected, View gathered);
  // No more ops; allocates activations and pages.
  void finish(View logits);

  // A row with SampleRow::logits >= 0 is not sampled: its logits are written out.
  void step(const StepArrays& step);
  // Sample those rows from `changed` [num_logits, vocab], which is overwritten; step.logits are still the model's own.
  void sample(const StepArrays& step, float* changed);
  void copy_pages(const int32_t* pairs, int64_t count);
  int64_t workspace_bytes() const { return workspace_bytes_; }
  // Give the memory of pages and workspace back; both read as zero afterwards.
  void drop_pages();
  // Bytes of pages and workspace that are in memory.
  int64_t resident_bytes() const;
  // Seconds spent in each op, as they were added, since the last call, then those of the sampler; the first call begins
  // the measuring.
  std::vector<double> take_op_seconds();

 private:
  class Clock;
  // The rows of a buffer in one form, for all workers, and `own` rows for each worker alone.
  struct Rows {
    int64_t stride = 0;  // bytes
    std::unique_ptr<Memory> memory, own;
    int64_t own_bytes = 0;  // of one worker
  };
  struct Buffer {
    int32_t width;
    BufferForms forms;
    bool head_only;
    Rows floats, dense, quantized;  // floats: a stream, or what attention writes before it is quantized
  };
  struct Rope {
    std::vector<float> inv_freq;
    float scale;
    std::vector<float> cos, sin;  // [max_rows, rotary_dim / 2] of the step
  };
  struct Stage {
    int first, last;                // row-local ops [first, last)
    int main;                       // then a linear or an attention, or -1
    bool makes_operand;             // the row-local ops only make what a linear reads: each worker may do it for itself
    std::optional<int> rope_table;  // the row-local ops are only what attention can do itself, with this table
  };

  std::vector<Stage> make_stages(int first, int last) const;
  bool feeds_linear(const Stage& stage) const;
  std::optional<int> rope_before(const Stage& stage) const;
  // In a step of one row per sequence attention turns and stores as it goes, which saves a meeting.
  bool is_fused(const Stage& stage) const { return stage.rope_table && batch_.num_rows == batch_.num_seqs; }
  void run_attend(const AttendArgs& args, int worker);
  void check(const StepArrays& step) const;
  void check_samples(const StepArrays& step, int64_t rows) const;
  void prepare(const StepArrays& step);
  void fill_ropes(int64_t begin, int64_t end);
  void allocate_rows(Rows& rows, int64_t count, int64_t own);
  void allocate(Buffer& buffer);
  void run_stage(const Stage& stage, int worker, int32_t rows);
  void run_local(const Stage& stage, int worker, int32_t rows);
  void run_linear(const LinearOp& op, int worker, int32_t rows, int own);
  // own: -1, or the worker whose own rows are written
  void run_rows(const Op& op, int64_t begin, int64_t end, int own);
  void run_norm(const RmsNormOp& op, int64_t begin, int64_t end, int own);
  void run_gated_mul(const GatedMulOp& op, int64_t begin, int64_t end, int own);
  // f(rows, stride, dtype) for each form in which an operand is read; INT8: activation blocks
  template <class F>
  void for_forms(View out, int own, F&& f) const {
    if (buffer(out).forms.dense) f(dense(out, own), dense_stride(out), sizes_.dtype);
    if (buffer(out).forms.quantized) f(static_cast<void*>(quantized(out, own)), quantized_stride(out), DType::INT8);
  }
  void run_head(const StepArrays& step, int worker);
  void finish_row(const StepArrays& step, int64_t index, float* logits, int worker);
  template <class F>
  void for_all_memory(F&& visit) const;
  size_t origin(int op) const { return size_t(op) < origins_.size() ? size_t(origins_[size_t(op)]) : size_t(added_); }
  void gather(const StepArrays& step, int64_t first, int64_t begin, int64_t end);
  LinearArgs linear_args(const LinearOp& op, const LinearOp::Part& part, int32_t rows, int own) const;
  AttendArgs attend_args(const AttendOp& op) const;
  const Buffer& buffer(View v) const { return buffers_[static_cast<size_t>(v.buffer)]; }
  void make_planners();
  const AttendPlan* plan_of(int32_t window) const;
  float* stream(View v) const;
  int64_t stride(View v) const { return buffer(v).floats.stride / 4; }
  void* dense(View v, int own) const;
  int64_t dense_stride(View v) const { return buffer(v).dense.stride / operand_bytes(sizes_.dtype); }
  ActivationBlock* quantized(View v, int own) const;
  int64_t quantized_stride(View v) const { return buffer(v).quantized.stride / int64_t(sizeof(ActivationBlock)); }
  int64_t page_bytes() const;
  int64_t row_grain(int64_t rows) const;

  Pool& pool_;
  const Kernels& kernels_;
  ProgramSizes sizes_;
  std::vector<Buffer> buffers_;
  std::vector<Rope> ropes_;
  std::vector<Op> ops_;
  int split_ = -1;
  View selected_{}, gathered_{}, logits_{};
  std::vector<Stage> body_, head_;
  std::unique_ptr<Memory> pages_;
  int64_t layer_bytes_ = 0;              // of a page: one layer's K (or V)
  std::vector<AttendPlanner> planners_;  // one for each window
  std::unique_ptr<Memory> partials_;
  std::vector<std::unique_ptr<Memory>> scratch_;  // one per worker
  int64_t workspace_bytes_ = 0;
  std::vector<int> origins_;        // of each op: which added op it came from
  int added_ = 0;                   // ops
  std::vector<double> op_seconds_;  // empty: not measured
  // The step under way.
  Batch batch_{};
  std::vector<int32_t> first_row_, row_seq_, row_pos_, ids_;
};

}  // namespace sg

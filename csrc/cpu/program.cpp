#include "cpu/program.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace sg {

namespace {

template <class... Ts>
struct Overloaded : Ts... {
  using Ts::operator()...;
};
template <class... Ts>
Overloaded(Ts...) -> Overloaded<Ts...>;

// Up to so many rows each worker makes a linear's input for itself.
constexpr int32_t kOwnRows = 4;

bool is_row_local(const Op& op) {
  return !std::holds_alternative<LinearOp>(op) && !std::holds_alternative<AttendOp>(op);
}

// Writes an operand and nothing else, so that it may be done several times.
bool makes_operand(const Op& op) {
  return std::holds_alternative<RmsNormOp>(op) || std::holds_alternative<GatedMulOp>(op) ||
         std::holds_alternative<ConvertOp>(op);
}

int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

[[noreturn]] void fail(const std::string& what, int64_t got, int64_t limit) {
  throw std::invalid_argument(what + ": expected < " + std::to_string(limit) + ", got " + std::to_string(got));
}

void check_index(const char* what, int64_t value, int64_t limit) {
  if (value < 0 || value >= limit) fail(what, value, limit);
}

}  // namespace

// Adds what passes in its scope to an op's seconds: the first worker's time, which includes the waiting for others.
class Program::Clock {
 public:
  Clock(Program& program, int worker, int op)
      : seconds_(worker == 0 && !program.op_seconds_.empty() ? &program.op_seconds_[program.origin(op)] : nullptr) {
    if (seconds_ != nullptr) began_ = std::chrono::steady_clock::now();
  }
  ~Clock() {
    if (seconds_ == nullptr) return;
    *seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - began_).count();
  }
  Clock(const Clock&) = delete;
  Clock& operator=(const Clock&) = delete;

 private:
  double* seconds_;
  std::chrono::steady_clock::time_point began_;
};

std::vector<double> Program::take_op_seconds() {
  std::vector<double> taken(static_cast<size_t>(added_) + 1);
  std::swap(taken, op_seconds_);
  return taken;
}

Program::Program(Pool& pool, const Kernels& kernels, const ProgramSizes& sizes)
    : pool_(pool), kernels_(kernels), sizes_(sizes) {
  if (sizes.dtype != DType::F32 && sizes.dtype != DType::BF16)
    throw std::invalid_argument("dtype: expected F32 or BF16");
  if (sizes.max_rows < 1 || sizes.head_rows < 1) throw std::invalid_argument("max_rows, head_rows: expected >= 1");
}

int Program::add_buffer(int32_t width, BufferForms forms, bool head_only) {
  if (forms.quantized && width % 32 != 0)
    throw std::invalid_argument("width of a quantized operand: no multiple of 32");
  Buffer b{width, forms, head_only, {}, {}, {}};
  // Rows start on cache lines.
  if (forms.stream) b.floats.stride = rounded_up(int64_t(width) * 4, 64);
  if (forms.dense) b.dense.stride = rounded_up(width * operand_bytes(sizes_.dtype), 64);
  if (forms.quantized) b.quantized.stride = width / 32 * int64_t(sizeof(ActivationBlock));
  buffers_.push_back(std::move(b));
  return static_cast<int>(buffers_.size()) - 1;
}

int Program::add_rope(std::vector<float> inv_freq, float scale) {
  ropes_.push_back({std::move(inv_freq), scale, {}, {}});
  return static_cast<int>(ropes_.size()) - 1;
}

void Program::add(const Op& op) {
  auto push = [&](Op derived) {
    ops_.push_back(std::move(derived));
    origins_.push_back(added_);
  };
  const auto* attend = std::get_if<AttendOp>(&op);
  if (attend != nullptr) push(StoreOp{static_cast<int32_t>(ops_.size()) + 1});
  push(op);
  if (attend != nullptr && buffer(attend->out).forms.quantized) {
    Rows& floats = buffers_[static_cast<size_t>(attend->out.buffer)].floats;
    floats.stride = rounded_up(int64_t(attend->out.width) * 4, 64);
    push(ConvertOp{attend->out});
  }
  ++added_;
}

void Program::split(View selected, View gathered) {
  split_ = static_cast<int>(ops_.size());
  selected_ = selected;
  gathered_ = gathered;
}

// Whether a worker may go on to the stage's linear while others still read what the operand is made of.
bool Program::feeds_linear(const Stage& stage) const {
  const auto* linear = stage.main < 0 ? nullptr : std::get_if<LinearOp>(&ops_[static_cast<size_t>(stage.main)]);
  if (linear == nullptr) return false;
  return std::all_of(ops_.begin() + stage.first, ops_.begin() + stage.last, [&](const Op& op) {
    const auto reads = [&](View v) { return v.buffer == linear->out.buffer; };
    if (const auto* norm = std::get_if<RmsNormOp>(&op)) return !reads(norm->x);
    if (const auto* product = std::get_if<GatedMulOp>(&op)) return !reads(product->gate) && !reads(product->up);
    if (const auto* convert = std::get_if<ConvertOp>(&op)) return !reads(convert->x);
    return false;
  });
}

// The rope table of an attention that is preceded by the turning of its q and k, and by nothing else.
std::optional<int> Program::rope_before(const Stage& stage) const {
  const auto* attend = stage.main < 0 ? nullptr : std::get_if<AttendOp>(&ops_[static_cast<size_t>(stage.main)]);
  if (attend == nullptr || stage.last - stage.first != 3) return std::nullopt;
  const auto* q = std::get_if<RopeOp>(&ops_[static_cast<size_t>(stage.first)]);
  const auto* k = std::get_if<RopeOp>(&ops_[static_cast<size_t>(stage.first) + 1]);
  const auto same = [](View a, View b) { return a.buffer == b.buffer && a.offset == b.offset && a.width == b.width; };
  if (q == nullptr || k == nullptr || q->table != k->table) return std::nullopt;
  return same(q->x, attend->q) && same(k->x, attend->k) ? std::optional<int>(q->table) : std::nullopt;
}

std::vector<Program::Stage> Program::make_stages(int first, int last) const {
  std::vector<Stage> stages;
  for (int i = first; i < last;) {
    Stage stage{i, i, -1, true, std::nullopt};
    for (; stage.last < last && is_row_local(ops_[static_cast<size_t>(stage.last)]); ++stage.last) {
      stage.makes_operand = stage.makes_operand && makes_operand(ops_[static_cast<size_t>(stage.last)]);
    }
    if (stage.last < last) stage.main = stage.last;
    stage.makes_operand = stage.makes_operand && feeds_linear(stage);
    stage.rope_table = rope_before(stage);
    stages.push_back(stage);
    i = stage.last + (stage.main >= 0);
  }
  return stages;
}

void Program::allocate_rows(Rows& rows, int64_t count, int64_t own) {
  if (rows.stride == 0) return;
  rows.memory = std::make_unique<Memory>(count * rows.stride, false);
  workspace_bytes_ += count * rows.stride;
  if (own == 0) return;
  rows.own_bytes = std::min(count, own) * rows.stride;
  rows.own = std::make_unique<Memory>(pool_.size() * rows.own_bytes, false);
  workspace_bytes_ += pool_.size() * rows.own_bytes;
}

void Program::allocate(Buffer& b) {
  const int64_t rows = b.head_only ? sizes_.head_rows : sizes_.max_rows;
  allocate_rows(b.floats, rows, 0);
  allocate_rows(b.dense, rows, kOwnRows);
  allocate_rows(b.quantized, rows, kOwnRows);
}

void Program::finish(View logits) {
  if (split_ < 0) throw std::logic_error("finish before split");
  logits_ = logits;
  body_ = make_stages(0, split_);
  head_ = make_stages(split_, static_cast<int>(ops_.size()));
  int64_t scratch = sample_scratch(sizes_.vocab);
  for (Buffer& b : buffers_) allocate(b);
  int64_t partials = 0;
  for (const Op& op : ops_) {
    if (const auto* attend = std::get_if<AttendOp>(&op)) {
      const AttendArgs a = attend_args(*attend);
      scratch = std::max(scratch, kernels_.attend_scratch(a));
      partials = std::max(partials, AttendPlanner::kUnits * a.num_heads * kernels_.attend_state(a) * 4);
    }
  }
  partials_ = std::make_unique<Memory>(partials, false);
  for (int i = 0; i < pool_.size(); ++i) scratch_.push_back(std::make_unique<Memory>(scratch, false));
  workspace_bytes_ += partials + pool_.size() * scratch;
  for (Rope& r : ropes_) {
    r.cos.resize(static_cast<size_t>(sizes_.max_rows) * r.inv_freq.size());
    r.sin.resize(r.cos.size());
    workspace_bytes_ += static_cast<int64_t>(r.cos.size()) * 8;
  }
  for (auto* v : {&first_row_, &row_seq_, &row_pos_, &ids_}) v->resize(static_cast<size_t>(sizes_.max_rows));
  layer_bytes_ = sizes_.num_kv_heads * tile_bytes(sizes_.kv_dtype, sizes_.page_size, sizes_.head_dim);
  make_planners();
  pages_ = std::make_unique<Memory>(sizes_.num_pages * page_bytes(), true);
}

float* Program::stream(View v) const { return static_cast<float*>(buffer(v).floats.memory->data()) + v.offset; }

void* Program::dense(View v, int own) const {
  const Rows& rows = buffer(v).dense;
  char* base = static_cast<char*>(own < 0 ? rows.memory->data() : rows.own->data());
  return base + (own < 0 ? 0 : own * rows.own_bytes) + v.offset * operand_bytes(sizes_.dtype);
}

ActivationBlock* Program::quantized(View v, int own) const {
  const Rows& rows = buffer(v).quantized;
  char* base = static_cast<char*>(own < 0 ? rows.memory->data() : rows.own->data());
  return reinterpret_cast<ActivationBlock*>(base + (own < 0 ? 0 : own * rows.own_bytes)) + v.offset / 32;
}

int64_t Program::page_bytes() const { return 2 * sizes_.num_layers * layer_bytes_; }

void Program::make_planners() {
  for (const Op& op : ops_) {
    const auto* attend = std::get_if<AttendOp>(&op);
    if (attend == nullptr || plan_of(attend->window) != nullptr) continue;
    planners_.emplace_back(
        AttendPlanner::Limits{attend->num_heads, attend->num_kv_heads, sizes_.page_size, attend->window, pool_.size(),
                              sizes_.max_rows, AttendPlanner::worth_sharing(attend->num_heads, attend->num_kv_heads)});
  }
}

const AttendPlan* Program::plan_of(int32_t window) const {
  for (const AttendPlanner& planner : planners_)
    if (planner.window() == window) return &planner.current();
  return nullptr;
}

int64_t Program::row_grain(int64_t rows) const { return std::max<int64_t>(1, rows / (4 * pool_.size())); }

LinearArgs Program::linear_args(const LinearOp& op, const LinearOp::Part& part, int32_t rows, int own) const {
  LinearArgs a{};
  if (is_integer(part.weight.type)) {
    a.x = quantized(op.x, own);
    a.x_stride = quantized_stride(op.x);
  } else {
    a.x = dense(op.x, own);
    a.x_stride = dense_stride(op.x);
  }
  a.w = part.weight.w;
  a.bias = op.bias == nullptr ? nullptr : op.bias + part.offset;
  a.out = stream(op.out) + part.offset;
  a.out_stride = stride(op.out);
  a.rows = rows;
  a.n = part.n;
  a.k = op.x.width;
  a.accumulate = op.accumulate;
  a.dtype = part.weight.type;
  a.group = part.weight.group;
  return a;
}

AttendArgs Program::attend_args(const AttendOp& op) const {
  AttendArgs a{};
  const bool is_float = buffer(op.out).forms.quantized;  // quantized afterwards
  if (buffer(op.q).floats.memory != nullptr && pages_ != nullptr) {
    a.q = stream(op.q);
    a.k = stream(op.k);
    a.v = stream(op.v);
    a.out = is_float ? stream(op.out) : dense(op.out, -1);
    char* layer = static_cast<char*>(pages_->data()) + 2 * op.layer * layer_bytes_;
    a.k_pages = layer;
    a.v_pages = layer + layer_bytes_;
    a.plan = plan_of(op.window);
    a.partials = static_cast<float*>(partials_->data());
  }
  a.q_stride = stride(op.q);
  a.k_stride = stride(op.k);
  a.v_stride = stride(op.v);
  a.out_stride = is_float ? stride(op.out) : dense_stride(op.out);
  a.out_dtype = is_float ? DType::F32 : sizes_.dtype;
  a.num_heads = op.num_heads;
  a.num_kv_heads = op.num_kv_heads;
  a.head_dim = op.head_dim;
  a.page_size = sizes_.page_size;
  a.page_stride = page_bytes();
  a.window = op.window;
  a.scale = op.scale;
  a.softcap = op.softcap;
  a.dtype = sizes_.dtype;
  a.kv_dtype = sizes_.kv_dtype;
  a.batch = &batch_;
  return a;
}

void Program::check(const StepArrays& s) const {
  if (s.num_seqs < 1) throw std::invalid_argument("num_seqs: expected >= 1");
  int64_t rows = 0;
  for (int32_t i = 0; i < s.num_seqs; ++i) {
    check_index("slot", s.slots[i], s.num_slots);
    if (s.counts[i] < 1 || s.starts[i] < 0) throw std::invalid_argument("counts, starts: expected >= 1 and >= 0");
    const int64_t end = int64_t(s.starts[i]) + s.counts[i];
    check_index("end of a sequence", end, s.tokens_stride);  // the next token's place as well
    const int64_t pages = (end + sizes_.page_size - 1) / sizes_.page_size;
    if (pages > s.page_table_stride) fail("pages of a sequence", pages, s.page_table_stride + 1);
    const int32_t* table = s.page_tables + s.slots[i] * s.page_table_stride;
    for (int64_t p = 0; p < pages; ++p) check_index("page", table[p], sizes_.num_pages);
    const int32_t* ids = s.tokens + s.slots[i] * s.tokens_stride;
    for (int64_t p = s.starts[i]; p < end; ++p) check_index("token id", ids[p], sizes_.vocab);
    rows += s.counts[i];
    if (rows > sizes_.max_rows) fail("rows of a step", rows, sizes_.max_rows + 1);
  }
  check_samples(s, rows);
}

void Program::check_samples(const StepArrays& s, int64_t rows) const {
  for (int32_t i = 0; i < s.num_samples; ++i) {
    const SampleRow& r = s.sampling.rows[i];
    check_index("sample row", r.row, rows);
    check_index("sample slot", r.slot, s.num_slots);
    check_index("sample position", r.position, s.tokens_stride - 1);
    if (r.target >= 0) check_index("target", r.target, sizes_.vocab);
    if (r.num_top > s.outputs.top_width) fail("num_top", r.num_top, s.outputs.top_width + 1);
    if (r.logits >= 0) check_index("row of logits", r.logits, s.num_logits);
    if (r.mask == kGrammarMask && s.sampling.grammars == nullptr)
      throw std::invalid_argument("a row's grammar is missing");
  }
}

void Program::prepare(const StepArrays& s) {
  int32_t row = 0;
  for (int32_t i = 0; i < s.num_seqs; ++i) {
    first_row_[static_cast<size_t>(i)] = row;
    const int32_t* ids = s.tokens + s.slots[i] * s.tokens_stride + s.starts[i];
    for (int32_t j = 0; j < s.counts[i]; ++j, ++row) {
      row_seq_[static_cast<size_t>(row)] = i;
      row_pos_[static_cast<size_t>(row)] = s.starts[i] + j;
      ids_[static_cast<size_t>(row)] = ids[j];
    }
  }
  batch_ = {s.num_seqs,      row,
            s.slots,         s.starts,
            s.counts,        first_row_.data(),
            row_seq_.data(), row_pos_.data(),
            s.page_tables,   s.page_table_stride};
  for (AttendPlanner& planner : planners_) planner.plan(batch_);
}

void Program::fill_ropes(int64_t begin, int64_t end) {
  for (Rope& rope : ropes_) {
    const size_t half = rope.inv_freq.size();
    for (int64_t r = begin; r < end; ++r) {
      const float position = static_cast<float>(row_pos_[static_cast<size_t>(r)]);
      float* cos = rope.cos.data() + static_cast<size_t>(r) * half;
      float* sin = rope.sin.data() + static_cast<size_t>(r) * half;
      for (size_t i = 0; i < half; ++i) {
        const float angle = position * rope.inv_freq[i];
        cos[i] = std::cos(angle) * rope.scale;
        sin[i] = std::sin(angle) * rope.scale;
      }
    }
  }
}

void Program::run_norm(const RmsNormOp& o, int64_t begin, int64_t end, int own) {
  for_forms(o.out, own, [&](void* out, int64_t out_stride, DType dtype) {
    kernels_.rms_norm(
        {stream(o.x), stride(o.x), o.weight, out, out_stride, o.x.width, o.groups, o.eps, o.offset, dtype}, begin, end);
  });
}

void Program::run_gated_mul(const GatedMulOp& o, int64_t begin, int64_t end, int own) {
  for_forms(o.out, own, [&](void* out, int64_t out_stride, DType dtype) {
    kernels_.gated_mul(
        {stream(o.gate), stream(o.up), stride(o.gate), stride(o.up), out, out_stride, o.out.width, o.activation, dtype},
        begin, end);
  });
}

void Program::run_rows(const Op& op, int64_t begin, int64_t end, int own) {
  std::visit(Overloaded{
                 [&](const EmbedOp& o) {
                   EmbedArgs a{};
                   a.ids = ids_.data();
                   a.w = o.weight.w;
                   a.out = stream(o.out);
                   a.out_stride = stride(o.out);
                   a.width = o.out.width;
                   a.scale = o.scale;
                   a.dtype = o.weight.type;
                   a.group = o.weight.group;
                   kernels_.embed(a, begin, end);
                 },
                 [&](const RmsNormOp& o) { run_norm(o, begin, end, own); },
                 [&](const RopeOp& o) {
                   const Rope& table = ropes_[static_cast<size_t>(o.table)];
                   RopeArgs a{};
                   a.x = stream(o.x);
                   a.x_stride = stride(o.x);
                   a.cos = table.cos.data();
                   a.sin = table.sin.data();
                   a.num_heads = o.num_heads;
                   a.head_dim = o.head_dim;
                   a.rotary_dim = 2 * static_cast<int32_t>(table.inv_freq.size());
                   kernels_.rope(a, begin, end);
                 },
                 [&](const StoreOp& o) {
                   kernels_.store_kv(attend_args(std::get<AttendOp>(ops_[static_cast<size_t>(o.attend)])), begin, end);
                 },
                 [&](const GatedMulOp& o) { run_gated_mul(o, begin, end, own); },
                 [&](const ConvertOp& o) {
                   for_forms(o.x, own, [&](void* out, int64_t out_stride, DType dtype) {
                     kernels_.convert({stream(o.x), stride(o.x), out, out_stride, o.x.width, dtype}, begin, end);
                   });
                 },
                 [](const LinearOp&) {},
                 [](const AttendOp&) {},
             },
             op);
}

// The parts of a linear are one list of items.
void Program::run_linear(const LinearOp& op, int worker, int32_t rows, int own) {
  int64_t items = 0;
  for (const LinearOp::Part& part : op.parts) items += kernels_.linear_items(linear_args(op, part, rows, own));
  pool_.share(worker, items, 1, [&](int64_t begin, int64_t end) {
    for (const LinearOp::Part& part : op.parts) {
      const LinearArgs a = linear_args(op, part, rows, own);
      const int64_t count = kernels_.linear_items(a);
      if (begin < count && end > 0) kernels_.linear(a, std::max<int64_t>(begin, 0), std::min(end, count));
      begin -= count;
      end -= count;
    }
  });
}

void Program::run_local(const Stage& stage, int worker, int32_t rows) {
  pool_.share(worker, rows, row_grain(rows), [&](int64_t begin, int64_t end) {
    for (int i = stage.first; i < stage.last; ++i) run_rows(ops_[static_cast<size_t>(i)], begin, end, -1);
  });
}

void Program::run_stage(const Stage& stage, int worker, int32_t rows) {
  int own = -1;
  if (stage.makes_operand && rows <= kOwnRows && pool_.size() > 1 && stage.last > stage.first) {
    const Clock clock(*this, worker, stage.first);
    own = worker;
    for (int i = stage.first; i < stage.last; ++i) run_rows(ops_[static_cast<size_t>(i)], 0, rows, own);
  } else if (stage.last > stage.first && !is_fused(stage)) {
    const Clock clock(*this, worker, stage.first);
    run_local(stage, worker, rows);
  }
  if (stage.main < 0) return;
  const Clock clock(*this, worker, stage.main);
  const Op& op = ops_[static_cast<size_t>(stage.main)];
  if (const auto* linear = std::get_if<LinearOp>(&op)) return run_linear(*linear, worker, rows, own);
  AttendArgs a = attend_args(std::get<AttendOp>(op));
  if (is_fused(stage)) {
    const Rope& rope = ropes_[static_cast<size_t>(*stage.rope_table)];
    a.cos = rope.cos.data();
    a.sin = rope.sin.data();
    a.rotary_dim = 2 * static_cast<int32_t>(rope.inv_freq.size());
    a.fused = true;
  }
  run_attend(a, worker);
}

void Program::run_attend(const AttendArgs& a, int worker) {
  void* scratch = scratch_[static_cast<size_t>(worker)]->data();
  if (a.plan->num_ahead > 0) {
    pool_.share(worker, int64_t(a.plan->num_ahead) * a.num_kv_heads, 1,
                [&](int64_t begin, int64_t end) { kernels_.attend_ahead(a, begin, end, scratch); });
  }
  pool_.share(worker, int64_t(a.plan->num_tiles) * a.num_kv_heads, 1,
              [&](int64_t begin, int64_t end) { kernels_.attend(a, begin, end, scratch); });
}

void Program::gather(const StepArrays& s, int64_t first, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = s.sampling.rows[first + i].row;
    std::memcpy(stream(gathered_) + i * stride(gathered_), stream(selected_) + row * stride(selected_),
                static_cast<size_t>(selected_.width) * sizeof(float));
  }
}

void Program::run_head(const StepArrays& s, int worker) {
  for (int32_t first = 0; first < s.num_samples; first += sizes_.head_rows) {
    const int32_t rows = std::min(sizes_.head_rows, s.num_samples - first);
    pool_.share(worker, rows, row_grain(rows), [&](int64_t begin, int64_t end) { gather(s, first, begin, end); });
    for (const Stage& stage : head_) run_stage(stage, worker, rows);
    const Clock clock(*this, worker, int(ops_.size()));
    pool_.share(worker, rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) finish_row(s, first + i, stream(logits_) + i * stride(logits_), worker);
    });
  }
}

void Program::finish_row(const StepArrays& s, int64_t index, float* logits, int worker) {
  const int32_t out = s.sampling.rows[index].logits;
  if (out < 0) {
    sample_row(kernels_, s.sampling, index, logits, nullptr, s.outputs, scratch_[static_cast<size_t>(worker)]->data());
    return;
  }
  clean_logits(logits, sizes_.vocab);
  std::memcpy(s.logits + int64_t(out) * sizes_.vocab, logits, static_cast<size_t>(sizes_.vocab) * sizeof(float));
}

void Program::sample(const StepArrays& s, float* changed) {
  check_samples(s, sizes_.max_rows);
  pool_.run([&](int worker) {
    pool_.share(worker, s.num_samples, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = int64_t(s.sampling.rows[i].logits) * sizes_.vocab;
        if (at < 0) continue;
        sample_row(kernels_, s.sampling, i, changed + at, s.logits + at, s.outputs,
                   scratch_[static_cast<size_t>(worker)]->data());
      }
    });
  });
}

void Program::step(const StepArrays& s) {
  check(s);
  prepare(s);
  pool_.run([&](int worker) {
    pool_.share(worker, batch_.num_rows, row_grain(batch_.num_rows),
                [&](int64_t begin, int64_t end) { fill_ropes(begin, end); });
    for (const Stage& stage : body_) run_stage(stage, worker, batch_.num_rows);
    run_head(s, worker);
  });
}

template <class F>
void Program::for_all_memory(F&& visit) const {
  for (const Buffer& b : buffers_) {
    for (const Rows* rows : {&b.floats, &b.dense, &b.quantized}) {
      if (rows->memory != nullptr) visit(*rows->memory);
      if (rows->own != nullptr) visit(*rows->own);
    }
  }
  for (const auto& scratch : scratch_) visit(*scratch);
  visit(*partials_);
  visit(*pages_);
}

void Program::drop_pages() {
  for_all_memory([](Memory& m) { m.drop(); });
}

int64_t Program::resident_bytes() const {
  int64_t total = 0;
  for_all_memory([&](const Memory& m) { total += m.resident(); });
  return total;
}

void Program::copy_pages(const int32_t* pairs, int64_t count) {
  char* pages = static_cast<char*>(pages_->data());
  for (int64_t i = 0; i < count; ++i) {
    check_index("page to copy", pairs[2 * i], sizes_.num_pages);
    check_index("page to copy to", pairs[2 * i + 1], sizes_.num_pages);
    std::memcpy(pages + pairs[2 * i + 1] * page_bytes(), pages + pairs[2 * i] * page_bytes(), size_t(page_bytes()));
  }
}

}  // namespace sg

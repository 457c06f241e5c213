#include "cpu/program.h"

#include <algorithm>
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

bool is_row_local(const Op& op) {
  return !std::holds_alternative<LinearOp>(op) && !std::holds_alternative<AttendOp>(op);
}

[[noreturn]] void fail(const std::string& what, int64_t got, int64_t limit) {
  throw std::invalid_argument(what + ": expected < " + std::to_string(limit) + ", got " + std::to_string(got));
}

void check_index(const char* what, int64_t value, int64_t limit) {
  if (value < 0 || value >= limit) fail(what, value, limit);
}

}  // namespace

Program::Program(Pool& pool, const Kernels& kernels, const ProgramSizes& sizes)
    : pool_(pool), kernels_(kernels), sizes_(sizes) {
  if (sizes.dtype != DType::F32 && sizes.dtype != DType::BF16)
    throw std::invalid_argument("dtype: expected F32 or BF16");
  if (sizes.max_rows < 1 || sizes.head_rows < 1) throw std::invalid_argument("max_rows, head_rows: expected >= 1");
}

int Program::add_buffer(int32_t width, bool operand, bool head_only) {
  // Rows start on cache lines.
  const int64_t per_line = 64 / (operand ? operand_bytes(sizes_.dtype) : 4);
  buffers_.push_back({width, operand, head_only, (width + per_line - 1) / per_line * per_line, nullptr});
  return static_cast<int>(buffers_.size()) - 1;
}

int Program::add_rope(std::vector<float> inv_freq, float scale) {
  ropes_.push_back({std::move(inv_freq), scale, {}, {}});
  return static_cast<int>(ropes_.size()) - 1;
}

void Program::add(const Op& op) {
  if (std::holds_alternative<AttendOp>(op)) ops_.push_back(StoreOp{static_cast<int32_t>(ops_.size()) + 1});
  ops_.push_back(op);
}

void Program::split(View selected, View gathered) {
  split_ = static_cast<int>(ops_.size());
  selected_ = selected;
  gathered_ = gathered;
}

std::vector<Program::Stage> Program::make_stages(int first, int last) const {
  std::vector<Stage> stages;
  for (int i = first; i < last; ++i) {
    const bool local = is_row_local(ops_[static_cast<size_t>(i)]);
    if (local && !stages.empty() && stages.back().row_local) {
      stages.back().last = i + 1;
    } else {
      stages.push_back({i, i + 1, local});
    }
  }
  return stages;
}

void Program::finish(View logits) {
  if (split_ < 0) throw std::logic_error("finish before split");
  logits_ = logits;
  body_ = make_stages(0, split_);
  head_ = make_stages(split_, static_cast<int>(ops_.size()));
  int64_t total = 0;
  auto allocate = [&](int64_t bytes) {
    total += bytes;
    return std::make_unique<Memory>(bytes, false);
  };
  for (Buffer& b : buffers_) {
    const int64_t rows = b.head_only ? sizes_.head_rows : sizes_.max_rows;
    b.memory = allocate(rows * b.stride * (b.operand ? operand_bytes(sizes_.dtype) : 4));
  }
  int64_t scratch = sample_scratch(sizes_.vocab);
  for (const Op& op : ops_) {
    if (const auto* attend = std::get_if<AttendOp>(&op)) {
      scratch = std::max(scratch, kernels_.attend_scratch(attend_args(*attend)));
    }
  }
  for (int i = 0; i < pool_.size(); ++i) scratch_.push_back(allocate(scratch));
  for (Rope& r : ropes_) {
    r.cos.resize(static_cast<size_t>(sizes_.max_rows) * r.inv_freq.size());
    r.sin.resize(r.cos.size());
    total += static_cast<int64_t>(r.cos.size()) * 8;
  }
  for (auto* v : {&first_row_, &row_seq_, &row_pos_, &ids_}) v->resize(static_cast<size_t>(sizes_.max_rows));
  workspace_bytes_ = total;
  layer_size_ = sizes_.num_kv_heads * tile_size(sizes_.page_size, sizes_.head_dim);
  pages_ = std::make_unique<Memory>(sizes_.num_pages * page_bytes(), true);
}

float* Program::stream(View v) const {
  return static_cast<float*>(buffers_[static_cast<size_t>(v.buffer)].memory->data()) + v.offset;
}

void* Program::operand(View v) const {
  return static_cast<char*>(buffers_[static_cast<size_t>(v.buffer)].memory->data()) +
         v.offset * operand_bytes(sizes_.dtype);
}

int64_t Program::page_bytes() const { return 2 * sizes_.num_layers * layer_size_ * operand_bytes(sizes_.dtype); }

int64_t Program::row_grain(int64_t rows) const { return std::max<int64_t>(1, rows / (4 * pool_.size())); }

LinearArgs Program::linear_args(const LinearOp& op, int32_t rows) const {
  LinearArgs a{};
  a.x = operand(op.x);
  a.x_stride = stride(op.x);
  a.w = op.w;
  a.bias = op.bias;
  a.out = stream(op.out);
  a.out_stride = stride(op.out);
  a.rows = rows;
  a.n = op.out.width;
  a.k = op.x.width;
  a.accumulate = op.accumulate;
  a.dtype = sizes_.dtype;
  return a;
}

AttendArgs Program::attend_args(const AttendOp& op) const {
  AttendArgs a{};
  if (buffers_[static_cast<size_t>(op.q.buffer)].memory != nullptr && pages_ != nullptr) {
    a.q = stream(op.q);
    a.k = stream(op.k);
    a.v = stream(op.v);
    a.out = operand(op.out);
    char* layer = static_cast<char*>(pages_->data()) + 2 * op.layer * layer_size_ * operand_bytes(sizes_.dtype);
    a.k_pages = layer;
    a.v_pages = layer + layer_size_ * operand_bytes(sizes_.dtype);
  }
  a.q_stride = stride(op.q);
  a.k_stride = stride(op.k);
  a.v_stride = stride(op.v);
  a.out_stride = stride(op.out);
  a.num_heads = op.num_heads;
  a.num_kv_heads = op.num_kv_heads;
  a.head_dim = op.head_dim;
  a.page_size = sizes_.page_size;
  a.page_stride = 2 * sizes_.num_layers * layer_size_;
  a.window = op.window;
  a.scale = op.scale;
  a.softcap = op.softcap;
  a.dtype = sizes_.dtype;
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

void Program::run_rows(const Op& op, int64_t begin, int64_t end) {
  std::visit(Overloaded{
                 [&](const EmbedOp& o) {
                   EmbedArgs a{};
                   a.ids = ids_.data();
                   a.w = o.w;
                   a.out = stream(o.out);
                   a.out_stride = stride(o.out);
                   a.width = o.out.width;
                   a.scale = o.scale;
                   a.dtype = sizes_.dtype;
                   kernels_.embed(a, begin, end);
                 },
                 [&](const RmsNormOp& o) {
                   RmsNormArgs a{};
                   a.x = stream(o.x);
                   a.x_stride = stride(o.x);
                   a.weight = o.weight;
                   a.out = operand(o.out);
                   a.out_stride = stride(o.out);
                   a.width = o.x.width;
                   a.groups = o.groups;
                   a.eps = o.eps;
                   a.offset = o.offset;
                   a.dtype = sizes_.dtype;
                   kernels_.rms_norm(a, begin, end);
                 },
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
                 [&](const GatedMulOp& o) {
                   GatedMulArgs a{};
                   a.gate = stream(o.gate);
                   a.gate_stride = stride(o.gate);
                   a.up = stream(o.up);
                   a.up_stride = stride(o.up);
                   a.out = operand(o.out);
                   a.out_stride = stride(o.out);
                   a.width = o.out.width;
                   a.activation = o.activation;
                   a.dtype = sizes_.dtype;
                   kernels_.gated_mul(a, begin, end);
                 },
                 [](const LinearOp&) {},
                 [](const AttendOp&) {},
             },
             op);
}

void Program::run_stage(const Stage& stage, int worker, int32_t rows) {
  const Op& op = ops_[static_cast<size_t>(stage.first)];
  if (stage.row_local) {
    pool_.share(worker, rows, row_grain(rows), [&](int64_t begin, int64_t end) {
      for (int i = stage.first; i < stage.last; ++i) run_rows(ops_[static_cast<size_t>(i)], begin, end);
    });
  } else if (const auto* linear = std::get_if<LinearOp>(&op)) {
    const LinearArgs a = linear_args(*linear, rows);
    pool_.share(worker, kernels_.linear_items(a), 1,
                [&](int64_t begin, int64_t end) { kernels_.linear(a, begin, end); });
  } else {
    const AttendArgs a = attend_args(std::get<AttendOp>(op));
    void* scratch = scratch_[static_cast<size_t>(worker)]->data();
    pool_.share(worker, kernels_.attend_items(a), 1,
                [&](int64_t begin, int64_t end) { kernels_.attend(a, begin, end, scratch); });
  }
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
  for (const Buffer& b : buffers_) visit(*b.memory);
  for (const auto& scratch : scratch_) visit(*scratch);
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

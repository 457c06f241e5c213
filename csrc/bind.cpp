// Every entry point of streamgen._cpu, with its checks: the table of contents of the CPU kernels.
//
// Arrays come as integers (addresses) with their sizes; the caller keeps them alive for the call. The Python side
// (backends/cpu.py) has checked dtypes and shapes when the program was loaded.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <cmath>

#include "bind_grammar.h"
#include "cpu/attend_plan.h"
#include "cpu/bandwidth.h"
#include "cpu/gguf_blocks.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/packed.h"
#include "cpu/philox.h"
#include "cpu/pool.h"
#include "cpu/program.h"
#include "cpu/sampling.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace sg {
namespace {

// ---- memory, pool, program (backends/cpu.py) ----------------------------------------------------------------------

using ViewTuple = std::tuple<int32_t, int32_t, int32_t>;  // buffer, offset, width

View view(const ViewTuple& v) { return {std::get<0>(v), std::get<1>(v), std::get<2>(v)}; }

template <class T>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

using PackedTuple = std::tuple<uint64_t, int, int>;  // address, type, group

Packed packed(const PackedTuple& p) { return {at<void>(std::get<0>(p)), DType(std::get<1>(p)), std::get<2>(p)}; }

void bind_memory_and_pool(nb::module_& m) {
  nb::class_<Memory>(m, "Memory", "Zeroed memory, aligned to 2 MiB; freed with the object.")
      .def(nb::init<int64_t, bool>(), "bytes"_a, "huge"_a)
      .def_prop_ro("address", [](const Memory& self) { return reinterpret_cast<uint64_t>(self.data()); })
      .def_prop_ro("size", &Memory::size)
      .def("drop", &Memory::drop, "Give everything back to the system; it reads as zero afterwards.")
      .def_prop_ro("resident", &Memory::resident, "Bytes that are in memory now.");
  nb::class_<Pool>(m, "Pool", "The threads of one engine; the caller of a step is one of them.")
      .def(nb::init<int>(), "threads"_a)
      .def_prop_ro("size", &Pool::size);
  m.def(
      "pack",
      [](Pool& pool, const std::string& isa, uint64_t src, int64_t src_row_bytes, int src_type, uint64_t dst,
         int dst_type, int n, int k, int first_row, int rope_heads, int group, bool symmetric) {
        const Kernels* kernels = select_kernels(isa.c_str());
        const PackArgs a{at<void>(src), src_row_bytes, DType(src_type), at<void>(dst), DType(dst_type), n, k,
                         first_row,     rope_heads,    group,           symmetric};
        nb::gil_scoped_release release;
        const int64_t panels = (int64_t(n) + 15) / 16 + (first_row % 16 != 0);
        pool.run([&](int worker) {
          pool.share(worker, panels, 4, [&](int64_t begin, int64_t end) { kernels->pack(a, begin, end); });
        });
      },
      "pool"_a, "isa"_a, "src"_a, "src_row_bytes"_a, "src_type"_a, "dst"_a, "dst_type"_a, "n"_a, "k"_a, "first_row"_a,
      "rope_heads"_a, "group"_a, "symmetric"_a,
      "Pack n stored rows of k values as rows first_row ... of a linear's weight: see PackArgs.");
  m.def(
      "read_bandwidth",
      [](int threads, int64_t bytes, double seconds) {
        nb::gil_scoped_release release;
        return read_bandwidth(threads, bytes, seconds);
      },
      "threads"_a, "bytes"_a, "seconds"_a,
      "GB/s at which `threads` read `bytes` of memory: the best pass within `seconds`.");
}

// Whoever reads the other end gets the interpreter now. A full pipe is as good: it will be read.
void announce(int fd) {
  const char byte = 0;
  [[maybe_unused]] const ssize_t written = write(fd, &byte, 1);
}

void bind_step_arrays(nb::module_& m) {
  nb::class_<StepArrays>(m, "StepArrays", "StepInputs and StepOutputs of backends/base.py, as addresses.")
      .def(
          "__init__",
          [](StepArrays* self, uint64_t tokens, int64_t tokens_stride, uint64_t page_tables, int64_t page_table_stride,
             int num_slots, uint64_t slots, uint64_t starts, uint64_t counts, int num_seqs, uint64_t samples,
             int num_samples, uint64_t bias_ids, uint64_t bias_values, uint64_t ban_ids, uint64_t masks, int vocab,
             uint64_t token, uint64_t logprob, uint64_t rank, uint64_t top_ids, uint64_t top_logprobs, int top_width,
             uint64_t logits, int num_logits, const GrammarSlots* grammars) {
            StepArrays& s = *new (self) StepArrays{};
            s.tokens = at<int32_t>(tokens);
            s.tokens_stride = tokens_stride;
            s.page_tables = at<int32_t>(page_tables);
            s.page_table_stride = page_table_stride;
            s.num_slots = num_slots;
            s.slots = at<int32_t>(slots);
            s.starts = at<int32_t>(starts);
            s.counts = at<int32_t>(counts);
            s.num_seqs = num_seqs;
            s.sampling = {at<SampleRow>(samples),
                          s.tokens,
                          tokens_stride,
                          at<int32_t>(bias_ids),
                          at<float>(bias_values),
                          at<int32_t>(ban_ids),
                          at<uint32_t>(masks),
                          vocab,
                          grammars};
            s.num_samples = num_samples;
            s.outputs = {at<int32_t>(token),   at<float>(logprob),      at<int32_t>(rank),
                         at<int32_t>(top_ids), at<float>(top_logprobs), top_width};
            s.logits = at<float>(logits);
            s.num_logits = num_logits;
          },
          nb::keep_alive<1, 26>(), "tokens"_a, "tokens_stride"_a, "page_tables"_a, "page_table_stride"_a, "num_slots"_a,
          "slots"_a, "starts"_a, "counts"_a, "num_seqs"_a, "samples"_a, "num_samples"_a, "bias_ids"_a, "bias_values"_a,
          "ban_ids"_a, "masks"_a, "vocab"_a, "token"_a, "logprob"_a, "rank"_a, "top_ids"_a, "top_logprobs"_a,
          "top_width"_a, "logits"_a, "num_logits"_a, "grammars"_a.none() = nb::none());
}

void bind_program(nb::module_& m) {
  nb::class_<Program>(m, "Program", "A model's ops over buffers; see csrc/cpu/program.h.")
      .def(
          "__init__",
          [](Program* self, Pool& pool, const std::string& isa, int dtype, int kv_dtype, int max_rows, int head_rows,
             int num_layers, int num_kv_heads, int head_dim, int page_size, int num_pages, int vocab) {
            const ProgramSizes sizes{DType(dtype), DType(kv_dtype), max_rows,  head_rows, num_layers,
                                     num_kv_heads, head_dim,        page_size, num_pages, vocab};
            new (self) Program(pool, *select_kernels(isa.c_str()), sizes);
          },
          nb::keep_alive<1, 2>(), "pool"_a, "isa"_a, "dtype"_a, "kv_dtype"_a, "max_rows"_a, "head_rows"_a,
          "num_layers"_a, "num_kv_heads"_a, "head_dim"_a, "page_size"_a, "num_pages"_a, "vocab"_a)
      .def(
          "add_buffer",
          [](Program& self, int width, bool stream, bool dense, bool quantized, bool head_only) {
            return self.add_buffer(width, {stream, dense, quantized}, head_only);
          },
          "width"_a, "stream"_a, "dense"_a, "quantized"_a, "head_only"_a)
      .def("add_rope", &Program::add_rope, "inv_freq"_a, "scale"_a)
      .def(
          "add_embed",
          [](Program& self, ViewTuple out, PackedTuple weight, float scale) {
            self.add(EmbedOp{view(out), packed(weight), scale});
          },
          "out"_a, "weight"_a, "scale"_a)
      .def(
          "add_rms_norm",
          [](Program& self, ViewTuple x, ViewTuple out, uint64_t weight, float eps, float offset, int groups) {
            self.add(RmsNormOp{view(x), view(out), at<float>(weight), eps, offset, groups});
          },
          "x"_a, "out"_a, "weight"_a, "eps"_a, "offset"_a, "groups"_a)
      .def(
          "add_linear",
          [](Program& self, ViewTuple x, ViewTuple out, const std::vector<std::tuple<PackedTuple, int, int>>& parts,
             uint64_t bias, bool accumulate) {
            LinearOp op{view(x), view(out), {}, at<float>(bias), accumulate};
            for (const auto& [weight, offset, n] : parts) op.parts.push_back({packed(weight), offset, n});
            self.add(op);
          },
          "x"_a, "out"_a, "parts"_a, "bias"_a, "accumulate"_a,
          "parts: packed matrices (address, type, group), each with its first column of out and its columns")
      .def(
          "add_rotation",
          [](Program& self, ViewTuple x, int num_heads, int head_dim, int table) {
            self.add(RopeOp{view(x), num_heads, head_dim, table});
          },
          "x"_a, "num_heads"_a, "head_dim"_a, "table"_a)
      .def(
          "add_attend",
          [](Program& self, ViewTuple q, ViewTuple k, ViewTuple v, ViewTuple out, int layer, int num_heads,
             int num_kv_heads, int head_dim, int window, float scale, float softcap) {
            self.add(AttendOp{view(q), view(k), view(v), view(out), layer, num_heads, num_kv_heads, head_dim, window,
                              scale, softcap});
          },
          "q"_a, "k"_a, "v"_a, "out"_a, "layer"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "window"_a, "scale"_a,
          "softcap"_a)
      .def(
          "add_gated_mul",
          [](Program& self, ViewTuple gate, ViewTuple up, ViewTuple out, int activation) {
            self.add(GatedMulOp{view(gate), view(up), view(out), Activation(activation)});
          },
          "gate"_a, "up"_a, "out"_a, "activation"_a)
      .def(
          "split",
          [](Program& self, ViewTuple selected, ViewTuple gathered) { self.split(view(selected), view(gathered)); },
          "selected"_a, "gathered"_a)
      .def(
          "finish", [](Program& self, ViewTuple logits) { self.finish(view(logits)); }, "logits"_a)
      .def_prop_ro("workspace_bytes", &Program::workspace_bytes)
      .def("take_op_seconds", &Program::take_op_seconds,
           "Seconds in each op since the last call, then the sampler's; the first call begins the measuring.")
      .def(
          "step",
          [](Program& self, const StepArrays& arrays, int wake_fd) {
            nb::gil_scoped_release release;
            if (wake_fd >= 0) announce(wake_fd);
            self.step(arrays);
          },
          "arrays"_a, "wake_fd"_a, "One step, see LoadedModel.step in backends/base.py.")
      .def(
          "sample",
          [](Program& self, const StepArrays& arrays, uint64_t changed) {
            nb::gil_scoped_release release;
            self.sample(arrays, at<float>(changed));
          },
          "arrays"_a, "changed"_a, "Sample the rows whose logits were written out, see LoadedModel.sample.")
      .def(
          "drop_pages",
          [](Program& self) {
            nb::gil_scoped_release release;
            self.drop_pages();
          },
          "Give the memory of pages and workspace back; they read as zero afterwards.")
      .def(
          "resident_bytes",
          [](const Program& self) {
            nb::gil_scoped_release release;
            return self.resident_bytes();
          },
          "Bytes of pages and workspace that are in memory.")
      .def(
          "copy_pages",
          [](Program& self, uint64_t pairs, int64_t count) {
            nb::gil_scoped_release release;
            self.copy_pages(at<int32_t>(pairs), count);
          },
          "pairs"_a, "count"_a);
}

// ---- kernels, one by one (tests and benchmarks) --------------------------------------------------------------------

const Kernels& kernels_named(const std::string& isa) {
  const Kernels* kernels = select_kernels(isa.c_str());
  if (isa != kernels->name) throw std::invalid_argument("isa: this processor does not run " + isa);
  return *kernels;
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  const Kernels* tables[kMostLevels];
  const int count = available_kernels(tables);
  for (int i = 0; i < count; ++i) names.push_back(tables[i]->name);
  return names;
}

void bind_matrix_kernels(nb::module_& m) {
  m.def("isa_names", isa_names, "The instruction sets usable here, the best first.");
  m.def(
      "kernel_linear_items",
      [](const std::string& isa, int rows, int n, int k, int dtype, int group) {
        LinearArgs a{};
        a.rows = rows, a.n = n, a.k = k, a.dtype = DType(dtype), a.group = group;
        return kernels_named(isa).linear_items(a);
      },
      "isa"_a, "rows"_a, "n"_a, "k"_a, "dtype"_a, "group"_a = 0);
  m.def(
      "kernel_linear",
      [](const std::string& isa, uint64_t x, int64_t x_stride, uint64_t w, uint64_t bias, uint64_t out,
         int64_t out_stride, int rows, int n, int k, bool accumulate, int dtype, int64_t begin, int64_t end,
         int group) {
        const LinearArgs a{at<void>(x), x_stride, at<void>(w), at<float>(bias), at<float>(out), out_stride,
                           rows,        n,        k,           accumulate,      DType(dtype),   group};
        const Kernels& kernels = kernels_named(isa);
        nb::gil_scoped_release release;
        const bool all = begin < 0;
        kernels.linear(a, all ? 0 : begin, all ? kernels.linear_items(a) : end);
      },
      "isa"_a, "x"_a, "x_stride"_a, "w"_a, "bias"_a, "out"_a, "out_stride"_a, "rows"_a, "n"_a, "k"_a, "accumulate"_a,
      "dtype"_a, "begin"_a = -1, "end"_a = -1, "group"_a = 0,
      "Items [begin, end) of a product; all of them by default.");
  m.def(
      "kernel_quantize",
      [](const std::string& isa, uint64_t x, int64_t x_stride, uint64_t out, int64_t out_stride, int rows, int width) {
        const Kernels& kernels = kernels_named(isa);
        kernels.convert({at<float>(x), x_stride, at<void>(out), out_stride, width, DType::INT8}, 0, rows);
      },
      "isa"_a, "x"_a, "x_stride"_a, "out"_a, "out_stride"_a, "rows"_a, "width"_a,
      "Rows of floats as activation blocks (ActivationBlock in csrc/cpu/kernels.h).");
  m.def(
      "packed_panel_bytes", [](int type, int group, int k) { return packed_layout(DType(type), group).panel_bytes(k); },
      "type"_a, "group"_a, "k"_a, "Bytes of 16 rows of k integer weights in memory.");
  m.def(
      "unpack_row",
      [](int type, int group, uint64_t w, int64_t row, int k, uint64_t out) {
        const auto* panel = at<uint8_t>(w) + row / 16 * packed_layout(DType(type), group).panel_bytes(k);
        unpack_row(DType(type), group, panel, int(row % 16), k, at<float>(out));
      },
      "type"_a, "group"_a, "w"_a, "row"_a, "k"_a, "out"_a, "Row `row` of packed integer weights as k floats.");
  m.def(
      "kernel_pack",
      [](const std::string& isa, uint64_t src, int64_t src_row_bytes, int src_type, uint64_t dst, int dst_type, int n,
         int k, int first_row, int rope_heads, int64_t begin, int64_t end, int group, bool symmetric) {
        const PackArgs a{at<void>(src), src_row_bytes, DType(src_type), at<void>(dst), DType(dst_type), n, k,
                         first_row,     rope_heads,    group,           symmetric};
        const Kernels& kernels = kernels_named(isa);
        nb::gil_scoped_release release;
        kernels.pack(a, begin < 0 ? 0 : begin, begin < 0 ? (first_row % 16 + n + 15) / 16 : end);
      },
      "isa"_a, "src"_a, "src_row_bytes"_a, "src_type"_a, "dst"_a, "dst_type"_a, "n"_a, "k"_a, "first_row"_a,
      "rope_heads"_a, "begin"_a = -1, "end"_a = -1, "group"_a = 0, "symmetric"_a = false,
      "Panels [begin, end) of a packing, counted from the one of first_row; all by default.");
  m.def(
      "dequantize",
      [](int type, uint64_t src, int64_t columns, uint64_t dst) {
        nb::gil_scoped_release release;
        dequantize(DType(type), at<void>(src), 0, columns, at<float>(dst));
      },
      "type"_a, "src"_a, "columns"_a, "dst"_a, "One stored row to float32.");
}

void bind_row_kernels(nb::module_& m) {
  m.def(
      "kernel_rms_norm",
      [](const std::string& isa, uint64_t x, int64_t x_stride, uint64_t weight, uint64_t out, int64_t out_stride,
         int rows, int width, int groups, float eps, float offset, int dtype) {
        const RmsNormArgs a{at<float>(x), x_stride, at<float>(weight), at<void>(out), out_stride, width, groups,
                            eps,          offset,   DType(dtype)};
        const Kernels& kernels = kernels_named(isa);
        nb::gil_scoped_release release;
        kernels.rms_norm(a, 0, rows);
      },
      "isa"_a, "x"_a, "x_stride"_a, "weight"_a, "out"_a, "out_stride"_a, "rows"_a, "width"_a, "groups"_a, "eps"_a,
      "offset"_a, "dtype"_a);
  m.def(
      "kernel_embed",
      [](const std::string& isa, uint64_t ids, uint64_t w, uint64_t out, int64_t out_stride, int rows, int width,
         float scale, int dtype, int group) {
        const EmbedArgs a{at<int32_t>(ids), at<void>(w), at<float>(out), out_stride, width, scale, DType(dtype), group};
        const Kernels& kernels = kernels_named(isa);
        nb::gil_scoped_release release;
        kernels.embed(a, 0, rows);
      },
      "isa"_a, "ids"_a, "w"_a, "out"_a, "out_stride"_a, "rows"_a, "width"_a, "scale"_a, "dtype"_a, "group"_a = 0);
  m.def(
      "kernel_rope",
      [](const std::string& isa, uint64_t x, int64_t x_stride, uint64_t cos, uint64_t sin, int rows, int num_heads,
         int head_dim, int rotary_dim) {
        const RopeArgs a{at<float>(x), x_stride, at<float>(cos), at<float>(sin), num_heads, head_dim, rotary_dim};
        const Kernels& kernels = kernels_named(isa);
        nb::gil_scoped_release release;
        kernels.rope(a, 0, rows);
      },
      "isa"_a, "x"_a, "x_stride"_a, "cos"_a, "sin"_a, "rows"_a, "num_heads"_a, "head_dim"_a, "rotary_dim"_a);
  m.def(
      "kernel_gated_mul",
      [](const std::string& isa, uint64_t gate, int64_t gate_stride, uint64_t up, int64_t up_stride, uint64_t out,
         int64_t out_stride, int rows, int width, int activation, int dtype) {
        const GatedMulArgs a{at<float>(gate), at<float>(up),          gate_stride, up_stride, at<void>(out), out_stride,
                             width,           Activation(activation), DType(dtype)};
        const Kernels& kernels = kernels_named(isa);
        nb::gil_scoped_release release;
        kernels.gated_mul(a, 0, rows);
      },
      "isa"_a, "gate"_a, "gate_stride"_a, "up"_a, "up_stride"_a, "out"_a, "out_stride"_a, "rows"_a, "width"_a,
      "activation"_a, "dtype"_a);
  m.def(
      "kernel_row_max",
      [](const std::string& isa, uint64_t x, int64_t n) { return kernels_named(isa).row_max(at<float>(x), n); },
      "isa"_a, "x"_a, "n"_a);
  m.def(
      "kernel_row_exp_sum",
      [](const std::string& isa, uint64_t x, int64_t n, float max) {
        return kernels_named(isa).row_exp_sum(at<float>(x), n, max);
      },
      "isa"_a, "x"_a, "n"_a, "max"_a);
}

// ---- attention, sampler, pool, one by one (tests) -------------------------------------------------------------------

// The rows of a batch, from its sequences.
struct BatchRows {
  BatchRows(int num_seqs, const int32_t* slots, const int32_t* starts, const int32_t* counts,
            const int32_t* page_tables, int64_t page_table_stride) {
    for (int32_t i = 0; i < num_seqs; ++i) {
      first_row.push_back(static_cast<int32_t>(row_seq.size()));
      for (int32_t j = 0; j < counts[i]; ++j) {
        row_seq.push_back(i);
        row_pos.push_back(starts[i] + j);
      }
    }
    batch = {num_seqs,       static_cast<int32_t>(row_seq.size()),
             slots,          starts,
             counts,         first_row.data(),
             row_seq.data(), row_pos.data(),
             page_tables,    page_table_stride};
  }
  std::vector<int32_t> first_row, row_seq, row_pos;
  Batch batch;
};

// Store the keys and values of every row unless attention does, then attend.
void attend_once(Pool& pool, const Kernels& kernels, AttendArgs a) {
  std::vector<std::vector<char>> scratch(static_cast<size_t>(pool.size()),
                                         std::vector<char>(static_cast<size_t>(kernels.attend_scratch(a))));
  const int64_t units = a.plan->num_ahead > 0 ? AttendPlanner::kUnits * a.num_heads : 0;
  std::vector<float> partials(static_cast<size_t>(units * kernels.attend_state(a)), std::nanf(""));
  a.partials = partials.data();
  pool.run([&](int worker) {
    if (!a.fused)
      pool.share(worker, a.batch->num_rows, 1, [&](int64_t begin, int64_t end) { kernels.store_kv(a, begin, end); });
    void* own = scratch[static_cast<size_t>(worker)].data();
    pool.share(worker, int64_t(a.plan->num_ahead) * a.num_kv_heads, 1,
               [&](int64_t begin, int64_t end) { kernels.attend_ahead(a, begin, end, own); });
    pool.share(worker, int64_t(a.plan->num_tiles) * a.num_kv_heads, 1,
               [&](int64_t begin, int64_t end) { kernels.attend(a, begin, end, own); });
  });
}

// Shares whose items read what other workers wrote in the share before; the result does not depend on the number of
// threads.
uint64_t pool_selftest(int threads, int rounds) {
  Pool pool(threads);
  std::vector<uint64_t> first(64), second(64);
  uint64_t sum = 0;
  for (int round = 0; round < rounds; ++round) {
    const int64_t n = 1 + round * 7 % 61;
    pool.run([&](int worker) {
      pool.share(worker, n, 1 + round % 3, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) first[size_t(i)] = uint64_t(i + 1) * uint64_t(i + round);
      });
      pool.share(worker, 0, 1, [&](int64_t, int64_t) { sum += 1; });  // never called
      pool.share(worker, n, 2, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          second[size_t(i)] = first[size_t(n - 1 - i)] + 3 * first[size_t((i + 1) % n)];
      });
      pool.share(worker, 1, 1, [&](int64_t, int64_t) {
        for (int64_t i = 0; i < n; ++i) sum = sum * 31 + second[size_t(i)];
      });
    });
  }
  return sum;
}

void bind_attention_and_sampler(nb::module_& m) {
  m.def(
      "kernel_attend",
      [](Pool& pool, const std::string& isa, int dtype, uint64_t q, uint64_t k, uint64_t v, int64_t q_stride,
         int64_t k_stride, int64_t v_stride, uint64_t out, int64_t out_stride, uint64_t k_pages, uint64_t v_pages,
         int num_heads, int num_kv_heads, int head_dim, int page_size, int window, float scale, float softcap,
         int num_seqs, uint64_t slots, uint64_t starts, uint64_t counts, uint64_t page_tables,
         int64_t page_table_stride, int kv_dtype, int out_dtype, uint64_t cos, uint64_t sin, int rotary_dim, bool fused,
         int workers, int shared_tokens) {
        const BatchRows rows(num_seqs, at<int32_t>(slots), at<int32_t>(starts), at<int32_t>(counts),
                             at<int32_t>(page_tables), page_table_stride);
        AttendPlanner planner(
            {num_heads, num_kv_heads, page_size, window, workers, rows.batch.num_rows, shared_tokens});
        const AttendPlan plan = planner.plan(rows.batch);
        const int64_t page_stride = num_kv_heads * tile_bytes(DType(kv_dtype), page_size, head_dim);
        const AttendArgs a{at<float>(q),     at<float>(k),  at<float>(v), q_stride,          k_stride,
                           v_stride,         at<void>(out), out_stride,   at<void>(k_pages), at<void>(v_pages),
                           page_stride,      num_heads,     num_kv_heads, head_dim,          page_size,
                           window,           scale,         softcap,      DType(dtype),      DType(kv_dtype),
                           DType(out_dtype), &rows.batch,   &plan,        nullptr,           at<float>(cos),
                           at<float>(sin),   rotary_dim,    fused};
        const Kernels* kernels = select_kernels(isa.c_str());
        nb::gil_scoped_release release;
        attend_once(pool, *kernels, a);
        return std::make_tuple(plan.num_tiles, plan.num_ahead);
      },
      "pool"_a, "isa"_a, "dtype"_a, "q"_a, "k"_a, "v"_a, "q_stride"_a, "k_stride"_a, "v_stride"_a, "out"_a,
      "out_stride"_a, "k_pages"_a, "v_pages"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "page_size"_a,
      "window"_a, "scale"_a, "softcap"_a, "num_seqs"_a, "slots"_a, "starts"_a, "counts"_a, "page_tables"_a,
      "page_table_stride"_a, "kv_dtype"_a, "out_dtype"_a, "cos"_a = 0, "sin"_a = 0, "rotary_dim"_a = 0,
      "fused"_a = false, "workers"_a = 1, "shared_tokens"_a = 0,
      "Store a batch's keys and values in their pages, then attend: AttendArgs and Batch in csrc/cpu.\n"
      "Returns how many tiles there were, and how many pieces of work went ahead of them.");
  m.def(
      "kernel_sample",
      [](const std::string& isa, uint64_t rows, int64_t num_rows, uint64_t logits, int64_t logits_stride,
         uint64_t tokens, int64_t tokens_stride, uint64_t bias_ids, uint64_t bias_values, uint64_t ban_ids,
         uint64_t masks, int vocab, uint64_t token, uint64_t logprob, uint64_t rank, uint64_t top_ids,
         uint64_t top_logprobs, int top_width, const GrammarSlots* grammars) {
        const SampleInputs inputs{at<SampleRow>(rows),
                                  at<int32_t>(tokens),
                                  tokens_stride,
                                  at<int32_t>(bias_ids),
                                  at<float>(bias_values),
                                  at<int32_t>(ban_ids),
                                  at<uint32_t>(masks),
                                  vocab,
                                  grammars};
        const SampleOutputs outputs{at<int32_t>(token),   at<float>(logprob),      at<int32_t>(rank),
                                    at<int32_t>(top_ids), at<float>(top_logprobs), top_width};
        const Kernels* kernels = select_kernels(isa.c_str());
        nb::gil_scoped_release release;
        std::vector<char> scratch(static_cast<size_t>(sample_scratch(vocab)), char(0x7f));  // need not be zero
        for (int64_t i = 0; i < num_rows; ++i) {
          sample_row(*kernels, inputs, i, at<float>(logits) + i * logits_stride, nullptr, outputs, scratch.data());
        }
      },
      "isa"_a, "rows"_a, "num_rows"_a, "logits"_a, "logits_stride"_a, "tokens"_a, "tokens_stride"_a, "bias_ids"_a,
      "bias_values"_a, "ban_ids"_a, "masks"_a, "vocab"_a, "token"_a, "logprob"_a, "rank"_a, "top_ids"_a,
      "top_logprobs"_a, "top_width"_a, "grammars"_a.none() = nb::none(),
      "Sample rows, whose logits are overwritten: StepInputs and StepOutputs in backends/base.py.");
  m.def(
      "philox",
      [](uint64_t key, std::array<uint32_t, 4> counter) {
        const Philox random = philox4x32(key, {{counter[0], counter[1], counter[2], counter[3]}});
        return std::array<uint32_t, 4>{random.word[0], random.word[1], random.word[2], random.word[3]};
      },
      "key"_a, "counter"_a, "Philox4x32-10.");
  m.def(
      "pool_selftest",
      [](int threads, int rounds) {
        nb::gil_scoped_release release;
        return pool_selftest(threads, rounds);
      },
      "threads"_a, "rounds"_a, "A checksum that is the same for any number of threads.");
}

}  // namespace
}  // namespace sg

NB_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of streamgen";
  sg::bind_grammar(m);
  sg::bind_memory_and_pool(m);
  sg::bind_step_arrays(m);
  sg::bind_program(m);
  sg::bind_attention_and_sampler(m);
  sg::bind_matrix_kernels(m);
  sg::bind_row_kernels(m);
}

// A small model as a program, run step by step: the logits of a sequence are the same bits for any number of threads
// and whatever else is in the batch. Few rows take other ways through a step than many (every worker then makes a
// linear's input for itself), so batches are of 1 to 8 rows.
#include "cpu/program.h"

#include <memory>

#include "check.h"
#include "cpu/packed.h"

namespace sg::test {

namespace {

constexpr int kHidden = 64, kHeads = 4, kKvHeads = 2, kHeadDim = 16, kFfn = 96, kVocab = 50, kLayers = 2;
constexpr int kWidthQ = kHeads * kHeadDim, kWidthKv = kKvHeads * kHeadDim;
constexpr int kSlots = 8, kContext = 40, kPage = 16, kPagesPerSlot = 3, kSteps = 4;

// What the weights of attention, of the mlp and of the head are, and what operands are.
struct Types {
  const char* name;
  DType dtype, kv_dtype, attention, mlp, head;
};

int group_of(DType type) { return type == DType::INT4 || type == DType::INT8 ? 32 : 0; }

Aligned packed_matrix(const Kernels& kernels, DType type, int n, int k, uint64_t seed) {
  Random random(seed);
  const std::vector<float> values = random.floats(size_t(n) * size_t(k), -0.3f, 0.3f);
  const int64_t dense = type == DType::F32 ? k * 64 : (k + 1) / 2 * 64;
  const int64_t panel = is_integer(type) ? packed_layout(type, group_of(type)).panel_bytes(k) : dense;
  Aligned w((n + 15) / 16 * panel);
  PackArgs a{};
  a.src = values.data();
  a.src_row_bytes = k * 4;
  a.src_type = DType::F32;
  a.dst = w.data();
  a.dst_type = type;
  a.n = n;
  a.k = k;
  a.group = group_of(type);
  kernels.pack(a, 0, (n + 15) / 16);
  return w;
}

class Model {
 public:
  Model(const Kernels& kernels, const Types& types) : kernels_(kernels), types_(types), norm_(kHidden, 1.25f) {}

  std::unique_ptr<Program> program(Pool& pool) {
    const ProgramSizes sizes{types_.dtype, types_.kv_dtype,        64,    5, kLayers, kKvHeads, kHeadDim,
                             kPage,        kSlots * kPagesPerSlot, kVocab};
    auto p = std::make_unique<Program>(pool, kernels_, sizes);
    std::vector<float> frequencies;
    for (int i = 0; i < kHeadDim / 2; i++) frequencies.push_back(std::pow(100.0f, -float(i) / (kHeadDim / 2)));
    rope_ = p->add_rope(frequencies, 1);
    const int x = p->add_buffer(kHidden, {true, false, false}, false);
    EmbedOp embed{};
    embed.out = {x, 0, kHidden};
    embed.weight = matrix(types_.head, kVocab, kHidden);
    embed.scale = 2;
    p->add(embed);
    for (int layer = 0; layer < kLayers; layer++) add_layer(*p, x, layer);
    const int gathered = p->add_buffer(kHidden, {true, false, false}, true);
    p->split({x, 0, kHidden}, {gathered, 0, kHidden});
    const View normed = add_norm(*p, gathered, types_.head, true);
    const int logits = p->add_buffer(kVocab, {true, false, false}, true);
    p->add(LinearOp{normed, {logits, 0, kVocab}, {{matrix(types_.head, kVocab, kHidden), 0, kVocab}}, nullptr, false});
    p->finish({logits, 0, kVocab});
    return p;
  }

 private:
  // The same weights for every program of this model: they are made in one order.
  Packed matrix(DType type, int n, int k) {
    weights_.push_back(std::make_unique<Aligned>(packed_matrix(kernels_, type, n, k, 100 + uint64_t(n + 3 * k))));
    return {weights_.back()->data(), type, group_of(type)};
  }

  // An operand in the form that weights of this type read.
  static int operand(Program& p, int width, DType weights, bool head_only) {
    return p.add_buffer(width, {false, !is_integer(weights), is_integer(weights)}, head_only);
  }

  View add_norm(Program& p, int x, DType weights, bool head_only) {
    const View out{operand(p, kHidden, weights, head_only), 0, kHidden};
    p.add(RmsNormOp{{x, 0, kHidden}, out, norm_.data(), 1e-5f, 0, 1});
    return out;
  }

  void add_layer(Program& p, int x, int layer) {
    const View normed = add_norm(p, x, types_.attention, false);
    const int qkv = p.add_buffer(kWidthQ + 2 * kWidthKv, {true, false, false}, false);
    const View q{qkv, 0, kWidthQ}, k{qkv, kWidthQ, kWidthKv}, v{qkv, kWidthQ + kWidthKv, kWidthKv};
    p.add(LinearOp{normed,
                   {qkv, 0, kWidthQ + 2 * kWidthKv},
                   {{matrix(types_.attention, kWidthQ, kHidden), 0, kWidthQ},
                    {matrix(types_.attention, 2 * kWidthKv, kHidden), kWidthQ, 2 * kWidthKv}},
                   nullptr,
                   false});
    p.add(RopeOp{q, kHeads, kHeadDim, rope_});
    p.add(RopeOp{k, kKvHeads, kHeadDim, rope_});
    const View attended{operand(p, kWidthQ, types_.attention, false), 0, kWidthQ};
    p.add(AttendOp{q, k, v, attended, layer, kHeads, kKvHeads, kHeadDim, 0, 0.25f, 0});
    p.add(
        LinearOp{attended, {x, 0, kHidden}, {{matrix(types_.attention, kHidden, kWidthQ), 0, kHidden}}, nullptr, true});
    const View mlp = add_norm(p, x, types_.mlp, false);
    const int both = p.add_buffer(2 * kFfn, {true, false, false}, false);
    p.add(LinearOp{mlp, {both, 0, 2 * kFfn}, {{matrix(types_.mlp, 2 * kFfn, kHidden), 0, 2 * kFfn}}, nullptr, false});
    const View product{operand(p, kFfn, types_.mlp, false), 0, kFfn};
    p.add(GatedMulOp{{both, 0, kFfn}, {both, kFfn, kFfn}, product, Activation::Silu});
    p.add(LinearOp{product, {x, 0, kHidden}, {{matrix(types_.mlp, kHidden, kFfn), 0, kHidden}}, nullptr, true});
  }

  const Kernels& kernels_;
  Types types_;
  std::vector<float> norm_;
  std::vector<std::unique_ptr<Aligned>> weights_;
  int rope_ = 0;
};

// What a host gives a program: slot i's tokens and pages, and what it gets back.
class Host {
 public:
  Host() : tokens_(size_t(kSlots * (kContext + 1))), tables_(size_t(kSlots * kPagesPerSlot)) {
    Random random(77);
    for (int32_t& id : tokens_) id = random.below(kVocab);
    for (int i = 0; i < kSlots * kPagesPerSlot; i++) tables_[size_t(i)] = (i * 5 + 2) % (kSlots * kPagesPerSlot);
  }

  // Rows start .. start + count - 1 of each of the slots. Returns the logits of their last rows; samples as well.
  std::vector<float> step(Program& program, const std::vector<int32_t>& slots, int start, int count) {
    const int n = int(slots.size());
    const std::vector<int32_t> starts(size_t(n), start), counts(size_t(n), count);
    std::vector<SampleRow> rows;
    for (int i = 0; i < n; i++) rows.push_back(sample_row(i, slots[size_t(i)], (i + 1) * count - 1, start + count - 1));
    std::vector<float> logits(size_t(n * kVocab), std::nanf(""));
    drawn_.assign(size_t(n), -1);
    StepArrays s{};
    s.tokens = tokens_.data();
    s.tokens_stride = kContext + 1;
    s.page_tables = tables_.data();
    s.page_table_stride = kPagesPerSlot;
    s.num_slots = kSlots;
    s.slots = slots.data();
    s.starts = starts.data();
    s.counts = counts.data();
    s.num_seqs = n;
    s.sampling.rows = rows.data();
    s.sampling.tokens = tokens_.data();
    s.sampling.tokens_stride = kContext + 1;
    s.sampling.vocab = kVocab;
    s.num_samples = n;
    s.outputs.token = drawn_.data();
    s.logits = logits.data();
    s.num_logits = n;
    program.step(s);
    std::vector<float> changed = logits;
    program.sample(s, changed.data());
    for (int i = 0; i < n; i++) rows[size_t(i)].logits = -1;
    const std::vector<int32_t> drawn = drawn_;
    program.step(s);  // again, sampling at once: the pages hold the same keys and values
    expect(drawn == drawn_, "tokens drawn in the step and after it differ");
    return logits;
  }

 private:
  static SampleRow sample_row(int index, int slot, int row, int position) {
    SampleRow r{};
    r.row = row;
    r.slot = slot;
    r.position = position;
    r.target = r.num_top = r.mask = -1;
    r.temperature = slot % 2 == 0 ? 0.0f : 0.8f;
    r.top_p = r.typical_p = r.repetition_penalty = 1;
    r.logits = index;
    r.seed = uint64_t(slot);
    return r;
  }

  std::vector<int32_t> tokens_, tables_, drawn_;
};

// Prompts of 3 tokens in one step of all slots, then one row each for some steps. Returns logits [step][slot].
std::vector<std::vector<float>> run(Program& program, const std::vector<int32_t>& slots) {
  Host host;
  std::vector<std::vector<float>> all = {host.step(program, slots, 0, 3)};
  for (int i = 0; i < kSteps; i++) all.push_back(host.step(program, slots, 3 + i, 1));
  return all;
}

void check_types(const Kernels& kernels, const Types& types) {
  const Scope scope(types.name);
  Model model(kernels, types);
  Pool one(1);
  std::vector<std::vector<std::vector<float>>> alone;
  for (int32_t slot = 0; slot < kSlots; slot++) alone.push_back(run(*model.program(one), {slot}));
  for (int threads : {1, 2, 3, 4}) {
    const Scope with(std::to_string(threads) + " threads");
    Pool pool(threads);
    const std::unique_ptr<Program> program = model.program(pool);
    std::vector<int32_t> slots;
    for (int32_t slot = 0; slot < kSlots; slot++) {
      slots.push_back(slot);
      const std::vector<std::vector<float>> together = run(*program, slots);
      bool is_same = true, is_number = true;
      for (size_t step = 0; step < together.size(); step++) {
        for (size_t i = 0; i < slots.size(); i++) {
          const float* logits = together[step].data() + i * kVocab;
          is_same = is_same && std::memcmp(logits, alone[i][step].data(), kVocab * sizeof(float)) == 0;
          for (int t = 0; t < kVocab; t++) is_number = is_number && std::isfinite(logits[t]);
        }
      }
      expect(is_number, std::to_string(slots.size()) + " sequences: logits that are no numbers");
      expect(is_same, std::to_string(slots.size()) + " sequences have other bits than each alone");
    }
  }
}

}  // namespace

void test_program(const Tables& tables) {
  for (const Kernels* kernels : tables) {
    const Scope isa(kernels->name);
    for (const Types& types : {Types{"float32", DType::F32, DType::F32, DType::F32, DType::F32, DType::F32},
                               Types{"bfloat16", DType::BF16, DType::BF16, DType::BF16, DType::BF16, DType::BF16},
                               Types{"integers", DType::BF16, DType::INT8, DType::Q8_0, DType::INT4, DType::Q4_0},
                               Types{"mixed", DType::F32, DType::F32, DType::INT8, DType::F32, DType::Q8_0}}) {
      check_types(*kernels, types);
    }
  }
}

}  // namespace sg::test

// Storing keys and values, and attending to them, against attention in doubles over a plain list of tokens.
#include <algorithm>

#include "check.h"
#include "common/paging.h"
#include "cpu/attend_plan.h"

namespace sg::test {

namespace {

struct Shape {
  int num_heads, num_kv_heads, head_dim, page_size, window;
  float softcap;
};

// Rows of one sequence in a step.
struct Sequence {
  int start, count;
};

// How a step is cut: see AttendPlanner.
struct Cut {
  int workers, shared_tokens;
  bool fused;  // attention turns and stores by itself
};
constexpr Cut kPlain = {1, 0, false};

// Types of products and of pages.
struct Types {
  const char* name;
  DType dtype, kv_dtype;
};

// A number as a product takes it.
double operand(DType type, float x) { return double(type == DType::F32 ? x : from_bf16(to_bf16(x))); }

// A cache in pages that lie in no order, and all that was ever stored, plainly.
class Cache {
 public:
  // With `prefix`, sequences have that many tokens in common, and the pages that these fill.
  Cache(const Shape& shape, const Types& types, int num_seqs, int max_tokens, int prefix = 0)
      : shape_(shape),
        types_(types),
        pages_per_seq_((max_tokens + shape.page_size - 1) / shape.page_size),
        prefix_(prefix),
        rotary_(shape.head_dim / 4 * 2) {
    const int num_pages = num_seqs * pages_per_seq_;
    for (int i = 0; i < num_pages; i++) {
      const int in_seq = i % pages_per_seq_;
      const bool is_common = (in_seq + 1) * shape.page_size <= prefix;
      tables_.push_back(num_pages - 1 - (is_common ? in_seq : i));
    }
    kv_bytes_ = shape.num_kv_heads * tile_bytes(types.kv_dtype, shape.page_size, shape.head_dim);
    memory_.assign(size_t(num_pages * 2 * kv_bytes_) / 4 + 1, bits_of(std::nanf("")));
    history_.resize(size_t(num_seqs));
  }

  // One step: random rows are stored and attended. Returns the output rows; checks them.
  std::vector<float> step(const Kernels& kernels, const std::vector<Sequence>& sequences, const Cut& cut = kPlain) {
    prepare(kernels, sequences, cut.fused);
    const int width = shape_.num_heads * shape_.head_dim;
    Guarded<float> out(batch_.num_rows, width);
    AttendPlanner planner({shape_.num_heads, shape_.num_kv_heads, shape_.page_size, shape_.window, cut.workers,
                           batch_.num_rows, cut.shared_tokens});
    const AttendPlan plan = planner.plan(batch_);
    num_ahead_ += plan.num_ahead;
    AttendArgs a = args(cut.fused);
    a.plan = &plan;
    a.out = out.data();
    a.out_stride = out.stride();
    run(kernels, a);
    out.check();
    std::vector<float> result;
    for (int r = 0; r < batch_.num_rows; r++) {
      if (r % check_every_ == 0) check_row(r, out);
      for (int i = 0; i < width; i++) result.push_back(out.value(r, i));
    }
    return result;
  }

  // The doubles take their time: of long steps only every n-th row meets them.
  void check_every(int n) { check_every_ = n; }
  // Pieces of work that went ahead of tiles, so far.
  int num_ahead() const { return num_ahead_; }

 private:
  struct Token {
    std::vector<double> k, v;  // as stored: rounded
  };

  void run(const Kernels& kernels, AttendArgs a) {
    const size_t units = a.plan->num_ahead > 0 ? size_t(AttendPlanner::kUnits * a.num_heads) : 0;
    std::vector<float> partials(units * size_t(kernels.attend_state(a)), std::nanf(""));
    std::vector<char> scratch(size_t(kernels.attend_scratch(a)), char(0xff));
    a.partials = partials.data();
    const int rows = batch_.num_rows, heads = a.num_kv_heads;
    if (!a.fused) {
      kernels.store_kv(a, rows / 2, rows);
      kernels.store_kv(a, 0, rows / 2);
    }
    const int64_t ahead = a.plan->num_ahead * heads, items = a.plan->num_tiles * heads;
    kernels.attend_ahead(a, ahead / 2, ahead, scratch.data());
    kernels.attend_ahead(a, 0, ahead / 2, scratch.data());
    kernels.attend(a, items / 2, items, scratch.data());
    kernels.attend(a, 0, items / 2, scratch.data());
  }

  // The same for a position however a prompt is cut into steps, and for all sequences where they have it in common.
  std::vector<float> numbers(int seq, int position, int kind, int count) const {
    const int which = position < prefix_ ? 0 : seq;
    return Random(uint64_t((which * 5000 + position) * 4 + kind)).floats(size_t(count), -2, 2);
  }

  void prepare(const Kernels& kernels, const std::vector<Sequence>& sequences, bool fused) {
    slots_.clear(), starts_.clear(), counts_.clear(), first_row_.clear(), row_seq_.clear(), row_pos_.clear();
    q_.clear(), k_.clear(), v_.clear(), turned_q_.clear(), cos_.clear(), sin_.clear();
    for (int s = 0; s < int(sequences.size()); s++) {
      slots_.push_back(s);
      starts_.push_back(sequences[size_t(s)].start);
      counts_.push_back(sequences[size_t(s)].count);
      first_row_.push_back(int32_t(row_seq_.size()));
      for (int j = 0; j < sequences[size_t(s)].count; j++) {
        row_seq_.push_back(s);
        row_pos_.push_back(sequences[size_t(s)].start + j);
        add_row(kernels, fused);
      }
    }
    batch_ = {int32_t(sequences.size()), int32_t(row_seq_.size()), slots_.data(),   starts_.data(), counts_.data(),
              first_row_.data(),         row_seq_.data(),          row_pos_.data(), tables_.data(), pages_per_seq_};
  }

  // Fused attention gets queries and keys that are not turned yet.
  void add_row(const Kernels& kernels, bool fused) {
    const int seq = row_seq_.back(), position = row_pos_.back(), kv_width = shape_.num_kv_heads * shape_.head_dim;
    std::vector<float> q = numbers(seq, position, 0, shape_.num_heads * shape_.head_dim);
    std::vector<float> k = numbers(seq, position, 1, kv_width), v = numbers(seq, position, 2, kv_width);
    for (int i = 0; i < rotary_ / 2; i++) {
      cos_.push_back(std::cos(float(position) / float(i + 2)));
      sin_.push_back(std::sin(float(position) / float(i + 2)));
    }
    const auto append = [](std::vector<float>& to, const std::vector<float>& x) {
      to.insert(to.end(), x.begin(), x.end());
    };
    const float *cos = cos_.data() + cos_.size() - rotary_ / 2, *sin = sin_.data() + sin_.size() - rotary_ / 2;
    if (fused) append(q_, q), append(k_, k);
    kernels.rope({q.data(), 0, cos, sin, shape_.num_heads, shape_.head_dim, rotary_}, 0, 1);
    kernels.rope({k.data(), 0, cos, sin, shape_.num_kv_heads, shape_.head_dim, rotary_}, 0, 1);
    if (!fused) append(q_, q), append(k_, k);
    append(v_, v);
    append(turned_q_, q);
    for (int other = 0; other < int(history_.size()); other++) {
      if (other != seq && position >= prefix_) continue;
      auto& history = history_[size_t(other)];
      history.resize(std::max(history.size(), size_t(position + 1)));
      history[size_t(position)] = {stored(k), stored(v)};
    }
  }

  // Heads as pages hold them: of 8-bit pages 127 codes of a head's largest magnitude.
  std::vector<double> stored(const std::vector<float>& x) const {
    std::vector<double> y;
    for (size_t first = 0; first < x.size(); first += size_t(shape_.head_dim)) {
      float most = 0;
      for (int d = 0; d < shape_.head_dim; d++) most = std::fmax(most, std::fabs(x[first + size_t(d)]));
      for (int d = 0; d < shape_.head_dim; d++) {
        const float f = x[first + size_t(d)];
        const float code = std::nearbyint(f * (127 / most));
        y.push_back(types_.kv_dtype == DType::INT8 ? double(code) * double(most / 127) : operand(types_.dtype, f));
      }
    }
    return y;
  }

  AttendArgs args(bool fused) {
    AttendArgs a{};
    a.q = q_.data();
    a.k = k_.data();
    a.v = v_.data();
    a.q_stride = shape_.num_heads * shape_.head_dim;
    a.k_stride = a.v_stride = shape_.num_kv_heads * shape_.head_dim;
    a.k_pages = memory_.data();
    a.v_pages = reinterpret_cast<char*>(memory_.data()) + kv_bytes_;
    a.page_stride = 2 * kv_bytes_;
    a.num_heads = shape_.num_heads;
    a.num_kv_heads = shape_.num_kv_heads;
    a.head_dim = shape_.head_dim;
    a.page_size = shape_.page_size;
    a.window = shape_.window;
    a.scale = scale();
    a.softcap = shape_.softcap;
    a.dtype = types_.dtype;
    a.kv_dtype = types_.kv_dtype;
    a.out_dtype = DType::F32;
    a.batch = &batch_;
    a.cos = cos_.data();
    a.sin = sin_.data();
    a.rotary_dim = rotary_;
    a.fused = fused;
    return a;
  }

  float scale() const { return 1 / std::sqrt(float(shape_.head_dim)); }

  // One head of one row in doubles.
  std::vector<double> attended(int r, int head) const {
    const std::vector<Token>& tokens = history_[size_t(row_seq_[size_t(r)])];
    const int dim = shape_.head_dim, position = row_pos_[size_t(r)];
    const int kv = head / (shape_.num_heads / shape_.num_kv_heads) * dim;
    const int begin = shape_.window > 0 ? std::max(0, position - shape_.window + 1) : 0;
    const float* q = turned_q_.data() + (int64_t(r) * shape_.num_heads + head) * dim;
    std::vector<double> sum(size_t(dim), 0.0);
    double total = 0;
    for (int p = begin; p <= position; p++) {
      double score = 0;
      for (int d = 0; d < dim; d++) score += operand(types_.dtype, q[d]) * tokens[size_t(p)].k[size_t(kv + d)];
      score *= double(scale());
      if (shape_.softcap > 0) score = double(shape_.softcap) * std::tanh(score / double(shape_.softcap));
      const double weight = std::exp(score);
      total += weight;
      for (int d = 0; d < dim; d++) sum[size_t(d)] += weight * tokens[size_t(p)].v[size_t(kv + d)];
    }
    for (double& x : sum) x /= total;
    return sum;
  }

  void check_row(int r, Guarded<float>& out) {
    const double tolerance = types_.dtype == DType::F32 ? 2e-5 : 2e-2;  // bf16 rounds probabilities
    for (int head = 0; head < shape_.num_heads; head++) {
      const std::vector<double> wanted = attended(r, head);
      for (int d = 0; d < shape_.head_dim; d++) {
        const double error = std::fabs(double(out.value(r, head * shape_.head_dim + d)) - wanted[size_t(d)]);
        expect(error <= tolerance, "row " + std::to_string(r) + " head " + std::to_string(head) + " dimension " +
                                       std::to_string(d) + " is off by " + std::to_string(error));
      }
    }
  }

  Shape shape_;
  Types types_;
  int pages_per_seq_, prefix_, rotary_;
  int64_t kv_bytes_ = 0;
  int num_ahead_ = 0, check_every_ = 1;
  std::vector<int32_t> tables_;
  std::vector<uint32_t> memory_;
  std::vector<std::vector<Token>> history_;
  std::vector<int32_t> slots_, starts_, counts_, first_row_, row_seq_, row_pos_;
  std::vector<float> q_, k_, v_, turned_q_, cos_, sin_;
  Batch batch_{};
};

bool same(const std::vector<float>& a, const float* b) { return std::memcmp(a.data(), b, a.size() * 4) == 0; }

// A prompt in one step, in chunks beside another sequence, and its last tokens one by one with attention storing them:
// the same bits.
void check_shape(const Kernels& kernels, const Types& types, const Shape& shape) {
  const Scope scope("heads " + std::to_string(shape.num_heads) + "/" + std::to_string(shape.num_kv_heads) + " of " +
                    std::to_string(shape.head_dim) + ", pages of " + std::to_string(shape.page_size) + ", window " +
                    std::to_string(shape.window));
  const int prompt = 75, decoded = 3, width = shape.num_heads * shape.head_dim;
  Cache whole(shape, types, 1, 80), chunks(shape, types, 2, 80);
  const std::vector<float> all = whole.step(kernels, {{0, prompt}});
  int start = 0, count = 1;
  for (int i = 0; start < prompt - decoded; i++) {
    const Sequence other = i == 0 ? Sequence{0, 6} : Sequence{5 + i, 1};
    std::vector<float> some = chunks.step(kernels, {{start, count}, other});
    some.resize(size_t(count * width));
    expect(same(some, all.data() + start * width),
           "rows from " + std::to_string(start) + " have other bits in a chunk");
    start += count;
    count = std::min(3 * count + 1, prompt - decoded - start);
  }
  for (; start < prompt; start++) {
    const std::vector<float> row = chunks.step(kernels, {{start, 1}}, {1, 0, true});
    expect(same(row, all.data() + start * width), "row " + std::to_string(start) + " has other bits when fused");
  }
}

// Contexts of several splits, of sequences that have most of them in common: alone and together, cut for several
// workers and shared, the same bits.
void check_long(const Kernels& kernels, const Types& types, int window) {
  const Scope scope("long contexts, window " + std::to_string(window));
  const Shape shape{2, 1, 16, 16, window, 0};
  const int prefix = 1040, width = 32;
  const std::vector<int> lengths = {1100, 1050, 1090};
  Cache alone(shape, types, 3, 1200, prefix), together(shape, types, 3, 1200, prefix);
  for (Cache* cache : {&alone, &together}) {
    cache->check_every(53);
    cache->step(kernels, {{0, lengths[0]}, {prefix, lengths[1] - prefix}, {prefix, lengths[2] - prefix}});
    cache->check_every(1);
  }
  const std::vector<Sequence> rows = {{lengths[0], 1}, {lengths[1], 1}, {lengths[2], 1}};
  const std::vector<float> one = alone.step(kernels, rows);
  for (const Cut& cut : {Cut{1, 64, false}, Cut{4, 0, false}, Cut{4, 64, true}}) {
    const std::vector<float> all = together.step(kernels, rows, cut);
    expect(same(all, one.data()), "other bits when cut for " + std::to_string(cut.workers) + " workers");
  }
  expect(window > 0 || together.num_ahead() > 3, "nothing went ahead of the tiles");
  expect(one.size() == size_t(3 * width), "rows of the step");
}

}  // namespace

void test_attention(const Tables& tables) {
  const Types all[] = {{"float32", DType::F32, DType::F32},
                       {"bfloat16", DType::BF16, DType::BF16},
                       {"bfloat16 with 8-bit pages", DType::BF16, DType::INT8},
                       {"float32 with 8-bit pages", DType::F32, DType::INT8}};
  for (const Kernels* kernels : tables) {
    const Scope isa(kernels->name);
    for (const Types& types : all) {
      const Scope scope(types.name);
      for (const Shape& shape : {Shape{4, 2, 32, 16, 0, 0}, Shape{3, 1, 20, 16, 0, 0}, Shape{6, 2, 16, 4, 21, 0},
                                 Shape{2, 2, 8, 1, 0, 12}, Shape{7, 1, 64, 16, 33, 30}, Shape{1, 1, 48, 32, 0, 0}}) {
        check_shape(*kernels, types, shape);
      }
      check_long(*kernels, types, 0);
      check_long(*kernels, types, 700);
    }
  }
}

}  // namespace sg::test

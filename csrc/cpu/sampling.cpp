// The sampler: from one row of logits to one token.
//
// The order is: log-probabilities of the raw logits; the host's logits processors, between two calls; bias, mask, bans,
// penalties; temperature; then the truncations top-k, top-p, min-p and typical-p, each on what the former left, with
// the definitions of transformers' logits warpers; then one draw. The vocabulary is never sorted: maxima of stretches
// of 256 logits, computed once, let every search skip what cannot matter, and a cut at a cumulative probability looks
// into one bucket of a histogram. Greedy and top-k rows that nothing else touches are read once and never written.
// Where a grammar allows a few tokens only these are looked at, and where it allows one no logit is.
//
// What is decided here: equal logits rank by lower id, but top-k keeps all that equal the k-th. A NaN logit counts as
// -inf, +inf as the largest float. If every token is at -inf the lowest allowed id is taken, and 0 if none is allowed.
// Bans give way to a mask: where they leave nothing of what it allows they do not count.
// A draw walks the kept tokens by ascending id and adds their weights in double until they exceed u times their sum,
// where u is philox_uniform(seed, {position + 1, sample_index, 0, 0}).
#include "cpu/sampling.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "cpu/philox.h"

namespace sg {
namespace {

constexpr int32_t kStretch = 256;  // logits per entry of the maxima
constexpr int32_t kBlock = 64;     // logits per entry of the sums that a draw walks along
constexpr float kInf = HUGE_VALF;

struct Candidate {
  float key;     // logit after temperature, less the row's maximum; for typical-p: minus the distance from the entropy
  float weight;  // exp of that logit
  int32_t id;
};

bool before(const Candidate& a, const Candidate& b) { return a.key > b.key || (a.key == b.key && a.id < b.id); }

int64_t stretches_of(int32_t vocab) { return (int64_t(vocab) + kStretch - 1) / kStretch; }
int64_t blocks_of(int32_t vocab) { return (int64_t(vocab) + kBlock - 1) / kBlock; }

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Scratch {
  Scratch(void* memory, int32_t vocab) : begin_(reinterpret_cast<uintptr_t>(memory)), next_(begin_) {
    raw = take<float>(vocab);
    counts = take<int32_t>(vocab);
    maxima = take<float>(stretches_of(vocab));
    sums = take<double>(blocks_of(vocab));
    kept = take<Candidate>(vocab);
    work = take<Candidate>(vocab);
  }
  int64_t bytes() const { return int64_t(next_ - begin_); }

  float* raw;       // [vocab] logits as they came, where log-probabilities are wanted
  int32_t* counts;  // [vocab] valid only for ids of the row's history
  float* maxima;    // [stretches]
  double* sums;     // [blocks] also space to select among the maxima
  Candidate* kept;  // [vocab] by ascending id
  Candidate* work;  // [vocab]

 private:
  template <class T>
  T* take(int64_t count) {
    const uintptr_t at = next_;
    next_ += uintptr_t(aligned(count * int64_t(sizeof(T))));
    return reinterpret_cast<T*>(at);
  }
  const uintptr_t begin_;
  uintptr_t next_;
};

// NaN -> -inf, +inf -> the largest float.
float ordered(float x) { return x <= FLT_MAX ? x : (x > FLT_MAX ? FLT_MAX : -kInf); }

void clean(float* x, int32_t n) {
  uint32_t found = 0;  // integers, so that the loop is vectorized; nearly always it finds nothing
  for (int32_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    found |= (bits & 0x7fffffffu) >= 0x7f800000u;
  }
  if (!found) return;
  for (int32_t i = 0; i < n; ++i) x[i] = ordered(x[i]);
}

// x[id] = -inf for every id whose bit is 0.
void mask_words_off(float* x, const uint32_t* words, int32_t vocab) {
  uint32_t bits[32];
  for (uint32_t i = 0; i < 32; ++i) bits[i] = 1u << i;
  for (int32_t first = 0; first < vocab; first += 32) {
    const uint32_t allowed = words[first / 32];
    if (allowed == 0xffffffffu) continue;
    const int32_t count = std::min(32, vocab - first);
    if (count == 32) {
      for (int32_t i = 0; i < 32; ++i) x[first + i] = allowed & bits[i] ? x[first + i] : -kInf;
    } else {
      for (int32_t i = 0; i < count; ++i) x[first + i] = allowed & bits[i] ? x[first + i] : -kInf;
    }
  }
}

double mass_of(const Candidate* first, const Candidate* last) {
  double mass = 0;
  for (; first != last; ++first) mass += first->weight;
  return mass;
}

// Keys are at most 0; buckets of 1 / 32, the last one without end.
constexpr int kBuckets = 512;
int bucket_of(float key) { return int(std::min(key * -32.0f, float(kBuckets - 1))); }

// The candidate at which the cumulative weight, in order of `before`, reaches `target`; the last one if it never does.
// Reorders a[0 .. n), n >= 1.
Candidate cut_at_mass(Candidate* a, int32_t n, double target) {
  constexpr int32_t kSmall = 32;
  double mass = 0;  // of a[0 .. low)
  int32_t low = 0, high = n;
  while (high - low > kSmall) {
    const int32_t middle = low + (high - low) / 2;
    std::nth_element(a + low, a + middle, a + high, before);
    const double upper = mass + mass_of(a + low, a + middle);
    if (upper >= target) {
      high = middle;
    } else {
      mass = upper;
      low = middle;
    }
  }
  std::sort(a + low, a + high, before);
  for (int32_t i = low; i < high; ++i) {
    mass += a[i].weight;
    if (mass >= target) return a[i];
  }
  return a[high - 1];
}

class Sampler {
 public:
  Sampler(const Kernels& kernels, const SampleInputs& inputs, int64_t index, float* logits, void* scratch)
      : kernels_(kernels),
        in_(inputs),
        row_(inputs.rows[index]),
        vocab_(inputs.vocab),
        x_(logits),
        s_(scratch, inputs.vocab) {}

  void run(int64_t index, const float* given_raw, const SampleOutputs& out) {
    int32_t token = row_.target;
    if (token < 0) token = draw_quickly();
    const float* raw = given_raw != nullptr ? given_raw : x_;
    if (token < 0 || row_.num_top >= 0) clean(x_, vocab_);
    if (token < 0) {
      if (row_.num_top >= 0 && raw == x_ && overwrites())
        raw = static_cast<float*>(std::memcpy(s_.raw, x_, size_t(vocab_) * 4));
      token = choose();
    }
    out.token[index] = token;
    if (row_.num_top >= 0 && is_token(token)) report(raw, token, index, out);
    if (row_.write) in_.tokens[row_.slot * in_.tokens_stride + row_.position + 1] = token;
  }

 private:
  using Kind = Allowed::Kind;

  bool is_token(int32_t id) const { return id >= 0 && id < vocab_; }
  bool is_greedy() const { return !(row_.temperature > 0); }
  bool cuts() const { return row_.top_k > 0 && row_.top_k < vocab_; }
  bool has_penalties() const {
    return row_.repetition_penalty != 1 || row_.presence_penalty != 0 || row_.frequency_penalty != 0;
  }
  bool changes_logits() const { return row_.bias_count > 0 || row_.ban_count > 0 || has_penalties(); }
  bool overwrites() const { return !is_greedy() || changes_logits() || allowed_.kind != Kind::kAll; }

  // Where not every logit has to be looked at, or none changed one by one; -1 where that does not do. Logits are
  // changed only where no log-probabilities of them are wanted.
  int32_t draw_quickly() {
    allowed_ = find_allowed();
    if (allowed_.kind == Kind::kIds) return choose_listed();
    if (row_.num_top >= 0 || changes_logits() || !(is_greedy() || cuts())) return -1;
    apply_mask();
    return choose_quickly();
  }

  int32_t choose() {
    add_bias();
    apply_mask();
    apply_bans();
    if (has_penalties()) apply_penalties();
    const float max = find_maxima(x_);
    if (max == -kInf) return lowest_allowed();
    if (is_greedy()) return find_first(max);
    temper(max);
    const int32_t kept = truncate(cuts() ? keep_top_k(collect(x_, bound_of_largest(row_.top_k))) : -1);
    return kept < 0 ? draw_from_all() : draw_from_kept(kept);
  }

  // As `choose`, for greedy and top-k rows where nothing changes single logits, from the logits as they came: only
  // those that top-k keeps are tempered. -1 where that takes more: a logit is +inf or all are -inf, or the whole
  // vocabulary matters. NaN, which counts as -inf, is passed over by maxima and comparisons.
  int32_t choose_quickly() {
    const float max = find_maxima(x_);
    if (!(max >= -FLT_MAX && max <= FLT_MAX)) return -1;
    if (is_greedy()) return find_first(max);
    const float bound = bound_of_largest(row_.top_k), distance = max - bound;
    const bool is_usual = distance < 1e30f && row_.temperature > 1e-3f && row_.temperature < 1e3f;
    if (!is_usual) return -1;
    // Tempering rounds twice: logits that differ by less than about 3e-7 of their distance may come out equal.
    const int32_t n = collect(x_, bound - (1e-6f * distance + 1e-30f));
    for (int32_t i = 0; i < n; ++i) s_.kept[i].key = (s_.kept[i].key - max) / row_.temperature;
    return draw_from_kept(truncate(keep_top_k(n)));
  }

  // As `choose`, where the tokens that are allowed are listed; x_ is only read.
  int32_t choose_listed() {
    int32_t n = take_listed();
    if (n <= 1) return n == 0 ? 0 : s_.kept[0].id;
    for (int32_t i = 0; i < n; ++i) s_.kept[i].key = ordered(x_[s_.kept[i].id]);
    add_bias_to_listed(n);
    n = keep_not_banned(n);
    if (has_penalties()) penalize_listed(n);
    const Candidate* best = std::min_element(s_.kept, s_.kept + n, before);
    const float max = best->key;
    if (is_greedy() || max == -kInf) return best->id;
    for (int32_t i = 0; i < n; ++i) s_.kept[i].key = (s_.kept[i].key - max) / row_.temperature;
    if (row_.top_k > 0) {
      n = keep_top_k(n);
    } else {
      weigh(n);
    }
    return draw_from_kept(truncate(n));
  }

  // ---- the tokens that a row may draw -------------------------------------------------------------------------------

  Allowed find_allowed() const {
    if (row_.mask == kGrammarMask) return in_.grammars->allowed(row_.slot, row_.position);
    Allowed allowed;
    if (row_.mask < 0) return allowed;
    allowed.kind = Kind::kWords;
    allowed.words = in_.masks + int64_t(row_.mask) * mask_words(vocab_);
    return allowed;
  }

  static bool holds(const Allowed::Ids& ids, int32_t id) { return std::binary_search(ids.begin(), ids.end(), id); }

  bool is_allowed(int32_t id) const {
    if (holds(allowed_.extra, id)) return true;
    if (allowed_.kind == Kind::kWords) return allowed_.words[id / 32] >> (id % 32) & 1;
    if (allowed_.kind == Kind::kAll) return true;
    return holds(allowed_.ids, id) == (allowed_.kind == Kind::kIds);
  }

  bool is_banned(int32_t id) const {
    const int32_t* bans = in_.ban_ids + row_.ban_start;
    return std::find(bans, bans + row_.ban_count, id) != bans + row_.ban_count;
  }

  // The lowest id that is allowed and not banned; -1: none.
  int32_t lowest(bool bans_count) const {
    for (int32_t id = 0; id < vocab_; ++id) {
      if (is_allowed(id) && !(bans_count && is_banned(id))) return id;
    }
    return -1;
  }

  int32_t lowest_allowed() const {
    const int32_t id = lowest(true);
    return std::max(0, id >= 0 || allowed_.kind == Kind::kAll ? id : lowest(false));
  }

  void apply_mask() {
    if (allowed_.kind == Kind::kAllBut) {
      for (const int32_t id : allowed_.ids) x_[id] = -kInf;
    } else if (allowed_.kind == Kind::kWords) {
      int32_t n = 0;
      for (const int32_t id : allowed_.extra) s_.work[n++].key = x_[id];
      mask_words_off(x_, allowed_.words, vocab_);
      n = 0;
      for (const int32_t id : allowed_.extra) x_[id] = s_.work[n++].key;
    }
  }

  // ---- what changes single logits -----------------------------------------------------------------------------------

  void add_bias() {
    for (int32_t i = row_.bias_start; i < row_.bias_start + row_.bias_count; ++i) {
      const int32_t id = in_.bias_ids[i];
      if (is_token(id)) x_[id] = ordered(x_[id] + in_.bias_values[i]);
    }
  }

  void apply_bans() {
    if (row_.ban_count == 0 || (allowed_.kind != Kind::kAll && lowest(true) < 0)) return;
    for (int32_t i = row_.ban_start; i < row_.ban_start + row_.ban_count; ++i) {
      if (is_token(in_.ban_ids[i])) x_[in_.ban_ids[i]] = -kInf;
    }
  }

  // f(position, id) for the prompt and the output so far, the row's own token included.
  template <class F>
  void for_history(F&& f) {
    const int32_t* tokens = in_.tokens + row_.slot * in_.tokens_stride;
    for (int32_t p = 0; p <= row_.position; ++p) {
      if (is_token(tokens[p])) f(p, tokens[p]);
    }
  }

  // Each distinct token once. The counts are cleared along the history, never over the vocabulary.
  void apply_penalties() {
    constexpr int32_t kDone = -1;
    int32_t* counts = s_.counts;
    for_history([&](int32_t, int32_t id) { counts[id] = 0; });
    for_history([&](int32_t p, int32_t id) { counts[id] += p >= row_.num_prompt; });
    for_history([&](int32_t, int32_t id) {
      if (counts[id] == kDone) return;
      x_[id] = penalized(x_[id], counts[id]);
      counts[id] = kDone;
    });
  }

  float penalized(float x, int32_t count) const {
    x = x > 0 ? x / row_.repetition_penalty : x * row_.repetition_penalty;
    if (count > 0) x -= row_.presence_penalty + row_.frequency_penalty * float(count);
    return ordered(x);
  }

  // ---- the same for listed tokens, in s_.kept by ascending id
  // --------------------------------------------------------

  // The tokens that are allowed; returns how many.
  int32_t take_listed() {
    const Allowed::Ids &ids = allowed_.ids, &extra = allowed_.extra;
    int32_t n = 0, i = 0, j = 0;
    while (i < ids.count || j < extra.count) {
      const bool takes_extra = i == ids.count || (j < extra.count && extra.first[j] < ids.first[i]);
      const int32_t id = takes_extra ? extra.first[j++] : ids.first[i++];
      if (!is_token(id) || (n > 0 && s_.kept[n - 1].id == id)) continue;
      s_.kept[n++] = {0, 0, id};
    }
    return n;
  }

  void add_bias_to_listed(int32_t n) {
    for (int32_t i = row_.bias_start; i < row_.bias_start + row_.bias_count; ++i) {
      Candidate* found = std::lower_bound(s_.kept, s_.kept + n, in_.bias_ids[i],
                                          [](const Candidate& c, int32_t id) { return c.id < id; });
      if (found != s_.kept + n && found->id == in_.bias_ids[i]) found->key = ordered(found->key + in_.bias_values[i]);
    }
  }

  int32_t keep_not_banned(int32_t n) {
    const auto is_free = [&](const Candidate& c) { return !is_banned(c.id); };
    if (row_.ban_count == 0 || std::none_of(s_.kept, s_.kept + n, is_free)) return n;
    return keep_if(n, is_free);
  }

  // Counts are valid only for ids of the history, and for listed ones, where kAbsent says that they are not in it.
  void penalize_listed(int32_t n) {
    constexpr int32_t kAbsent = -1;
    int32_t* counts = s_.counts;
    for (int32_t i = 0; i < n; ++i) counts[s_.kept[i].id] = kAbsent;
    for_history([&](int32_t, int32_t id) { counts[id] = 0; });
    for_history([&](int32_t p, int32_t id) { counts[id] += p >= row_.num_prompt; });
    for (int32_t i = 0; i < n; ++i) {
      Candidate& c = s_.kept[i];
      if (counts[c.id] != kAbsent) c.key = penalized(c.key, counts[c.id]);
    }
  }

  // ---- searching ----------------------------------------------------------------------------------------------------

  int32_t block_size(int64_t block) const { return std::min<int32_t>(kBlock, vocab_ - int32_t(block) * kBlock); }
  int32_t stretch_size(int64_t i) const { return std::min<int32_t>(kStretch, vocab_ - int32_t(i) * kStretch); }

  // Fills s_.maxima for x; returns the largest.
  float find_maxima(const float* x) {
    float max = -kInf;
    for (int64_t i = 0; i < stretches_of(vocab_); ++i) {
      s_.maxima[i] = kernels_.row_max(x + i * kStretch, stretch_size(i));
      max = std::max(max, s_.maxima[i]);
    }
    return max;
  }

  // The lowest id whose logit is `value`, which is a maximum.
  int32_t find_first(float value) const {
    const int64_t i = std::find(s_.maxima, s_.maxima + stretches_of(vocab_), value) - s_.maxima;
    const float* first = x_ + i * kStretch;
    return int32_t(std::find(first, first + stretch_size(i), value) - x_);
  }

  // A value that at least `count` logits reach: the count-th largest maximum.
  float bound_of_largest(int32_t count) {
    const int64_t stretches = stretches_of(vocab_);
    if (count >= stretches) return -kInf;
    float* maxima = reinterpret_cast<float*>(s_.sums);
    std::copy(s_.maxima, s_.maxima + stretches, maxima);
    std::nth_element(maxima, maxima + count - 1, maxima + stretches, [](float a, float b) { return a > b; });
    return maxima[count - 1];
  }

  // All ids with x[id] >= threshold into s_.kept, ascending, weights not set; returns how many.
  int32_t collect(const float* x, float threshold) {
    int32_t n = 0;
    for (int64_t stretch = 0; stretch < stretches_of(vocab_); ++stretch) {
      if (s_.maxima[stretch] < threshold) continue;
      const int32_t first = int32_t(stretch) * kStretch;
      for (int32_t i = first; i < first + stretch_size(stretch); ++i) {
        if (x[i] >= threshold) s_.kept[n++] = {x[i], 0, i};
      }
    }
    return n;
  }

  template <class F>
  int32_t keep_if(int32_t n, F&& wanted) {
    return int32_t(std::remove_if(s_.kept, s_.kept + n, [&](const Candidate& c) { return !wanted(c); }) - s_.kept);
  }

  void weigh(int32_t n) {
    for (int32_t i = 0; i < n; ++i) s_.kept[i].weight = std::exp(s_.kept[i].key);
  }

  // Where the cumulative weight of s_.kept, in order of `before`, reaches `target`: first which bucket of keys, then
  // which of the bucket's few candidates.
  Candidate cut_kept_at(int32_t n, double target) {
    double masses[kBuckets] = {};
    for (int32_t i = 0; i < n; ++i) masses[bucket_of(s_.kept[i].key)] += s_.kept[i].weight;
    int bucket = 0;
    double mass = 0;
    while (bucket + 1 < kBuckets && mass + masses[bucket] < target) mass += masses[bucket++];
    const auto copy_if = [&](auto&& wanted) {
      return int32_t(std::copy_if(s_.kept, s_.kept + n, s_.work, wanted) - s_.work);
    };
    int32_t count = copy_if([&](const Candidate& c) { return bucket_of(c.key) == bucket; });
    if (count == 0) {  // a target of 0, or one that rounding put out of reach
      count = copy_if([](const Candidate&) { return true; });
      mass = 0;
    }
    return cut_at_mass(s_.work, count, target - mass);
  }

  // ---- temperature and truncation -----------------------------------------------------------------------------------

  // Subtracting the maximum first keeps every quotient finite or -inf, however small the temperature. Maxima stay
  // maxima.
  void temper(float max) {
    const float temperature = row_.temperature;
    if (temperature == 1) {  // dividing takes longer than all the rest
      for (int32_t i = 0; i < vocab_; ++i) x_[i] -= max;
    } else {
      for (int32_t i = 0; i < vocab_; ++i) x_[i] = (x_[i] - max) / temperature;
    }
    for (int64_t i = 0; i < stretches_of(vocab_); ++i) s_.maxima[i] = (s_.maxima[i] - max) / temperature;
  }

  // Number of candidates in s_.kept, or -1 where nothing is cut; n likewise is what top-k left.
  int32_t truncate(int32_t n) {
    if (row_.top_p < 1) n = keep_top_p(n);
    if (row_.min_p > 0) n = keep_min_p(n);
    if (row_.typical_p < 1) n = keep_typical(n);
    return n;
  }

  // Of the n in s_.kept, those that reach the k-th largest.
  int32_t keep_top_k(int32_t n) {
    const int32_t k = row_.top_k;
    if (n > k) {
      std::copy(s_.kept, s_.kept + n, s_.work);
      std::nth_element(s_.work, s_.work + k - 1, s_.work + n, before);
      const float least = s_.work[k - 1].key;
      n = keep_if(n, [&](const Candidate& c) { return c.key >= least; });
    }
    weigh(n);
    return n;
  }

  int32_t keep_top_p(int32_t n) {
    double target;
    if (n < 0) {
      target = row_.top_p * kernels_.row_exp_sum(x_, vocab_, 0);
      n = collect_mass(target);
    } else {
      target = row_.top_p * mass_of(s_.kept, s_.kept + n);
    }
    const Candidate last = cut_kept_at(n, target);
    return keep_if(n, [&](const Candidate& c) { return !before(last, c); });
  }

  // Enough of the likeliest for `target`: the threshold falls until they are.
  int32_t collect_mass(double target) {
    int32_t n = 0;
    for (const float threshold : {-5.f, -8.f, -12.f, -18.f, -kInf}) {
      n = collect(x_, threshold);
      weigh(n);
      if (mass_of(s_.kept, s_.kept + n) >= target) break;
    }
    return n;
  }

  // The likeliest has weight 1: it is never cut before.
  int32_t keep_min_p(int32_t n) {
    if (n < 0) {
      n = collect(x_, std::min(0.f, std::log(row_.min_p) - 1e-3f));  // a little more than wanted: the weight decides
      weigh(n);
    }
    const float least = std::min(row_.min_p, 1.f);
    return keep_if(n, [&](const Candidate& c) { return c.weight >= least; });
  }

  int32_t keep_typical(int32_t n) {
    if (n < 0) {
      n = collect(x_, -kInf);
      weigh(n);
    }
    const double total = mass_of(s_.kept, s_.kept + n), log_total = std::log(total);
    double entropy = 0;
    for (int32_t i = 0; i < n; ++i) {
      const Candidate& c = s_.kept[i];
      if (c.weight > 0) entropy += c.weight / total * (log_total - double(c.key));
    }
    for (int32_t i = 0; i < n; ++i) {
      Candidate& c = s_.kept[i];
      c.key = float(-std::fabs(log_total - double(c.key) - entropy));
    }
    const float least = cut_kept_at(n, row_.typical_p * total).key;
    return keep_if(n, [&](const Candidate& c) { return c.key >= least; });
  }

  // ---- the draw -----------------------------------------------------------------------------------------------------

  double uniform() const { return philox_uniform(row_.seed, {{uint32_t(row_.position) + 1, row_.sample_index, 0, 0}}); }

  int32_t draw_from_kept(int32_t n) const {
    const double target = uniform() * mass_of(s_.kept, s_.kept + n);
    double mass = 0;
    int32_t last = s_.kept[0].id;
    for (int32_t i = 0; i < n; ++i) {
      if (!(s_.kept[i].weight > 0)) continue;
      last = s_.kept[i].id;
      mass += s_.kept[i].weight;
      if (mass > target) break;
    }
    return last;
  }

  // The same over the whole vocabulary: blocks first, then the ids of the block where the sum is passed. A block's sum
  // and its terms round differently, so the walk may end in the block after.
  int32_t draw_from_all() {
    const int64_t blocks = blocks_of(vocab_);
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      s_.sums[b] = kernels_.row_exp_sum(x_ + b * kBlock, block_size(b), 0);
      total += s_.sums[b];
    }
    const double target = uniform() * total;
    double before_block = 0;
    int32_t last = find_first(0);
    for (int64_t b = 0; b < blocks; before_block += s_.sums[b], ++b) {
      if (before_block + s_.sums[b] <= target) continue;
      double mass = before_block;
      const int32_t first = int32_t(b) * kBlock;
      for (int32_t i = first; i < first + block_size(b); ++i) {
        const double weight = std::exp(double(x_[i]));
        if (!(weight > 0)) continue;
        last = i;
        mass += weight;
        if (mass > target) return i;
      }
    }
    return last;
  }

  // ---- log-probabilities --------------------------------------------------------------------------------------------

  // log_softmax of `raw` at the token, its rank, and the likeliest num_top. All -inf where no logit is above -inf.
  void report(const float* raw, int32_t token, int64_t index, const SampleOutputs& out) {
    const float max = find_maxima(raw);
    const double log_sum = max == -kInf ? 0 : max + std::log(kernels_.row_exp_sum(raw, vocab_, max));
    out.logprob[index] = float(raw[token] - log_sum);
    out.rank[index] = rank_of(raw, token);
    const int32_t k = std::min({row_.num_top, out.top_width, vocab_});
    if (k == 0) return;
    const int32_t n = collect(raw, bound_of_largest(k));
    std::partial_sort(s_.kept, s_.kept + k, s_.kept + n, before);
    for (int32_t i = 0; i < k; ++i) {
      out.top_ids[index * out.top_width + i] = s_.kept[i].id;
      out.top_logprobs[index * out.top_width + i] = float(s_.kept[i].key - log_sum);
    }
  }

  int32_t rank_of(const float* raw, int32_t token) const {
    const float value = raw[token];
    int32_t rank = 1;
    for (int32_t i = 0; i < vocab_; ++i) rank += raw[i] > value;
    for (int32_t i = 0; i < token; ++i) rank += raw[i] == value;
    return rank;
  }

  const Kernels& kernels_;
  const SampleInputs& in_;
  const SampleRow& row_;
  const int32_t vocab_;
  float* x_;
  const Scratch s_;
  Allowed allowed_;
};

}  // namespace

int64_t sample_scratch(int32_t vocab) { return Scratch(nullptr, vocab).bytes(); }

void sample_row(const Kernels& kernels, const SampleInputs& inputs, int64_t index, float* logits, const float* raw,
                const SampleOutputs& outputs, void* scratch) {
  Sampler(kernels, inputs, index, logits, scratch).run(index, raw, outputs);
}

void clean_logits(float* logits, int32_t vocab) { clean(logits, vocab); }

}  // namespace sg

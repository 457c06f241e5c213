// The arithmetic of attention: some rows over one block of tokens. Included by attention.inl.
//
// Keys are turned into scores with tokens as lanes, values are summed with dimensions as lanes; no reduction is
// horizontal but a row's maximum. Exponents are of two: a row's maximum is of score * factor, where factor has the
// scale and log2 e in it.
#pragma once
#include "cpu/attend_pages.inl"

namespace sg {
namespace {
namespace attention {

constexpr int kRows = kTileSums >= 24 ? 6 : kTileSums >= 6 ? 3 : 2;  // queries at once
constexpr int kWide = kTileSums / kRows;                             // pages, or vectors of dimensions
static_assert(kWide >= 1 && kWide <= 4 && kAttendSplit % kBlock == 0);

constexpr float kNone = -__builtin_inff();  // the maximum of a row that has seen nothing
constexpr float kUnseen = -1e30f;           // the score of what a row does not see: a number whose exponential is 0

// A row's running state: o [width], not normalized; 16 partial sums of probabilities; the maximum, and 15 of nothing.
SG_INLINE int state_size(int width) { return width + 32; }

// The tokens [begin, end) of a block that a row sees.
struct Seen {
  int begin, end;
};

// R rows over a block.
template <class In>
struct Rows {
  const AttendArgs& a;
  const typename In::Element* q;             // [head_dim / W, R, W]
  float* states;                             // [R, state_size]
  const Seen* seen;                          // [R]
  const typename In::Element* const* ahead;  // tiles of values to fetch while scoring, one for each page
  int width;
};

// scores[i][16 (page + j) + t] = q[i] . (key t of page + j), for R queries and N pages.
template <class In, int R, int N>
SG_INLINE void score_tile(const Rows<In>& rows, const Block<In>& block, int page, float (*scores)[kBlock]) {
  F16 sums[R][N];
  SG_UNROLL
  for (int i = 0; i < R; ++i) {
    SG_UNROLL
    for (int j = 0; j < N; ++j) sums[i][j] = zero();
  }
  const typename In::Element* q = rows.q;
  const typename In::Element *k[N], *ahead[N];
  SG_UNROLL
  for (int j = 0; j < N; ++j) k[j] = block.k[page + j], ahead[j] = rows.ahead[page + j];
  for (int d = 0; d < rows.a.head_dim; d += In::kWidth) {
    typename In::Vector keys[N];
    SG_UNROLL
    for (int j = 0; j < N; ++j) {
      keys[j] = In::lines(k[j] + d * kPage);
      hold(keys[j]);
      prefetch(ahead[j] + d * kPage);  // a tile of values is as long
    }
    SG_UNROLL
    for (int i = 0; i < R; ++i) {
      const typename In::Vector query = In::broadcast(q + d * R + i * In::kWidth);
      SG_UNROLL
      for (int j = 0; j < N; ++j) sums[i][j] = In::multiply(sums[i][j], query, keys[j]);
    }
  }
  SG_UNROLL
  for (int i = 0; i < R; ++i) {
    SG_UNROLL
    for (int j = 0; j < N; ++j) store(scores[i] + (page + j) * kPage, sums[i][j]);
  }
}

// o[i][16 (first + c) + lane] = o * alpha[i] + p[i] V, for R rows and C vectors of dimensions.
template <class In, int R, int C>
SG_INLINE void value_tile(const typename In::Element (*p)[kBlock], const float* alpha, const Block<In>& block,
                          int first, int width, float* o) {
  const int o_stride = state_size(width);
  F16 sums[R][C];
  SG_UNROLL
  for (int i = 0; i < R; ++i) {
    SG_UNROLL
    for (int c = 0; c < C; ++c) sums[i][c] = mul(load(o + i * o_stride + (first + c) * 16), set1(alpha[i]));
  }
  for (int page = 0; page < block.pages; ++page) {
    const typename In::Element* v = block.v[page] + first * 16 * In::kWidth;
    const typename In::Element* next = block.next_k[page] + first * 16 * In::kWidth;
    const int tokens = smaller(kPage, block.tokens - page * kPage);
    for (int t = 0; t < tokens; t += In::kWidth) {
      typename In::Vector values[C];
      SG_UNROLL
      for (int c = 0; c < C; ++c) {
        values[c] = In::lines(v + t * width + c * 16 * In::kWidth);
        hold(values[c]);
        prefetch(next + t * width + c * 16 * In::kWidth);
      }
      SG_UNROLL
      for (int i = 0; i < R; ++i) {
        const typename In::Vector weight = In::broadcast(p[i] + page * kPage + t);
        SG_UNROLL
        for (int c = 0; c < C; ++c) sums[i][c] = In::multiply(sums[i][c], weight, values[c]);
      }
    }
  }
  SG_UNROLL
  for (int i = 0; i < R; ++i) {
    SG_UNROLL
    for (int c = 0; c < C; ++c) store(o + i * o_stride + (first + c) * 16, sums[i][c]);
  }
}

// ---- softmax --------------------------------------------------------------------------------------------------------

// cap * tanh(x / cap)
SG_INLINE F16 capped(F16 x, float cap) {
  const F16 one = set1(1), e = exp(mul(x, set1(2 / cap)));
  return mul(set1(cap), sub(one, div(set1(2), add(e, one))));
}

SG_INLINE float factor_of(const AttendArgs& a) { return a.softcap > 0 ? kLog2E : a.scale * kLog2E; }

// What is more than a product with the query: scales of keys, the cap, tokens that the row does not see.
template <class In>
SG_INLINE void adjust(const AttendArgs& a, const Block<In>& block, Seen seen, float* scores) {
  for (int page = 0; page < block.pages; ++page) {
    const int first = page * kPage;
    F16 x = load(scores + first);
    if (block.k_scales != nullptr) x = mul(x, load(block.k_scales + first));
    if (a.softcap > 0) x = capped(mul(x, set1(a.scale)), a.softcap);
    const int from = smaller(larger_of(seen.begin - first, 0), kPage),
              to = smaller(larger_of(seen.end - first, 0), kPage);
    if (from > 0 || to < kPage) x = select_lanes(x, from, to, set1(kUnseen));
    store(scores + first, x);
  }
}

// 2^-x for the distances of maxima, R <= 16 of them: 1 for 0, 0 for infinity and where there was no maximum.
SG_INLINE void shrinking(const float* before, const float* now, float* factors) {
  store(factors, exp2(max(sub(load(before), load(now)), set1(kUnseen))));
}

// The rows' new maxima, and what earlier sums are to be multiplied with.
template <class In, int R>
SG_INLINE void raise_maxima(const Rows<In>& rows, const Block<In>& block, const float (*scores)[kBlock], float* now,
                            float* alpha) {
  alignas(64) float before[16] = {};
  const int at = rows.width + 16;
  const float factor = factor_of(rows.a);
  SG_UNROLL
  for (int i = 0; i < R; ++i) {
    F16 top = set1(kUnseen);
    for (int page = 0; page < block.pages; ++page) top = max(load(scores[i] + page * kPage), top);
    float& maximum = rows.states[i * state_size(rows.width) + at];
    const float highest = reduce_max(top) * factor;
    before[i] = maximum;
    now[i] = rows.seen[i].begin < rows.seen[i].end && highest > maximum ? highest : maximum;
    maximum = now[i];
  }
  shrinking(before, now, alpha);
}

// Scores of R rows to probabilities relative to their new maxima.
template <class In, int R>
SG_INLINE void soften(const Rows<In>& rows, const Block<In>& block, float (*scores)[kBlock],
                      typename In::Element (*p)[kBlock], float* alpha) {
  const AttendArgs& a = rows.a;
  for (int i = 0; i < R; ++i) {
    const bool sees_all = rows.seen[i].begin <= 0 && rows.seen[i].end >= block.pages * kPage;
    if (!sees_all || a.softcap > 0 || block.k_scales != nullptr) adjust(a, block, rows.seen[i], scores[i]);
  }
  alignas(64) float now[16] = {};
  raise_maxima<In, R>(rows, block, scores, now, alpha);
  const F16 factor = set1(factor_of(a));
  for (int i = 0; i < R; ++i) {
    float* sums = rows.states + i * state_size(rows.width) + rows.width;
    const F16 less = set1(now[i] == kNone ? 0 : -now[i]);
    F16 total = mul(load(sums), set1(alpha[i]));
    for (int page = 0; page < block.pages; ++page) {
      F16 e = exp2(fma(load(scores[i] + page * kPage), factor, less));
      total = add(total, e);
      if (block.v_scales != nullptr) e = mul(e, load(block.v_scales + page * kPage));
      In::store(p[i] + page * kPage, e);
    }
    store(sums, total);
  }
}

// R rows take in one block.
template <class In, int R>
__attribute__((noinline)) void attend_block(const Rows<In>& rows, const Block<In>& block) {
  alignas(64) float scores[R][kBlock];
  alignas(64) typename In::Element p[R][kBlock];
  alignas(64) float alpha[16];
  int page = 0;
  for (; page + kWide <= block.pages; page += kWide) score_tile<In, R, kWide>(rows, block, page, scores);
  if constexpr (kWide > 2)
    for (; page + 2 <= block.pages; page += 2) score_tile<In, R, 2>(rows, block, page, scores);
  for (; page < block.pages; ++page) score_tile<In, R, 1>(rows, block, page, scores);
  soften<In, R>(rows, block, scores, p, alpha);
  const int vectors = rows.width / 16;
  int c = 0;
  for (; c + kWide <= vectors; c += kWide) value_tile<In, R, kWide>(p, alpha, block, c, rows.width, rows.states);
  if constexpr (kWide > 2)
    for (; c + 2 <= vectors; c += 2) value_tile<In, R, 2>(p, alpha, block, c, rows.width, rows.states);
  for (; c < vectors; ++c) value_tile<In, R, 1>(p, alpha, block, c, rows.width, rows.states);
}

// attend_block for a number of rows known at run time, 1 .. R.
template <class In, int R = kRows>
void attend_block_of(int count, const Rows<In>& rows, const Block<In>& block) {
  if (count == R) {
    attend_block<In, R>(rows, block);
  } else if constexpr (R > 1) {
    attend_block_of<In, R - 1>(count, rows, block);
  }
}

// ---- states ---------------------------------------------------------------------------------------------------------

SG_INLINE void clear_states(float* states, int rows, int width) {
  for (int r = 0; r < rows; ++r, states += state_size(width)) {
    for (int i = 0; i < width + 16; i += 16) store(states + i, zero());
    store(states + width + 16, set1(kNone));
  }
}

SG_INLINE void merge_state(float* total, const float* split, int width, float old_factor, float new_factor) {
  for (int i = 0; i < width + 16; i += 16)
    store(total + i, fma(load(split + i), set1(new_factor), mul(load(total + i), set1(old_factor))));
}

// The rows' splits go into their totals. A row that saw nothing yet takes the split as it is.
SG_INLINE void merge_states(float* total, const float* split, int rows, int width) {
  const int size = state_size(width), at = width + 16;
  for (int first = 0; first < rows; first += 16) {
    const int count = smaller(16, rows - first);
    alignas(64) float old_max[16] = {}, new_max[16] = {}, now[16] = {}, old_factors[16], new_factors[16];
    for (int r = 0; r < count; ++r) {
      old_max[r] = total[(first + r) * size + at];
      new_max[r] = split[(first + r) * size + at];
      now[r] = new_max[r] > old_max[r] ? new_max[r] : old_max[r];
    }
    shrinking(old_max, now, old_factors);
    shrinking(new_max, now, new_factors);
    for (int r = 0; r < count; ++r) {
      float* to = total + (first + r) * size;
      const float* from = split + (first + r) * size;
      if (new_max[r] == kNone) continue;
      if (old_max[r] == kNone) {
        memcpy(to, from, size_t(at) * sizeof(float));
      } else {
        merge_state(to, from, width, old_factors[r], new_factors[r]);
      }
      to[at] = now[r];
    }
  }
}

}  // namespace attention
}  // namespace
}  // namespace sg

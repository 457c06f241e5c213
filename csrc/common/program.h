// One row through the head and the sampler. Mirrored by SAMPLE_ROW in src/streamgen/backends/base.py, whose comments
// say what each field means.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sg {

constexpr int32_t kGrammarMask = -2;  // SampleRow::mask: what the grammar of the row's slot allows

struct SampleRow {
  int32_t row, slot, position, target, write, num_top, num_prompt, top_k;
  float temperature, top_p, min_p, typical_p, repetition_penalty, presence_penalty, frequency_penalty;
  uint32_t sample_index;
  int32_t bias_start, bias_count, ban_start, ban_count, mask, logits;
  uint64_t seed;
};
static_assert(sizeof(SampleRow) == 96 && offsetof(SampleRow, temperature) == 32 && offsetof(SampleRow, seed) == 88);

}  // namespace sg

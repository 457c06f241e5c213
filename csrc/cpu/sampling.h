// The sampler: one fused pass per row of logits.
#pragma once
#include <cstdint>

#include "common/program.h"
#include "cpu/kernels.h"
#include "grammar/slots.h"

namespace sg {

// Arrays of the step that rows refer to (StepInputs in backends/base.py).
struct SampleInputs {
  const SampleRow* rows;
  int32_t* tokens;  // [slots, tokens_stride]
  int64_t tokens_stride;
  const int32_t* bias_ids;
  const float* bias_values;
  const int32_t* ban_ids;
  const uint32_t* masks;  // [num_masks, ceil(vocab / 32)]
  int32_t vocab;
  const GrammarSlots* grammars;  // null where no row has kGrammarMask
};

// StepOutputs in backends/base.py, without the logits.
struct SampleOutputs {
  int32_t* token;
  float* logprob;
  int32_t* rank;
  int32_t* top_ids;
  float* top_logprobs;
  int32_t top_width;
};

// Bytes of scratch that one call needs.
int64_t sample_scratch(int32_t vocab);

// Row `index` of inputs.rows, whose logits are logits[0 .. vocab); logits are overwritten. Writes the row's outputs
// and, where the row says so, its token into inputs.tokens.
//
// raw: nullptr, or [vocab] the logits that the model gave, cleaned, where `logits` were changed since:
// log-probabilities are reported of them.
void sample_row(const Kernels& kernels, const SampleInputs& inputs, int64_t index, float* logits, const float* raw,
                const SampleOutputs& outputs, void* scratch);

// All logits become numbers that compare and subtract: NaN -> -inf, +inf -> the largest float; -inf stays.
void clean_logits(float* logits, int32_t vocab);

}  // namespace sg

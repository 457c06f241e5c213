// Rows of integer weights as files hold them, random, and what they mean: written here from the formats' descriptions
// (ggml's common header, csrc/cpu/packed.h), not from the engine's code.
#pragma once
#include "check.h"

namespace sg::test {

// A value is scale * code + min; size is |scale * code| + |min|, which rounding errors are a part of.
struct Weight {
  float value;  // rounded as the engine says it is: products first, then the sum
  double exact, size;
};

struct Format {
  DType type;
  const char* name;
  int values, bytes;  // of a stored block
  int group;          // of INT4 and INT8, else 0
};

const std::vector<Format>& formats();

// One row of k values; k is a multiple of format.values.
std::vector<uint8_t> random_row(const Format& format, int k, Random& random);
Weight weight_at(const Format& format, const uint8_t* row, int i);

}  // namespace sg::test

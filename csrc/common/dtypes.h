// Element types. Numbers are GGUF's (ggml.h), the same as streamgen.quantization.base.TensorType.
#pragma once
#include <cstdint>

namespace sg {

enum class DType : int32_t {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  BF16 = 30,
  // Groups of a size that is said beside: a scale and a zero point, then a code for each value. Ours, hence above 1000.
  INT4 = 1000,
  INT8 = 1001,
};

// Weights that stay integers in memory; their inputs are quantized as well (ActivationBlock in cpu/kernels.h).
inline constexpr bool is_integer(DType t) { return t != DType::F32 && t != DType::F16 && t != DType::BF16; }

// Bytes of an operand element: F32 or BF16.
inline constexpr int64_t operand_bytes(DType t) { return t == DType::F32 ? 4 : 2; }

}  // namespace sg

// Everything that works on one row at a time: norm, embedding, rope, gated product, and the reductions of the sampler.
// Included by a unit after its simd header.
#include "cpu/gguf_blocks.h"
#include "cpu/kernels.h"
#include "cpu/lanes.inl"
#include "cpu/packed.h"
#include "cpu/quantize.inl"

namespace sg {
namespace {

SG_INLINE int lanes_left(int width, int i) { return width - i < 16 ? width - i : 16; }

SG_INLINE float sum_of_squares(const float* x, int width) {
  F16 sum = zero();
  for (int i = 0; i < width; i += 16) {
    const F16 v = load_lanes(x + i, lanes_left(width, i));
    sum = fma(v, v, sum);
  }
  return reduce_add(sum);
}

void rms_norm(const RmsNormArgs& a, int64_t begin, int64_t end) {
  const int width = a.width / a.groups;
  const F16 offset = set1(a.offset);
  for (int64_t item = begin * a.groups; item < end * a.groups; item++) {
    const int64_t row = item / a.groups, group = item % a.groups * width;
    const float* x = a.x + row * a.x_stride + group;
    const F16 factor = set1(1.0f / __builtin_sqrtf(sum_of_squares(x, width) / float(width) + a.eps));
    if (a.dtype == DType::INT8) {
      quantize_row(width, static_cast<ActivationBlock*>(a.out) + row * a.out_stride + group / 32,
                   [&](int i) { return mul(mul(load(x + i), factor), add(load(a.weight + i), offset)); });
      continue;
    }
    for (int i = 0; i < width; i += 16) {
      const int lanes = lanes_left(width, i);
      const F16 weight = add(load_lanes(a.weight + i, lanes), offset);
      const F16 y = mul(mul(load_lanes(x + i, lanes), factor), weight);
      store_operand(a.out, a.dtype, row * a.out_stride + group + i, y, lanes);
    }
  }
}

void convert(const ConvertArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const float* x = a.x + row * a.x_stride;
    if (a.dtype == DType::INT8) {
      auto* out = static_cast<ActivationBlock*>(a.out) + row * a.out_stride;
      quantize_row(a.width, out, [&](int i) { return load(x + i); });
      continue;
    }
    for (int i = 0; i < a.width; i += 16) {
      const int lanes = lanes_left(a.width, i);
      store_operand(a.out, a.dtype, row * a.out_stride + i, load_lanes(x + i, lanes), lanes);
    }
  }
}

void embed_f32(const float* column, int width, float scale, float* out) {
  for (int i = 0; i < width; i++) out[i] = column[int64_t(i) * 16] * scale;
}

void embed_bf16(const uint16_t* column, int width, float scale, float* out) {
  for (int i = 0; i < width; i++) out[i] = bf16_to_float(column[int64_t(i / 2) * 32 + i % 2]) * scale;
}

void embed_int(const EmbedArgs& a, int64_t panel, int lane, float* out) {
  const int64_t panel_size = packed_layout(a.dtype, a.group).panel_bytes(a.width);
  unpack_row(a.dtype, a.group, static_cast<const uint8_t*>(a.w) + panel * panel_size, lane, a.width, out);
  for (int i = 0; i < a.width; i++) out[i] *= a.scale;
}

void embed(const EmbedArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    const int64_t panel = a.ids[row] / 16, lane = a.ids[row] % 16;
    float* out = a.out + row * a.out_stride;
    if (is_integer(a.dtype)) {
      embed_int(a, panel, int(lane), out);
    } else if (a.dtype == DType::F32) {
      embed_f32(static_cast<const float*>(a.w) + panel * a.width * 16 + lane, a.width, a.scale, out);
    } else {
      const int64_t panel_size = int64_t(a.width + 1) / 2 * 32;
      embed_bf16(static_cast<const uint16_t*>(a.w) + panel * panel_size + lane * 2, a.width, a.scale, out);
    }
  }
}

void rope(const RopeArgs& a, int64_t begin, int64_t end) {
  const int half = a.rotary_dim / 2;
  for (int64_t row = begin; row < end; row++) {
    const float* cos_row = a.cos + row * half;
    const float* sin_row = a.sin + row * half;
    for (int head = 0; head < a.num_heads; head++) {
      float* first = a.x + row * a.x_stride + int64_t(head) * a.head_dim;
      for (int i = 0; i < half; i += 16) {
        const int lanes = lanes_left(half, i);
        const F16 c = load_lanes(cos_row + i, lanes), s = load_lanes(sin_row + i, lanes);
        const F16 x = load_lanes(first + i, lanes), y = load_lanes(first + half + i, lanes);
        store_lanes(first + i, sub(mul(x, c), mul(y, s)), lanes);
        store_lanes(first + half + i, add(mul(y, c), mul(x, s)), lanes);
      }
    }
  }
}

// x * sigmoid(y): silu for y = x, and gelu's tanh form for y = 2 sqrt(2 / pi) (x + 0.044715 x^3).
SG_INLINE F16 times_sigmoid(F16 x, F16 y) { return div(x, add(set1(1.0f), exp(sub(zero(), y)))); }

SG_INLINE F16 gelu_tanh(F16 x) {
  const F16 cube = mul(mul(x, x), x);
  return times_sigmoid(x, mul(set1(1.5957691216057308f), fma(set1(0.044715f), cube, x)));
}

// x / 2 erfc(-x / sqrt(2)). For z >= 0, erfc(z) = t exp(-z^2 + c0 + c1 t + ... + c9 t^9) with t = 1 / (1 + z / 2) is
// within 1.2e-7 of itself, however small it gets (Press et al., Numerical Recipes, 6.2); erfc(-z) = 2 - erfc(z).
SG_INLINE F16 gelu(F16 x) {
  constexpr float kPoly[10] = {0.17087277f,  -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                               -0.18628806f, 0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
  const F16 magnitude = max(x, sub(zero(), x));
  const F16 z = mul(magnitude, set1(0.70710678118654752f));
  const F16 t = div(set1(1.0f), fma(set1(0.5f), z, set1(1.0f)));
  F16 poly = set1(kPoly[0]);
  SG_UNROLL
  for (int i = 1; i < 10; i++) poly = fma(poly, t, set1(kPoly[i]));
  const F16 tail = mul(mul(t, exp(sub(poly, mul(z, z)))), mul(magnitude, set1(0.5f)));  // |x| / 2 erfc(z)
  return sub(max(x, zero()), tail);
}

template <class F>
SG_INLINE void gated_rows(const GatedMulArgs& a, int64_t begin, int64_t end, F activation) {
  for (int64_t row = begin; row < end; row++) {
    const float* gate = a.gate + row * a.gate_stride;
    const float* up = a.up + row * a.up_stride;
    if (a.dtype == DType::INT8) {
      quantize_row(a.width, static_cast<ActivationBlock*>(a.out) + row * a.out_stride,
                   [&](int i) { return mul(activation(load(gate + i)), load(up + i)); });
      continue;
    }
    for (int i = 0; i < a.width; i += 16) {
      const int lanes = lanes_left(a.width, i);
      const F16 y = mul(activation(load_lanes(gate + i, lanes)), load_lanes(up + i, lanes));
      store_operand(a.out, a.dtype, row * a.out_stride + i, y, lanes);
    }
  }
}

void gated_mul(const GatedMulArgs& a, int64_t begin, int64_t end) {
  switch (a.activation) {
    case Activation::Silu:
      return gated_rows(a, begin, end, [](F16 x) { return times_sigmoid(x, x); });
    case Activation::GeluTanh:
      return gated_rows(a, begin, end, [](F16 x) { return gelu_tanh(x); });
    case Activation::Gelu:
      return gated_rows(a, begin, end, [](F16 x) { return gelu(x); });
  }
}

constexpr float kMinusInfinity = -__builtin_inff();

float row_max(const float* x, int64_t n) {
  F16 largest = set1(kMinusInfinity);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) largest = max(load(x + i), largest);
  if (i < n) largest = max(select_lanes(load_n(x + i, int(n - i)), 0, int(n - i), largest), largest);
  return reduce_max(largest);
}

float read(const float* x, int64_t n) {
  F16 sums[4] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0; i < n; i += 64) {
    SG_UNROLL
    for (int j = 0; j < 4; j++) sums[j] = add(sums[j], load(x + i + 16 * j));
  }
  return reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// In floats over stretches of 1024 elements (64 per lane, an error of a few ulp), and those in a double.
double row_exp_sum(const float* x, int64_t n, float max) {
  const F16 top = set1(max);
  double total = 0;
  for (int64_t first = 0; first < n; first += 1024) {
    const int64_t last = n - first < 1024 ? n : first + 1024;
    F16 sum = zero();
    int64_t i = first;
    for (; i + 16 <= last; i += 16) sum = add(sum, exp(sub(load(x + i), top)));
    if (i < last) {
      const int lanes = int(last - i);
      sum = add(sum, select_lanes(exp(sub(load_n(x + i, lanes), top)), 0, lanes, zero()));
    }
    total += double(reduce_add(sum));
  }
  return total;
}

}  // namespace
}  // namespace sg

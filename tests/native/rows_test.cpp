// What works on one row at a time: norm, embedding, rope, gated product, and reductions over logits.
#include <cstddef>

#include "check.h"

namespace sg::test {

namespace {

constexpr int kRows = 3;

// How far a value may be off: in float32 some ulp, in bf16 half of one more.
template <class T>
bool near(float got, double wanted, double ulps) {
  const double error = std::fabs(double(got) - wanted);
  const double step = std::fabs(wanted) * (ulps * 0x1p-24 + (sizeof(T) == 2 ? 0x1.01p-8 : 0));
  return error <= step + 1e-37;
}

template <class T>
void check_norm(const Kernels& kernels, int width, int groups) {
  constexpr DType kType = sizeof(T) == 4 ? DType::F32 : DType::BF16;
  const Scope scope("norm of " + std::to_string(width) + " in " + std::to_string(groups));
  Random random{uint64_t(width)};
  const std::vector<float> x = random.floats(size_t(kRows * width), -4, 4), weight = random.floats(size_t(width));
  Guarded<T> out(kRows, width);
  RmsNormArgs a{};
  a.x = x.data();
  a.x_stride = width;
  a.weight = weight.data();
  a.out = out.data();
  a.out_stride = out.stride();
  a.width = width;
  a.groups = groups;
  a.eps = 1e-5f;
  a.offset = 1;
  a.dtype = kType;
  kernels.rms_norm(a, 1, kRows);
  kernels.rms_norm(a, 0, 1);
  out.check();
  const int part = width / groups;
  for (int r = 0; r < kRows; r++) {
    for (int g = 0; g < groups; g++) {
      const float* from = x.data() + r * width + g * part;
      double squares = 0;
      for (int i = 0; i < part; i++) squares += double(from[i]) * double(from[i]);
      const double factor = 1 / std::sqrt(squares / part + double(a.eps));
      for (int i = 0; i < part; i++) {
        const double wanted = double(from[i]) * factor * double(weight[size_t(i)] + 1.0f);
        expect(near<T>(out.value(r, g * part + i), wanted, 8 + part / 8), "column " + std::to_string(i));
      }
    }
  }
}

template <class T>
void check_embed(const Kernels& kernels, int width) {
  constexpr DType kType = sizeof(T) == 4 ? DType::F32 : DType::BF16;
  const Scope scope("embedding of " + std::to_string(width));
  Random random{uint64_t(width)};
  const int vocab = 21, elements = sizeof(T) == 4 ? 1 : 2;
  const std::vector<T> table = to_elements<T>(random.floats(size_t(vocab * width)));
  std::vector<T> w(size_t((vocab + 15) / 16 * ((width + elements - 1) / elements) * elements * 16));
  PackArgs p{};
  p.src = table.data();
  p.src_row_bytes = width * int64_t(sizeof(T));
  p.src_type = p.dst_type = kType;
  p.dst = w.data();
  p.n = vocab;
  p.k = width;
  kernels.pack(p, 0, 2);
  const int32_t ids[kRows] = {20, 0, 15};
  Guarded<float> out(kRows, width);
  EmbedArgs a{};
  a.ids = ids;
  a.w = w.data();
  a.out = out.data();
  a.out_stride = out.stride();
  a.width = width;
  a.scale = 3;
  a.dtype = kType;
  kernels.embed(a, 0, kRows);
  out.check();
  for (int r = 0; r < kRows; r++) {
    for (int i = 0; i < width; i++) {
      const float wanted = value_of_element(table[size_t(ids[r] * width + i)]) * 3.0f;
      expect(out.value(r, i) == wanted, "column " + std::to_string(i));
    }
  }
}

void check_rope(const Kernels& kernels, int head_dim, int rotary_dim) {
  const Scope scope("rope of " + std::to_string(rotary_dim) + " of " + std::to_string(head_dim));
  Random random{uint64_t(head_dim)};
  const int heads = 2, half = rotary_dim / 2;
  const std::vector<float> before = random.floats(size_t(kRows * heads * head_dim));
  const std::vector<float> cos = random.floats(size_t(kRows * half)), sin = random.floats(size_t(kRows * half));
  Guarded<float> x(kRows, heads * head_dim);
  for (int r = 0; r < kRows; r++)
    for (int i = 0; i < heads * head_dim; i++) x.at(r, i) = before[size_t(r * heads * head_dim + i)];
  kernels.rope({x.data(), x.stride(), cos.data(), sin.data(), heads, head_dim, rotary_dim}, 0, kRows);
  x.check();
  for (int r = 0; r < kRows; r++) {
    for (int i = 0; i < heads * head_dim; i++) {
      const float* head = before.data() + r * heads * head_dim + i / head_dim * head_dim;
      const int d = i % head_dim, pair = d % half;
      float wanted = head[d];
      if (d < rotary_dim) {
        const float c = cos[size_t(r * half + pair)], s = sin[size_t(r * half + pair)];
        const float a = head[pair], b = head[pair + half];
        const float first = d < half ? a * c : b * c, second = d < half ? b * s : a * s;
        wanted = d < half ? first - second : first + second;
      }
      expect(x.value(r, i) == wanted, "column " + std::to_string(i));
    }
  }
}

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::Silu:
      return x / (1 + std::exp(-x));
    case Activation::GeluTanh:
      return x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    default:
      return x / 2 * std::erfc(-x / std::sqrt(2.0));
  }
}

template <class T>
void check_gated(const Kernels& kernels, Activation activation, int width) {
  constexpr DType kType = sizeof(T) == 4 ? DType::F32 : DType::BF16;
  const Scope scope("activation " + std::to_string(int(activation)) + " of " + std::to_string(width));
  Random random{uint64_t(width)};
  const std::vector<float> gate = random.floats(size_t(kRows * width), -6, 6);
  const std::vector<float> up = random.floats(size_t(kRows * width), 0.5, 2);
  Guarded<T> out(kRows, width);
  kernels.gated_mul({gate.data(), up.data(), width, width, out.data(), out.stride(), width, activation, kType}, 0,
                    kRows);
  out.check();
  for (int r = 0; r < kRows; r++) {
    for (int i = 0; i < width; i++) {
      const size_t at = size_t(r * width + i);
      const double wanted = activated(activation, double(gate[at])) * double(up[at]);
      const double error = std::fabs(double(out.value(r, i)) - wanted);
      expect(error <= 1e-6 || near<T>(out.value(r, i), wanted, 32), "column " + std::to_string(i));
    }
  }
}

void check_reductions(const Kernels& kernels, int n) {
  const Scope scope("reductions of " + std::to_string(n));
  Random random{uint64_t(n)};
  std::vector<float> x = random.floats(size_t(n), -20, 5);
  for (int i = 3; i < n; i += 7) x[size_t(i)] = -HUGE_VALF;
  const float before = x[size_t(n - 1)];
  x[size_t(n - 1)] = std::nanf("");
  float most = -HUGE_VALF;
  for (float f : x) most = f > most ? f : most;
  expect(kernels.row_max(x.data(), n) == most, "maximum beside a NaN");
  x[size_t(n - 1)] = before;
  most = -HUGE_VALF;
  for (float f : x) most = f > most ? f : most;
  expect(kernels.row_max(x.data(), n) == most, "maximum");
  double sum = 0;
  for (float f : x) sum += std::exp(double(f) - double(most));
  const double got = kernels.row_exp_sum(x.data(), n, most);
  expect(std::fabs(got - sum) <= 1e-6 * sum, "sum of exponentials");
}

void check_reading(const Kernels& kernels) {
  std::vector<float> x(640);
  for (size_t i = 0; i < x.size(); i++) x[i] = float(i % 13);
  double sum = 0;
  for (float f : x) sum += double(f);
  expect(kernels.read(x.data(), 640) == float(sum), "sum of small integers");
}

// Blocks of activations are what the same floats are when they are quantized afterwards.
std::vector<ActivationBlock> quantized(const Kernels& kernels, Guarded<float>& x, int width) {
  std::vector<ActivationBlock> blocks(size_t(kRows * width / 32));
  kernels.convert({x.data(), x.stride(), blocks.data(), width / 32, width, DType::INT8}, 0, kRows);
  return blocks;
}

bool same(const std::vector<ActivationBlock>& a, const std::vector<ActivationBlock>& b) {
  for (size_t i = 0; i < a.size(); i++)
    if (std::memcmp(&a[i], &b[i], offsetof(ActivationBlock, unused)) != 0) return false;
  return a.size() == b.size();
}

void check_quantized(const Kernels& kernels, int width) {
  const Scope scope("quantized rows of " + std::to_string(width));
  Random random{uint64_t(width)};
  const std::vector<float> x = random.floats(size_t(kRows * width), -4, 4), weight = random.floats(size_t(width));
  std::vector<ActivationBlock> blocks(size_t(kRows * width / 32));
  Guarded<float> floats(kRows, width);
  RmsNormArgs norm{};
  norm.x = x.data();
  norm.x_stride = width;
  norm.weight = weight.data();
  norm.width = width;
  norm.groups = 1;
  norm.eps = 1e-5f;
  norm.out = floats.data();
  norm.out_stride = floats.stride();
  norm.dtype = DType::F32;
  kernels.rms_norm(norm, 0, kRows);
  norm.out = blocks.data();
  norm.out_stride = width / 32;
  norm.dtype = DType::INT8;
  kernels.rms_norm(norm, 1, kRows);
  kernels.rms_norm(norm, 0, 1);
  expect(same(blocks, quantized(kernels, floats, width)), "norm");
  const std::vector<float> up = random.floats(size_t(kRows * width));
  const auto gated = [&](void* out, int64_t stride, DType type) {
    kernels.gated_mul({x.data(), up.data(), width, width, out, stride, width, Activation::Silu, type}, 0, kRows);
  };
  gated(floats.data(), floats.stride(), DType::F32);
  gated(blocks.data(), width / 32, DType::INT8);
  expect(same(blocks, quantized(kernels, floats, width)), "gated product");
}

template <class T>
void check_converted(const Kernels& kernels, int width) {
  const Scope scope("converted rows of " + std::to_string(width));
  Random random{uint64_t(width)};
  const std::vector<float> x = random.floats(size_t(kRows * width), -4, 4);
  Guarded<T> out(kRows, width);
  kernels.convert({x.data(), width, out.data(), out.stride(), width, sizeof(T) == 4 ? DType::F32 : DType::BF16}, 0,
                  kRows);
  out.check();
  for (int r = 0; r < kRows; r++)
    for (int i = 0; i < width; i++)
      expect(out.at(r, i) == to_element<T>(x[size_t(r * width + i)]), "column " + std::to_string(i));
}

template <class T>
void check_operands(const Kernels& kernels) {
  const Scope scope(sizeof(T) == 4 ? "float32" : "bfloat16");
  for (int width : {1, 15, 16, 17, 96, 130}) {
    check_norm<T>(kernels, width, 1);
    check_norm<T>(kernels, 3 * width, 3);
    check_embed<T>(kernels, width);
    check_converted<T>(kernels, width);
    for (Activation activation : {Activation::Silu, Activation::GeluTanh, Activation::Gelu})
      check_gated<T>(kernels, activation, width);
  }
}

}  // namespace

void test_rows(const Tables& tables) {
  for (const Kernels* kernels : tables) {
    const Scope isa(kernels->name);
    check_operands<float>(*kernels);
    check_operands<uint16_t>(*kernels);
    for (const auto& [head_dim, rotary_dim] : {std::pair(8, 8), {64, 64}, {80, 20}, {36, 34}})
      check_rope(*kernels, head_dim, rotary_dim);
    for (int n : {1, 2, 15, 16, 17, 63, 64, 65, 1030, 3000}) check_reductions(*kernels, n);
    for (int width : {32, 96, 256, 544}) check_quantized(*kernels, width);
    check_reading(*kernels);
  }
}

}  // namespace sg::test

// Integer weights: packing, unpacking, quantized inputs, products, and rounding floats to integers.
#include "cpu/packed.h"
#include "stored.h"

namespace sg::test {

namespace {

// A matrix of n stored rows, and how a kernel packs it.
struct Matrix {
  Matrix(const Format& format, int n, int k, uint64_t seed) : format(format), n(n), k(k) {
    Random random(seed);
    for (int r = 0; r < n; r++) {
      const std::vector<uint8_t> row = random_row(format, k, random);
      row_bytes = int64_t(row.size());
      stored.insert(stored.end(), row.begin(), row.end());
    }
  }
  int panels() const { return (n + 15) / 16; }
  Weight at(int r, int i) const { return weight_at(format, stored.data() + r * row_bytes, i); }

  Aligned packed(const Kernels& kernels) const {
    Aligned w(panels() * packed_layout(format.type, format.group).panel_bytes(k));
    PackArgs a{};
    a.src = stored.data();
    a.src_row_bytes = row_bytes;
    a.src_type = a.dst_type = format.type;
    a.dst = w.data();
    a.n = n;
    a.k = k;
    a.group = format.group;
    kernels.pack(a, 0, panels());
    return w;
  }

  Format format;
  int n, k;
  int64_t row_bytes = 0;
  std::vector<uint8_t> stored;
};

// Inputs as blocks, from plain loops: 127 of the largest magnitude of 16 values, rounded to nearest even.
std::vector<ActivationBlock> quantized_plainly(const std::vector<float>& x) {
  std::vector<ActivationBlock> blocks(x.size() / 32);
  for (size_t b = 0; b < blocks.size(); b++) {
    int sums[2] = {0, 0};
    for (size_t half = 0; half < 2; half++) {
      const float* from = x.data() + 32 * b + 16 * half;
      float most = 0;
      for (int i = 0; i < 16; i++) most = std::fmax(most, std::fabs(from[i]));
      const float inverse = most > 0 ? 127.0f / most : 0.0f;
      for (int i = 0; i < 16; i++) {
        const int code = int(std::nearbyint(from[i] * inverse));
        blocks[b].codes[16 * half + size_t(i)] = int8_t(code);
        sums[half] += code;
      }
      blocks[b].scales[half] = most * (1.0f / 127.0f);
      blocks[b].negative_sums[half] = -sums[half];
    }
    const float first = blocks[b].scales[0] * float(sums[0]), second = blocks[b].scales[1] * float(sums[1]);
    blocks[b].sum = first + second;
  }
  return blocks;
}

bool same(const ActivationBlock& a, const ActivationBlock& b) {
  return std::memcmp(a.codes, b.codes, 32) == 0 && std::memcmp(a.scales, b.scales, 8) == 0 &&
         std::memcmp(a.negative_sums, b.negative_sums, 8) == 0 && bits_of(a.sum) == bits_of(b.sum);
}

// Mostly random, with zeros, one value alone, and runs of one magnitude.
std::vector<float> inputs(int rows, int k, Random& random) {
  std::vector<float> x = random.floats(size_t(rows) * size_t(k), -3, 3);
  for (size_t i = 0; i < x.size(); i += 16) {
    const int kind = random.below(6);
    for (size_t j = i; j < i + 16; j++) {
      if (kind == 0) x[j] = j == i + 5 ? -2.5f : 0.0f;
      if (kind == 1) x[j] = random.below(2) ? 1.25f : -1.25f;
      if (kind == 2) x[j] = 0.75f;
    }
  }
  return x;
}

void check_quantize(const Kernels& kernels) {
  Random random(8);
  const int rows = 3, k = 160;
  std::vector<float> x = inputs(rows, k, random);
  x[0] = 1e-42f;  // denormal, beside larger ones
  std::vector<ActivationBlock> out(size_t(rows) * k / 32 + 2);
  std::memset(out.data(), 0xff, out.size() * sizeof(ActivationBlock));
  const ActivationBlock untouched = out[0];
  const ConvertArgs a{x.data(), k, out.data() + 1, k / 32, k, DType::INT8};
  kernels.convert(a, 2, 3);
  kernels.convert(a, 0, 2);
  const std::vector<ActivationBlock> plain = quantized_plainly(x);
  for (size_t i = 0; i < plain.size(); i++) expect(same(out[i + 1], plain[i]), "block " + std::to_string(i));
  expect(std::memcmp(&out.front(), &untouched, 64) == 0 && std::memcmp(&out.back(), &untouched, 64) == 0,
         "wrote outside its blocks");
}

void check_unpacked(const Kernels& kernels, const Matrix& m, Aligned& w) {
  for (int r = 0; r < m.n; r++) {
    Guarded<float> out(1, m.k);
    EmbedArgs a{};
    const int32_t id = r;
    a.ids = &id;
    a.w = w.data();
    a.out = out.data();
    a.out_stride = out.stride();
    a.width = m.k;
    a.scale = 1;
    a.dtype = m.format.type;
    a.group = m.format.group;
    kernels.embed(a, 0, 1);
    out.check();
    bool is_right = true;
    for (int i = 0; i < m.k; i++) is_right = is_right && out.value(0, i) == m.at(r, i).value;
    expect(is_right, "unpacked row " + std::to_string(r));
  }
}

void run_linear(const Kernels& kernels, const Matrix& m, Aligned& w, const ActivationBlock* x, int rows,
                Guarded<float>& out, const float* bias) {
  LinearArgs a{};
  a.x = x;
  a.x_stride = m.k / 32;
  a.w = w.data();
  a.bias = bias;
  a.out = out.data();
  a.out_stride = out.stride();
  a.rows = rows;
  a.n = m.n;
  a.k = m.k;
  a.accumulate = false;
  a.dtype = m.format.type;
  a.group = m.format.group;
  const int64_t items = kernels.linear_items(a);
  kernels.linear(a, items / 2, items);
  kernels.linear(a, 0, items / 2);
}

// Row r of out against doubles. Integer sums are exact; each block of 32 then rounds a few times.
void check_row(const Matrix& m, const ActivationBlock* x, int r, Guarded<float>& out, const float* bias) {
  const double tolerance = std::ldexp(double(m.k / 32 + 8), -23);
  for (int c = 0; c < m.n; c++) {
    double sum = double(bias[c]), size = std::fabs(double(bias[c]));
    for (int i = 0; i < m.k; i++) {
      const ActivationBlock& block = x[r * (m.k / 32) + i / 32];
      const double value = double(block.scales[i % 32 / 16]) * block.codes[i % 32];
      const Weight weight = m.at(c, i);
      sum += value * weight.exact;
      size += std::fabs(value) * weight.size;
    }
    const double error = std::fabs(double(out.value(r, c)) - sum);
    expect(error <= size * tolerance,
           "element " + std::to_string(r) + ", " + std::to_string(c) + " is off by " + std::to_string(error / size));
  }
}

void check_products(const Kernels& kernels, const Matrix& m, Aligned& w, const std::vector<int>& all_rows) {
  Random random(4);
  const int most = all_rows.back();
  const std::vector<float> floats = inputs(most, m.k, random), bias = random.floats(size_t(m.n));
  const std::vector<ActivationBlock> x = quantized_plainly(floats);
  Guarded<float> alone(most, m.n);
  for (int r = 0; r < most; r++) {
    Guarded<float> one(1, m.n);
    run_linear(kernels, m, w, x.data() + r * (m.k / 32), 1, one, bias.data());
    one.check();
    for (int c = 0; c < m.n; c++) alone.at(r, c) = one.at(0, c);
    check_row(m, x.data(), r, alone, bias.data());
  }
  for (int rows : all_rows) {
    Guarded<float> out(rows, m.n);
    run_linear(kernels, m, w, x.data(), rows, out, bias.data());
    out.check();
    bool is_same = true;
    for (int r = 0; r < rows; r++)
      is_same = is_same && std::memcmp(&out.at(r, 0), &alone.at(r, 0), size_t(m.n) * 4) == 0;
    expect(is_same, std::to_string(rows) + " rows have other bits than each alone");
  }
}

void check_format(const Kernels& kernels, const Kernels& reference, const Format& format) {
  const Scope scope(format.name);
  const std::vector<int> rows = {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 33, 100};
  const int k = 2 * format.values;
  const Matrix m(format, 35, k, 7);
  Aligned w = m.packed(kernels), expected = m.packed(reference);
  expect(std::memcmp(w.data(), expected.data(), size_t(w.size())) == 0,
         "packed otherwise than by " + std::string(reference.name));
  check_unpacked(kernels, m, w);
  check_products(kernels, m, w, rows);
  const Matrix large(format, 290, 3 * format.values, 9);  // several items of several panels
  Aligned large_w = large.packed(kernels);
  check_products(kernels, large, large_w, {1, 4});
}

// ---- floats rounded to integers -------------------------------------------------------------------------------------

struct Rounding {
  DType type;
  int group;
  bool symmetric;
};

Aligned rounded(const Kernels& kernels, const Rounding& to, const std::vector<float>& values, int n, int k) {
  Aligned w((n + 15) / 16 * packed_layout(to.type, to.group).panel_bytes(k));
  PackArgs a{};
  a.src = values.data();
  a.src_row_bytes = k * 4;
  a.src_type = DType::F32;
  a.dst_type = to.type;
  a.dst = w.data();
  a.n = n;
  a.k = k;
  a.group = to.group;
  a.symmetric = to.symmetric;
  kernels.pack(a, 0, (n + 15) / 16);
  return w;
}

// The sum of squared errors of a group with the scale that its range asks for; what a search
// finds may favour some values, but is not much worse.
double plain_error(const Rounding& to, const float* values, int count) {
  double low = 0, high = 0, sum = 0;
  for (int i = 0; i < count; i++) low = std::fmin(low, double(values[i])), high = std::fmax(high, double(values[i]));
  const bool is_8 = to.type == DType::Q8_0 || to.type == DType::INT8,
             is_symmetric = to.symmetric || to.type == DType::Q4_0;
  const double most = -low > high ? low : high;  // of largest magnitude
  const double d = is_8 ? std::fabs(most) / 127 : is_symmetric ? most / -8 : (high - low) / 15;
  const double zero = is_8 ? 128 : is_symmetric ? 8 : d == 0 ? 0 : std::nearbyint(-low / d);
  for (int i = 0; i < count; i++) {
    const double code = d == 0 ? zero : std::nearbyint(double(values[i]) / d) + zero;
    const double value = d * (std::fmin(std::fmax(code, 0), is_8 ? 255 : 15) - zero);
    sum += (double(values[i]) - value) * (double(values[i]) - value);
  }
  return sum;
}

void check_rounding(const Kernels& kernels, const Kernels& reference, const Rounding& to) {
  const Scope scope("rounded to " + std::to_string(int(to.type)) + " in " + std::to_string(to.group));
  Random random(6);
  const int n = 19, k = 256, group = to.group == 0 ? 32 : to.group;
  std::vector<float> values = random.floats(size_t(n) * k, -0.3f, 0.5f);
  for (int i = 0; i < group; i++) values[size_t(i)] = 0, values[size_t(k + i)] = -0.25f;
  Aligned w = rounded(kernels, to, values, n, k), expected = rounded(reference, to, values, n, k);
  expect(std::memcmp(w.data(), expected.data(), size_t(w.size())) == 0,
         "otherwise than by " + std::string(reference.name));
  std::vector<float> row(k);
  const int64_t panel_bytes = packed_layout(to.type, to.group).panel_bytes(k);
  for (int r = 0; r < n; r++) {
    unpack_row(to.type, to.group, w.data() + r / 16 * panel_bytes, r % 16, k, row.data());
    for (int first = 0; first < k; first += group) {
      const float* from = values.data() + r * k + first;
      double sum = 0;
      for (int i = 0; i < group; i++) {
        const double error = double(row[size_t(first + i)]) - double(from[i]);
        sum += error * error;
      }
      // A scale is a half: a value of it is off by 2^-11 of itself.
      expect(sum <= 1.5 * plain_error(to, from, group) + group * std::ldexp(0.25, -22),
             "group " + std::to_string(first / group) + " of row " + std::to_string(r) + " is worse than its range");
    }
  }
}

}  // namespace

void test_integers(const Tables& tables) {
  const Kernels& reference = *tables.back();
  for (const Kernels* kernels : tables) {
    const Scope isa(kernels->name);
    check_quantize(*kernels);
    for (const Format& format : formats()) check_format(*kernels, reference, format);
    for (const Rounding& to :
         {Rounding{DType::INT4, 32, false}, Rounding{DType::INT4, 64, true}, Rounding{DType::INT8, 256, false},
          Rounding{DType::INT8, 32, true}, Rounding{DType::Q4_0, 0, false}, Rounding{DType::Q8_0, 0, false}}) {
      check_rounding(*kernels, reference, to);
    }
  }
}

}  // namespace sg::test

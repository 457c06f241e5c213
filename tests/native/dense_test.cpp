// Products with dense weights, and the packing of them.
#include "check.h"

namespace sg::test {

namespace {

// One product on random data: weights [n, k], inputs [rows, k].
template <class T>
struct Product {
  static constexpr DType kType = sizeof(T) == 4 ? DType::F32 : DType::BF16;
  static constexpr int kWidth = sizeof(T) == 4 ? 1 : 2;

  Product(int rows, int n, int k, uint64_t seed)
      : rows(rows),
        n(n),
        k(k),
        random(seed),
        weights(to_elements<T>(random.floats(size_t(n) * size_t(k)))),
        bias(random.floats(size_t(n))),
        x(rows, k),
        before(random.floats(size_t(rows) * size_t(n))) {
    for (int r = 0; r < rows; r++)
      for (int i = 0; i < k; i++) x.at(r, i) = to_element<T>(random.uniform(-1, 1));
  }

  int64_t panel_size() const { return int64_t(k + kWidth - 1) / kWidth * 16 * kWidth; }

  // As LinearArgs describes it.
  std::vector<T> packed_plainly() const {
    std::vector<T> w(size_t((n + 15) / 16 * panel_size()));
    for (int r = 0; r < n; r++) {
      for (int i = 0; i < k; i++) {
        w[size_t(r / 16 * panel_size() + (i / kWidth * 16 + r % 16) * kWidth + i % kWidth)] =
            weights[size_t(r) * size_t(k) + size_t(i)];
      }
    }
    return w;
  }

  std::vector<T> packed(const Kernels& kernels) const {
    std::vector<T> w(size_t((n + 15) / 16 * panel_size()));
    PackArgs a{};
    a.src = weights.data();
    a.src_row_bytes = k * int64_t(sizeof(T));
    a.src_type = a.dst_type = kType;
    a.dst = w.data();
    a.n = n;
    a.k = k;
    kernels.pack(a, 0, (n + 15) / 16);
    return w;
  }

  void run(const Kernels& kernels, const T* w, int first, int count, bool is_full, Guarded<float>& out) {
    LinearArgs a{};
    a.x = x.data() + first * x.stride();
    a.x_stride = x.stride();
    a.w = w;
    a.bias = is_full ? bias.data() : nullptr;
    a.out = out.data();
    a.out_stride = out.stride();
    a.rows = count;
    a.n = n;
    a.k = k;
    a.accumulate = is_full;
    a.dtype = kType;
    if (is_full)
      for (int r = 0; r < count; r++)
        for (int c = 0; c < n; c++) out.at(r, c) = before[size_t(first + r) * size_t(n) + size_t(c)];
    const int64_t items = kernels.linear_items(a);
    kernels.linear(a, items / 2, items);
    kernels.linear(a, 0, items / 2);
  }

  // The product in double, and what its terms are together.
  std::pair<double, double> element(int r, int c, bool is_full) {
    double sum = 0, size = 0;
    for (int i = 0; i < k; i++) {
      const double term = double(x.value(r, i)) * double(value_of_element(weights[size_t(c) * size_t(k) + size_t(i)]));
      sum += term;
      size += std::fabs(term);
    }
    if (is_full) {
      for (float other : {bias[size_t(c)], before[size_t(r) * size_t(n) + size_t(c)]}) {
        sum += double(other);
        size += std::fabs(double(other));
      }
    }
    return {sum, size};
  }

  int rows, n, k;
  Random random;
  std::vector<T> weights;
  std::vector<float> bias;
  Guarded<T> x;
  std::vector<float> before;
};

// Rounding of a chain of k multiply-adds; dot products of bf16 pairs may round each step to odd, and more than once.
template <class T>
double tolerance(int k) {
  return std::ldexp(double(k + 3), sizeof(T) == 4 ? -24 : -22);
}

template <class T>
void check_product(const Kernels& kernels, Product<T>& p, bool is_full) {
  const std::vector<T> w = p.packed(kernels);
  expect(w == p.packed_plainly(), "packing");
  Guarded<float> out(p.rows, p.n);
  p.run(kernels, w.data(), 0, p.rows, is_full, out);
  out.check();
  for (int r = 0; r < p.rows; r++) {
    Guarded<float> alone(1, p.n);
    p.run(kernels, w.data(), r, 1, is_full, alone);
    expect(std::memcmp(alone.data(), out.data() + r * out.stride(), size_t(p.n) * 4) == 0,
           "row " + std::to_string(r) + " has other bits alone");
    for (int c = 0; c < p.n; c++) {
      const auto [sum, size] = p.element(r, c, is_full);
      const double error = std::fabs(double(out.value(r, c)) - sum);
      expect(error <= size * tolerance<T>(p.k),
             "element " + std::to_string(r) + ", " + std::to_string(c) + " is off by " + std::to_string(error / size));
    }
  }
}

template <class T>
void check_sizes(const Kernels& kernels) {
  constexpr int kSizes[][2] = {{1, 1}, {17, 7}, {40, 33}, {70, 96}};  // n, k
  std::vector<int> rows = {31, 32, 33, 64, 100};
  for (int r = 1; r <= 17; r++) rows.push_back(r);
  for (const auto& [n, k] : kSizes) {
    for (int r : rows) {
      const Scope scope(std::to_string(r) + " x " + std::to_string(n) + " x " + std::to_string(k));
      Product<T> p(r, n, k, uint64_t(r * 1000 + n));
      check_product(kernels, p, r % 2 == 0);
    }
  }
  const int k = sizeof(T) == 4 ? 2053 : 4101;  // more than one stretch of K
  const Scope scope("long K");
  Product<T> p(40, 70, k, 5);
  check_product(kernels, p, true);
}

// A matrix of bf16, packed from floats: rounded to nearest even.
void check_narrowing(const Kernels& kernels) {
  Random random(3);
  const int n = 21, k = 37;
  std::vector<float> weights = random.floats(size_t(n) * k, -100, 100);
  Product<uint16_t> plain(1, n, k, 3);
  plain.weights = to_elements<uint16_t>(weights);
  std::vector<uint16_t> w(size_t((n + 15) / 16 * plain.panel_size()));
  PackArgs a{};
  a.src = weights.data();
  a.src_row_bytes = k * 4;
  a.src_type = DType::F32;
  a.dst_type = DType::BF16;
  a.dst = w.data();
  a.n = n;
  a.k = k;
  kernels.pack(a, 0, 2);
  expect(w == plain.packed_plainly(), "packing floats as bf16");
}

}  // namespace

void test_dense(const Tables& tables) {
  for (const Kernels* kernels : tables) {
    const Scope isa(kernels->name);
    check_narrowing(*kernels);
    {
      const Scope scope("float32");
      check_sizes<float>(*kernels);
    }
    const Scope scope("bfloat16");
    check_sizes<uint16_t>(*kernels);
  }
}

}  // namespace sg::test

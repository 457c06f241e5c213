// What the native tests share: counting failures, random numbers, outputs that show when too much was written.
//
// A test compares kernels with plain loops written beside it, which share no code with them. A comparison that fails
// is printed and counted, and the program ends with 1.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace sg::test {

// Counts one comparison; prints `what`, with what is being tested, where it failed.
void expect(bool is_right, const std::string& what);

// While it lives, failures are printed with `name`: an instruction set, a case.
class Scope {
 public:
  explicit Scope(std::string name);
  ~Scope();
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
};

// splitmix64: the same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int below(int n) { return int(bits() % uint64_t(n)); }
  float uniform(float low, float high) { return low + (high - low) * float(bits() >> 40) / float(1 << 24); }
  std::vector<float> floats(size_t n, float low = -1, float high = 1) {
    std::vector<float> x(n);
    for (float& f : x) f = uniform(low, high);
    return x;
  }

 private:
  uint64_t state_;
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// bf16, rounded to nearest even; finite values.
inline uint16_t to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t x) { return float_of(uint32_t(x) << 16); }

// A half from its definition.
inline float from_half(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float magnitude =
      exponent == 0 ? std::ldexp(float(mantissa), -24) : std::ldexp(float(mantissa + 1024), exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

// Operand elements: floats, or bf16 where T is uint16_t.
template <class T>
T to_element(float x);
template <>
inline float to_element<float>(float x) {
  return x;
}
template <>
inline uint16_t to_element<uint16_t>(float x) {
  return to_bf16(x);
}
inline float value_of_element(float x) { return x; }
inline float value_of_element(uint16_t x) { return from_bf16(x); }

template <class T>
std::vector<T> to_elements(const std::vector<float>& x) {
  std::vector<T> y;
  for (float f : x) y.push_back(to_element<T>(f));
  return y;
}

// [rows, width] elements, all NaN, inside memory that is NaN too; `check` finds what should not have been written.
template <class T>
class Guarded {
 public:
  Guarded(int rows, int width) : rows_(rows), width_(width), stride_(width + 19) {
    const float nan = std::nanf("");
    all_.assign(size_t(rows + 2) * size_t(stride_), to_element<T>(nan));
    before_ = all_;
  }
  T* data() { return all_.data() + stride_ + 3; }
  int64_t stride() const { return stride_; }
  T& at(int row, int column) { return data()[row * stride_ + column]; }
  float value(int row, int column) { return value_of_element(at(row, column)); }

  // Nothing outside was written.
  void check() {
    for (size_t i = 0; i < all_.size(); i++) {
      const int row = int(i / size_t(stride_)) - 1, column = int(i % size_t(stride_)) - 3;
      if (row >= 0 && row < rows_ && column >= 0 && column < width_) continue;
      if (std::memcmp(&all_[i], &before_[i], sizeof(T)) == 0) continue;
      return expect(false, "wrote outside its rows, at " + std::to_string(row) + ", " + std::to_string(column));
    }
    expect(true, "");
  }

 private:
  int rows_, width_;
  int64_t stride_;
  std::vector<T> all_, before_;
};

// 64-byte aligned, zeroed.
class Aligned {
 public:
  explicit Aligned(int64_t bytes) : bytes_(bytes), memory_(size_t(bytes) + 64) {}
  uint8_t* data() { return memory_.data() + (64 - uintptr_t(memory_.data()) % 64) % 64; }
  int64_t size() const { return bytes_; }

 private:
  int64_t bytes_;
  std::vector<uint8_t> memory_;
};

// The suites; each runs for every table it is given.
using Tables = std::vector<const Kernels*>;
void test_dense(const Tables& tables);
void test_integers(const Tables& tables);
void test_rows(const Tables& tables);
void test_attention(const Tables& tables);
void test_program(const Tables& tables);
void test_pool();
void test_grammar();

}  // namespace sg::test

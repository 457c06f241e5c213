#include "stored.h"

namespace sg::test {

namespace {

float half_at(const uint8_t* p) { return from_half(uint16_t(p[0] | p[1] << 8)); }

// A half between 2^-10 and 2^-7, either sign.
void put_random_half(uint8_t* p, Random& random) {
  p[0] = uint8_t(random.below(256));
  p[1] = uint8_t((5 + random.below(3)) << 2 | random.below(4) | random.below(2) << 7);
}

Weight scaled(float d, int code) { return {d * float(code), double(d) * code, std::fabs(double(d) * code)}; }

// d q + m, with the size of what an 8-bit code without its bias would have.
Weight shifted(float d, int code, float m) {
  const float product = d * float(code);
  return {product + m, double(d) * code + double(m), std::fabs(double(product)) + std::fabs(double(m))};
}

int nibble(const uint8_t* bytes, int i) { return i < 16 ? bytes[i] & 15 : bytes[i - 16] >> 4; }
int fifth(const uint8_t* bits, int i) { return (bits[i / 8] >> i % 8 & 1) << 4; }

// The six-bit scale and minimum of group g: bytes 0-3 and 4-7 hold the first four of each, and in their upper bits
// what bytes 8-11 lack of the last four.
std::pair<int, int> k_scale_min(const uint8_t* p, int g) {
  if (g < 4) return {p[g] & 63, p[g + 4] & 63};
  return {(p[g + 4] & 15) + 16 * (p[g - 4] >> 6), (p[g + 4] >> 4) + 16 * (p[g] >> 6)};
}

Weight k_weight(const uint8_t* block, const uint8_t* low, const uint8_t* high, int i) {
  const int g = i / 32, j = i % 32;
  const int code = (low[g / 2 * 32 + j] >> (g % 2 ? 4 : 0) & 15) + (high != nullptr ? (high[j] >> g & 1) * 16 : 0);
  const auto [scale, min] = k_scale_min(block + 4, g);
  const float d = half_at(block) * float(scale), m = half_at(block + 2) * float(min);
  return shifted(d, code, -m);
}

Weight k6_weight(const uint8_t* block, int i) {
  const int half = i / 128, run = i % 128 / 32, j = i % 32;
  const int low = block[64 * half + 32 * (run % 2) + j] >> (run / 2 * 4) & 15;
  const int high = block[128 + 32 * half + j] >> (2 * run) & 3;
  const int scale = int8_t(block[192 + i / 16]);
  return scaled(half_at(block + 208) * float(scale), low + 16 * high - 32);
}

// d (q - z); a kernel may take z off the sum, so it counts in the size.
Weight zeroed(const uint8_t* p, int i) {
  const float d = half_at(p);
  const int code = p[4 + i], zero = p[2];
  return {d * float(code - zero), double(d) * (code - zero), std::fabs(double(d)) * (code + zero)};
}

}  // namespace

const std::vector<Format>& formats() {
  static const std::vector<Format> all = {
      {DType::Q4_0, "Q4_0", 32, 18, 0},
      {DType::Q4_1, "Q4_1", 32, 20, 0},
      {DType::Q5_0, "Q5_0", 32, 22, 0},
      {DType::Q5_1, "Q5_1", 32, 24, 0},
      {DType::Q8_0, "Q8_0", 32, 34, 0},
      {DType::Q4_K, "Q4_K", 256, 144, 0},
      {DType::Q5_K, "Q5_K", 256, 176, 0},
      {DType::Q6_K, "Q6_K", 256, 210, 0},
      {DType::INT4, "INT4 of 32", 32, 36, 32},
      {DType::INT8, "INT8 of 32", 32, 36, 32},
      {DType::INT4, "INT4 of 128", 128, 132, 128},
      {DType::INT8, "INT8 of 96", 96, 100, 96},
  };
  return all;
}

std::vector<uint8_t> random_row(const Format& format, int k, Random& random) {
  std::vector<uint8_t> row(size_t(k / format.values * format.bytes));
  for (uint8_t& byte : row) byte = uint8_t(random.below(256));
  for (uint8_t* block = row.data(); block < row.data() + row.size(); block += format.bytes) {
    // Codes at both ends for whole runs: sums of products are then as large as they get.
    if (random.below(3) == 0) std::memset(block, random.below(2) ? 0xff : 0x00, size_t(format.bytes));
    const bool has_min = format.type == DType::Q4_1 || format.type == DType::Q5_1 || format.type == DType::Q4_K ||
                         format.type == DType::Q5_K;
    put_random_half(format.type == DType::Q6_K ? block + 208 : block, random);
    if (has_min) put_random_half(block + 2, random);
    if (format.group == 0) continue;
    block[2] = uint8_t(random.below(format.type == DType::INT4 ? 16 : 256));
    block[3] = 0;
    if (format.type == DType::INT8) continue;
    for (int i = 0; i < format.values; i++) block[4 + i] &= 15;
  }
  return row;
}

Weight weight_at(const Format& format, const uint8_t* row, int i) {
  const uint8_t* p = row + i / format.values * format.bytes;
  i %= format.values;
  switch (format.type) {
    case DType::Q4_0:
      return scaled(half_at(p), nibble(p + 2, i) - 8);
    case DType::Q4_1:
      return shifted(half_at(p), nibble(p + 4, i), half_at(p + 2));
    case DType::Q5_0:
      return scaled(half_at(p), nibble(p + 6, i) + fifth(p + 2, i) - 16);
    case DType::Q5_1:
      return shifted(half_at(p), nibble(p + 8, i) + fifth(p + 4, i), half_at(p + 2));
    case DType::Q8_0:
      return scaled(half_at(p), int8_t(p[2 + i]));
    case DType::Q4_K:
      return k_weight(p, p + 16, nullptr, i);
    case DType::Q5_K:
      return k_weight(p, p + 48, p + 16, i);
    case DType::Q6_K:
      return k6_weight(p, i);
    default:
      return zeroed(p, i);
  }
}

}  // namespace sg::test

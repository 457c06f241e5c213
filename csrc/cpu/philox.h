// Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
// A number is a function of (key, counter) alone, so a draw needs no state and does not depend on what was drawn
// before.
#pragma once
#include <cstdint>

namespace sg {

struct Philox {
  uint32_t word[4];
};

inline Philox philox4x32(uint64_t key, Philox counter) {
  uint32_t key0 = uint32_t(key), key1 = uint32_t(key >> 32);
  uint32_t* c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c[0];
    const uint64_t b = uint64_t(0xCD9E8D57u) * c[2];
    const uint32_t c1 = c[1], c3 = c[3];
    c[0] = uint32_t(b >> 32) ^ c1 ^ key0;
    c[1] = uint32_t(b);
    c[2] = uint32_t(a >> 32) ^ c3 ^ key1;
    c[3] = uint32_t(a);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// A number in [0, 1) with 53 random bits: the first two words, the first one on top.
inline double philox_uniform(uint64_t key, Philox counter) {
  const Philox random = philox4x32(key, counter);
  const uint64_t bits = uint64_t(random.word[0]) << 32 | random.word[1];
  return double(bits >> 11) * 0x1p-53;
}

}  // namespace sg

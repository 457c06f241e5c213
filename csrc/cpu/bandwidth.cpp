#include "cpu/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "cpu/memory.h"
#include "cpu/pool.h"

namespace sg {

namespace {

constexpr int64_t kChunk = 1 << 20;

// Sum of 64-bit words in eight chains, so that the loads and not the additions are the limit.
uint64_t sum_words(const uint64_t* words, int64_t count) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i + 32 <= count; i += 32) {
    __builtin_prefetch(words + i + 256);
    for (int j = 0; j < 32; ++j) sums[j % 8] += words[i + j];
  }
  uint64_t total = 0;
  for (uint64_t s : sums) total += s;
  return total;
}

}  // namespace

double read_bandwidth(int threads, int64_t bytes, double seconds) {
  using Clock = std::chrono::steady_clock;
  const int64_t chunks = std::max<int64_t>(1, bytes / kChunk);
  Memory memory(chunks * kChunk, true);
  std::memset(memory.data(), 1, static_cast<size_t>(memory.size()));  // real pages, not the shared zero page
  Pool pool(threads);
  std::atomic<uint64_t> sink{0};
  double best = 0;
  const auto start = Clock::now();
  while (std::chrono::duration<double>(Clock::now() - start).count() < seconds) {
    const auto begin = Clock::now();
    pool.run([&](int worker) {
      uint64_t sum = 0;
      pool.share(worker, chunks, 1, [&](int64_t b, int64_t e) {
        sum += sum_words(static_cast<const uint64_t*>(memory.data()) + b * (kChunk / 8), (e - b) * (kChunk / 8));
      });
      sink += sum;
    });
    const double pass = std::chrono::duration<double>(Clock::now() - begin).count();
    best = std::max(best, static_cast<double>(chunks * kChunk) / pass / 1e9);
  }
  return best;
}

}  // namespace sg

#include "cpu/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/memory.h"
#include "cpu/pool.h"

namespace sg {

namespace {

constexpr int64_t kChunk = 1 << 20;

}  // namespace

double read_bandwidth(int threads, int64_t bytes, double seconds) {
  using Clock = std::chrono::steady_clock;
  const int64_t chunks = std::max<int64_t>(1, bytes / kChunk);
  Memory memory(chunks * kChunk, true);
  // Real pages, not the shared zero page; and ordinary numbers, since denormal ones would slow the additions.
  std::memset(memory.data(), 0x3f, static_cast<size_t>(memory.size()));
  const Kernels* kernels = select_kernels(nullptr);
  Pool pool(threads);
  std::atomic<float> sink{0};
  double best = 0;
  const auto start = Clock::now();
  while (std::chrono::duration<double>(Clock::now() - start).count() < seconds) {
    const auto begin = Clock::now();
    pool.run([&](int worker) {
      float sum = 0;
      pool.share(worker, chunks, 1, [&](int64_t b, int64_t e) {
        sum += kernels->read(static_cast<const float*>(memory.data()) + b * (kChunk / 4), (e - b) * (kChunk / 4));
      });
      sink.store(sum);
    });
    const double pass = std::chrono::duration<double>(Clock::now() - begin).count();
    best = std::max(best, static_cast<double>(chunks * kChunk) / pass / 1e9);
  }
  return best;
}

}  // namespace sg

// The pool under stress: shares that read what other workers wrote in the share before, pools that come and go, more
// workers than processors, several pools at once. What thread sanitizers look for is ordering that only luck provides.
#include "cpu/pool.h"

#include <atomic>
#include <thread>

#include "check.h"

namespace sg::test {

namespace {

// A checksum of several shares; the same for any number of threads.
uint64_t shares(Pool& pool, int rounds) {
  std::vector<uint64_t> first(64), second(64);
  uint64_t sum = 0;
  for (int round = 0; round < rounds; round++) {
    const int64_t n = 1 + round * 7 % 61;
    pool.run([&](int worker) {
      pool.share(worker, n, 1 + round % 3, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) first[size_t(i)] = uint64_t(i + 1) * uint64_t(i + round);
      });
      pool.share(worker, 0, 1, [&](int64_t, int64_t) { sum++; });  // never called
      pool.share(worker, n, 2, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
          second[size_t(i)] = first[size_t(n - 1 - i)] + 3 * first[size_t((i + 1) % n)];
      });
      pool.share(worker, 1, 1, [&](int64_t, int64_t) {
        for (int64_t i = 0; i < n; i++) sum = sum * 31 + second[size_t(i)];
      });
    });
  }
  return sum;
}

void check_shares() {
  const Scope scope("shares");
  Pool one(1);
  const uint64_t wanted = shares(one, 400);
  for (int threads : {2, 3, 4, 7}) {
    Pool pool(threads);
    expect(shares(pool, 400) == wanted, std::to_string(threads) + " threads compute something else");
  }
}

// Workers sleep between runs: the host waits longer than they spin.
void check_sleepers() {
  const Scope scope("sleepers");
  Pool pool(3);
  for (int i = 0; i < 30; i++) {
    std::atomic<int> ran{0};
    pool.run([&](int) { ran.fetch_add(1); });
    expect(ran.load() == 3, "a worker did not run");
    std::this_thread::sleep_for(std::chrono::microseconds(i % 3 * 300));
  }
}

// Writes of one run are seen by the caller, and the caller's by the next run, without atomics.
void check_visibility() {
  const Scope scope("visibility");
  Pool pool(4);
  std::vector<int> written(4);
  int given = 0;
  for (int i = 0; i < 500; i++) {
    given = i;
    pool.run([&](int worker) { written[size_t(worker)] = given + worker; });
    bool is_right = true;
    for (int worker = 0; worker < 4; worker++) is_right = is_right && written[size_t(worker)] == i + worker;
    expect(is_right, "run " + std::to_string(i));
  }
}

void check_lives() {
  const Scope scope("lives");
  for (int i = 0; i < 40; i++) {
    Pool unused(1 + i % 4);
    Pool pool(1 + (i + 2) % 4);
    std::atomic<int> ran{0};
    pool.run([&](int) { ran.fetch_add(1); });
    expect(ran.load() == pool.size(), "a worker did not run");
  }
}

void check_several() {
  const Scope scope("several pools");
  Pool one(1);
  const uint64_t wanted = shares(one, 150);
  uint64_t sums[3] = {};
  std::vector<std::thread> hosts;
  for (uint64_t& sum : sums) {
    hosts.emplace_back([&sum] {
      Pool pool(2);
      sum = shares(pool, 150);
    });
  }
  for (std::thread& host : hosts) host.join();
  for (uint64_t sum : sums) expect(sum == wanted, "a pool beside others computes something else");
}

}  // namespace

void test_pool() {
  check_shares();
  check_sleepers();
  check_visibility();
  check_lives();
  check_several();
}

}  // namespace sg::test

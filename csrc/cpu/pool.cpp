// The thread pool: workers 1 .. n-1 are threads, the caller is worker 0.
//
// Everything waits at a Gate: a number that moves on. A waiter spins for a few tens of microseconds, which covers the
// gap between two ops of a step, and then sleeps in the kernel: an idle pool uses no processor time, and a worker that
// waits for one that was preempted does not take the core the other needs.
#include "cpu/pool.h"

#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#else
#include <condition_variable>
#include <mutex>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#include <signal.h>
#endif

namespace sg {
namespace {

constexpr size_t kLine = 64;  // bytes of a cache line: what different workers write stands on different lines
constexpr auto kSpin = std::chrono::microseconds(30);

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class alignas(kLine) Gate {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }

  // Move on and wake who sleeps. What was written before is visible to whoever saw the new value.
  void advance() {
    // NOTE: both are seq_cst, as is the pair in sleep: either we see the sleeper, or it sees the new value.
    value_.fetch_add(1);
    if (sleepers_.load() > 0) wake_all();
  }

  // Wait until the value is no longer `seen`.
  void wait(uint32_t seen, bool spin) {
    if (spin && spun(seen)) return;
    while (value() == seen) sleep(seen);
  }

 private:
  bool spun(uint32_t seen) const {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 16; ++i) {
        if (value() != seen) return true;
        pause();
      }
    } while (std::chrono::steady_clock::now() < end);
    return false;
  }

#if defined(__linux__)
  static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "a futex is a plain 32-bit word");
  void futex(int op, uint32_t argument) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value_), op, argument, nullptr, nullptr, 0);
  }
  void sleep(uint32_t seen) {
    sleepers_.fetch_add(1);
    if (value_.load() == seen) futex(FUTEX_WAIT_PRIVATE, seen);
    sleepers_.fetch_sub(1);
  }
  void wake_all() { futex(FUTEX_WAKE_PRIVATE, INT_MAX); }
#else
  void sleep(uint32_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    condition_.wait(lock, [&] { return value_.load() != seen; });
    sleepers_.fetch_sub(1);
  }
  void wake_all() {
    std::lock_guard<std::mutex> lock(mutex_);
    condition_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable condition_;
#endif

  std::atomic<uint32_t> value_{0};
  std::atomic<int> sleepers_{0};
};

void name_this_thread() {
#if defined(__linux__)
  pthread_setname_np(pthread_self(), "streamgen");
#elif defined(__APPLE__)
  pthread_setname_np("streamgen");
#endif
}

// While it lives, threads started here inherit a mask that blocks every signal: handlers belong to the host's threads.
class SignalsBlocked {
 public:
#if defined(_WIN32)
  SignalsBlocked() {}
#else
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
#endif
};

}  // namespace

struct Pool::State {
  explicit State(int size)
      : size(size),
        spin(size <= int(std::thread::hardware_concurrency())),  // else spinning only takes turns away
        stretches(size_t(size)) {}

  void work(int worker) {
    name_this_thread();
    for (uint32_t seen = 0;; ++seen) {
      started.wait(seen, spin);
      if (stopping) return;
      fn(arg, worker);
      meet();
    }
  }

  // The barrier. The last to arrive clears the counters before it opens the gate: nobody else touches them until then,
  // so the next share starts from zero without a second meeting.
  void meet() {
    const uint32_t seen = met.value();  // cannot move before we have arrived
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < size) {
      met.wait(seen, spin);
      return;
    }
    arrived.store(0, std::memory_order_relaxed);
    for (Stretch& stretch : stretches) stretch.next.store(0, std::memory_order_relaxed);
    met.advance();
  }

  void stop() {
    stopping = true;
    started.advance();
    for (std::thread& thread : threads) thread.join();
  }

  const int size;
  const bool spin;
  std::vector<std::thread> threads;
  // Written by the caller before `started` moves, read by workers after.
  void (*fn)(void*, int) = nullptr;
  void* arg = nullptr;
  bool stopping = false;
  Gate started, met;
  alignas(kLine) std::atomic<int> arrived{0};
  struct alignas(kLine) Stretch {
    std::atomic<int64_t> next{0};  // items taken
  };
  std::vector<Stretch> stretches;  // of each worker
};

Pool::Pool(int threads) : state_(new State(threads < 1 ? 1 : threads)) {
  const SignalsBlocked blocked;
  State* state = state_.get();
  try {
    for (int worker = 1; worker < state->size; ++worker) {
      state->threads.emplace_back([state, worker] { state->work(worker); });
    }
  } catch (...) {  // the system has no more threads: end those it gave
    state->stop();
    throw;
  }
}

Pool::~Pool() { state_->stop(); }

int Pool::size() const { return state_->size; }

void Pool::run_erased(void (*fn)(void*, int), void* arg) {
  State& state = *state_;
  if (state.size > 1) {
    state.fn = fn;
    state.arg = arg;
    state.started.advance();
  }
  fn(arg, 0);
  if (state.size > 1) state.meet();
}

int64_t Pool::take(int owner, int64_t grain) {
  return state_->stretches[size_t(owner)].next.fetch_add(grain, std::memory_order_relaxed);
}

void Pool::finish() { state_->meet(); }

}  // namespace sg

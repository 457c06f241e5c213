// The thread pool of one engine. The calling thread takes part as worker 0.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

namespace sg {

class Pool {
 public:
  explicit Pool(int threads);  // threads >= 1; starts threads - 1 threads
  ~Pool();                     // joins them
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  int size() const;

  // Run fn(worker) on every worker, 0 .. size() - 1; returns when all have returned. Not reentrant.
  template <class F>
  void run(F&& fn) {
    run_erased([](void* f, int worker) { (*static_cast<F*>(f))(worker); }, &fn);
  }

  // Inside run, called by every worker with the same arguments: share items [0, items) in chunks of `grain`,
  // dynamically; body(begin, end). Returns when every item is done, its writes visible to all workers.
  template <class F>
  void share(int worker, int64_t items, int64_t grain, F&& body) {
    if (size() == 1) {
      if (items > 0) body(int64_t(0), items);
      return;
    }
    for (;;) {
      const int64_t begin = take(worker, grain);
      if (begin >= items) break;
      body(begin, begin + grain < items ? begin + grain : items);
    }
    finish(worker);
  }

 private:
  void run_erased(void (*fn)(void*, int), void* arg);
  int64_t take(int worker, int64_t grain);  // first item of the next chunk of this worker's current share
  void finish(int worker);                  // barrier that ends the current share
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace sg

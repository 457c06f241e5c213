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

  // Inside run, called by every worker with the same arguments: share items [0, items) in chunks of `grain`;
  // body(begin, end). Each worker has a stretch of its own, so that it reads memory in one stream (a third faster than
  // every other chunk), and takes from others' stretches what they have not begun when it is done. Returns when every
  // item is done, its writes visible to all workers.
  template <class F>
  void share(int worker, int64_t items, int64_t grain, F&& body) {
    const int workers = size();
    if (workers == 1) {
      if (items > 0) body(int64_t(0), items);
      return;
    }
    for (int i = 0; i < workers; ++i) {
      const int owner = worker + i < workers ? worker + i : worker + i - workers;
      const int64_t first = items * owner / workers, end = items * (owner + 1) / workers;
      for (;;) {
        const int64_t begin = first + take(owner, grain);
        if (begin >= end) break;
        body(begin, begin + grain < end ? begin + grain : end);
      }
    }
    finish();
  }

 private:
  void run_erased(void (*fn)(void*, int), void* arg);
  int64_t take(int owner, int64_t grain);  // of the owner's stretch of the current share: the next chunk's first item
  void finish();                           // barrier that ends the current share
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace sg

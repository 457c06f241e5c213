// Aligned, zeroed memory straight from the system, for weights, pages and activations.
#pragma once
#include <cstdint>

namespace sg {

class Memory {
 public:
  // huge: ask for 2 MiB pages (weights, which are read from end to end); else 4 KiB pages, so that only what is
  // touched is resident (pages of the KV cache). Throws std::bad_alloc.
  Memory(int64_t bytes, bool huge);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  // Give everything back to the system; it reads as zero afterwards.
  void drop();
  // Bytes that the system holds in memory for it now.
  int64_t resident() const;
  void* data() const { return data_; }
  int64_t size() const { return size_; }

 private:
  void* data_;
  int64_t size_;
  int64_t mapped_;
};

}  // namespace sg

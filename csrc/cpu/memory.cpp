#include "cpu/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <new>
#include <vector>

namespace sg {

namespace {
constexpr int64_t kHugePage = 2 << 20;
}

Memory::Memory(int64_t bytes, bool huge) : data_(nullptr), size_(bytes), mapped_(0) {
  if (bytes <= 0) return;
  // One huge page more than needed, so that the start can be aligned to 2 MiB.
  mapped_ = (bytes + kHugePage - 1) / kHugePage * kHugePage + kHugePage;
  void* base = mmap(nullptr, static_cast<size_t>(mapped_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  auto start = (reinterpret_cast<uintptr_t>(base) + kHugePage - 1) & ~uintptr_t(kHugePage - 1);
  const int64_t head = static_cast<int64_t>(start - reinterpret_cast<uintptr_t>(base));
  if (head > 0) munmap(base, static_cast<size_t>(head));
  mapped_ -= head;
  data_ = reinterpret_cast<void*>(start);
#if defined(MADV_HUGEPAGE) && defined(MADV_NOHUGEPAGE)
  madvise(data_, static_cast<size_t>(mapped_), huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);  // advice: failure is harmless
#else
  (void)huge;
#endif
}

void Memory::drop() {
  if (data_ != nullptr) madvise(data_, static_cast<size_t>(mapped_), MADV_DONTNEED);
}

int64_t Memory::resident() const {
  if (data_ == nullptr) return 0;
  const int64_t page = sysconf(_SC_PAGESIZE);
  std::vector<unsigned char> in_core(4096);
  int64_t pages = 0;
  for (int64_t at = 0; at < mapped_; at += page * int64_t(in_core.size())) {
    const int64_t bytes = std::min(mapped_ - at, page * int64_t(in_core.size()));
    const int64_t count = (bytes + page - 1) / page;
    if (mincore(static_cast<char*>(data_) + at, static_cast<size_t>(bytes), in_core.data()) != 0) return size_;
    pages += std::count_if(in_core.begin(), in_core.begin() + count, [](unsigned char c) { return c & 1; });
  }
  return pages * page;
}

Memory::~Memory() {
  if (data_ != nullptr) munmap(data_, static_cast<size_t>(mapped_));
}

}  // namespace sg

#include "cpu/memory.h"

#include <sys/mman.h>

#include <new>

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

Memory::~Memory() {
  if (data_ != nullptr) munmap(data_, static_cast<size_t>(mapped_));
}

}  // namespace sg

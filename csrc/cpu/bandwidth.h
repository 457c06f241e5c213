// How fast this machine reads memory: the limit that decoding is measured against.
#pragma once
#include <cstdint>

namespace sg {

// Read `bytes` of fresh memory with `threads` threads, again and again for about `seconds`; GB/s of the best pass.
double read_bandwidth(int threads, int64_t bytes, double seconds);

}  // namespace sg

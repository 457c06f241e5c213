// All kernels of one instruction set: a unit (k_*.cpp) includes its simd header, then this, and exports its table.
//
// NOTE: units are compiled with different instruction sets, so nothing here may have external linkage and no STL header may
// be included: the linker keeps one copy of an inline function, and it may be the one that this processor cannot run.
#include "cpu/lanes.inl"
// The order matters from here on: each may use what stands before.
#include "cpu/linear.inl"
#include "cpu/pack.inl"
#include "cpu/elementwise.inl"
#if __has_include("cpu/attention.inl")
#include "cpu/attention.inl"
#define SG_ATTENTION_ENTRIES store_kv, attend_items, attend_scratch, attend
#else
#define SG_ATTENTION_ENTRIES nullptr, nullptr, nullptr, nullptr
#endif

namespace sg {
namespace {

constexpr Kernels kernel_table(const char* name) {
  return {name, linear_items, linear, rms_norm, embed, rope, gated_mul, SG_ATTENTION_ENTRIES, pack, row_max, row_exp_sum};
}

}  // namespace
}  // namespace sg

// All kernels of one instruction set. A unit (k_*.cpp) names its simd header in SG_SIMD, includes this, and exports its
// table.
//
// NOTE: units are compiled with different instruction sets, so nothing here may have external linkage and no STL header
// may be included: the linker keeps one copy of an inline function, and it may be the one that this processor cannot
// run.
#include SG_SIMD

#include "cpu/attention.inl"
#include "cpu/elementwise.inl"
#include "cpu/linear.inl"
#include "cpu/pack.inl"

namespace sg {
namespace {

constexpr Kernels kernel_table(const char* name) {
  return {name,           linear_items, linear,       rms_norm,     convert, embed,   rope,        gated_mul, store_kv,
          attend_scratch, attend,       attend_ahead, attend_state, pack,    row_max, row_exp_sum, read};
}

}  // namespace
}  // namespace sg

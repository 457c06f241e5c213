// What attention is asked for, and how a step's work is cut up. See attention.inl for the arithmetic, attend_plan.h for
// who cuts.
#pragma once
#include <cstdint>

#include "common/dtypes.h"

namespace sg {

struct Batch;

constexpr int kAttendTile = 16;    // positions of a tile, at absolute multiples
constexpr int kAttendBlock = 128;  // tokens between two updates of a row's running state, at absolute multiples
constexpr int kAttendSplit = 512;  // tokens of a running state, at absolute multiples
constexpr int kAheadRows = 64;     // at most, rows (positions x heads of a group) that go over shared pages together

// Rows that attend together: up to 16 consecutive positions of one sequence. It sees tokens [begin, end), end being its
// last position + 1. What goes ahead of it is done in an earlier share of the pool, and left in `partials`: tokens
// [begin, shared_end), together with tiles of other sequences that have the same pages, and [own_begin, end).
struct AttendTile {
  int32_t seq, row, pos, positions;
  int32_t begin, shared_end, own_begin;
  int32_t partial;  // units (see AttendArgs) of its first split's states
  int32_t end() const { return pos + positions; }
};

// Tokens [begin, end) for the tiles members[first .. first + count).
struct AttendAhead {
  int32_t first, count, begin, end;
};

// A step's attention, for layers of one window.
struct AttendPlan {
  const AttendTile* tiles;
  const AttendAhead* ahead;
  const int32_t* members;
  int32_t num_tiles, num_ahead;
};

// Attention over pages (paging.h). q, k, v are the step's rows.
struct AttendArgs {
  const float* q;
  const float* k;
  const float* v;
  int64_t q_stride, k_stride, v_stride;
  void* out;  // [rows, num_heads * head_dim] of out_dtype
  int64_t out_stride;
  void* k_pages;  // of this layer: the K tile of page 0 and head 0
  void* v_pages;
  int64_t page_stride;  // bytes from a page to the next
  int32_t num_heads, num_kv_heads, head_dim, page_size;
  int32_t window;  // 0: none
  float scale;     // > 0
  float softcap;   // 0: none
  DType dtype;     // of products: F32 | BF16
  DType kv_dtype;  // of pages: dtype, or INT8
  DType out_dtype;
  const Batch* batch;
  const AttendPlan* plan;
  float* partials;  // [units, num_heads] states of rows, attend_state(args) floats each; where the plan has any ahead
  // In a step in which every sequence has one row, attention may do what comes before it: with `fused`, q and k are not
  // turned yet, and keys and values not stored. cos, sin [rows, rotary_dim / 2] as in RopeArgs; rotary_dim may be 0.
  const float* cos;
  const float* sin;
  int32_t rotary_dim;
  bool fused;
};

}  // namespace sg

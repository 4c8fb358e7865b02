// moe_top1 on the CPU: shared expert plus each row's chosen expert, rows grouped by expert.
//
// What it is: the order of rows by expert, and the two GEMM passes over a range of columns. Both experts' columns are one
// chunk of work, so a phase needs no extra barrier for the routed part.
// What it refuses to be: top-k, or expert parallel.
// Run it: compiled by engine_plugins/native/compiler.py.
#pragma once
#include "fc13_swiglu/cpu.h"

namespace KILOTOK_NAMESPACE {

// order: rows sorted by expert (stable), start: [experts + 1].
static void group_by_expert(const int* expert, int rows, int num_experts, int* order, int* start) {
  for (int e = 0; e <= num_experts; ++e) start[e] = 0;
  for (int r = 0; r < rows; ++r) ++start[expert[r] + 1];
  for (int e = 0; e < num_experts; ++e) start[e + 1] += start[e];
  for (int e = 0, at = 0; e < num_experts; ++e)
    for (int r = 0; r < rows && at < start[e + 1]; ++r)
      if (expert[r] == e) order[at++] = r;
}

// Columns [c0, c1) of the routed half: silu(x gate_e) * (x up_e) for every row's expert e.
static void moe_fc13(const Matrix& m, int c0, int c1, const float* const* x, const int* order, const int* start, int num_experts,
                     const float** x_sorted, float** out_sorted, float* const* out, float inv_scale) {
  for (int e = 0; e < num_experts; ++e) {
    const int count = start[e + 1] - start[e];
    if (!count) continue;
    for (int i = 0; i < count; ++i) x_sorted[i] = x[order[start[e] + i]], out_sorted[i] = out[order[start[e] + i]];
    fc13_swiglu(m, e, c0, c1, x_sorted, count, inv_scale, out_sorted);
  }
}

}  // namespace KILOTOK_NAMESPACE

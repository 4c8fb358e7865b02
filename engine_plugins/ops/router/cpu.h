// router on the CPU: BF16 GEMV over the experts, the best one and its sigmoid.
//
// What it is: every thread routes all rows itself, because that is cheaper than a barrier for a few rows.
// What it refuses to be: top-k.
// Run it: compiled by engine_plugins/native/compiler.py.
#pragma once
#include "gemm_low_latency/cpu.h"

namespace KILOTOK_NAMESPACE {

// x rows are not rounded. Lowest index wins a tie. logits: [rows][n] scratch.
static void router(const Matrix& m, int num_experts, const float* const* x, int rows, float* logits, int* expert, float* score) {
  gemm_low_latency(m, 0, 0, m.n / kLanes, x, rows, logits, m.n);
  for (int r = 0; r < rows; ++r) {
    const float* row = logits + (size_t)r * m.n;
    int best = 0;
    for (int e = 1; e < num_experts; ++e)
      if (row[e] > row[best]) best = e;
    expert[r] = best;
    score[r] = 1.0f / (1.0f + expf(-row[best]));
  }
}

}  // namespace KILOTOK_NAMESPACE

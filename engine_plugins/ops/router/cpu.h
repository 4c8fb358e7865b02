// router on the CPU: BF16 GEMV over the experts, the best one and its sigmoid.
//
// What it is: every thread routes all rows itself, because that is cheaper than a barrier for a few rows.
// What it refuses to be: top-k.
// Run it: compiled by engine_plugins/native/compiler.py.
#pragma once
#include "gemm_low_latency/cpu.h"

namespace KILOTOK_NAMESPACE {

static void choose_expert(const float* logits, int num_experts, int& expert, float& score) {
  expert = 0;  // lowest index wins a tie
  for (int e = 1; e < num_experts; ++e)
    if (logits[e] > logits[expert]) expert = e;
  score = 1.0f / (1.0f + expf(-logits[expert]));
}

// x rows are not rounded. logits: [rows][n] scratch.
static void router(const Matrix& m, int num_experts, const float* const* x, int rows, float* logits, int* expert, float* score) {
  gemm_low_latency(m, 0, 0, m.n / kLanes, x, rows, logits, m.n);
  for (int r = 0; r < rows; ++r) choose_expert(logits + (size_t)r * m.n, num_experts, expert[r], score[r]);
}

}  // namespace KILOTOK_NAMESPACE

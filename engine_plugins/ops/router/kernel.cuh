// router on the GPU: BF16 logits of every expert; who needs the choice takes it from them (`route`).
//
// What it is: one block per expert for all tokens, its weights in registers before it waits. With eight rows a tile, mma would
// fill 16 of 132 SMs.
// What it refuses to be: a kernel that waits for all experts; the choice costs its reader one warp per token.
// Run it: compiled by engine_plugins/ops/compile.py; emulated by tests/engine_plugins/test_gpu_ops.py.
#pragma once
#include "gemm_low_latency/kernel.cuh"

namespace kilotok {

constexpr int kRouterThreads = 320;
constexpr int kRouterBatch = 2;  // 5120 BF16 values over 320 threads

KT_INLINE float dot_bf16x8(const uint4& a, const uint4& b, float sum) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(bf16_to_float((uint16_t)x[i]), bf16_to_float((uint16_t)y[i]), sum);
    sum = fmaf(bf16_to_float((uint16_t)(x[i] >> 16)), bf16_to_float((uint16_t)(y[i] >> 16)), sum);
  }
  return sum;
}

KT_KERNEL(kRouterThreads, 2) router_kernel(const uint8_t* w_EK, Stored x, int experts, float* logits_ME) {
  constexpr int warps = kRouterThreads / kWarp, stride = kRouterThreads * 16;
  KT_SHARED(float, shared, kNarrowTokens * warps);
  const int expert = blockIdx.x;
  const uint8_t* row = w_EK + (long long)expert * x.row_bytes;
  float sum[kNarrowTokens] = {};
  for (int base = 0; base < x.row_bytes; base += kRouterBatch * stride) {
    uint4 batch[kRouterBatch], values[kNarrowTokens][kRouterBatch];
#pragma unroll
    for (int i = 0; i < kRouterBatch; ++i) {
      const int at = base + i * stride + threadIdx.x * 16;
      batch[i] = at < x.row_bytes ? load_weight(row + at) : zero16();
    }
    if (base == 0) grid_wait();
#pragma unroll
    for (int token = 0; token < kNarrowTokens; ++token)  // every load before the first use
#pragma unroll
      for (int i = 0; i < kRouterBatch; ++i) {
        const int at = base + i * stride + threadIdx.x * 16;
        values[token][i] = token < x.tokens && at < x.row_bytes ? load_activation(x.x + (long long)token * x.row_bytes + at) : zero16();
      }
#pragma unroll
    for (int token = 0; token < kNarrowTokens; ++token)
#pragma unroll
      for (int i = 0; i < kRouterBatch; ++i)
        if (token < x.tokens) sum[token] = dot_bf16x8(batch[i], values[token][i], sum[token]);
  }
#pragma unroll
  for (int token = 0; token < kNarrowTokens; ++token) {
    if (token >= x.tokens) break;
    const float whole = warp_sum(sum[token]);
    if (threadIdx.x % kWarp == 0) shared[token * warps + threadIdx.x / kWarp] = whole;
  }
  __syncthreads();
  if ((int)threadIdx.x >= x.tokens) return;
  float logit = 0.0f;
#pragma unroll
  for (int warp = 0; warp < warps; ++warp) logit += shared[threadIdx.x * warps + warp];
  logits_ME[threadIdx.x * experts + expert] = logit;
}

// Each token's best expert (the lowest index of equals), the sigmoid of its logit, and the different experts in the order of
// tokens, then -1: all into shared memory.
KT_INLINE void route(const float* logits_ME, int tokens, int experts, int* expert_M, float* score_M, int* chosen_S) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (int token = threadIdx.x / kWarp; token < tokens; token += warps) {
    const float* logits = logits_ME + (long long)token * experts;
    float best = -INFINITY;
    int index = experts;
    for (int e = lane; e < experts; e += kWarp)
      if (logits[e] > best || index == experts) best = logits[e], index = e;
    for (int offset = kWarp / 2; offset; offset /= 2) {
      const float other = __shfl_xor_sync(0xFFFFFFFFu, best, offset);
      const int at = __shfl_xor_sync(0xFFFFFFFFu, index, offset);
      if (at < experts && (other > best || (other == best && at < index) || index == experts)) best = other, index = at;
    }
    if (lane == 0) expert_M[token] = index, score_M[token] = sigmoid(best);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int num = 0;
    for (int token = 0; token < tokens; ++token) {
      bool first = true;
      for (int before = 0; before < token; ++before) first = first && expert_M[before] != expert_M[token];
      if (first) chosen_S[num++] = expert_M[token];
    }
    while (num < tokens) chosen_S[num++] = -1;
  }
  __syncthreads();
}

}  // namespace kilotok

// allreduce_rmsnorm on the GPU: one-shot all-reduce over symmetric memory, residual add, RMSNorm, E4M3, in one kernel.
//
// What it is: every rank pushes its part into each peer's inbox and adds what arrives in rank order, so all ranks get the same
// bits. Four bytes of data travel with the epoch in one 8-byte word: no separate flag, no fence, nothing to clear. Two
// inboxes by the parity of the epoch are enough: a peer can only be one call ahead, because to finish it needed our part.
// Epochs live in device memory, per token, so a CUDA graph can be replayed.
// What it refuses to be: a collective for large messages; above 8 tokens use two-shot.
// Run it: compiled by engine_plugins/ops/compile.py; emulated with 2, 4 and 8 ranks by tests/engine_plugins/test_gpu_ops.py.
#pragma once
#include "cuda/device.cuh"

namespace kilotok {

constexpr int kPerThread = 8;  // BF16 values: 16 bytes of a part, 32 bytes of an inbox

struct Exchange {
  const uint64_t* inbox_R;  // each rank's inbox as this rank sees it: [parity 2][source][token 8][hidden / 4] x 16 bytes
  uint32_t* epoch_M;        // calls made so far, per token; zero at the start, like the inboxes
  int rank, ranks;
};

struct Norm {
  const uint8_t* part_MH;         // BF16, this rank's share
  const uint8_t* residual_MH;     // BF16
  const float* weight_H;
  uint16_t *y_MH, *residual_out_MH;
  uint8_t* y8_MH;                 // null: no E4M3 output
  const float* inv_out_scale;     // there before the kernel before ends
  int hidden;
  float eps;
};

KT_INLINE uint8_t* inbox_cell(const Exchange& e, int of, uint32_t epoch, int source, int token, int hidden, int thread) {
  const long long row = ((long long)(epoch & 1) * e.ranks + source) * kNarrowTokens + token;
  return (uint8_t*)e.inbox_R[of] + (row * hidden + (long long)thread * kPerThread) * 4;
}

KT_INLINE void add_bf16x8(float (&sum)[kPerThread], const uint4& v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] += bf16_to_float((uint16_t)words[i]);
    sum[2 * i + 1] += bf16_to_float((uint16_t)(words[i] >> 16));
  }
}

KT_INLINE uint4 receive(const uint8_t* cell, uint32_t epoch) {
  uint4 v;
  while (!load_flagged(cell, epoch, v.x, v.y)) {
  }
  while (!load_flagged(cell + 16, epoch, v.z, v.w)) {
  }
  return v;
}

KT_INLINE uint32_t pack_bf16(float a, float b) { return float_to_bf16(a) | (uint32_t)float_to_bf16(b) << 16; }
KT_INLINE uint4 pack_bf16x8(const float (&v)[kPerThread]) {
  return uint4{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
}

// Grid: one block per token, hidden / 8 threads.
KT_KERNEL(1024, 1) allreduce_rmsnorm_kernel(Norm a, Exchange e) {
  KT_SHARED(float, squares, kWarp);
  const int token = blockIdx.x, column = threadIdx.x * kPerThread;
  const bool active = column < a.hidden;
  float weight[kPerThread], value[kPerThread] = {};
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) weight[i] = active ? a.weight_H[column + i] : 0.0f;
  const float inverse = a.inv_out_scale[0];
  grid_wait();
  const uint32_t epoch = e.ranks > 1 || threadIdx.x == 0 ? e.epoch_M[token] + 1 : 0;
  const long long at = (long long)token * a.hidden + column;
  if (active) {
    const uint4 mine = load_activation(a.part_MH + at * 2), residual = load_activation(a.residual_MH + at * 2);
    for (int hop = 1; hop < e.ranks; ++hop) {
      uint8_t* cell = inbox_cell(e, (e.rank + hop) % e.ranks, epoch, e.rank, token, a.hidden, threadIdx.x);
      store_flagged(cell, mine.x, mine.y, epoch);
      store_flagged(cell + 16, mine.z, mine.w, epoch);
    }
    for (int source = 0; source < e.ranks; ++source)
      add_bf16x8(value, source == e.rank ? mine : receive(inbox_cell(e, e.rank, epoch, source, token, a.hidden, threadIdx.x), epoch));
    add_bf16x8(value, residual);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) sum = fmaf(value[i], value[i], sum);
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) squares[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) e.epoch_M[token] = epoch;
  const int lane = threadIdx.x % kWarp;
  const float total = warp_sum(lane < (int)blockDim.x / kWarp ? squares[lane] : 0.0f);
  if (!active) return;
  const float factor = 1.0f / sqrtf(total / (float)a.hidden + a.eps);
  *(uint4*)(a.residual_out_MH + at) = pack_bf16x8(value);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) value[i] *= factor * weight[i];
  *(uint4*)(a.y_MH + at) = pack_bf16x8(value);
  if (!a.y8_MH) return;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) value[i] *= inverse;
  *(uint2*)(a.y8_MH + at) = uint2{pack_e4m3(value[0], value[1], value[2], value[3]), pack_e4m3(value[4], value[5], value[6], value[7])};
}

}  // namespace kilotok

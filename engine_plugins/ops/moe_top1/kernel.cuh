// moe_top1 on the GPU: two kernels, FC13 and FC2, for the shared expert and every distinct routed expert at once.
//
// What it is: each chosen expert's weights are read once, however many tokens chose it (the others' rows are zero in mma). The
// shared expert's weights are fetched before the wait; a routed expert is not known then. The score multiplies the
// activation before it is rounded to E4M3, as the checkpoint was calibrated.
// What it refuses to be: top-k, or expert parallel.
// Run it: compiled by engine_plugins/ops/compile.py; emulated by tests/engine_plugins/test_gpu_ops.py.
#pragma once
#include "fc13_swiglu/kernel.cuh"
#include "router/kernel.cuh"

namespace kilotok {

constexpr int kMoeBatch = 4;  // chunks of FC2 per warp and expert: 1024 over four warps

struct Moe {
  const uint8_t *x8_MK, *x_MK;  // E4M3 for the shared expert; BF16, rounded here for the routed ones
  const float* logits_ME;
  const uint8_t *shared13_2FK, *shared2_KF, *routed13_E2FK, *routed2_EKF;
  const float *shared13_scale_2F, *routed13_scale_E2F, *shared2_scale, *routed2_scale_E;  // weight times input scale
  const float* inv_scale_3;  // 1 / input scale of: routed FC13, shared FC2, routed FC2
  uint8_t *shared_h_MF, *routed_h_MF;
  uint16_t* y_MK;
  int tokens, hidden, width, experts;
};

// Activations of the tokens that chose `wanted`, times their score, rounded to E4M3 on the way. `row_bytes` counts E4M3 values.
struct Scored {
  const uint8_t* x;
  const int* expert_M;
  const float* score_M;
  int wanted;
  float inv_scale;
  int tokens, row_bytes;

  KT_INLINE bool has(int token) const { return token < tokens && expert_M[token] == wanted; }
  KT_INLINE uint32_t four(uint32_t low, uint32_t high, float factor) const {
    return pack_e4m3(bf16_to_float((uint16_t)low) * factor, bf16_to_float((uint16_t)(low >> 16)) * factor,
                     bf16_to_float((uint16_t)high) * factor, bf16_to_float((uint16_t)(high >> 16)) * factor);
  }
  KT_INLINE void put(uint4* to, int token, int at, const uint4& eight, float factor) const {
    uint2* place = (uint2*)(to + at / kChunkBytes * kWarp + token * 4 + at % kChunkBytes / 16) + at % 16 / 8;
    *place = uint2{four(eight.x, eight.y, factor), four(eight.z, eight.w, factor)};
  }
  // All lanes of the warp share each token's values, eight at a time.
  template <int Batch>
  KT_INLINE void fetch(uint4* to, int first, int chunk, int end, const Lane& lane) const {
    const int begin = chunk * kChunkBytes, stop = end * kChunkBytes < row_bytes ? end * kChunkBytes : row_bytes;
    for (int token = first; token < tokens; ++token) {
      if (!has(token)) continue;
      const float factor = score_M[token] * inv_scale;
      const uint8_t* row = x + ((long long)token * row_bytes + begin) * 2;
#pragma unroll 1
      for (int at = lane.id * 8; at < Batch * kChunkBytes; at += kWarp * 16) {  // two loads in flight
        const int next = at + kWarp * 8;
        const bool one = begin + at < stop, two = next < Batch * kChunkBytes && begin + next < stop;
        const uint4 first_eight = one ? load_activation(row + at * 2) : zero16(), second = two ? load_activation(row + next * 2) : zero16();
        if (one) put(to, token, at, first_eight, factor);
        if (two) put(to, token, next, second, factor);
      }
    }
  }
};

struct GatedOfExpert {  // the same epilogue, for the tokens that chose this expert
  Gated<kE4m3> gated;
  const int* expert_M;
  int wanted;
  KT_INLINE void operator()(int token, int f, const float2 (&sum)[2]) const {
    if (expert_M[token] == wanted) gated(token, f, sum);
  }
};

// Grid (tiles of F, 1 + tokens): row 0 is the shared expert, row s the s-th distinct routed one, if there is one.
KT_KERNEL(256, 2) moe_fc13_kernel(Moe a, Cut cut) {
  KT_SHARED(int, expert_M, kNarrowTokens);
  KT_SHARED(float, score_M, kNarrowTokens);
  KT_SHARED(int, chosen_S, kNarrowTokens);
  grid_launch_dependents();
  if (blockIdx.y == 0) {
    const Stored x{a.x8_MK, a.tokens, a.hidden};
    skinny_gemm<kE4m3, 2, false>(a.shared13_2FK, a.width, a.width, x, cut, Gated<kE4m3>{{a.shared13_scale_2F, 1}, a.inv_scale_3 + 1, a.shared_h_MF, a.width});
    return;
  }
  grid_wait();
  route(a.logits_ME, a.tokens, a.experts, expert_M, score_M, chosen_S);
  const int expert = chosen_S[blockIdx.y - 1];
  if (expert < 0) return;
  const Scored x{a.x_MK, expert_M, score_M, expert, a.inv_scale_3[0], a.tokens, a.hidden};
  const Gated<kE4m3> gated{{a.routed13_scale_E2F + (long long)expert * 2 * a.width, 1}, a.inv_scale_3 + 2, a.routed_h_MF, a.width};
  skinny_gemm<kE4m3, 2, false>(a.routed13_E2FK + (long long)expert * 2 * a.width * a.hidden, a.width, a.width, x, cut,
                        GatedOfExpert{gated, expert_M, expert});
}

// y = shared FC2 + routed FC2. Steps walk over (batch of chunks, expert); the next step's weights load during this one's mma.
KT_KERNEL(256, 3) moe_fc2_kernel(Moe a, Cut cut) {
  KT_SHARED(int, expert_M, kNarrowTokens);
  KT_SHARED(float, score_M, kNarrowTokens);
  KT_SHARED(int, chosen_S, kNarrowTokens);
  KT_LAUNCH_SHARED(uint4, shared);
  const Lane lane;
  const int slice = lane.warp % cut.slices, begin = cut.begin(slice), end = cut.begin(slice + 1), mine = lane_end(end, a.width, lane);
  const int index = (blockIdx.x * cut.tiles + lane.warp / cut.slices) * kTileRows + lane.group;
  grid_launch_dependents();
  uint4 now[1][kMoeBatch], next[1][kMoeBatch];
  const uint8_t* shared_row = lane_row(a.shared2_KF, index, a.hidden, a.width, lane);
  load_batch(now[0], shared_row, begin, mine);
  grid_wait();
  route(a.logits_ME, a.tokens, a.experts, expert_M, score_M, chosen_S);
  uint4 *staged = warp_shared(shared, lane), *routed = staged + kMoeBatch * kWarp;
  float total[4] = {};
  int slot = -1, expert = -1, chunk = begin;
  while (chunk < end) {
    const int this_slot = slot, this_expert = expert, this_chunk = chunk;
    expert = ++slot < a.tokens ? chosen_S[slot] : -1;
    if (expert < 0) {  // every expert had this batch of chunks
      slot = -1;
      chunk += kMoeBatch;
    }
    if (this_slot < 0) {
      __syncwarp();
      Stored{a.shared_h_MF, a.tokens, a.width}.fetch<kMoeBatch>(staged, 0, this_chunk, end, lane);
      Stored{a.routed_h_MF, a.tokens, a.width}.fetch<kMoeBatch>(routed, 0, this_chunk, end, lane);
    }
    const uint8_t* row = expert < 0 ? shared_row : lane_row(a.routed2_EKF + (long long)expert * a.hidden * a.width, index, a.hidden, a.width, lane);
    load_batch(next[0], row, chunk, mine);
    if (this_slot < 0) {
      staged_wait();
      __syncwarp();
    }
    const bool has = lane.group < a.tokens && (this_expert < 0 || expert_M[lane.group] == this_expert);
    const float scale = this_expert < 0 ? a.shared2_scale[0] : a.routed2_scale_E[this_expert];
    float d[4] = {};
    multiply_batch<kE4m3>(d, now, this_expert < 0 ? staged : routed, has, false, this_chunk, end, mine, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] += d[i] * scale;
#pragma unroll
    for (int i = 0; i < kMoeBatch; ++i) now[0][i] = next[0][i];
  }
  put_sums<1>(shared, total, lane);
  __syncthreads();
  finish_sums<1>(shared, cut, a.tokens, ScaledBf16{{nullptr, 0}, a.y_MK, a.hidden});
}

}  // namespace kilotok

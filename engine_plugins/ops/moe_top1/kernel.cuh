// moe_top1 on the GPU: the routing, then FC13 and FC2 of the shared expert and of every distinct routed one at once.
//
// What it is: each chosen expert's weights are read once, however many tokens chose it (the others' columns are zero in mma). The
// score multiplies the activation before it is rounded to E4M3, as the checkpoint was calibrated.
// What it refuses to be: top-k, or expert parallel.
// Run it: compiled by engine_plugins/ops/compile.py; emulated by tests/engine_plugins/test_gpu_ops.py.
#pragma once
#include "fc13_swiglu/kernel.cuh"
#include "router/kernel.cuh"

namespace kilotok {

struct Moe {
  const uint8_t *x8_MK, *x_MK;  // E4M3 for the shared expert; BF16, rounded here for the routed ones
  const float* logits_ME;
  const uint8_t *shared13_2FK, *shared2_KF, *routed13_E2FK, *routed2_EKF;
  const float *shared13_scale_2F, *routed13_scale_E2F, *shared2_scale, *routed2_scale_E;  // weight times input scale
  const float* inv_scale_3;  // 1 / input scale of: routed FC13, shared FC2, routed FC2
  uint8_t *routed_x_MK, *shared_h_MF, *routed_h_MF;  // E4M3
  int *expert_M, *chosen_S;                          // each token's expert; the distinct ones in the order of tokens, then -1
  uint16_t* y_MK;
  int tokens, hidden, width, experts;
};

constexpr int kRouteThreads = 512, kRouteValues = 8;

KT_INLINE uint32_t four_e4m3(uint32_t low, uint32_t high, float factor) {
  return pack_e4m3(bf16_to_float((uint16_t)low) * factor, bf16_to_float((uint16_t)(low >> 16)) * factor, bf16_to_float((uint16_t)high) * factor,
                   bf16_to_float((uint16_t)(high >> 16)) * factor);
}

// Grid: one block per token, which rounds the token's activations times its score; the first also writes the choices down.
KT_KERNEL(kRouteThreads, 2) moe_route_kernel(Moe a) {
  KT_SHARED(int, expert_M, kNarrowTokens);
  KT_SHARED(float, score_M, kNarrowTokens);
  KT_SHARED(int, chosen_S, kNarrowTokens);
  const int token = blockIdx.x;
  const float inverse = a.inv_scale_3[0];
  grid_wait();
  route(a.logits_ME, a.tokens, a.experts, expert_M, score_M, chosen_S);
  const float factor = score_M[token] * inverse;
  for (int at = threadIdx.x * kRouteValues; at < a.hidden; at += kRouteThreads * kRouteValues) {
    const uint4 eight = load_activation(a.x_MK + ((long long)token * a.hidden + at) * 2);
    *(uint2*)(a.routed_x_MK + (long long)token * a.hidden + at) = uint2{four_e4m3(eight.x, eight.y, factor), four_e4m3(eight.z, eight.w, factor)};
  }
  if (token || (int)threadIdx.x >= a.tokens) return;
  a.expert_M[threadIdx.x] = expert_M[threadIdx.x];
  a.chosen_S[threadIdx.x] = chosen_S[threadIdx.x];
}

struct GatedOfExpert {  // the same epilogue, for the tokens that chose this expert
  static constexpr int kRows = Gated<kE4m3>::kRows, kPairs = Gated<kE4m3>::kPairs;
  Gated<kE4m3> gated;
  const int* expert_M;
  int wanted;
  KT_INLINE void prepare(int row, int token, int tokens) { gated.prepare(row, token, tokens); }
  KT_INLINE void operator()(int token, const float2 (&sum)[2]) const {
    if (expert_M[token] == wanted) gated(token, sum);
  }
};

// Grid (tiles of F, 1 + tokens): row 0 is the shared expert, row s the s-th distinct routed one, if there is one. Two launches, so
// that the routing lies two kernels before the routed experts' and their weights need not wait, took 47 us more of a cycle.
KT_KERNEL(kWarp * kMaxWarps, 1) moe_fc13_kernel(Moe a, Cut cut) {
  if (blockIdx.y == 0) {
    const Stored x{a.x8_MK, a.tokens, a.hidden};
    skinny_gemm<kE4m3, false>(a.shared13_2FK, 2 * a.width, a.width, x, cut, Gated<kE4m3>{{a.shared13_scale_2F, 1}, a.inv_scale_3 + 1, a.shared_h_MF, a.width});
    return;
  }
  grid_wait();
  const int expert = ((volatile const int*)a.chosen_S)[blockIdx.y - 1];
  if (expert < 0) return;
  const Stored x{a.routed_x_MK, a.tokens, a.hidden, a.expert_M, expert};
  const Gated<kE4m3> gated{{a.routed13_scale_E2F + (long long)expert * 2 * a.width, 1}, a.inv_scale_3 + 2, a.routed_h_MF, a.width};
  skinny_gemm<kE4m3, false>(a.routed13_E2FK + (long long)expert * 2 * a.width * a.hidden, 2 * a.width, a.width, x, cut,
                            GatedOfExpert{gated, a.expert_M, expert});
}

// y = shared FC2 + routed FC2. A warp's shares of the shared expert's rows and of each routed one's are one stream of chunks.
KT_KERNEL(kWarp * kMaxWarps, 1) moe_fc2_kernel(Moe a, Cut cut) {
  KT_LAUNCH_SHARED(uint4, shared);
  const Lane lane;
  const int begin = cut.begin(lane.warp), share = cut.begin(lane.warp + 1) - begin, first = blockIdx.x * ScaledBf16::kRows;
  const Ring ring(shared, lane.warp, a.tokens, cut.stages);
  const Rows of_shared(a.shared2_KF, first, first + 8, a.hidden, a.width, lane), of_routed(a.routed2_EKF, first, first + 8, a.hidden, a.width, lane);
  // The routing was made two kernels before. Lane s holds the expert of slot s; slot 0 is the shared one.
  const volatile int *chosen_S = a.chosen_S, *expert_M = a.expert_M;
  const int chosen = lane.id >= 1 && lane.id <= a.tokens ? chosen_S[lane.id - 1] : -1, own = lane.group < a.tokens ? expert_M[lane.group] : -2;
  int slots = 1;
  while (slots <= a.tokens && __shfl_sync(0xFFFFFFFFu, chosen, slots) >= 0) ++slots;
  const int total = slots * share, mine = lane_end(begin + share, a.width, lane) - begin;
  // The stream's head: what is fetched next. Weights run ahead of the wait, tokens cannot.
  Rows rows = of_shared;
  int head_slot = 0, head_chunk = 0;
  auto fetch_weights = [&](int i) {
    if (head_chunk < mine) ring.fetch(i, rows, begin + head_chunk, lane);
  };
  auto fetch_tokens = [&](int i, int slot, int chunk) {
    if (chunk < mine && lane.group < a.tokens) Stored{slot ? a.routed_h_MF : a.shared_h_MF, a.tokens, a.width}.fetch(ring, i, lane.group, begin + chunk, lane);
  };
  auto advance = [&] {
    if (++head_chunk < share) return;
    head_chunk = 0;
    rows = of_routed;
    rows.low += (long long)__shfl_sync(0xFFFFFFFFu, chosen, ++head_slot) * a.hidden * a.width;
  };
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    if (i >= total) break;
    fetch_weights(i);
    advance();
  }
  ScaledBf16 finish{{nullptr, 0}, a.y_MK, a.hidden};
  finish.prepare(first + (int)threadIdx.x / cut.slices % ScaledBf16::kPairs * 2, 0, 0);
  float scale = lane.id == 0 ? a.shared2_scale[0] : chosen >= 0 ? a.routed2_scale_E[chosen] : 0.0f;  // of slot `lane.id`
  grid_wait();
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    if (i < total) fetch_tokens(i, i / share, i % share);
    stage_commit();
  }
  float sum[2][4] = {}, d[2][4] = {};
  for (int at = 0, i = 0, slot = 0, chunk = 0; at < total; ++at) {
    stage_wait<kStages - 1>();
    const int expert = __shfl_sync(0xFFFFFFFFu, chosen, slot);
    const bool inside = chunk < mine, has = inside && lane.group < a.tokens && (!slot || own == expert);
    const uint4 low = inside ? load_shared(ring.weights(i, 0, lane)) : zero16(), high = inside ? load_shared(ring.weights(i, 1, lane)) : zero16();
    multiply<kE4m3>(d, low, high, has ? load_shared(ring.token(i, lane.group, lane.member)) : zero16());
    if (at + kStages < total) {
      fetch_weights(i);
      fetch_tokens(i, head_slot, head_chunk);
      advance();
    }
    stage_commit();
    i = i + 1 == kStages ? 0 : i + 1;
    if (++chunk < share) continue;
    const float factor = __shfl_sync(0xFFFFFFFFu, scale, slot);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sum[0][j] += (d[0][j] + d[1][j]) * factor;
      d[0][j] = d[1][j] = 0.0f;
    }
    chunk = 0;
    ++slot;
  }
  __syncwarp();
  put_sums(sums_of(shared, lane.warp, a.tokens, cut.stages), sum, 0, lane);
  __syncthreads();
  finish_sums<ScaledBf16::kPairs>(shared, cut, a.tokens, finish);
}

}  // namespace kilotok

// fc13_swiglu on the GPU: a tile of gate and the same tile of up in one warp, SwiGLU and E4M3 in the epilogue.
//
// What it is: the activations are read and unpacked once for both.
// What it refuses to be: the down projection.
// Run it: compiled by engine_plugins/ops/compile.py; emulated by tests/engine_plugins/test_gpu_ops.py.
#pragma once
#include "gemm_low_latency/kernel.cuh"

namespace kilotok {

// h [M, F] E4M3 = silu(gate) * up / scale of the next layer's input. Rows are [gate F | up F].
struct Gated {
  RowScale scale;
  const float* inv_out_scale;
  uint8_t* h;
  int width;

  KT_INLINE float value(int f, float gate, float up) const {
    gate *= scale[f];
    up *= scale[width + f];
    return gate * sigmoid(gate) * up * inv_out_scale[0];
  }
  KT_INLINE void operator()(int token, int f, const float2 (&sum)[2]) const {
    if (f >= width) return;
    const float odd = f + 1 < width ? value(f + 1, sum[0].y, sum[1].y) : 0.0f;
    const uint32_t both = pack_e4m3(value(f, sum[0].x, sum[1].x), odd, 0.0f, 0.0f);
    uint8_t* to = h + (long long)token * width + f;
    to[0] = (uint8_t)both;
    if (f + 1 < width) to[1] = (uint8_t)(both >> 8);
  }
};

KT_KERNEL(256, 2) fc13_swiglu_kernel(const void* w, Stored x, Gated finish, Cut cut) {
  grid_launch_dependents();
  skinny_gemm<kE4m3, 2, false>(w, finish.width, finish.width, x, cut, finish);
}

}  // namespace kilotok

// fc13_swiglu on the GPU: a tile of gate and the same tile of up in one warp, SwiGLU and the output's rounding in the epilogue.
//
// What it is: the activations are read and unpacked once for both. E4M3 weights give E4M3, BF16 weights (a draft's) give BF16.
// What it refuses to be: the down projection.
// Run it: compiled by engine_plugins/ops/compile.py; emulated by tests/engine_plugins/test_gpu_ops.py.
#pragma once
#include "gemm_low_latency/kernel.cuh"

namespace kilotok {

// h [M, F] = silu(gate) * up, E4M3 in units of the next layer's input scale, or BF16. Rows are [gate F | up F].
template <int F>
struct Gated {
  RowScale scale;
  const float* inv_out_scale;  // null in BF16
  uint8_t* h;
  int width;

  KT_INLINE float value(int f, float gate, float up) const {
    gate *= scale[f];
    up *= scale[width + f];
    return gate * sigmoid(gate) * up;
  }
  KT_INLINE void put(int token, int f, float value) const {
    if (f >= width) return;
    const long long at = (long long)token * width + f;
    if constexpr (F == kE4m3)
      h[at] = (uint8_t)pack_e4m3(value * inv_out_scale[0], 0.0f, 0.0f, 0.0f);
    else
      ((uint16_t*)h)[at] = float_to_bf16(value);
  }
  KT_INLINE void operator()(int token, int f, const float2 (&sum)[2]) const {
    if (f >= width) return;
    put(token, f, value(f, sum[0].x, sum[1].x));
    if (f + 1 < width) put(token, f + 1, value(f + 1, sum[0].y, sum[1].y));
  }
};

template <int F>
KT_KERNEL(256, 2) fc13_swiglu_kernel(const void* w, Stored x, Gated<F> finish, Cut cut) {
  grid_launch_dependents();
  skinny_gemm<F, 2, false>(w, finish.width, finish.width, x, cut, finish);
}

}  // namespace kilotok

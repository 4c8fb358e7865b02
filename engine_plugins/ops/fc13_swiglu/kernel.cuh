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
  static constexpr int kRows = 8, kPairs = 4;
  RowScale scale;
  const float* inv_out_scale;  // null in BF16
  uint8_t* h;
  int width;
  int f;
  float2 gate_scale, up_scale;
  float inverse;

  KT_INLINE void prepare(int row, int, int) {
    f = row;
    gate_scale = float2{f < width ? scale[f] : 0.0f, f + 1 < width ? scale[f + 1] : 0.0f};
    up_scale = float2{f < width ? scale[width + f] : 0.0f, f + 1 < width ? scale[width + f + 1] : 0.0f};
    inverse = inv_out_scale ? inv_out_scale[0] : 1.0f;
  }
  KT_INLINE void put(int token, int at, float gate, float up) const {
    if (at >= width) return;
    const float value = gate * sigmoid(gate) * up;
    const long long to = (long long)token * width + at;
    if constexpr (F == kE4m3)
      h[to] = (uint8_t)pack_e4m3(value * inverse, 0.0f, 0.0f, 0.0f);
    else
      ((uint16_t*)h)[to] = float_to_bf16(value);
  }
  KT_INLINE void operator()(int token, const float2 (&sum)[2]) const {
    put(token, f, sum[0].x * gate_scale.x, sum[1].x * up_scale.x);
    put(token, f + 1, sum[0].y * gate_scale.y, sum[1].y * up_scale.y);
  }
};

template <int F>
KT_KERNEL(kWarp * kMaxWarps, 2) fc13_swiglu_kernel(const void* w, Stored x, Gated<F> finish, Cut cut) {
  skinny_gemm<F, false>(w, 2 * finish.width, finish.width, x, cut, finish);
}

}  // namespace kilotok

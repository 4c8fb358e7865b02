// qkv_attn_scaling on the GPU: FC_QKV whose epilogue rotates Q and K (RoPE layers) or scales Q by position (NoPE layers).
//
// What it is: mma leaves the interleaved pair (2i, 2i + 1) of a head in one thread, so RoPE costs no exchange. With a cache,
// keys and values also go there, rounded to E4M3, from the same registers.
// What it refuses to be: attention.
// Run it: compiled by engine_plugins/ops/compile.py; emulated by tests/engine_plugins/test_gpu_ops.py.
#pragma once
#include "gemm_low_latency/kernel.cuh"

namespace kilotok {

// Rows are [q_rows | k_rows | v_rows]. cos_sin_SP2: [positions][head_dim / 2][cos, sin] or null (NoPE).
struct Positioned {
  ScaledBf16 out;
  const int64_t* position_M;
  const float2* cos_sin_SP2;
  int q_rows, k_rows, head_dim;
  float floor_scale, attn_scale;  // floor_scale 0: no temperature
  uint8_t *k_SGD, *v_SGD;         // E4M3 cache of one slot, or null
  float inv_k_scale, inv_v_scale;

  KT_INLINE void put(int token, int n, float value) const {
    out.y[(long long)token * out.rows + n] = float_to_bf16(value);
    const int in_cache = n - q_rows;
    if (!k_SGD || in_cache < 0) return;
    const bool key = in_cache < k_rows;
    uint8_t* row = (key ? k_SGD : v_SGD) + position_M[token] * k_rows;
    row[key ? in_cache : in_cache - k_rows] = (uint8_t)pack_e4m3(value * (key ? inv_k_scale : inv_v_scale), 0.0f, 0.0f, 0.0f);
  }
  KT_INLINE void operator()(int token, int n, const float2 (&sum)[1]) const {
    if (n >= out.rows) return;
    float even = sum[0].x * out.scale[n], odd = n + 1 < out.rows ? sum[0].y * out.scale[n + 1] : 0.0f;
    if (cos_sin_SP2 && n < q_rows + k_rows) {
      const float2 turn = cos_sin_SP2[position_M[token] * (head_dim / 2) + n % head_dim / 2];
      const float first = even * turn.x - odd * turn.y;
      odd = even * turn.y + odd * turn.x;
      even = first;
    }
    if (floor_scale > 0.0f && n < q_rows) {
      const float factor = log1pf(floorf(((float)position_M[token] + 1.0f) / floor_scale)) * attn_scale + 1.0f;
      even *= factor;
      odd *= factor;
    }
    put(token, n, even);
    if (n + 1 < out.rows) put(token, n + 1, odd);
  }
};

template <int F>
KT_KERNEL(256, 3) qkv_attn_scaling_kernel(const void* w, Stored x, Positioned finish, Cut cut) {
  grid_launch_dependents();
  skinny_gemm<F, 1, false>(w, finish.out.rows, 0, x, cut, finish);
}

}  // namespace kilotok

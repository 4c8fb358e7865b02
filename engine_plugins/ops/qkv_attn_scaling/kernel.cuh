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
  static constexpr int kRows = 16, kPairs = 8;
  ScaledBf16 out;
  const int64_t* position_M;
  const float2* cos_sin_SP2;
  int q_rows, k_rows, head_dim;
  float floor_scale, attn_scale;  // floor_scale 0: no temperature
  uint8_t *k_SGD, *v_SGD;         // E4M3 cache of one slot, or null
  float inv_k_scale, inv_v_scale;

  int first_token;
  long long first_position;
  float2 first_turn;

  KT_INLINE long long position(int token) const { return position_M ? position_M[token] : 0; }
  KT_INLINE float2 turn(long long at) const {
    return cos_sin_SP2 && out.n < q_rows + k_rows ? cos_sin_SP2[at * (head_dim / 2) + out.n % head_dim / 2] : float2{1.0f, 0.0f};
  }
  KT_INLINE void prepare(int row, int token, int tokens) {
    out.prepare(row, token, tokens);
    first_token = token;
    first_position = token < tokens ? position(token) : 0;
    first_turn = turn(first_position);
  }
  KT_INLINE void put(int token, int n, long long position, float value) const {
    out.y[(long long)token * out.rows + n] = float_to_bf16(value);
    const int in_cache = n - q_rows;
    if (!k_SGD || in_cache < 0) return;
    const bool key = in_cache < k_rows;
    uint8_t* row = (key ? k_SGD : v_SGD) + position * k_rows;
    row[key ? in_cache : in_cache - k_rows] = (uint8_t)pack_e4m3(value * (key ? inv_k_scale : inv_v_scale), 0.0f, 0.0f, 0.0f);
  }
  KT_INLINE void operator()(int token, const float2 (&sum)[1]) const {
    const int n = out.n;
    if (n >= out.rows) return;
    const long long position = token == first_token ? first_position : this->position(token);
    const float2 angle = token == first_token ? first_turn : turn(position);
    const float x = sum[0].x * out.factor.x, y = sum[0].y * out.factor.y;
    float even = x * angle.x - y * angle.y, odd = x * angle.y + y * angle.x;
    if (floor_scale > 0.0f && n < q_rows) {
      const float factor = log1pf(floorf(((float)position + 1.0f) / floor_scale)) * attn_scale + 1.0f;
      even *= factor;
      odd *= factor;
    }
    put(token, n, position, even);
    if (n + 1 < out.rows) put(token, n + 1, position, odd);
  }
};

template <int F>
KT_KERNEL(kWarp * kMaxWarps, 2) qkv_attn_scaling_kernel(const void* w, Stored x, Positioned finish, Cut cut) {
  skinny_gemm<F, false>(w, finish.out.rows, 8, x, cut, finish);
}

}  // namespace kilotok

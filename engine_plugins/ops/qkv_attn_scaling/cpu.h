// qkv_attn_scaling on the CPU: FC_QKV for one head, then RoPE or temperature, then into the query buffer or the KV cache.
//
// What it is: the epilogue works on one head's tile while it is in L1. K and V leave in the cache's format and layout:
// K [S/16][D/2][16][2] and V [D/16][S/2][16][2], the same shape as a weight, so attention is the GEMM tile again.
// What it refuses to be: aware of requests; it gets (slot, position) per row.
// Run it: compiled by engine_plugins/native/compiler.py.
#pragma once
#include "gemm_low_latency/cpu.h"

namespace KILOTOK_NAMESPACE {

struct CacheView {  // one layer's cache
  uint8_t *k, *v;
  size_t stride;  // bytes per (slot, kv head)
  float k_scale, v_scale;
};

static void rotate(float* x, int head_dim, const float* cos_D, const float* sin_D) {
  for (int i = 0; i < head_dim / 2; ++i) {
    float even = x[2 * i], odd = x[2 * i + 1];
    x[2 * i] = even * cos_D[i] - odd * sin_D[i];
    x[2 * i + 1] = even * sin_D[i] + odd * cos_D[i];
  }
}

static void l2_norm(float* x, int head_dim, float eps) {
  V sum = vzero();
  for (int i = 0; i < head_dim; i += kLanes) sum = vfma(vload(x + i), vload(x + i), sum);
  V factor = vset1(1.0f / sqrtf(vsum(sum) / (float)head_dim + eps));
  for (int i = 0; i < head_dim; i += kLanes) vstore(x + i, vmul(vload(x + i), factor));
}

// log(floor((position + 1) / floor_scale) + 1) * attn_scale + 1
static inline float attention_temperature(const Attention& a, int position) {
  return log1pf(floorf((float)(position + 1) / a.floor_scale)) * a.attn_scale + 1.0f;
}

static void store_kv(const Attention& a, const CacheView& cache, bool is_k, int slot, int head, int position, float* x) {
  const int D = a.head_dim;
  uint8_t* base = (is_k ? cache.k : cache.v) + ((size_t)slot * a.kv_heads + head) * cache.stride;
  float inv = 1.0f / (is_k ? cache.k_scale : cache.v_scale);
  if (a.cache_dtype == kFp8)
    for (int i = 0; i < D; i += kLanes) vstore(x + i, vquantize(vload(x + i), inv));
  for (int d = 0; d < D; ++d) {
    size_t at = is_k ? ((((size_t)(position / kLanes) * (D / 2) + d / 2) * kLanes + position % kLanes) * 2 + d % 2)
                     : ((((size_t)(d / kLanes) * (a.max_seq / 2) + position / 2) * kLanes + d % kLanes) * 2 + position % 2);
    if (a.cache_dtype == kFp8) base[at] = encode_e4m3(x[d]);
    else ((uint16_t*)base)[at] = encode_bf16(x[d]);
  }
}

// One head (queries first, then keys, then values) of all rows. tile: [rows][D] scratch.
static void qkv_attn_scaling(const Matrix& m, const Attention& a, const CacheView& cache, bool rope, int head, const float* const* x,
                             const Rows& rows, float* tile, float* q_out) {
  const int D = a.head_dim, groups = D / kLanes, q_width = a.heads * D;
  gemm_low_latency(m, 0, head * groups, groups, x, rows.count, tile, D);
  const bool is_q = head < a.heads, is_k = !is_q && head < a.heads + a.kv_heads;
  for (int r = 0; r < rows.count; ++r) {
    float* row = tile + (size_t)r * D;
    const int position = rows.position[r];
    if ((is_q || is_k) && rope) {
      rotate(row, D, a.cos_SD + (size_t)position * (D / 2), a.sin_SD + (size_t)position * (D / 2));
      if (a.use_qk_norm) l2_norm(row, D, a.eps);
    }
    if (!is_q) {
      store_kv(a, cache, is_k, rows.slot[r], is_k ? head - a.heads : head - a.heads - a.kv_heads, position, row);
      continue;
    }
    V factor = vset1(!rope && a.temperature_tuning ? attention_temperature(a, position) : 1.0f);
    for (int i = 0; i < D; i += kLanes) vstore(q_out + (size_t)r * q_width + head * D + i, vmul(vload(row + i), factor));
  }
}

}  // namespace KILOTOK_NAMESPACE

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

// Sixteen codes of one position into a cache block of Code: K has two dimensions side by side, V two positions.
template <class Code>
KT_INLINE void scatter(const Code* codes, bool is_k, int d, int head_dim, int max_seq, int position, Code* base) {
  if (is_k) {
    Code* at = base + (((size_t)(position / kLanes) * (head_dim / 2) + d / 2) * kLanes + position % kLanes) * 2;
    for (int i = 0; i < kLanes; i += 2, at += 2 * kLanes) at[0] = codes[i], at[1] = codes[i + 1];
  } else {
    Code* at = base + ((size_t)(d / kLanes) * (max_seq / 2) + position / 2) * kLanes * 2 + position % 2;
    for (int i = 0; i < kLanes; ++i) at[2 * i] = codes[i];
  }
}

static void store_kv(const Attention& a, const CacheView& cache, bool is_k, int slot, int head, int position, float* x) {
  const int D = a.head_dim;
  uint8_t* base = (is_k ? cache.k : cache.v) + ((size_t)slot * a.kv_heads + head) * cache.stride;
  const float inv = 1.0f / (is_k ? cache.k_scale : cache.v_scale);
  uint8_t codes[kLanes];
  uint16_t words[kLanes];
  for (int d = 0; d < D; d += kLanes) {
    if (a.cache_dtype == kFp8) {
      vstore(x + d, vquantize(vload(x + d), inv));
      encode_e4m3(x + d, codes);
      scatter(codes, is_k, d, D, a.max_seq, position, base);
    } else {
      for (int i = 0; i < kLanes; ++i) words[i] = encode_bf16(x[d + i]);
      scatter(words, is_k, d, D, a.max_seq, position, (uint16_t*)base);
    }
  }
}

// Heads first .. first + count (queries, then keys, then values) of all rows. tile: [rows][count x D] scratch.
static void qkv_attn_scaling(const Matrix& m, const Attention& a, const CacheView& cache, bool rope, int first, int count,
                             const float* const* x, const Rows& rows, float* tile, float* q_out) {
  const int D = a.head_dim, groups = D / kLanes, q_width = a.heads * D;
  gemm_low_latency(m, 0, first * groups, count * groups, x, rows.count, tile, count * D);
  for (int i = 0; i < rows.count * count; ++i) {
    const int r = i / count, head = first + i % count;
    const bool is_q = head < a.heads, is_k = !is_q && head < a.heads + a.kv_heads;
    float* row = tile + (size_t)i * D;
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
    for (int d = 0; d < D; d += kLanes) vstore(q_out + (size_t)r * q_width + head * D + d, vmul(vload(row + d), factor));
  }
}

}  // namespace KILOTOK_NAMESPACE

// attention_decode on the CPU: a tile of one slot's rows, one KV head, against the cache.
//
// What it is: scores = GEMM tile over K (lanes are 16 positions), exact two-pass softmax per row, output = GEMM tile over V
// (lanes are 16 head dimensions, inputs are positions). Positions that a row may not see get probability 0, which adds
// nothing bit for bit: the result does not depend on which rows share a tile.
// What it refuses to be: split over positions; with two cores the (row tile, KV head) pairs are enough work.
// Run it: compiled by engine_plugins/native/compiler.py.
#pragma once
#include "allreduce_rmsnorm/cpu.h"
#include "qkv_attn_scaling/cpu.h"

namespace KILOTOK_NAMESPACE {

constexpr int kAttentionRows = 8;

struct RowTile {
  int first, count;  // rows of one slot, positions ascending
};

// Softmax over x[0, size); only [low, high] is visible, the rest becomes 0. Returns 1 / sum.
static float softmax_visible(float* x, int size, int low, int high, float scale) {
  auto hidden = [&](int i) { return i < low || i + kLanes > high + 1; };  // some of these sixteen are
  V best = vset1(-INFINITY);
  for (int i = 0; i < size; i += kLanes) best = vmax(best, hidden(i) ? vlanes(vload(x + i), low - i, high - i, -INFINITY) : vload(x + i));
  const V top = vset1(vmax_lane(best)), factor = vset1(scale);
  V sum = vzero();
  for (int i = 0; i < size; i += kLanes) {
    V p = vexp(vmul(vsub(vload(x + i), top), factor));
    if (hidden(i)) p = vlanes(p, low - i, high - i, 0.0f);
    vstore(x + i, p);
    sum = vadd(sum, p);
  }
  return 1.0f / vsum(sum);
}

static void attention_decode(const Attention& a, const CacheView& cache, bool local, const RowTile& tile, int kv_head, const Rows& rows,
                             const float* q, float inv_out_scale, float* scratch, float* out) {
  const int D = a.head_dim, group = a.heads / a.kv_heads, width = a.heads * D, num = tile.count * group;
  const int chunk = local ? a.chunk : 0;
  const int* position = rows.position + tile.first;
  const int first = chunk ? position[0] / chunk * chunk : 0, last = position[tile.count - 1];
  const int begin = first / kLanes * kLanes, size = padded(last + 1 - begin);
  const bool fp8 = a.cache_dtype == kFp8;
  const size_t element = fp8 ? 1 : 2;
  const size_t head_base = ((size_t)rows.slot[tile.first] * a.kv_heads + kv_head) * cache.stride;
  const float* x[kAttentionRows * 64];
  for (int i = 0; i < num; ++i)
    x[i] = q + (size_t)(tile.first + i / group) * width + (kv_head * group + i % group) * D;
  float* scores = scratch;                              // [num][size]
  float* result = scratch + (size_t)num * size;         // [num][D]
  const size_t k_group = (size_t)D * kLanes * element;  // bytes of 16 positions
  const uint8_t* k = cache.k + head_base + begin / kLanes * k_group;
  if (fp8) gemm_rows<kFp8>(k, k_group, size / kLanes, D / 2, x, num, scores, size);
  else gemm_rows<kBf16>(k, k_group, size / kLanes, D / 2, x, num, scores, size);
  const float scale = (fp8 ? cache.k_scale * 256.0f : 1.0f) / sqrtf((float)D);
  float inv_sum[kAttentionRows * 64];
  for (int i = 0; i < num; ++i) {
    const int at = position[i / group], low = chunk ? at / chunk * chunk : 0;
    inv_sum[i] = softmax_visible(scores + (size_t)i * size, size, low - begin, at - begin, scale);
    x[i] = scores + (size_t)i * size;
  }
  const size_t v_group = (size_t)a.max_seq * kLanes * element;
  const uint8_t* v = cache.v + head_base + (size_t)begin * kLanes * element;
  if (fp8) gemm_rows<kFp8>(v, v_group, D / kLanes, size / 2, x, num, result, D);
  else gemm_rows<kBf16>(v, v_group, D / kLanes, size / 2, x, num, result, D);
  for (int i = 0; i < num; ++i) {
    const float factor = inv_sum[i] * (fp8 ? cache.v_scale * 256.0f : 1.0f);
    quantize_row(result + (size_t)i * D, factor, inv_out_scale, D, out + (size_t)(tile.first + i / group) * width, (kv_head * group + i % group) * D);
  }
}

}  // namespace KILOTOK_NAMESPACE

// The target as separate operators: what the fused phases of layers.h are measured against.
//
// What it is: one pass over memory and one join per operator, as an engine without fusion runs them: norm, quantize, each
// projection, RoPE, cache write, attention, add, activation and every expert on their own. The same GEMM tiles, threads and
// SIMD, and the same bits: only what is between the operators differs.
// What it refuses to be: slowed down on purpose, or served; Engine(fused=False) and the source's server in validate use it.
// Run it: `python -m engine_plugins.native.bench --bundle DIR --no-speculation --no-fusion`.
#pragma once
#include "layers.h"

namespace KILOTOK_NAMESPACE {

// One operator that works on each row by itself.
template <class F>
static void for_rows(Engine& e, Group group, int rows, F row) {
  auto run = [&](int r, int) { row(r); };
  phase(e, group, rows, run);
}

static void op_norm(Engine& e, const float* from, const float* weight, int rows, float* to) {
  const int H = e.hidden;
  for_rows(e, kNorm, rows, [&](int r) { rmsnorm(from + (size_t)r * H, weight, H, e.eps, 0.0f, to + (size_t)r * H); });
}

static void op_quantize(Engine& e, Group group, const Matrix& next, int rows, float* x, size_t stride) {
  if (!(next.inv_input_scale > 0)) return;
  for_rows(e, group, rows, [&](int r) { quantize_row(x + r * stride, 1.0f, next.inv_input_scale, next.k, x + r * stride); });
}

// y[r][0 .. 16*groups) = x[r] times groups first, first + every, ... of a matrix of a stack.
static void op_gemm(Engine& e, Group group, const Matrix& m, int index, int first, int every, int groups, const float* x, size_t stride,
                    int rows, float* y, int ldy) {
  Cut cut(e, groups, 1);
  auto run = [&](int chunk, int) {
    RowPointers p(x, stride, rows);
    const int g = cut.first(chunk);
    gemm_low_latency(m, index, first + g * every, cut.end(chunk) - g, p.at, rows, y + g * kLanes, ldy, every);
  };
  phase(e, group, cut.chunks, run);
}

static void op_add(Engine& e, Group group, int rows, const float* x, float* sum) {
  const size_t H = e.hidden;
  for_rows(e, group, rows, [&](int r) {
    for (size_t i = r * H; i < (r + 1) * H; i += kLanes) vstore(sum + i, vadd(vload(sum + i), vload(x + i)));
  });
}

static void unfused_attention(Engine& e, const Layer& layer, const CacheView& cache, const RowTile* tiles, int num_tiles) {
  const Attention& a = e.attention;
  const Rows& rows = e.rows;
  const int D = a.head_dim, groups = D / kLanes, count = rows.count, q_width = a.heads * D, kv_width = a.kv_heads * D;
  float *x = e.unfused[0], *k = e.unfused[1], *v = e.unfused[2];
  op_norm(e, e.residual, layer.input_norm, count, x);
  op_quantize(e, kQkv, layer.qkv, count, x, e.hidden);
  op_gemm(e, kQkv, layer.qkv, 0, 0, 1, a.heads * groups, x, e.hidden, count, e.q, q_width);
  op_gemm(e, kQkv, layer.qkv, 0, a.heads * groups, 1, a.kv_heads * groups, x, e.hidden, count, k, kv_width);
  op_gemm(e, kQkv, layer.qkv, 0, (a.heads + a.kv_heads) * groups, 1, a.kv_heads * groups, x, e.hidden, count, v, kv_width);
  auto heads_of = [&](float* base, int heads, auto head) {
    for_rows(e, kQkv, count, [&](int r) {
      for (int h = 0; h < heads; ++h) head(base + ((size_t)r * heads + h) * D, r, h);
    });
  };
  if (layer.rope) {
    auto turn = [&](float* row, int r, int) {
      const size_t at = (size_t)rows.position[r] * (D / 2);
      rotate(row, D, a.cos_SD + at, a.sin_SD + at);
    };
    auto norm = [&](float* row, int, int) { l2_norm(row, D, a.eps); };
    heads_of(e.q, a.heads, turn), heads_of(k, a.kv_heads, turn);
    if (a.use_qk_norm) heads_of(e.q, a.heads, norm), heads_of(k, a.kv_heads, norm);
  } else if (a.temperature_tuning) {
    heads_of(e.q, a.heads, [&](float* row, int r, int) { quantize_row(row, attention_temperature(a, rows.position[r]), 0.0f, D, row); });
  }
  heads_of(k, a.kv_heads, [&](float* row, int r, int h) { store_kv(a, cache, true, rows.slot[r], h, rows.position[r], row); });
  heads_of(v, a.kv_heads, [&](float* row, int r, int h) { store_kv(a, cache, false, rows.slot[r], h, rows.position[r], row); });
  auto attend = [&](int chunk, int thread) {
    attention_decode(a, cache, layer.rope, tiles[chunk / a.kv_heads], chunk % a.kv_heads, rows, e.q, 0.0f, e.score_scratch[thread],
                     e.attended);
  };
  phase(e, kAttention, num_tiles * a.kv_heads, attend);
  op_quantize(e, kO, layer.o, count, e.attended, q_width);
  op_gemm(e, kO, layer.o, 0, 0, 1, layer.o.n / kLanes, e.attended, q_width, count, x, e.hidden);
  op_add(e, kO, count, x, e.residual);
}

// out = down(silu(gate x) * up x) of one matrix pair in a stack; x is rounded already.
static void unfused_mlp(Engine& e, Group group, const Matrix& gate_up, const Matrix& down, int index, const float* x, int rows,
                        float* out) {
  const int groups = gate_up.n / (2 * kLanes), width = groups * kLanes;
  float *gate = e.unfused[1], *up = e.unfused[2];
  op_gemm(e, group, gate_up, index, 0, 2, groups, x, e.hidden, rows, gate, width);
  op_gemm(e, group, gate_up, index, 1, 2, groups, x, e.hidden, rows, up, width);
  auto each = [&](auto f) {
    for_rows(e, group, rows, [&](int r) {
      for (size_t i = (size_t)r * width; i < (size_t)(r + 1) * width; i += kLanes) vstore(gate + i, f(i));
    });
  };
  each([&](size_t i) { return vsilu(vload(gate + i)); });
  each([&](size_t i) { return vmul(vload(gate + i), vload(up + i)); });
  op_quantize(e, group, down, rows, gate, width);
  op_gemm(e, group, down, index, 0, 1, down.n / kLanes, gate, width, rows, out, e.hidden);
}

static void unfused_moe(Engine& e, const Layer& layer, int rows) {
  const size_t H = e.hidden;
  float *x = e.unfused[0], *out = e.unfused[3], *routed = e.unfused[4], *chosen = e.unfused[5], *answer = e.unfused[6];
  float* logits = e.unfused[1];
  int *expert = e.expert_scratch[0], *order = expert + e.max_rows, *start = order + e.max_rows;
  float* score = e.score_scratch[0];
  op_norm(e, e.residual, layer.post_norm, rows, x);
  op_gemm(e, kMoe, layer.router, 0, 0, 1, layer.router.n / kLanes, x, H, rows, logits, layer.router.n);
  for_rows(e, kMoe, rows, [&](int r) { choose_expert(logits + (size_t)r * layer.router.n, e.num_experts, expert[r], score[r]); });
  group_by_expert(expert, rows, e.num_experts, order, start);
  for_rows(e, kMoe, rows, [&](int r) { quantize_row(x + r * H, score[r], 0.0f, H, routed + r * H); });
  op_quantize(e, kMoe, layer.gate_up, rows, x, H);
  unfused_mlp(e, kMoe, layer.gate_up, layer.down, 0, x, rows, out);
  for (int i = 0; i < e.num_experts; ++i) {
    const int count = start[i + 1] - start[i];
    if (!count) continue;
    for_rows(e, kMoe, count, [&](int r) { memcpy(chosen + r * H, routed + order[start[i] + r] * H, H * sizeof(float)); });
    op_quantize(e, kMoe, layer.expert_gate_up, count, chosen, H);
    unfused_mlp(e, kMoe, layer.expert_gate_up, layer.expert_down, i, chosen, count, answer);
    for_rows(e, kMoe, count, [&](int r) {
      float* to = out + order[start[i] + r] * H;
      for (size_t c = 0; c < H; c += kLanes) vstore(to + c, vadd(vload(to + c), vload(answer + r * H + c)));
    });
  }
  op_add(e, kMoe, rows, out, e.residual);
}

static void unfused_layer(Engine& e, const Layer& layer, const CacheView& cache, const RowTile* tiles, int num_tiles) {
  const int rows = e.rows.count;
  const size_t H = e.hidden;
  unfused_attention(e, layer, cache, tiles, num_tiles);
  if (layer.moe) {
    unfused_moe(e, layer, rows);
  } else {
    op_norm(e, e.residual, layer.post_norm, rows, e.unfused[0]);
    op_quantize(e, kMlp, layer.gate_up, rows, e.unfused[0], H);
    unfused_mlp(e, kMlp, layer.gate_up, layer.down, 0, e.unfused[0], rows, e.unfused[3]);
    op_add(e, kMlp, rows, e.unfused[3], e.residual);
  }
  if (layer.capture >= 0)
    for_rows(e, kEmbed, rows, [&](int r) {
      memcpy(e.features + ((size_t)r * e.num_captures + layer.capture) * H, e.residual + r * H, H * sizeof(float));
    });
}

static void unfused_head(Engine& e) {
  const Rows& rows = e.rows;
  const size_t H = e.hidden;
  if (!rows.num_logits) return;
  for_rows(e, kLmHead, rows.num_logits, [&](int i) { memcpy(e.unfused[3] + i * H, e.residual + rows.logit_row[i] * H, H * sizeof(float)); });
  op_norm(e, e.unfused[3], e.norm, rows.num_logits, e.unfused[0]);
  op_gemm(e, kLmHead, e.lm_head, 0, 0, 1, e.lm_head.n / kLanes, e.unfused[0], H, rows.num_logits, e.logits, e.lm_head.n);
}

}  // namespace KILOTOK_NAMESPACE

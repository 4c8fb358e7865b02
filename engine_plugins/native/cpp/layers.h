// The phases of one forward pass: each is a lambda over chunks, run by the pool; in between only the pool's join.
//
// What it is: target layers and the EAGLE-3 head, composed from the ops. Threads normalize (and route) rows for themselves
// before their first chunk, so a layer needs five joins: QKV, attention, O, gate/up, down.
// What it refuses to be: aware of requests; it works on Rows.
// Run it: compiled by engine_plugins/native/compiler.py, once per instruction set.
#pragma once
#include "attention_decode/cpu.h"
#include "fc13_swiglu/cpu.h"
#include "gemm_low_latency/cpu.h"
#include "moe_top1/cpu.h"
#include "router/cpu.h"

namespace KILOTOK_NAMESPACE {

KT_INLINE uint64_t ticks() { return __rdtsc(); }

template <class F>
static void invoke(void* context, int chunk, int thread) {
  (*(F*)context)(chunk, thread);
}

// Runs f(chunk, thread) over the pool and books the time to `group`.
template <class F>
static void phase(Engine& e, Group group, int chunks, F& f) {
  const uint64_t start = ticks();
  pool_run(e.pool, invoke<F>, &f, chunks);
  e.ticks[group] += ticks() - start;
  ++e.phases;
}

// Each thread's own one-time work in a phase. Thread 0's share is moved from the phase's group to kNorm.
struct Prologue {
  Engine& e;
  Group group;
  uint8_t done[kMaxThreads];
  Prologue(Engine& engine, Group g) : e(engine), group(g) { memset(done, 0, sizeof done); }
  template <class F>
  KT_INLINE_MEMBER void once(int thread, F f) {
    if (done[thread]) return;
    done[thread] = 1;
    const uint64_t start = ticks();
    f();
    if (thread == 0) {
      const uint64_t spent = ticks() - start;
      e.ticks[kNorm] += spent;
      e.ticks[group] -= spent;
    }
  }
};

// How a number of equal pieces, each of some groups of outputs, is cut: up to four chunks per thread, so that stealing can even
// out, as long as a chunk has eight groups. Tiles of fewer wait for their own sums.
struct Cut {
  int per_chunk, chunks, pieces;
  Cut(const Engine& e, int pieces_, int groups_each) : pieces(pieces_) {
    const int threads = pool_threads(e.pool), share = (pieces + threads - 1) / threads, full = share * groups_each / 8;
    const int cuts = full < 1 ? 1 : full < 4 ? full : 4;
    per_chunk = (share + cuts - 1) / cuts;
    chunks = (pieces + per_chunk - 1) / per_chunk;
  }
  int first(int chunk) const { return chunk * per_chunk; }
  int end(int chunk) const { return first(chunk) + per_chunk < pieces ? first(chunk) + per_chunk : pieces; }
};

struct RowPointers {  // rows of one thread's scratch
  const float* at[kMaxRows];
  RowPointers(const float* base, size_t stride, int rows) {
    for (int r = 0; r < rows; ++r) at[r] = base + r * stride;
  }
  RowPointers() {}
  void set(const float* base, size_t stride, int rows) {
    for (int r = 0; r < rows; ++r) at[r] = base + r * stride;
  }
};

static int tile_rows(const Rows& rows, RowTile* tiles) {
  int count = 0;
  for (int r = 0; r < rows.count; ++r) {
    RowTile* last = count ? &tiles[count - 1] : nullptr;
    if (last && last->count < kAttentionRows && rows.slot[r] == rows.slot[r - 1] && rows.position[r] == rows.position[r - 1] + 1) ++last->count;
    else tiles[count++] = {r, 1};
  }
  return count;
}

// Heads from `first_head` on (queries, keys, values) of all rows: queries to e.q, keys and values to the cache.
static void qkv_block(Engine& e, const Attention& a, const Matrix& qkv, const CacheView& cache, bool rope, const Rows& rows, int first_head,
                      Group group, void (*prepare)(Engine&, const void*, const Rows&, float*), const void* context) {
  const int in = qkv.k, D = a.head_dim, heads = a.heads + 2 * a.kv_heads - first_head;
  Prologue prologue(e, group);
  Cut cut(e, heads, D / kLanes);
  auto run = [&](int chunk, int thread) {
    float* x = e.scratch[thread];
    prologue.once(thread, [&] { prepare(e, context, rows, x); });
    RowPointers p(x, in, rows.count);
    const int end = cut.end(chunk), block = e.hidden > D ? e.hidden / D : 1;  // as many as the scratch holds
    for (int head = cut.first(chunk); head < end; head += block)
      qkv_attn_scaling(qkv, a, cache, rope, first_head + head, end - head < block ? end - head : block, p.at, rows,
                       e.score_scratch[thread], e.q);
  };
  phase(e, group, cut.chunks, run);
}

// residual += o(attention of e.q over the cache)
static void attention_block(Engine& e, const Attention& a, const Matrix& o, const CacheView& cache, bool rope, const Rows& rows,
                            const RowTile* tiles, int num_tiles, Group attention_group, Group o_group, float* residual) {
  const int width = a.heads * a.head_dim, H = e.hidden;
  auto attend = [&](int chunk, int thread) {
    attention_decode(a, cache, rope, tiles[chunk / a.kv_heads], chunk % a.kv_heads, rows, e.q, o.inv_input_scale, e.score_scratch[thread],
                     e.attended);
  };
  phase(e, attention_group, num_tiles * a.kv_heads, attend);
  Cut cut(e, o.n / kLanes, 1);
  auto run = [&](int chunk, int thread) {
    const int g0 = cut.first(chunk), groups = cut.end(chunk) - g0, columns = groups * kLanes;
    float* tile = e.score_scratch[thread];
    RowPointers p(e.attended, width, rows.count);
    gemm_low_latency(o, 0, g0, groups, p.at, rows.count, tile, columns);
    for (int r = 0; r < rows.count; ++r)
      for (int c = 0; c < columns; c += kLanes) {
        float* to = residual + (size_t)r * H + g0 * kLanes + c;
        vstore(to, vadd(vload(to), vload(tile + (size_t)r * columns + c)));
      }
  };
  phase(e, o_group, cut.chunks, run);
}

static void prepare_layer(Engine& e, const void* context, const Rows& rows, float* x) {
  const Layer& layer = *(const Layer*)context;
  for (int r = 0; r < rows.count; ++r)
    rmsnorm(e.residual + (size_t)r * e.hidden, layer.input_norm, e.hidden, e.eps, layer.qkv.inv_input_scale, x + (size_t)r * e.hidden);
}

static void dense_block(Engine& e, const Matrix& gate_up, const Matrix& down, const float* norm, float eps, int rows, float* residual,
                        int capture, Group group) {
  const int H = e.hidden;
  {
    Prologue prologue(e, group);
    Cut cut(e, gate_up.n / (2 * kLanes), 2);
    auto run = [&](int chunk, int thread) {
      float* x = e.scratch[thread];
      prologue.once(thread, [&] {
        for (int r = 0; r < rows; ++r) rmsnorm(residual + (size_t)r * H, norm, H, eps, gate_up.inv_input_scale, x + (size_t)r * H);
      });
      RowPointers in(x, H, rows), out(e.gated, e.gated_stride, rows);
      fc13_swiglu(gate_up, 0, cut.first(chunk), cut.end(chunk), in.at, rows, down.inv_input_scale, (float* const*)out.at);
    };
    phase(e, group, cut.chunks, run);
  }
  {
    Cut cut(e, down.n / kLanes, 1);
    auto run = [&](int chunk, int thread) {
      const int g0 = cut.first(chunk), groups = cut.end(chunk) - g0, columns = groups * kLanes;
      float* tile = e.score_scratch[thread];
      RowPointers in(e.gated, e.gated_stride, rows);
      gemm_low_latency(down, 0, g0, groups, in.at, rows, tile, columns);
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < columns; c += kLanes) {
          const int column = g0 * kLanes + c;
          float* to = residual + (size_t)r * H + column;
          V sum = vadd(vload(to), vload(tile + (size_t)r * columns + c));
          vstore(to, sum);
          if (capture >= 0) vstore(e.features + ((size_t)r * e.num_captures + capture) * H + column, sum);
        }
    };
    phase(e, group, cut.chunks, run);
  }
}

// Per thread: x (shared expert's input) and routed x, each [rows][H]; expert order in expert_scratch.
struct Routed {
  int *order, *start, *expert;
  float* score;
};

static void moe_block(Engine& e, const Layer& layer, int rows) {
  const int H = e.hidden, E = e.num_experts;
  int order_all[kMaxRows], start_all[kMaxRows + 1];  // thread 0's copy outlives the first phase
  const int width = layer.gate_up.n / 2;
  {
    Prologue prologue(e, kMoe);
    Cut cut(e, width / kLanes, 4);
    auto run = [&](int chunk, int thread) {
      float *x = e.scratch[thread], *routed = x + (size_t)e.max_rows * H;
      int* order = e.expert_scratch[thread];
      int *expert = order + e.max_rows, *start = expert + e.max_rows;
      prologue.once(thread, [&] {
        float* score = e.score_scratch[thread];
        float* logits = score + e.max_rows;
        for (int r = 0; r < rows; ++r) rmsnorm(e.residual + (size_t)r * H, layer.post_norm, H, e.eps, 0.0f, x + (size_t)r * H);
        RowPointers p(x, H, rows);
        router(layer.router, E, p.at, rows, logits, expert, score);
        group_by_expert(expert, rows, E, order, start);
        for (int r = 0; r < rows; ++r) {
          quantize_row(x + (size_t)r * H, score[r], layer.expert_gate_up.inv_input_scale, H, routed + (size_t)r * H);
          quantize_row(x + (size_t)r * H, 1.0f, layer.gate_up.inv_input_scale, H, x + (size_t)r * H);
        }
      });
      RowPointers in(x, H, rows), out(e.gated, e.gated_stride, rows), in_routed(routed, H, rows),
          out_routed(e.gated_expert, e.gated_stride, rows), sorted_in, sorted_out;
      const int c0 = cut.first(chunk), c1 = cut.end(chunk);
      fc13_swiglu(layer.gate_up, 0, c0, c1, in.at, rows, layer.down.inv_input_scale, (float* const*)out.at);
      moe_fc13(layer.expert_gate_up, c0, c1, in_routed.at, order, start, E, sorted_in.at, (float**)sorted_out.at,
               (float* const*)out_routed.at, layer.expert_down.inv_input_scale);
      if (chunk == 0) {  // whoever ran chunk 0 hands the order on to the next phase
        memcpy(order_all, order, sizeof(int) * rows);
        memcpy(start_all, start, sizeof(int) * (E + 1));
      }
    };
    phase(e, kMoe, cut.chunks, run);
  }
  {
    Cut cut(e, layer.down.n / kLanes, 2);
    auto run = [&](int chunk, int thread) {
      const int g0 = cut.first(chunk), groups = cut.end(chunk) - g0, columns = groups * kLanes;
      float *shared = e.score_scratch[thread], *routed = shared + (size_t)rows * columns;
      RowPointers in(e.gated, e.gated_stride, rows), sorted;
      gemm_low_latency(layer.down, 0, g0, groups, in.at, rows, shared, columns);
      for (int x = 0; x < E; ++x) {
        const int begin = start_all[x], count = start_all[x + 1] - begin;
        if (!count) continue;
        for (int i = 0; i < count; ++i) sorted.at[i] = e.gated_expert + (size_t)order_all[begin + i] * e.gated_stride;
        gemm_low_latency(layer.expert_down, x, g0, groups, sorted.at, count, routed, columns);
        for (int i = 0; i < count; ++i) {
          const int r = order_all[begin + i];
          for (int c = 0; c < columns; c += kLanes) {
            const int column = g0 * kLanes + c;
            float* to = e.residual + (size_t)r * H + column;
            V out = vadd(vload(shared + (size_t)r * columns + c), vload(routed + (size_t)i * columns + c));
            V sum = vadd(vload(to), out);
            vstore(to, sum);
            if (layer.capture >= 0) vstore(e.features + ((size_t)r * e.num_captures + layer.capture) * H + column, sum);
          }
        }
      }
    };
    phase(e, kMoe, cut.chunks, run);
  }
}

// logits[i] = norm(hidden of row which[i]) @ head, for `count` rows.
static void head_block(Engine& e, const Matrix& head, const float* norm, float eps, const float* hidden, const int* which, int count,
                       float* logits, int ldl, Group group) {
  if (count == 0) return;
  const int H = e.hidden;
  Prologue prologue(e, group);
  Cut cut(e, head.n / kLanes, 1);
  auto run = [&](int chunk, int thread) {
    float* x = e.scratch[thread];
    prologue.once(thread, [&] {
      for (int i = 0; i < count; ++i) rmsnorm(hidden + (size_t)which[i] * H, norm, H, eps, 0.0f, x + (size_t)i * H);
    });
    RowPointers p(x, H, count);
    const int g0 = cut.first(chunk), groups = cut.end(chunk) - g0;
    gemm_low_latency(head, 0, g0, groups, p.at, count, logits + g0 * kLanes, ldl);
  };
  phase(e, group, cut.chunks, run);
}

static void embed_row(const uint16_t* table, int token, int size, float* out) {
  for (int i = 0; i < size; i += kLanes) vstore(out + i, vbf16(table + (size_t)token * size + i));
}

static void unfused_layer(Engine& e, const Layer& layer, const CacheView& cache, const RowTile* tiles, int num_tiles);
static void unfused_head(Engine& e);

// Target forward over e.rows: fills residual, features, logits of the rows that asked for them.
static void target_forward(Engine& e) {
  const Rows& rows = e.rows;
  uint64_t start = ticks();
  for (int r = 0; r < rows.count; ++r) embed_row(e.embed, rows.token[r], e.hidden, e.residual + (size_t)r * e.hidden);
  RowTile tiles[kMaxRows];
  const int num_tiles = tile_rows(rows, tiles);
  e.ticks[kEmbed] += ticks() - start;
  const size_t layer_bytes = e.cache_stride * e.attention.kv_heads * e.max_slots;
  for (int l = 0; l < e.num_layers; ++l) {
    const Layer& layer = e.layers[l];
    const CacheView cache{e.k_cache + l * layer_bytes, e.v_cache + l * layer_bytes, e.cache_stride, layer.k_scale, layer.v_scale};
    if (!e.fused) {
      unfused_layer(e, layer, cache, tiles, num_tiles);
      continue;
    }
    qkv_block(e, e.attention, layer.qkv, cache, layer.rope, rows, 0, kQkv, prepare_layer, &layer);
    attention_block(e, e.attention, layer.o, cache, layer.rope, rows, tiles, num_tiles, kAttention, kO, e.residual);
    if (layer.moe) moe_block(e, layer, rows.count);
    else dense_block(e, layer.gate_up, layer.down, layer.post_norm, e.eps, rows.count, e.residual, layer.capture, kMlp);
  }
  if (!e.fused) return unfused_head(e);
  head_block(e, e.lm_head, e.norm, e.eps, e.residual, rows.logit_row, rows.num_logits, e.logits, e.lm_head.n, kLmHead);
}

static void prepare_draft(Engine& e, const void*, const Rows& rows, float* x) {
  const Draft& d = e.draft;
  const int H = e.hidden;
  for (int r = 0; r < rows.count; ++r) {
    float *left = x + (size_t)r * 2 * H, *right = left + H;
    embed_row(d.embed, rows.token[r], H, left);
    rmsnorm(left, d.input_norm, H, d.eps, 0.0f, left);
    const float* hidden = e.draft_hidden + (size_t)r * H;
    if (d.normalize_hidden_twice) rmsnorm(hidden, d.input_norm, H, d.eps, 0.0f, right), hidden = right;
    rmsnorm(hidden, d.hidden_norm, H, d.eps, 0.0f, right);
  }
}

// draft_hidden[r] = fc(features of row draft_source[r])
static void draft_combine(Engine& e) {
  const int H = e.hidden, rows = e.draft_rows.count, width = e.num_captures * H;
  Cut cut(e, e.draft.fc.n / kLanes, 1);
  auto run = [&](int chunk, int) {
    RowPointers p;
    for (int r = 0; r < rows; ++r) p.at[r] = e.features + (size_t)e.draft_source[r] * width;
    const int g0 = cut.first(chunk);
    gemm_low_latency(e.draft.fc, 0, g0, cut.end(chunk) - g0, p.at, rows, e.draft_hidden + g0 * kLanes, H);
  };
  phase(e, kDraft, cut.chunks, run);
}

// Rows without logits leave only their keys and values behind: the others move to the front, and only they go on.
static void keep_logit_rows(Engine& e, Rows& rows) {
  const size_t H = e.hidden, width = (size_t)e.draft_attention.heads * e.draft_attention.head_dim;
  for (int i = 0; i < rows.num_logits; ++i) {
    const int from = rows.logit_row[i];
    rows.logit_row[i] = i;
    if (from == i) continue;
    rows.slot[i] = rows.slot[from], rows.position[i] = rows.position[from], rows.token[i] = rows.token[from];
    memcpy(e.q + i * width, e.q + from * width, sizeof(float) * width);
    memcpy(e.draft_hidden + i * H, e.draft_hidden + from * H, sizeof(float) * H);
  }
  rows.count = rows.num_logits;
}

// One pass of the head over e.draft_rows (token = the one after the row's position); the first draft_hidden rows become its output
// for the rows that asked for logits.
static void draft_forward(Engine& e) {
  const Draft& d = e.draft;
  Rows& rows = e.draft_rows;
  const CacheView cache{d.k_cache, d.v_cache, e.draft_cache_stride, 1.0f, 1.0f};
  qkv_block(e, e.draft_attention, d.qkv, cache, true, rows, rows.num_logits ? 0 : e.draft_attention.heads, kDraft, prepare_draft, nullptr);
  keep_logit_rows(e, rows);
  if (!rows.count) return;
  RowTile tiles[kMaxRows];
  const int num_tiles = tile_rows(rows, tiles);
  attention_block(e, e.draft_attention, d.o, cache, true, rows, tiles, num_tiles, kDraft, kDraft, e.draft_hidden);
  dense_block(e, d.gate_up, d.down, d.post_norm, d.eps, rows.count, e.draft_hidden, -1, kDraft);
  head_block(e, d.lm_head, d.norm, d.eps, e.draft_hidden, rows.logit_row, rows.num_logits, e.draft_logits, d.lm_head.n, kDraft);
}

}  // namespace KILOTOK_NAMESPACE

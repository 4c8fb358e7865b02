// What the C ABI, the thread pool and the two instruction-set paths share: plain structs, no code.
//
// What it is: the model as matrices in kernel layout, per-slot state, row buffers, counters.
// What it refuses to be: a place for inline code. Both paths include this file, and the linker merges inline functions, so
// one of them compiled for AVX-512 could end up in the AVX2 path.
// Run it: compiled by engine_plugins/native/compiler.py.
//
// Legend: M rows, H hidden, V vocabulary, D head size, S cached positions, F intermediate, T threads.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace kilotok {

constexpr int kMaxDrafts = 15, kMaxThreads = 64, kLanes = 16, kMaxRows = 2048;

enum Dtype : int { kFp8 = 0, kBf16 = 1 };

// [count][n/16][k/2][16][2]; `scale` is per output row: weight scale x input scale x 2^8 for FP8 (see vec.h), null for BF16.
struct Matrix {
  const uint8_t* data;
  const float* scale;
  float inv_input_scale;  // 0: the input is not quantized
  int n, k;               // padded: n to 16, k to 2
  int dtype, count;
};

struct Layer {
  const float *input_norm, *post_norm;
  Matrix qkv, o, gate_up, down, router, expert_gate_up, expert_down;
  float k_scale, v_scale;  // of the FP8 cache; 1 for BF16
  int rope, moe, capture;  // capture: index among the captured layers, -1 for none
};

struct Attention {  // one kind of attention: the target's or the draft's
  int heads, kv_heads, head_dim, chunk;
  int cache_dtype, max_seq;
  const float *cos_SD, *sin_SD;  // [S][D/2]
  int use_qk_norm, temperature_tuning;
  float floor_scale, attn_scale, eps;
};

struct Draft {
  Matrix fc, qkv, o, gate_up, down, lm_head;
  const float *input_norm, *hidden_norm, *post_norm, *norm;
  const uint16_t* embed;
  const int32_t* to_target;
  int32_t* from_target;  // -1: not in the draft's vocabulary
  int vocab, normalize_hidden_twice;
  float eps;
  uint8_t *k_cache, *v_cache;
};

struct Slot {
  int position;  // of last_token, which is not in the cache yet
  int32_t last_token;
  int num_drafts;
  int32_t drafts[kMaxDrafts + 1];
  float temperature, top_p;
  uint64_t seed, draws;
  double forced_debt;
  float* q;  // [k][draft vocab], probabilities the drafts were drawn from
};

enum Group : int { kEmbed, kNorm, kQkv, kAttention, kO, kMlp, kMoe, kLmHead, kVerify, kDraft, kHost, kNumGroups };

struct Rows {  // what one forward pass works on
  int count;
  int *slot, *position;
  int32_t *token, *next_token;
  int num_logits;
  int* logit_row;
};

struct Pool;

struct Engine {
  int num_layers, hidden, vocab, num_experts, num_captures, num_drafts, draft_limit, row_budget, max_rows, max_logit_rows, max_slots, max_seq;
  float eps, forced_acceptance;
  Layer* layers;
  const float* norm;
  const uint16_t* embed;
  Matrix lm_head;
  Attention attention, draft_attention;
  int has_draft;
  Draft draft;
  uint8_t *k_cache, *v_cache;  // [layer][slot][kv head][S x D]
  size_t cache_stride;         // bytes per (layer, slot, kv head)
  size_t draft_cache_stride;
  Slot* slots;
  Rows rows, draft_rows;
  int *draft_source, *cycle_first, *cycle_accepted;
  float *residual, *features, *q, *attended, *gated, *gated_expert, *logits, *draft_hidden, *draft_logits;
  int gated_stride, fused;
  float* unfused[7];            // [rows][widest]; only when the operators run apart (unfused.h)
  float* scratch[kMaxThreads];  // per thread: normalized rows, routed rows
  float* score_scratch[kMaxThreads];
  float* vocab_scratch[kMaxThreads];
  int* expert_scratch[kMaxThreads];
  size_t scratch_floats, score_floats;
  Pool* pool;
  uint64_t ticks[kNumGroups], cycles, decode_rows, prefill_rows, phases, accepted[kMaxDrafts + 1], proposed;
  uint64_t wall_ns, wall_ticks;
};

struct CycleIO {
  int num_prefills;
  const int32_t *prefill_slot, *prefill_position, *prefill_length, *prefill_tokens;  // tokens: length + 1 each
  int num_decodes;
  const int32_t* decode_slot;
  int32_t *out_tokens, *out_count, *out_proposed;  // tokens: [num_decodes][num_drafts + 1]
};

// One table of entry points per instruction set; api.cpp picks one.
struct StepTable {
  void (*cycle)(Engine&, const CycleIO&);
  void (*forced)(Engine&, int slot, const int32_t* tokens, int count, int what, float* out);
  void (*gemm)(Engine&, const Matrix&, const float* x, int rows, float* y);
  float (*read)(Engine&, const uint8_t* data, size_t bytes);  // the roof: reads everything, computes nothing
};

// Runs fn(context, chunk, thread) for every chunk; returns when all are done. Chunk claims are dynamic: a thread that the
// operating system took off its core holds up nobody unless it already holds a chunk.
void pool_run(Pool* pool, void (*fn)(void*, int, int), void* context, int num_chunks);
int pool_threads(const Pool* pool);
Pool* pool_new(int threads);
void pool_delete(Pool* pool);
void pool_begin_cycle(Pool* pool);
void pool_end_cycle(Pool* pool);

}  // namespace kilotok

// The C ABI that ctypes calls, the choice of instruction set, and memory.
//
// What it is: creation, weights in, slots, one call per cycle, counters out. Compiled for the baseline instruction set.
// What it refuses to be: forgiving: shapes are checked in Python (bundle.py, native_backend.py) before they come here.
// Run it: compiled by engine_plugins/native/compiler.py.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <string.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "engine.h"
#include "pool.h"

namespace kilotok_avx2 {
extern const kilotok::StepTable kTable;
}
namespace kilotok_avx512 {
extern const kilotok::StepTable kTable;
}
namespace kilotok_avx512_bf16 {
extern const kilotok::StepTable kTable;
}

#define KT_API extern "C" __attribute__((visibility("default")))

using namespace kilotok;

namespace {

// Bump allocator over blocks that ask for huge pages: weights are read once per cycle, page walks would show.
class Arena {
 public:
  ~Arena() {
    for (auto& b : blocks_) munmap(b.first, b.second);
  }
  void* take(size_t bytes) {
    bytes = (bytes + 127) / 64 * 64;  // at least 64 spare bytes behind everything
    if (bytes > left_) grow(bytes);
    void* out = at_;
    at_ += bytes;
    left_ -= bytes;
    return out;
  }
  template <class T>
  T* array(size_t count) {
    return static_cast<T*>(take(count * sizeof(T)));
  }
  bool failed = false;

 private:
  void grow(size_t bytes) {
    const size_t huge = size_t{2} << 20, size = (bytes + (size_t{16} << 20)) / huge * huge + huge;
    char* block = static_cast<char*>(mmap(nullptr, size + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (block == MAP_FAILED) {
      fprintf(stderr, "kilotok: out of memory (%zu bytes)\n", size);
      abort();  // native_backend.py checks the size against free memory first
    }
    blocks_.push_back({block, size + huge});
    at_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block) + huge - 1) / huge * huge);
    madvise(at_, size, MADV_HUGEPAGE);
    left_ = size;
  }
  std::vector<std::pair<void*, size_t>> blocks_;
  char* at_ = nullptr;
  size_t left_ = 0;
};

struct Handle {
  Engine e{};
  Arena arena;
  const StepTable* table = nullptr;
};

float* copy_floats(Handle* h, const float* from, size_t count) {
  float* to = h->arena.array<float>((count + kLanes - 1) / kLanes * kLanes);
  memcpy(to, from, count * sizeof(float));
  return to;
}

void rope_tables(Handle* h, Attention& a, const float* inv_freq) {
  const int half = a.head_dim / 2;
  float* cos_SD = h->arena.array<float>(size_t(a.max_seq) * half);
  float* sin_SD = h->arena.array<float>(size_t(a.max_seq) * half);
  for (int s = 0; s < a.max_seq; ++s)
    for (int d = 0; d < half; ++d) {
      const float angle = (float)s * inv_freq[d];  // fp32 product, as transformers computes it
      cos_SD[size_t(s) * half + d] = (float)std::cos((double)angle);
      sin_SD[size_t(s) * half + d] = (float)std::sin((double)angle);
    }
  a.cos_SD = cos_SD;
  a.sin_SD = sin_SD;
}

Rows make_rows(Handle* h, int count) {
  Rows r{};
  r.slot = h->arena.array<int>(count);
  r.position = h->arena.array<int>(count);
  r.token = h->arena.array<int32_t>(count);
  r.next_token = h->arena.array<int32_t>(count);
  r.logit_row = h->arena.array<int>(count);
  return r;
}

Matrix* find_matrix(Engine& e, int layer, int which) {
  if (layer == -1) return &e.lm_head;
  if (layer == -2) {
    Matrix* draft[] = {&e.draft.fc, &e.draft.qkv, &e.draft.o, &e.draft.gate_up, &e.draft.down, &e.draft.lm_head};
    return draft[which];
  }
  Layer& l = e.layers[layer];
  Matrix* all[] = {&l.qkv, &l.o, &l.gate_up, &l.down, &l.router, &l.expert_gate_up, &l.expert_down};
  return all[which];
}

uint64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return uint64_t(t.tv_sec) * 1000000000ull + t.tv_nsec;
}

Matrix make_matrix(Handle* h, const void* data, int dtype, int count, int n, int k, const float* scale, float input_scale) {
  Matrix m{};
  const size_t rows = size_t(count) * n, bytes = rows * k * (dtype == kFp8 ? 1 : 2);
  uint8_t* copy = static_cast<uint8_t*>(h->arena.take(bytes + 1024));  // kernels prefetch past the end
  memcpy(copy, data, bytes);
  m.data = copy;
  m.inv_input_scale = input_scale > 0 ? 1.0f / input_scale : 0.0f;
  m.n = n, m.k = k, m.dtype = dtype, m.count = count;
  if (dtype == kFp8) {
    float* combined = h->arena.array<float>(rows);
    for (size_t i = 0; i < rows; ++i) combined[i] = scale[i] * (input_scale > 0 ? input_scale : 1.0f) * 256.0f;
    m.scale = combined;
  }
  return m;
}

// The best path this CPU has, or the one asked for; null when it lacks that.
const StepTable* choose_table(int isa) {
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  const StepTable* best = has_bf16 ? &kilotok_avx512_bf16::kTable : has_avx512 ? &kilotok_avx512::kTable : has_avx2 ? &kilotok_avx2::kTable : nullptr;
  const StepTable* asked[] = {best, has_avx2 ? &kilotok_avx2::kTable : nullptr, has_avx512 ? &kilotok_avx512::kTable : nullptr,
                              has_bf16 ? &kilotok_avx512_bf16::kTable : nullptr};
  return asked[isa];
}

}  // namespace

// ints: layers, hidden, vocab, experts, captures, drafts, max_rows, max_logit_rows, slots, max_seq, heads, kv_heads, head_dim,
// chunk, fp8 cache, qk_norm, temperature tuning, threads, gated width, has draft, draft heads, draft kv heads, draft head_dim,
// draft vocab, normalize twice, isa (0 best, 1 avx2, 2 avx512, 3 avx512_bf16), row budget, fused. floats: eps, forced acceptance, floor_scale, attn_scale, draft eps.
KT_API void* kt_new(const int32_t* ints, const float* floats, const float* inv_freq, const float* draft_inv_freq) {
  Handle* h = new Handle;
  Engine& e = h->e;
  const int32_t* i = ints;
  e.num_layers = i[0], e.hidden = i[1], e.vocab = i[2], e.num_experts = i[3], e.num_captures = i[4], e.num_drafts = i[5];
  e.max_rows = i[6], e.max_logit_rows = i[7], e.max_slots = i[8], e.max_seq = i[9];
  e.eps = floats[0], e.forced_acceptance = floats[1];
  const int padded_seq = (e.max_seq + kLanes - 1) / kLanes * kLanes;
  e.attention = {i[10], i[11], i[12], i[13], i[14] ? kFp8 : kBf16, padded_seq, nullptr, nullptr, i[15], i[16], floats[2], floats[3], e.eps};
  rope_tables(h, e.attention, inv_freq);
  e.gated_stride = i[18];
  e.has_draft = i[19];
  e.row_budget = i[26], e.fused = i[27];
  h->table = choose_table(i[25]);
  if (!h->table) return delete h, nullptr;
  e.layers = h->arena.array<Layer>(e.num_layers);
  e.cache_stride = size_t(padded_seq) * e.attention.head_dim * (i[14] ? 1 : 2);
  const size_t cache = e.cache_stride * e.attention.kv_heads * e.max_slots * e.num_layers;
  e.k_cache = h->arena.array<uint8_t>(cache);
  e.v_cache = h->arena.array<uint8_t>(cache);
  int q_width = e.attention.heads * e.attention.head_dim, group = e.attention.heads / e.attention.kv_heads, head_dim = i[12];
  int logits = 0;
  if (e.has_draft) {
    e.draft_attention = {i[20], i[21], i[22], 0, kBf16, padded_seq, nullptr, nullptr, 0, 0, 1.0f, 0.0f, floats[4]};
    rope_tables(h, e.draft_attention, draft_inv_freq);
    e.draft.vocab = i[23], e.draft.normalize_hidden_twice = i[24], e.draft.eps = floats[4];
    e.draft_cache_stride = size_t(padded_seq) * i[22] * 2;
    e.draft.k_cache = h->arena.array<uint8_t>(e.draft_cache_stride * i[21] * e.max_slots);
    e.draft.v_cache = h->arena.array<uint8_t>(e.draft_cache_stride * i[21] * e.max_slots);
    if (i[20] * i[22] > q_width) q_width = i[20] * i[22];
    if (i[20] / i[21] > group) group = i[20] / i[21];
    if (i[22] > head_dim) head_dim = i[22];
    logits = (i[23] + kLanes - 1) / kLanes * kLanes;
    e.draft.from_target = h->arena.array<int32_t>(e.vocab);
  }
  e.slots = h->arena.array<Slot>(e.max_slots);
  for (int s = 0; s < e.max_slots; ++s) e.slots[s].q = h->arena.array<float>(size_t(e.num_drafts + 1) * (logits + kLanes));
  e.rows = make_rows(h, e.max_rows);
  e.draft_rows = make_rows(h, e.max_rows);
  e.draft_source = h->arena.array<int>(e.max_rows);
  e.cycle_first = h->arena.array<int>(e.max_slots);
  const size_t rows = e.max_rows, H = e.hidden, vocab = (e.vocab + kLanes - 1) / kLanes * kLanes;
  e.residual = h->arena.array<float>(rows * H);
  e.features = h->arena.array<float>(rows * H * (e.num_captures ? e.num_captures : 1));
  e.q = h->arena.array<float>(rows * q_width);
  e.attended = h->arena.array<float>(rows * q_width);
  e.gated = h->arena.array<float>(rows * e.gated_stride);
  e.gated_expert = h->arena.array<float>(rows * e.gated_stride);
  e.logits = h->arena.array<float>(size_t(e.max_logit_rows) * vocab);
  e.draft_hidden = h->arena.array<float>(rows * H);
  e.draft_logits = h->arena.array<float>(size_t(e.max_logit_rows) * logits);
  const size_t widest = rows * std::max({(size_t)e.gated_stride, H, (size_t)e.attention.kv_heads * e.attention.head_dim, (size_t)e.num_experts + kLanes});
  for (int b = 0; !e.fused && b < 7; ++b) e.unfused[b] = h->arena.array<float>(widest + kLanes);
  e.pool = pool_new(i[17]);
  size_t score = size_t(8) * group * (padded_seq + head_dim), tiles = 2 * rows * (H > size_t(head_dim) ? H : head_dim) + 64 * rows;
  size_t routing = rows * (2 + (e.num_experts + 15) / 16 * 16);
  if (tiles > score) score = tiles;
  e.score_floats = routing > score ? routing : score;
  e.scratch_floats = rows * 2 * H;
  for (int t = 0; t < pool_threads(e.pool); ++t) {
    e.scratch[t] = h->arena.array<float>(e.scratch_floats + 64);
    e.score_scratch[t] = h->arena.array<float>(e.score_floats + 64);
    e.vocab_scratch[t] = h->arena.array<float>(2 * vocab + 64);
    e.expert_scratch[t] = h->arena.array<int>(2 * rows + e.num_experts + 64);
  }
  return h;
}

KT_API void kt_free(void* handle) {
  Handle* h = static_cast<Handle*>(handle);
  pool_delete(h->e.pool);
  delete h;
}

KT_API const char* kt_isa(void* handle) {
  const StepTable* table = static_cast<Handle*>(handle)->table;
  return table == &kilotok_avx512_bf16::kTable ? "avx512_bf16" : table == &kilotok_avx512::kTable ? "avx512" : "avx2";
}

KT_API void kt_matrix(void* handle, int layer, int which, const void* data, int dtype, int count, int n, int k, const float* scale,
                      float input_scale) {
  Handle* h = static_cast<Handle*>(handle);
  *find_matrix(h->e, layer, which) = make_matrix(h, data, dtype, count, n, k, scale, input_scale);
}

KT_API void kt_share_lm_head(void* handle) {
  Engine& e = static_cast<Handle*>(handle)->e;
  e.draft.lm_head = e.lm_head;
}

KT_API void kt_layer(void* handle, int layer, const float* input_norm, const float* post_norm, float k_scale, float v_scale, int rope,
                     int moe, int capture) {
  Handle* h = static_cast<Handle*>(handle);
  Layer& l = h->e.layers[layer];
  l.input_norm = copy_floats(h, input_norm, h->e.hidden);
  l.post_norm = copy_floats(h, post_norm, h->e.hidden);
  l.k_scale = k_scale, l.v_scale = v_scale, l.rope = rope, l.moe = moe, l.capture = capture;
}

KT_API void kt_target(void* handle, const float* norm, const uint16_t* embed) {
  Handle* h = static_cast<Handle*>(handle);
  Engine& e = h->e;
  e.norm = copy_floats(h, norm, e.hidden);
  uint16_t* copy = h->arena.array<uint16_t>(size_t(e.vocab) * e.hidden);
  memcpy(copy, embed, size_t(e.vocab) * e.hidden * 2);
  e.embed = copy;
}

KT_API void kt_draft(void* handle, const float* input_norm, const float* hidden_norm, const float* post_norm, const float* norm,
                     const uint16_t* embed, const int32_t* to_target) {
  Handle* h = static_cast<Handle*>(handle);
  Engine& e = h->e;
  Draft& d = e.draft;
  d.input_norm = copy_floats(h, input_norm, e.hidden);
  d.hidden_norm = copy_floats(h, hidden_norm, e.hidden);
  d.post_norm = copy_floats(h, post_norm, e.hidden);
  d.norm = copy_floats(h, norm, e.hidden);
  d.embed = e.embed;
  if (embed) {
    uint16_t* copy = h->arena.array<uint16_t>(size_t(e.vocab) * e.hidden);
    memcpy(copy, embed, size_t(e.vocab) * e.hidden * 2);
    d.embed = copy;
  }
  int32_t* map = h->arena.array<int32_t>(d.vocab);
  memcpy(map, to_target, size_t(d.vocab) * 4);
  d.to_target = map;
  for (int i = 0; i < e.vocab; ++i) d.from_target[i] = -1;
  for (int i = 0; i < d.vocab; ++i) d.from_target[map[i]] = i;
}

KT_API void kt_start(void* handle, int slot, int position, int32_t token, float temperature, float top_p, uint64_t seed) {
  Slot& s = static_cast<Handle*>(handle)->e.slots[slot];
  s.position = position, s.last_token = token, s.num_drafts = 0;
  s.temperature = temperature, s.top_p = top_p, s.seed = seed, s.draws = 0, s.forced_debt = 0;
}

// Positions [0, count) of every layer's and the draft's cache, from one slot to another. K is [S/16][..], V is [D/16][S/2][..].
KT_API void kt_copy_prefix(void* handle, int from, int to, int count) {
  const Engine& e = static_cast<Handle*>(handle)->e;
  auto copy = [&](uint8_t* k, uint8_t* v, const Attention& a, size_t stride, size_t layer) {
    const size_t element = a.cache_dtype == kFp8 ? 1 : 2, blocks = (count + kLanes - 1) / kLanes, v_block = size_t(a.max_seq) * kLanes * element;
    for (int head = 0; head < a.kv_heads; ++head) {
      const size_t source = layer + (size_t(from) * a.kv_heads + head) * stride, target = layer + (size_t(to) * a.kv_heads + head) * stride;
      memcpy(k + target, k + source, blocks * kLanes * a.head_dim * element);
      for (int d = 0; d < a.head_dim / kLanes; ++d)
        memcpy(v + target + d * v_block, v + source + d * v_block, blocks * kLanes * kLanes * element);
    }
  };
  for (int l = 0; l < e.num_layers; ++l)
    copy(e.k_cache, e.v_cache, e.attention, e.cache_stride, l * e.cache_stride * e.attention.kv_heads * e.max_slots);
  if (e.has_draft) copy(e.draft.k_cache, e.draft.v_cache, e.draft_attention, e.draft_cache_stride, 0);
}

KT_API void kt_cycle(void* handle, const CycleIO* io) {
  Handle* h = static_cast<Handle*>(handle);
  const uint64_t ns = now_ns(), ticks = __builtin_ia32_rdtsc();
  h->table->cycle(h->e, *io);
  h->e.wall_ns += now_ns() - ns;
  h->e.wall_ticks += __builtin_ia32_rdtsc() - ticks;
}

KT_API void kt_forced(void* handle, int slot, const int32_t* tokens, int count, int what, float* out) {
  Handle* h = static_cast<Handle*>(handle);
  h->table->forced(h->e, slot, tokens, count, what, out);
}

// groups: seconds of each Group, then wall seconds. counts: cycles, decode rows, prefill rows, proposed, phases, accepted[15].
KT_API void kt_counters(void* handle, double* groups, uint64_t* counts) {
  const Engine& e = static_cast<Handle*>(handle)->e;
  const double second = e.wall_ticks ? double(e.wall_ns) / double(e.wall_ticks) * 1e-9 : 0.0;
  for (int g = 0; g < kNumGroups; ++g) groups[g] = double(int64_t(e.ticks[g])) * second;
  groups[kNumGroups] = double(e.wall_ns) * 1e-9;
  counts[0] = e.cycles, counts[1] = e.decode_rows, counts[2] = e.prefill_rows, counts[3] = e.proposed, counts[4] = e.phases;
  for (int i = 0; i < kMaxDrafts; ++i) counts[5 + i] = e.accepted[i];
}

// For benches and kernel tests: a loose matrix on an engine made for its threads and scratch. Null when it does not fit.
KT_API void* kt_gemm_new(void* handle, const void* data, int dtype, int n, int k, const float* scale, float input_scale) {
  Handle* h = static_cast<Handle*>(handle);
  Matrix* m = h->arena.array<Matrix>(1);
  *m = make_matrix(h, data, dtype, 1, n, k, scale, input_scale);
  return m;
}

KT_API int kt_gemm(void* handle, const void* matrix, const float* x, int rows, float* y) {
  Handle* h = static_cast<Handle*>(handle);
  const Matrix& m = *static_cast<const Matrix*>(matrix);
  if (size_t(rows) * m.k > h->e.scratch_floats || rows > kMaxRows) return -1;
  h->table->gemm(h->e, m, x, rows, y);
  return 0;
}

// Reads `bytes` of memory with all threads; benches divide by the time. The bytes are a matrix's, from kt_gemm_new.
KT_API float kt_read(void* handle, const void* matrix) {
  Handle* h = static_cast<Handle*>(handle);
  const Matrix& m = *static_cast<const Matrix*>(matrix);
  return h->table->read(h->e, m.data, size_t(m.n) * m.k * (m.dtype == kFp8 ? 1 : 2));
}

// One engine cycle: prefill rows, verify every decoding slot's drafts, draft again. One call from Python, no Python inside.
//
// What it is: the entry points of one instruction-set path (compiled twice, see compiler.py).
// What it refuses to be: a scheduler; which slots run is the engine's business.
// Run it: compiled by engine_plugins/native/compiler.py.
//
// Position arithmetic: a slot's last token sits at `position` and is not in the cache. Verify runs it and the drafts at
// position .. position + k. With a accepted, rows position .. position + a get a draft row whose token is the one after them.
#define KT_CONCAT_(a, b) a##b
#define KT_CONCAT(a, b) KT_CONCAT_(a, b)
#define KILOTOK_NAMESPACE KT_CONCAT(kilotok_, KILOTOK_ISA)
#define KT_INLINE_MEMBER inline __attribute__((always_inline))
#include "layers.h"
#include "unfused.h"
#include "verify/cpu.h"

namespace KILOTOK_NAMESPACE {

static void add_row(Rows& rows, int slot, int position, int32_t token) {
  rows.slot[rows.count] = slot;
  rows.position[rows.count] = position;
  rows.token[rows.count++] = token;
}

static void choose_draft(Engine& e, Slot& s, int step, const float* logits, int thread) {
  const Draft& d = e.draft;
  int choice;
  if (s.temperature <= 0 || e.forced_acceptance > 0) {
    choice = argmax(logits, d.vocab);
  } else {
    float* q = s.q + (size_t)step * d.vocab;
    probabilities(logits, d.vocab, s.temperature, 1.0f, q, (int*)e.vocab_scratch[thread]);
    choice = draw(q, d.vocab, uniform(s));
  }
  s.drafts[s.num_drafts++] = d.to_target[choice];
}

static int room_for_drafts(const Engine& e, const Slot& s) {
  const int room = e.max_seq - 1 - s.position;
  return room < e.draft_limit ? (room > 0 ? room : 0) : e.draft_limit;
}

// Chain steps: one row per slot that still has room; each eats the hidden state of the step before.
static void draft_chain(Engine& e, const CycleIO& io) {
  const int H = e.hidden;
  int active[kMaxRows], count = 0;
  Rows& rows = e.draft_rows;
  {
    int wanted = 0;
    for (int i = 0; i < io.num_decodes; ++i)
      if (io.out_count[i] && room_for_drafts(e, e.slots[io.decode_slot[i]]) > 0) active[wanted++] = i;
    count = wanted;
  }
  for (int step = 0; count > 0; ++step) {
    auto choose = [&](int c, int thread) {
      choose_draft(e, e.slots[io.decode_slot[active[c]]], step, e.draft_logits + (size_t)c * e.draft.lm_head.n, thread);
    };
    phase(e, kDraft, count, choose);
    int kept = 0;
    int source[kMaxRows];
    for (int c = 0; c < count; ++c) {
      Slot& s = e.slots[io.decode_slot[active[c]]];
      if (s.num_drafts < room_for_drafts(e, s)) source[kept] = rows.logit_row[c], active[kept++] = active[c];
    }
    count = kept;
    if (!count) break;
    rows.count = rows.num_logits = 0;
    for (int c = 0; c < count; ++c) {
      Slot& s = e.slots[io.decode_slot[active[c]]];
      add_row(rows, io.decode_slot[active[c]], s.position + s.num_drafts - 1, s.drafts[s.num_drafts - 1]);
      if (source[c] != c) memmove(e.draft_hidden + (size_t)c * H, e.draft_hidden + (size_t)source[c] * H, sizeof(float) * H);
      rows.logit_row[rows.num_logits++] = c;
    }
    draft_forward(e);
  }
}

static void draft_all(Engine& e, const CycleIO& io, int prefill_rows, const int32_t* prefill_next) {
  Rows& rows = e.draft_rows;
  rows.count = rows.num_logits = 0;
  for (int r = 0; r < prefill_rows; ++r) {
    e.draft_source[rows.count] = r;
    add_row(rows, e.rows.slot[r], e.rows.position[r], prefill_next[r]);
  }
  for (int i = 0; i < io.num_decodes; ++i) {
    Slot& s = e.slots[io.decode_slot[i]];
    const int tokens = io.out_count[i], first = e.cycle_first[i];
    for (int t = 0; t < tokens; ++t) {
      e.draft_source[rows.count] = first + t;
      add_row(rows, io.decode_slot[i], e.rows.position[first + t], io.out_tokens[i * (e.num_drafts + 1) + t]);
    }
    if (tokens && room_for_drafts(e, s) > 0) rows.logit_row[rows.num_logits++] = rows.count - 1;
  }
  if (!rows.count) return;
  draft_combine(e);
  draft_forward(e);
  draft_chain(e, io);
}

static void cycle(Engine& e, const CycleIO& io) {
  Rows& rows = e.rows;
  uint64_t start = ticks();
  pool_begin_cycle(e.pool);
  rows.count = rows.num_logits = 0;
  const int32_t* token = io.prefill_tokens;
  for (int i = 0; i < io.num_prefills; ++i, ++token)
    for (int t = 0; t < io.prefill_length[i]; ++t, ++token) {
      rows.next_token[rows.count] = token[1];
      add_row(rows, io.prefill_slot[i], io.prefill_position[i] + t, token[0]);
    }
  const int prefill_rows = rows.count;
  // With many slots the step is bound by arithmetic, and a drafted row costs as much as a sure one: draft less. The draft's
  // cache still gets its rows, so that drafting resumes when the load falls.
  const int fair = io.num_decodes ? e.row_budget / io.num_decodes - 1 : e.num_drafts;
  e.draft_limit = fair >= e.num_drafts ? e.num_drafts : fair > 0 ? fair : 0;
  for (int i = 0; i < io.num_decodes; ++i) {
    const Slot& s = e.slots[io.decode_slot[i]];
    e.cycle_first[i] = rows.count;
    for (int t = 0; t <= s.num_drafts; ++t) {
      rows.logit_row[rows.num_logits++] = rows.count;
      add_row(rows, io.decode_slot[i], s.position + t, t ? s.drafts[t - 1] : s.last_token);
    }
  }
  e.prefill_rows += prefill_rows;
  e.decode_rows += rows.count - prefill_rows;
  e.ticks[kHost] += ticks() - start;
  if (rows.count) target_forward(e);
  auto accept = [&](int i, int thread) {
    Slot& s = e.slots[io.decode_slot[i]];
    float* p = e.vocab_scratch[thread];
    const float* logits = e.logits + (size_t)(e.cycle_first[i] - prefill_rows) * e.lm_head.n;
    io.out_count[i] = verify(s, logits, e.lm_head.n, e.vocab, e.draft.from_target, e.draft.vocab, e.forced_acceptance,
                             e.num_drafts, p,
                             (int*)(p + e.lm_head.n), io.out_tokens + i * (e.num_drafts + 1));
  };
  if (io.num_decodes) phase(e, kVerify, io.num_decodes, accept);
  start = ticks();
  for (int i = 0; i < io.num_decodes; ++i) {
    Slot& s = e.slots[io.decode_slot[i]];
    const int tokens = io.out_count[i];
    io.out_proposed[i] = s.num_drafts;
    e.proposed += s.num_drafts > 0;
    for (int t = 1; t < tokens; ++t) ++e.accepted[t - 1];
    s.num_drafts = 0;
    if (!tokens) continue;  // its request ends
    s.position += tokens;
    s.last_token = io.out_tokens[i * (e.num_drafts + 1) + tokens - 1];
  }
  ++e.cycles;
  e.ticks[kHost] += ticks() - start;
  if (e.has_draft && e.num_drafts > 0) draft_all(e, io, prefill_rows, rows.next_token);
  pool_end_cycle(e.pool);
}

// Teacher-forced pass over a whole text. what: 0 logits [T][V], 1 features [T][C][H], 2 draft logits [T-1][draft V].
static void forced(Engine& e, int slot, const int32_t* tokens, int count, int what, float* out) {
  const int step = e.max_logit_rows, H = e.hidden;
  Rows &rows = e.rows, &drafts = e.draft_rows;
  pool_begin_cycle(e.pool);
  for (int begin = 0; begin < count; begin += step) {
    const int take = count - begin < step ? count - begin : step;
    rows.count = rows.num_logits = drafts.count = drafts.num_logits = 0;
    for (int t = 0; t < take; ++t) {
      add_row(rows, slot, begin + t, tokens[begin + t]);
      if (what == 0) rows.logit_row[rows.num_logits++] = t;
    }
    target_forward(e);
    for (int t = 0; what == 0 && t < take; ++t)
      memcpy(out + (size_t)(begin + t) * e.vocab, e.logits + (size_t)t * e.lm_head.n, sizeof(float) * e.vocab);
    if (what == 1) memcpy(out + (size_t)begin * e.num_captures * H, e.features, sizeof(float) * take * e.num_captures * H);
    if (what != 2) continue;
    for (int t = 0; t < take && begin + t + 1 < count; ++t) {
      e.draft_source[t] = t;
      drafts.logit_row[drafts.num_logits++] = t;
      add_row(drafts, slot, begin + t, tokens[begin + t + 1]);
    }
    if (!drafts.count) continue;
    draft_combine(e);
    draft_forward(e);
    for (int t = 0; t < drafts.count; ++t)
      memcpy(out + (size_t)(begin + t) * e.draft.vocab, e.draft_logits + (size_t)t * e.draft.lm_head.n, sizeof(float) * e.draft.vocab);
  }
  pool_end_cycle(e.pool);
}

// y = x w for the op bench and the kernel tests; x is fp32 and rounded here when the matrix asks for it.
static void gemm(Engine& e, const Matrix& m, const float* x, int rows, float* y) {
  Prologue prologue(e, kHost);
  Cut cut(e, m.n / kLanes, 1);
  auto run = [&](int chunk, int thread) {
    float* rounded = e.scratch[thread];
    prologue.once(thread, [&] {
      for (int r = 0; r < rows; ++r) quantize_row(x + (size_t)r * m.k, 1.0f, m.inv_input_scale, m.k, rounded + (size_t)r * m.k);
    });
    RowPointers p(rounded, m.k, rows);
    const int g0 = cut.first(chunk);
    gemm_low_latency(m, 0, g0, cut.end(chunk) - g0, p.at, rows, y + g0 * kLanes, m.n);
  };
  pool_begin_cycle(e.pool);
  phase(e, kHost, cut.chunks, run);
  pool_end_cycle(e.pool);
}

static float read(Engine& e, const uint8_t* data, size_t bytes) {
  float sums[kMaxThreads] = {};
  const int chunks = pool_threads(e.pool) * 16;
  auto run = [&](int chunk, int thread) {
    const size_t share = bytes / chunks / 256 * 256;
    const float *at = (const float*)(data + chunk * share), *end = (const float*)((const uint8_t*)at + share);
    V a = vzero(), b = vzero(), c = vzero(), d = vzero();
    for (; at < end; at += 64) {
      _mm_prefetch((const char*)(at + 512), _MM_HINT_T0);
      a = vmax(a, vload(at)), b = vmax(b, vload(at + 16)), c = vmax(c, vload(at + 32)), d = vmax(d, vload(at + 48));
    }
    sums[thread] += vmax_lane(vmax(vmax(a, b), vmax(c, d)));
  };
  pool_begin_cycle(e.pool);
  phase(e, kHost, chunks, run);
  pool_end_cycle(e.pool);
  return sums[0];
}

extern const StepTable kTable;
const StepTable kTable = {cycle, forced, gemm, read};

}  // namespace KILOTOK_NAMESPACE

// verify on the CPU: greedy exact match, or lossless rejection sampling, per slot.
//
// What it is: Leviathan et al. 2023, algorithm 1, for a chain; the same steps as reference.py.
// What it refuses to be: a tree.
// Run it: compiled by engine_plugins/native/compiler.py.
#pragma once
#include <algorithm>

#include "vec.h"

namespace KILOTOK_NAMESPACE {

static int argmax(const float* x, int size) {
  int best = 0;
  V top = vset1(x[0]);
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) top = vmax(top, vload(x + i));
  float high = vmax_lane(top);
  for (; i < size; ++i) high = x[i] > high ? x[i] : high;
  while (best < size - 1 && x[best] != high) ++best;  // first of equals; the last when all are NaN
  return best;
}

// Counter-based, so that a request's numbers do not depend on who else is in the batch. In [0, 1).
static double uniform(Slot& s) {
  uint64_t z = s.seed * 0x9E3779B97F4A7C15ull + (++s.draws) * 0xD1B54A32D192ED03ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return (double)((z ^ (z >> 31)) >> 11) * (1.0 / 9007199254740992.0);
}

// p = softmax(x / temperature), cut to the smallest set that holds top_p. order: scratch of `size` ints.
static void probabilities(const float* x, int size, float temperature, float top_p, float* p, int* order) {
  const float high = x[argmax(x, size)], inv = 1.0f / temperature;
  double sum = 0;
  for (int i = 0; i < size; ++i) sum += p[i] = expf((x[i] - high) * inv);
  if (top_p < 1.0f) {
    for (int i = 0; i < size; ++i) order[i] = i;
    std::sort(order, order + size, [p](int a, int b) { return p[a] > p[b] || (p[a] == p[b] && a < b); });
    double before = 0;
    const double limit = top_p * sum;
    for (int i = 0; i < size; ++i) {
      const double mass = p[order[i]];
      if (before >= limit) p[order[i]] = 0;
      before += mass;
    }
    sum = 0;
    for (int i = 0; i < size; ++i) sum += p[i];
  }
  const float factor = (float)(1.0 / sum);
  for (int i = 0; i < size; ++i) p[i] *= factor;
}

static int draw(const float* p, int size, double u) {
  double sum = 0, reached = 0;
  for (int i = 0; i < size; ++i) sum += p[i];
  int last = 0;
  for (int i = 0; i < size; ++i) {
    if (p[i] <= 0) continue;
    last = i;
    reached += p[i];
    if (reached > u * sum) return i;
  }
  return last;
}

// Writes accepted drafts and one more token to out; returns how many tokens, 0 when the logits are not numbers. logits: [num_drafts + 1] rows of stride ldl.
static int verify(Slot& s, const float* logits, int ldl, int vocab, const int32_t* from_target, int draft_vocab, float forced, int full,
                  float* p, int* order, int32_t* out) {
  const int k = s.num_drafts;
  int accepted = 0;
  for (int row = 0; row <= k; ++row)
    if (!(fabsf(logits[(size_t)row * ldl]) <= 3e38f)) return 0;  // a NaN or infinity in a hidden state reaches every logit
  if (forced > 0 && k > 0) {
    s.forced_debt += (forced - 1.0) * k / full;  // under load fewer are drafted, and fewer can be accepted
    accepted = std::min(k, (int)s.forced_debt);
    s.forced_debt -= accepted;
    for (int i = 0; i < accepted; ++i) out[i] = s.drafts[i];
    out[accepted] = argmax(logits + (size_t)accepted * ldl, vocab);
    return accepted + 1;
  }
  if (s.temperature <= 0) {
    for (;; ++accepted) {
      out[accepted] = argmax(logits + (size_t)accepted * ldl, vocab);
      if (accepted == k || out[accepted] != s.drafts[accepted]) return accepted + 1;
    }
  }
  for (; accepted < k; ++accepted) {
    const int32_t draft = s.drafts[accepted];
    probabilities(logits + (size_t)accepted * ldl, vocab, s.temperature, s.top_p, p, order);
    const float* q = s.q + (size_t)accepted * draft_vocab;
    out[accepted] = draft;
    if (uniform(s) * q[from_target[draft]] < p[draft]) continue;
    double left = 0;
    for (int i = 0; i < vocab; ++i) {
      const float over = from_target[i] >= 0 ? q[from_target[i]] : 0.0f;
      if (p[i] > over) left += p[i] - over;
    }
    if (left > 0)
      for (int i = 0; i < vocab; ++i) {
        const float over = from_target[i] >= 0 ? q[from_target[i]] : 0.0f;
        p[i] = p[i] > over ? p[i] - over : 0.0f;
      }
    out[accepted] = draw(p, vocab, uniform(s));
    return accepted + 1;
  }
  probabilities(logits + (size_t)k * ldl, vocab, s.temperature, s.top_p, p, order);
  out[k] = draw(p, vocab, uniform(s));
  return k + 1;
}

}  // namespace KILOTOK_NAMESPACE

// Thread pool with chunk claims. Included by api.cpp only, so that it is compiled for the baseline instruction set.
//
// What it is: per-thread claim words (phase, next, end) and stealing. A phase is done when its chunks are done, not when all
// threads arrived: with an HTTP process on the same cores, a helper that is off its core must not stop the world.
// What it refuses to be: general. One producer (thread 0), phases in order, at most 60000 chunks each.
// Run it: compiled by engine_plugins/native/compiler.py.
#pragma once
#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "engine.h"

namespace kilotok {

struct alignas(64) Claim {
  std::atomic<uint64_t> word{0};  // phase << 32 | next << 16 | end
};
struct alignas(64) Done {
  std::atomic<uint64_t> count{0};
};

// Nearest even, subnormals kept: some libraries switch them off for the threads of whoever loads them, and bits would depend on it.
constexpr unsigned kFloatRules = 0x1F80;

struct Pool {
  int threads = 1;
  unsigned caller_rules = kFloatRules;
  Claim claims[kMaxThreads];
  Done done[kMaxThreads];
  alignas(64) void (*fn)(void*, int, int) = nullptr;
  void* context = nullptr;
  uint64_t phase = 0, published = 0;
  alignas(64) std::atomic<int> sleepers{0};
  std::atomic<int> wake_sequence{0};
  std::atomic<int> in_cycle{0}, stop{0};
  std::thread workers[kMaxThreads];
};

static inline long futex(std::atomic<int>* address, int op, int value) {
  return syscall(SYS_futex, reinterpret_cast<int*>(address), op | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

// Takes one chunk from `owner`'s share and runs it. False when that share is used up.
static inline bool claim_one(Pool* p, int owner, int self) {
  uint64_t seen = p->claims[owner].word.load(std::memory_order_acquire);
  if (((seen >> 16) & 0xFFFF) >= (seen & 0xFFFF)) return false;
  seen = p->claims[owner].word.fetch_add(uint64_t{1} << 16, std::memory_order_acq_rel);
  int next = (seen >> 16) & 0xFFFF, end = seen & 0xFFFF;
  if (next >= end) return false;
  p->fn(p->context, next, self);
  p->done[self].count.fetch_add(1, std::memory_order_release);
  return true;
}

static inline bool claim_any(Pool* p, int self) {
  if (claim_one(p, self, self)) return true;
  for (int i = 1; i < p->threads; ++i)
    if (claim_one(p, (self + i) % p->threads, self)) return true;
  return false;
}

static void sleep_until_woken(Pool* p, int self) {
  int sequence = p->wake_sequence.load();
  p->sleepers.fetch_add(1);
  if (!p->stop.load() && !claim_any(p, self)) futex(&p->wake_sequence, FUTEX_WAIT, sequence);
  p->sleepers.fetch_sub(1);
}

static void worker(Pool* p, int self) {
  prctl(PR_SET_NAME, "kilotok-step");
  int self_tid = static_cast<int>(syscall(SYS_gettid));
  setpriority(PRIO_PROCESS, self_tid, getpriority(PRIO_PROCESS, self_tid) + 10);  // see YIELDS in scheduler.py
  _mm_setcsr(kFloatRules);
  int idle = 0;
  while (!p->stop.load(std::memory_order_relaxed)) {
    if (claim_any(p, self)) {
      idle = 0;
      continue;
    }
    ++idle;
    if (idle < 400) {
      _mm_pause();  // a few microseconds: the next phase is usually near
    } else if (idle < (p->in_cycle.load(std::memory_order_relaxed) ? 4000 : 600)) {
      sched_yield();  // another process may want this core more
    } else {
      sleep_until_woken(p, self);
      idle = 0;
    }
  }
}

static void wake_sleepers(Pool* p) {
  if (p->sleepers.load(std::memory_order_relaxed) == 0) return;
  p->wake_sequence.fetch_add(1);
  futex(&p->wake_sequence, FUTEX_WAKE, 1 << 30);
}

Pool* pool_new(int threads) {
  Pool* p = new Pool;
  p->threads = threads < 1 ? 1 : threads > kMaxThreads ? kMaxThreads : threads;
  for (int i = 1; i < p->threads; ++i) p->workers[i] = std::thread(worker, p, i);
  return p;
}

void pool_delete(Pool* p) {
  p->stop.store(1);
  p->wake_sequence.fetch_add(1);
  futex(&p->wake_sequence, FUTEX_WAKE, 1 << 30);
  for (int i = 1; i < p->threads; ++i) p->workers[i].join();
  delete p;
}

int pool_threads(const Pool* p) { return p->threads; }

void pool_begin_cycle(Pool* p) {
  p->caller_rules = _mm_getcsr();
  _mm_setcsr(kFloatRules);
  p->in_cycle.store(1);
  wake_sleepers(p);
}

void pool_end_cycle(Pool* p) {
  p->in_cycle.store(0);
  _mm_setcsr(p->caller_rules);
}

void pool_run(Pool* p, void (*fn)(void*, int, int), void* context, int num_chunks) {
  if (p->threads == 1 || num_chunks == 1) {
    for (int c = 0; c < num_chunks; ++c) fn(context, c, 0);
    return;
  }
  p->fn = fn;
  p->context = context;
  ++p->phase;
  p->published += num_chunks;
  for (int t = p->threads - 1; t >= 0; --t) {
    uint64_t begin = uint64_t(num_chunks) * t / p->threads, end = uint64_t(num_chunks) * (t + 1) / p->threads;
    p->claims[t].word.store((p->phase << 32) | (begin << 16) | end, std::memory_order_release);
  }
  wake_sleepers(p);
  while (claim_any(p, 0)) {
  }
  for (int spins = 0;; ++spins) {
    uint64_t finished = 0;
    for (int t = 0; t < p->threads; ++t) finished += p->done[t].count.load(std::memory_order_acquire);
    if (finished == p->published) return;
    if (spins < 2000) _mm_pause();
    else sched_yield();
  }
}

}  // namespace kilotok

// A GPU for `cuda/device.cuh` to run on: every thread is a fiber, so that a kernel's real source executes without a device.
//
// What it is: blocks, barriers, warp exchanges, mma by the fragment layout of the PTX manual, programmatic dependent launch.
// It is stricter than a GPU: 16-byte loads must be aligned and inside a registered buffer; what an earlier kernel makes reads
// as NaN until every thread of the block has called grid_wait; shared memory starts as NaN; a deadlock is an error.
// What it refuses to be: fast, or a model of the memory system. Races that need real concurrency stay unseen.
// Run it: `python -m pytest tests/engine_plugins/test_gpu_ops.py`.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#define KT_KERNEL(threads, blocks) static void
#define KT_INLINE inline
#define KT_EVERYWHERE inline
#define KT_SHARED(type, name, count) type* name = (type*)emulator::shared_memory(__COUNTER__, sizeof(type) * (count))
#define KT_LAUNCH_SHARED(type, name) type* name = (type*)emulator::shared_memory(-1, emulator::now->block->launch_shared)
#define threadIdx (emulator::now->thread)
#define blockIdx (emulator::now->block->index)
#define blockDim (emulator::now->block->size)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint4 { uint32_t x, y, z, w; };
struct uint2 { uint32_t x, y; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };

namespace emulator {

constexpr int kLanes = 32, kStackBytes = 64 << 10, kWords = 8;

struct Barrier { int arrived = 0, generation = 0; };

struct Warp {
  Barrier barrier;
  uint32_t words[kLanes][kWords];
};

struct Block;
struct Cluster {
  std::vector<Block*> blocks;
  Barrier barrier;
};

struct Block {
  dim3 index, size;
  int live = 0, rank = 0;
  size_t launch_shared = 0;
  Barrier barrier;
  std::shared_ptr<Cluster> cluster;
  std::vector<Warp> warps;
  std::map<int, std::vector<uint8_t>> shared;
};

struct Fiber {
  ucontext_t context;
  std::vector<uint8_t> stack;
  dim3 thread;
  Block* block = nullptr;
  std::function<void()> body;
  bool done = false, waited = false;
};

struct Buffer {
  uint8_t* at;
  size_t bytes;
  bool dependent;
  std::vector<uint8_t> kept;
};

struct Launch {
  dim3 grid;
  int threads;
  size_t shared;
  unsigned cluster;  // so many neighbours in x run side by side
  std::function<void()> body;
};

inline Fiber* now = nullptr;
inline ucontext_t scheduler;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Buffer> buffers;
inline std::vector<Launch> queue;
inline std::string error;
inline bool together = false;
inline int waiting = 0;
inline long events = 0;

inline void fail(const std::string& what) {
  if (error.empty()) error = what;
}

inline void yield() { swapcontext(&now->context, &scheduler); }

inline void arrive(Barrier& b, int expected) {
  ++events;
  const int generation = b.generation;
  if (++b.arrived >= expected) {
    b.arrived = 0;
    ++b.generation;
  }
  while (b.generation == generation && error.empty()) yield();
}

inline Warp& warp() { return now->block->warps[now->thread.x / kLanes]; }
inline int lane() { return now->thread.x % kLanes; }

inline void* shared_memory(int key, size_t bytes) {
  auto& memory = now->block->shared[key];
  if (memory.empty()) memory.assign(bytes, 0xFF);
  return memory.data();
}

inline void poison() {
  for (auto& b : buffers)
    if (b.dependent) {
      b.kept.assign(b.at, b.at + b.bytes);
      memset(b.at, 0xFF, b.bytes);
    }
}

inline void restore() {
  for (auto& b : buffers)
    if (b.dependent && !b.kept.empty()) {
      memcpy(b.at, b.kept.data(), b.bytes);
      b.kept.clear();
    }
}

inline uint4 load(const void* at) {
  uint4 v = {0, 0, 0, 0};
  bool inside = false;
  for (auto& b : buffers) inside = inside || ((const uint8_t*)at >= b.at && (const uint8_t*)at + 16 <= b.at + b.bytes);
  if (!inside) fail("a 16-byte load outside every buffer");
  else if ((uintptr_t)at % 16) fail("a 16-byte load that is not aligned");
  else memcpy(&v, at, 16);
  return v;
}

inline void start() {
  now->body();
  now->done = true;
  ++events;
  Block& block = *now->block;
  if (--block.live && block.barrier.arrived >= block.live) {  // who left no longer counts
    block.barrier.arrived = 0;
    ++block.barrier.generation;
  }
  yield();
}

inline int live_fibers() {
  int live = 0;
  for (auto& f : fibers) live += !f->done;
  return live;
}

inline void run_fibers() {
  poison();
  waiting = 0;
  while (live_fibers() && error.empty()) {
    const long before = events;
    for (auto& fiber : fibers)
      if (!fiber->done && error.empty()) {
        now = fiber.get();
        swapcontext(&scheduler, &now->context);
      }
    if (events == before) fail("deadlock: no thread moves");
  }
  restore();
  fibers.clear();
}

inline void add_block(const Launch& l, Block& block) {
  block.size = dim3(l.threads);
  block.launch_shared = l.shared;
  block.live = l.threads;
  block.warps.resize((l.threads + kLanes - 1) / kLanes);
  for (int t = 0; t < l.threads; ++t) {
    fibers.push_back(std::make_unique<Fiber>());
    Fiber& f = *fibers.back();
    f.thread = dim3(t, 0, 0);
    f.block = &block;
    f.body = l.body;
    f.stack.resize(kStackBytes);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = kStackBytes;
    makecontext(&f.context, start, 0);
  }
}

// Clusters of one launch run one after the other, or, `together`, with all that is queued: ranks that wait for each other.
inline void run_queue() {
  std::vector<std::unique_ptr<Block>> blocks;
  for (auto& l : queue)
    for (unsigned z = 0; z < l.grid.z; ++z)
      for (unsigned y = 0; y < l.grid.y; ++y)
        for (unsigned x = 0; x < l.grid.x && error.empty(); ++x) {
          blocks.push_back(std::make_unique<Block>());
          Block& block = *blocks.back();
          block.index = dim3(x, y, z);
          block.rank = x % l.cluster;
          block.cluster = block.rank ? blocks[blocks.size() - 2]->cluster : std::make_shared<Cluster>();
          block.cluster->blocks.push_back(&block);
          add_block(l, block);
          if (!together && (x + 1) % l.cluster == 0) run_fibers();
        }
  if (together) run_fibers();
  queue.clear();
}

inline float decode_e4m3(uint8_t code) {
  const int exponent = (code >> 3) & 15, mantissa = code & 7;
  if ((code & 0x7F) == 0x7F) return NAN;
  const float value = exponent ? ldexpf(8.0f + mantissa, exponent - 10) : ldexpf((float)mantissa, -9);
  return code & 0x80 ? -value : value;
}

inline uint8_t encode_e4m3(float x) {
  const uint8_t sign = signbit(x) ? 0x80 : 0;
  if (isnan(x)) return 0x7F;
  const float a = fabsf(x);
  if (a >= 448.0f) return sign | 0x7E;
  if (a == 0.0f) return sign;
  const int exponent = fmax(ilogbf(a), -6);
  const int steps = (int)nearbyintf(ldexpf(a, 3 - exponent));  // 8..16 of a normal, 0..8 of a subnormal value
  const int code = (exponent + 6) * 8 + steps;                 // a carry walks into the exponent by itself
  return sign | (uint8_t)code;
}

inline float value_of(int format, uint32_t word, int i) {
  if (format == 0) return decode_e4m3((uint8_t)(word >> (8 * i)));
  if (format == 2) {
    _Float16 half;
    const uint16_t bits = (uint16_t)(word >> (16 * i));
    memcpy(&half, &bits, 2);
    return (float)half;
  }
  const uint32_t wide = (word >> (16 * i)) << 16;
  float v;
  memcpy(&v, &wide, 4);
  return v;
}

}  // namespace emulator

inline void __syncwarp() { emulator::arrive(emulator::warp().barrier, emulator::kLanes); }
inline void __syncthreads() { emulator::arrive(emulator::now->block->barrier, emulator::now->block->live); }

template <class T>
inline T __shfl_sync(unsigned, T value, int from) {
  using namespace emulator;
  memcpy(&warp().words[lane()][0], &value, 4);
  arrive(warp().barrier, kLanes);
  T other;
  memcpy(&other, &warp().words[from][0], 4);
  arrive(warp().barrier, kLanes);
  return other;
}

template <class T>
inline T __shfl_xor_sync(unsigned all, T value, int mask) {
  return __shfl_sync(all, value, emulator::lane() ^ mask);
}

namespace kilotok {

inline uint4 load_weight(const void* at) { return emulator::load(at); }
inline uint4 load_activation(const void* at) { return emulator::load(at); }
using SharedAt = uint8_t*;
inline SharedAt shared_at(const void* p) { return (uint8_t*)p; }
inline uint4 load_shared(SharedAt at) { return *(const uint4*)at; }
inline void store_shared(SharedAt at, const uint2& v) { memcpy(at, &v, 8); }
inline void stage(SharedAt to, const void* at) { *(uint4*)to = emulator::load(at); }
inline void stage_weight(SharedAt to, const void* at) { stage(to, at); }
inline void stage_commit() {}
template <int Pending>
inline void stage_wait() {}
inline void prefetch(const void*) {}

inline uint32_t f16_bits(float x) {
  const _Float16 half = (_Float16)x;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
inline uint32_t pack_f16(float a, float b) { return f16_bits(a) | f16_bits(b) << 16; }
inline uint32_t e4m3x2_to_f16x2(uint32_t pair) {
  return pack_f16(emulator::decode_e4m3((uint8_t)pair), emulator::decode_e4m3((uint8_t)(pair >> 8)));
}
inline uint32_t e4m3x2_to_bf16x2(uint32_t pair) {
  const float values[2] = {emulator::decode_e4m3((uint8_t)pair), emulator::decode_e4m3((uint8_t)(pair >> 8))};
  uint32_t bits[2];
  memcpy(bits, values, 8);
  return bits[0] >> 16 | (bits[1] & 0xFFFF0000u);
}
inline uint32_t two_bytes(uint32_t first, uint32_t second, int index) {
  return (first >> (8 * index) & 0xFF) | (second >> (8 * index) & 0xFF) << 8;
}

inline int cluster_rank() { return emulator::now->block->rank; }
inline void cluster_arrive() {}
inline void cluster_wait() {
  emulator::Cluster& c = *emulator::now->block->cluster;
  emulator::arrive(c.barrier, (int)(c.blocks.size() * emulator::now->block->size.x));
}
inline void store_remote(float4* mine, int rank, const float4& v) {
  using namespace emulator;
  for (auto& [key, memory] : now->block->shared) {
    const long offset = (const uint8_t*)mine - memory.data();
    if (offset < 0 || offset + 16 > (long)memory.size()) continue;
    auto& theirs = now->block->cluster->blocks[rank]->shared[key];
    if (theirs.empty()) theirs.assign(memory.size(), 0xFF);
    memcpy(theirs.data() + offset, &v, 16);
    return;
  }
  fail("a remote store outside shared memory");
}

inline void grid_wait() {
  using namespace emulator;
  if (now->waited) return;
  now->waited = true;
  ++events;
  ++waiting;
  const int all = (int)fibers.size();
  if (waiting == all) restore();
  while (waiting < all && error.empty()) yield();
}

inline uint32_t pack_e4m3(float a, float b, float c, float d) {
  using emulator::encode_e4m3;
  return encode_e4m3(a) | encode_e4m3(b) << 8 | encode_e4m3(c) << 16 | (uint32_t)encode_e4m3(d) << 24;
}

// Fragments of mma.m16n8k32 (8-bit) and m16n8k16 (16-bit) as PTX documents them; `per` values share a word.
template <int F>
inline void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  using namespace emulator;
  const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(warp().words[lane()], mine, sizeof mine);
  arrive(warp().barrier, kLanes);
  const int group = lane() / 4, member = lane() % 4, per = F == 0 ? 4 : 2;
  for (int out = 0; out < 4; ++out) {
    const int row = group + out / 2 * 8, column = member * 2 + out % 2;
    double sum = d[out];
    for (int k = 0; k < per * 8; ++k) {
      const int holder = k / per % 4, half = k / per / 4;  // k = half * 4 * per + holder * per + i
      const uint32_t a = warp().words[row % 8 * 4 + holder][half * 2 + row / 8], b = warp().words[column * 4 + holder][4 + half];
      sum += (double)value_of(F, a, k % per) * value_of(F, b, k % per);
    }
    d[out] = (float)sum;
  }
  arrive(warp().barrier, kLanes);
}

inline void store_flagged(void* at, uint32_t first, uint32_t second, uint32_t epoch) {
  const uint32_t words[4] = {first, epoch, second, epoch};
  memcpy(at, words, 16);
  ++emulator::events;
}

inline bool load_flagged(const void* at, uint32_t epoch, uint32_t& first, uint32_t& second) {
  uint32_t words[4];
  memcpy(words, at, 16);
  first = words[0], second = words[2];
  if (words[1] == epoch && words[3] == epoch) return true;
  emulator::yield();
  return !emulator::error.empty();  // a failed run ends every wait
}

}  // namespace kilotok

template <class... Wanted, class... Given>
int launch(void (*kernel)(Wanted...), dim3 grid, int threads, int shared, unsigned cluster, void*, Given... given) {
  if (shared > 227 << 10) emulator::fail("more shared memory than a block may have");
  emulator::queue.push_back({grid, threads, (size_t)shared, cluster, [=] { kernel(Wanted(given)...); }});
  if (!emulator::together) emulator::run_queue();
  return emulator::error.empty() ? 0 : 1;
}

extern "C" {
void kt_emulate_buffer(void* at, long long bytes, int dependent) {
  emulator::buffers.push_back({(uint8_t*)at, (size_t)bytes, dependent != 0, {}});
}
void kt_emulate_together(int on) { emulator::together = on != 0; }
// Runs what is queued, forgets the buffers, and says what went wrong ("" when nothing did).
const char* kt_emulate_finish() {
  static std::string said;
  emulator::run_queue();
  emulator::buffers.clear();
  said = emulator::error;
  emulator::error.clear();
  return said.c_str();
}
}

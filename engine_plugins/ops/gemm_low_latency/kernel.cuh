// gemm_low_latency on the GPU: up to 16 tokens times weights that stay where they are, [N, K] row-major.
//
// What it is: 16 weight rows are mma's A operand, eight tokens its B operand: one path for 1 to 16 tokens, with fewer
// instructions per weight byte than CUDA-core FMAs even for one token. A block is one tile of rows; its warps cut K. Each warp
// keeps kStages chunks on their way to shared memory, the first of them before it waits for the kernel that makes the
// activations, so launch, DRAM latency and the previous kernel's tail overlap; blocks are small, so that the next kernel's
// find room beside this one's. A lane's 16 bytes are four fragment words: which k a word holds is free as long as both
// operands agree, so neither weights nor activations need a swizzle.
// What it refuses to be: a GEMM for more than 16 tokens.
// Run it: compiled by engine_plugins/ops/compile.py; emulated by tests/engine_plugins/test_gpu_ops.py.
#pragma once
#include "cuda/device.cuh"

namespace kilotok {

constexpr int kChunkBytes = 64;  // of one row: four lanes with 16 bytes each
constexpr int kStages = 8;       // chunks of one warp in flight, at most
constexpr int kMaxWarps = 16;

struct Lane {
  int warp, id, group, member;  // group 0..7: a weight row of either half, and a token; member 0..3: which 16 bytes
  KT_INLINE Lane() : warp(threadIdx.x / kWarp), id(threadIdx.x % kWarp), group(id / 4), member(id % 4) {}
};

// How a block cuts K: `slices` warps share the chunks of a row; each has `stages` of them in flight.
struct Cut {
  int slices, chunks, stages;
  KT_INLINE int begin(int slice) const { return slice * chunks / slices; }
};

KT_INLINE uint4 zero16() { return uint4{0, 0, 0, 0}; }

// One past the last chunk before `end` in which this lane has bytes of a row.
KT_INLINE int lane_end(int end, int row_bytes, const Lane& lane) {
  const int whole = (row_bytes - lane.member * 16 + kChunkBytes - 1) / kChunkBytes;
  return end < whole ? end : whole;
}

// A lane's two rows of a tile. A row behind the last is the last again: its sums are dropped.
struct Rows {
  const uint8_t* low;
  long long to_high;  // bytes
  KT_INLINE Rows(const void* w, int first, int second, int rows, int row_bytes, const Lane& lane) {
    first = first + lane.group < rows ? first + lane.group : rows - 1;
    second = second + lane.group < rows ? second + lane.group : rows - 1;
    low = (const uint8_t*)w + (long long)first * row_bytes + lane.member * 16;
    to_high = (long long)(second - first) * row_bytes;
  }
};

// A warp's piece of shared memory: a ring of chunks, each with a tile's weights by row half and lane, then the tokens' 16-byte
// pieces; in the end the warp's sums, [token][row 0..15], padded so that a fragment spreads over the banks.
constexpr int kWeightBytes = 2 * kWarp * 16, kTokenStride = 20;
struct Ring {
  SharedAt at;
  int chunk_bytes;
  static KT_EVERYWHERE int bytes(int tokens, int stages) { return stages * (kWeightBytes + tokens * kChunkBytes); }
  KT_INLINE Ring(const void* shared, int warp, int tokens, int stages)
      : at(shared_at(shared) + warp * bytes(tokens, stages)), chunk_bytes(kWeightBytes + tokens * kChunkBytes) {}
  KT_INLINE SharedAt weights(int i, int half, const Lane& lane) const { return at + i * chunk_bytes + (half * kWarp + lane.id) * 16; }
  KT_INLINE SharedAt token(int i, int token, int member) const { return at + i * chunk_bytes + kWeightBytes + (token * 4 + member) * 16; }
  KT_INLINE void fetch(int i, const Rows& rows, int chunk, const Lane& lane) const {
    const uint8_t* from = rows.low + chunk * kChunkBytes;
    stage_weight(weights(i, 0, lane), from);
    stage_weight(weights(i, 1, lane), from + rows.to_high);
  }
};

// E4M3 or BF16 activations as they lie in memory, [M, K]; with `expert_M`, of the tokens only that chose `wanted`.
struct Stored {
  const uint8_t* x;
  int tokens, row_bytes;
  const int* expert_M = nullptr;
  int wanted = 0;
  KT_INLINE bool has(int token) const { return token < tokens && (!expert_M || expert_M[token] == wanted); }
  KT_INLINE void fetch(const Ring& to, int i, int token, int chunk, const Lane& lane) const {
    stage(to.token(i, token, lane.member), x + (long long)token * row_bytes + chunk * kChunkBytes + lane.member * 16);
  }
};

KT_INLINE uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// d [row g, row g + 8 of A][tokens 2t, 2t + 1] += 16 bytes of each of both rows and of a token. Two sums, so that an mma need
// not wait for the one before. E4M3 goes through F16, exactly.
template <int F>
KT_INLINE void multiply(float (&d)[2][4], const uint4& low, const uint4& high, const uint4& x) {
  if constexpr (F == kE4m3) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t a = word_of(low, i), b = word_of(high, i), c = word_of(x, i);
      mma<kF16>(d[i % 2], e4m3x2_to_f16x2(a), e4m3x2_to_f16x2(b), e4m3x2_to_f16x2(a >> 16), e4m3x2_to_f16x2(b >> 16), e4m3x2_to_f16x2(c),
                e4m3x2_to_f16x2(c >> 16));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      mma<kBf16>(d[i], word_of(low, 2 * i), word_of(high, 2 * i), word_of(low, 2 * i + 1), word_of(high, 2 * i + 1), word_of(x, 2 * i),
                 word_of(x, 2 * i + 1));
  }
}

// One warp's share of a tile: d += rows times tokens over chunks [begin, end). With `Wide`, `upper` takes tokens 8 to 15.
// The ring's first chunks of weights are on their way already.
template <int F, bool Wide>
KT_INLINE void multiply_share(float (&d)[2][4], float (&upper)[2][4], const Ring& ring, const Rows& rows, const Stored& x, int begin, int end,
                              const Lane& lane) {
  const int mine = lane_end(end, x.row_bytes, lane);
  const bool has = x.has(lane.group), has_upper = Wide && x.has(lane.group + 8);
  auto fetch_tokens = [&](int i, int chunk) {
    if (has) x.fetch(ring, i, lane.group, chunk, lane);
    if (has_upper) x.fetch(ring, i, lane.group + 8, chunk, lane);
  };
#pragma unroll
  for (int i = 0; i < kStages; ++i) {
    if (begin + i < mine) fetch_tokens(i, begin + i);
    stage_commit();
  }
  int i = 0;
  for (int chunk = begin; chunk < end; ++chunk) {
    stage_wait<kStages - 1>();
    const bool inside = chunk < mine;
    const uint4 low = inside ? load_shared(ring.weights(i, 0, lane)) : zero16(), high = inside ? load_shared(ring.weights(i, 1, lane)) : zero16();
    multiply<F>(d, low, high, inside && has ? load_shared(ring.token(i, lane.group, lane.member)) : zero16());
    if constexpr (Wide) multiply<F>(upper, low, high, inside && has_upper ? load_shared(ring.token(i, lane.group + 8, lane.member)) : zero16());
    if (chunk + kStages < mine) {
      ring.fetch(i, rows, chunk + kStages, lane);
      fetch_tokens(i, chunk + kStages);
    }
    stage_commit();
    i = i + 1 == kStages ? 0 : i + 1;
  }
}

// In its own ring, two banks further than the warp before, because the lanes of a warp read the same place of all.
KT_INLINE float* sums_of(const void* shared, int warp, int tokens, int stages) {
  return (float*)((uint8_t*)shared + warp * (Ring::bytes(tokens, stages) + 8));
}

KT_INLINE void put_sums(float* sums, const float (&d)[2][4], int first_token, const Lane& lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    sums[(first_token + lane.member * 2 + i % 2) * kTokenStride + i / 2 * 8 + lane.group] = d[0][i] + d[1][i];
}

// After a barrier: for every token and pair of rows, the sums of all warps, added in one order, to `finish`: as many lanes as
// there are warps share an item. `Pairs` 8: rows 2p, 2p + 1; 4: those and the same two of the second half.
template <int Pairs, class Finish>
KT_INLINE void finish_sums(const void* shared, const Cut& cut, int tokens, const Finish& finish) {
  const int warps = cut.slices, item = threadIdx.x / warps, part = threadIdx.x % warps, pair = item % Pairs;
  const float* sums = sums_of(shared, part, tokens, cut.stages) + pair * 2;
  for (int token = item / Pairs; token - item / Pairs < tokens; token += kWarp / Pairs) {
    float2 sum[8 / Pairs];
#pragma unroll
    for (int half = 0; half < 8 / Pairs; ++half) {
      sum[half] = token < tokens ? *(const float2*)(sums + token * kTokenStride + half * 8) : float2{0.0f, 0.0f};
      for (int offset = warps / 2; offset; offset /= 2) {
        sum[half].x += __shfl_xor_sync(0xFFFFFFFFu, sum[half].x, offset);
        sum[half].y += __shfl_xor_sync(0xFFFFFFFFu, sum[half].y, offset);
      }
    }
    if (part == 0 && token < tokens) finish(token, sum);
  }
}

// The body of every dense kernel: tile `blockIdx.x` of `Finish::kRows` rows and, `second` rows behind each of the first eight,
// eight more: the other half of the tile, or up beside gate.
template <int F, bool Wide, class Finish>
KT_INLINE void skinny_gemm(const void* w, int rows, int second, const Stored& x, const Cut& cut, Finish finish) {
  KT_LAUNCH_SHARED(uint4, shared);
  const Lane lane;
  const int begin = cut.begin(lane.warp), end = cut.begin(lane.warp + 1), first = blockIdx.x * Finish::kRows;
  const Rows at(w, first, first + second, rows, x.row_bytes, lane);
  const Ring ring(shared, lane.warp, x.tokens, cut.stages);
  float d[2][4] = {}, upper[2][4] = {};
  const int mine = lane_end(end, x.row_bytes, lane);
#pragma unroll
  for (int i = 0; i < kStages; ++i)
    if (begin + i < mine) ring.fetch(i, at, begin + i, lane);
  finish.prepare(first + (int)threadIdx.x / cut.slices % Finish::kPairs * 2, threadIdx.x / cut.slices / Finish::kPairs, x.tokens);
  grid_wait();
  multiply_share<F, Wide>(d, upper, ring, at, x, begin, end, lane);
  float* sums = sums_of(shared, lane.warp, x.tokens, cut.stages);
  __syncwarp();  // every lane has read what the sums overwrite
  put_sums(sums, d, 0, lane);
  if constexpr (Wide) put_sums(sums, upper, 8, lane);
  __syncthreads();
  finish_sums<Finish::kPairs>(shared, cut, x.tokens, finish);
}

// One number for all rows (step 0) or one per row (step 1); none at all is 1.
struct RowScale {
  const float* at;
  int step;
  KT_INLINE float operator[](int n) const { return at ? at[n * step] : 1.0f; }
};

// y [M, N] BF16 = sums * scale.
struct ScaledBf16 {
  static constexpr int kRows = 16, kPairs = 8;
  RowScale scale;
  uint16_t* y;
  int rows;
  int n;
  float2 factor;

  // Before the wait: rows `row` and `row + 1` are this thread's, and `token` first.
  KT_INLINE void prepare(int row, int, int) {
    n = row;
    factor = float2{n < rows ? scale[n] : 0.0f, n + 1 < rows ? scale[n + 1] : 0.0f};
  }
  KT_INLINE void operator()(int token, const float2 (&sum)[1]) const {
    uint16_t* to = y + (long long)token * rows + n;
    if (n < rows) to[0] = float_to_bf16(sum[0].x * factor.x);
    if (n + 1 < rows) to[1] = float_to_bf16(sum[0].y * factor.y);
  }
};

template <int F, bool Wide>
KT_KERNEL(kWarp * kMaxWarps, Wide ? 1 : 2) gemm_low_latency_kernel(const void* w, Stored x, ScaledBf16 finish, Cut cut) {
  skinny_gemm<F, Wide>(w, finish.rows, 8, x, cut, finish);
}

}  // namespace kilotok

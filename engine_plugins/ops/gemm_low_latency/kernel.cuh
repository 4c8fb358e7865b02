// gemm_low_latency on the GPU: up to 16 tokens times weights that stay where they are, [N, K] row-major.
//
// What it is: the weights are mma's B operand, eight rows a tile, the tokens its A operand: one path for 1 to 16 tokens, with
// fewer instructions per weight byte than CUDA-core FMAs even for one token. A block's warps cut K; each warp has its whole
// slice in registers before it waits for the kernel that makes the activations, so launch, DRAM latency and the previous
// kernel's tail overlap. The activations of a slice then come all at once into shared memory: one latency, not one per chunk.
// A lane's 16 bytes are four fragment words: which k a word holds is free as long as both operands agree, so neither weights
// nor activations need a swizzle.
// What it refuses to be: a GEMM for more than 16 tokens.
// Run it: compiled by engine_plugins/ops/compile.py; emulated by tests/engine_plugins/test_gpu_ops.py.
#pragma once
#include "cuda/device.cuh"

namespace kilotok {

constexpr int kTileRows = 8;
constexpr int kChunkBytes = 64;  // of one row: four lanes with 16 bytes each
constexpr int kBatch = 10;       // chunks of one warp in registers: 5120 E4M3 values over eight warps
constexpr int kMaxWarps = 8;

struct Lane {
  int warp, id, group, member;  // group 0..7: a weight row, and a token of A; member 0..3: which 16 bytes
  KT_INLINE Lane() : warp(threadIdx.x / kWarp), id(threadIdx.x % kWarp), group(id / 4), member(id % 4) {}
};

// How a grid cuts [N, K]: `slices` warps share a tile's K, `tiles` tiles share a block.
struct Cut {
  int slices, tiles, chunks;
  KT_INLINE int begin(int slice) const { return slice * chunks / slices; }
};

KT_INLINE uint4 zero16() { return uint4{0, 0, 0, 0}; }

// Where this lane's 16 bytes of chunk 0 are in row `index`. A row behind the last is the last again: its sums are dropped.
KT_INLINE const uint8_t* lane_row(const void* w, int index, int rows, int row_bytes, const Lane& lane) {
  return (const uint8_t*)w + (long long)(index < rows ? index : rows - 1) * row_bytes + lane.member * 16;
}

// One past the last chunk before `end` in which this lane has bytes of a row.
KT_INLINE int lane_end(int end, int row_bytes, const Lane& lane) {
  const int whole = (row_bytes - lane.member * 16 + kChunkBytes - 1) / kChunkBytes;
  return end < whole ? end : whole;
}

// Chunks [chunk, end) of a row, at most `Batch`, into registers; what lies outside is zero.
template <int Batch>
KT_INLINE void load_batch(uint4 (&w)[Batch], const uint8_t* row, int chunk, int end) {
#pragma unroll
  for (int i = 0; i < Batch; ++i) w[i] = chunk + i < end ? load_weight(row + (chunk + i) * kChunkBytes) : zero16();
}

// A warp's piece of shared memory: activations by chunk and lane, then its sums.
constexpr int kWarpShared = kBatch * kWarp * 16;
KT_INLINE uint4* warp_shared(void* shared, const Lane& lane) { return (uint4*)((uint8_t*)shared + lane.warp * kWarpShared); }

// E4M3 or BF16 activations as they lie in memory, [M, K].
struct Stored {
  const uint8_t* x;
  int tokens, row_bytes;
  KT_INLINE bool has(int token) const { return token < tokens; }
  // Chunks [chunk, end), at most `Batch`, of tokens `first` to `first + 7`: each lane brings its own 16 bytes.
  template <int Batch>
  KT_INLINE void fetch(uint4* to, int first, int chunk, int end, const Lane& lane) const {
    if (!has(first + lane.group)) return;
    const uint8_t* row = x + (long long)(first + lane.group) * row_bytes + lane.member * 16;
    const int mine = lane_end(end, row_bytes, lane);
#pragma unroll
    for (int i = 0; i < Batch; ++i)
      if (chunk + i < mine) stage(to + i * kWarp + lane.id, row + (chunk + i) * kChunkBytes);
  }
};

// Chunks [chunk, end), which all lanes of a warp share; a lane has bytes up to `mine` only. One matrix is mma's B operand: d is
// [token g or g + 8][rows 2t, 2t + 1]; `low` and `high`: tokens g and g + 8 exist, staged one batch after the other.
template <int F, int Batch>
KT_INLINE void multiply_batch(float (&d)[4], const uint4 (&w)[1][Batch], const uint4* staged, bool low, bool high, int chunk, int end,
                              int mine, const Lane& lane) {
#pragma unroll
  for (int i = 0; i < Batch; ++i) {
    if (chunk + i >= end) break;
    const bool inside = chunk + i < mine;
    const uint4 a = low && inside ? staged[i * kWarp + lane.id] : zero16();
    const uint4 b = high && inside ? staged[(Batch + i) * kWarp + lane.id] : zero16();
    mma<F>(d, a.x, b.x, a.y, b.y, w[0][i].x, w[0][i].y);
    mma<F>(d, a.z, b.z, a.w, b.w, w[0][i].z, w[0][i].w);
  }
}

// Two matrices are the two halves of mma's A operand, up to eight tokens its B: d is [gate row g, up row g][tokens 2t, 2t + 1].
template <int F, int Batch>
KT_INLINE void multiply_batch(float (&d)[4], const uint4 (&w)[2][Batch], const uint4* staged, bool low, bool, int chunk, int end,
                              int mine, const Lane& lane) {
#pragma unroll
  for (int i = 0; i < Batch; ++i) {
    if (chunk + i >= end) break;
    const uint4 token = low && chunk + i < mine ? staged[i * kWarp + lane.id] : zero16();
    mma<F>(d, w[0][i].x, w[1][i].x, w[0][i].y, w[1][i].y, token.x, token.y);
    mma<F>(d, w[0][i].z, w[1][i].z, w[0][i].w, w[1][i].w, token.z, token.w);
  }
}

// Sums of a block's slices meet in shared memory, [token 0..15][row 0..7] for each of a warp's matrices.
constexpr int kPairs = kMaxTokens * kTileRows / 2;

template <int Tiles>
KT_INLINE void put_sums(void* shared, const float (&d)[4], const Lane& lane) {
  float2* mine = (float2*)warp_shared(shared, lane);
  __syncwarp();  // every lane has read its activations
  if constexpr (Tiles == 1) {
    mine[lane.group * 4 + lane.member] = float2{d[0], d[1]};
    mine[(lane.group + 8) * 4 + lane.member] = float2{d[2], d[3]};
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) ((float*)(mine + i / 2 * kPairs))[(lane.member * 2 + i % 2) * kTileRows + lane.group] = d[i];
  }
}

// After a barrier: every (tile of the block, token, row pair) once, its slices added in order, given to `finish`.
template <int Tiles, class Finish>
KT_INLINE void finish_sums(const void* shared, const Cut& cut, int tokens, const Finish& finish) {
  const int work = cut.tiles * tokens * 4;
  for (int i = threadIdx.x; i < work; i += blockDim.x) {
    const int group = i / (tokens * 4), pair = i % (tokens * 4);  // pair = token * 4 + row pair
    float2 sum[Tiles] = {};
    for (int slice = 0; slice < cut.slices; ++slice) {
      const float2* part = (const float2*)((const uint8_t*)shared + (group * cut.slices + slice) * kWarpShared) + pair;
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        sum[tile].x += part[tile * kPairs].x;
        sum[tile].y += part[tile * kPairs].y;
      }
    }
    finish(pair / 4, (blockIdx.x * cut.tiles + group) * kTileRows + pair % 4 * 2, sum);
  }
}

// The body of every dense kernel. Of `Tiles` = 2 matrices the second starts `stride_rows` rows after the first: gate, then up.
// More than eight tokens (`Wide`) halve the batch, so that both halves of the tokens fit a warp's shared memory.
template <int F, int Tiles, bool Wide, class Activations, class Finish>
KT_INLINE void skinny_gemm(const void* w, int rows, int stride_rows, const Activations& x, const Cut& cut, const Finish& finish) {
  static_assert(!Wide || Tiles == 1, "a pair takes eight tokens");
  KT_LAUNCH_SHARED(uint4, shared);
  constexpr int Batch = Wide ? kBatch / 2 : kBatch;
  const Lane lane;
  const int slice = lane.warp % cut.slices, begin = cut.begin(slice), end = cut.begin(slice + 1), bytes = x.row_bytes;
  const int mine = lane_end(end, bytes, lane);
  const int index = (blockIdx.x * cut.tiles + lane.warp / cut.slices) * kTileRows + lane.group;
  const uint8_t* row = lane_row(w, index, rows, bytes, lane);
  const long long stride = (long long)stride_rows * bytes;
  uint4 batch[Tiles][Batch];
  uint4* staged = warp_shared(shared, lane);
  float d[4] = {};
#pragma unroll
  for (int tile = 0; tile < Tiles; ++tile) load_batch(batch[tile], row + tile * stride, begin, mine);
  grid_wait();
  for (int chunk = begin; chunk < end; chunk += Batch) {
    __syncwarp();
    x.template fetch<Batch>(staged, 0, chunk, end, lane);
    if constexpr (Wide) x.template fetch<Batch>(staged + Batch * kWarp, 8, chunk, end, lane);
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile)
      if (chunk > begin) load_batch(batch[tile], row + tile * stride, chunk, mine);
    staged_wait();
    __syncwarp();
    multiply_batch<F>(d, batch, staged, x.has(lane.group), Wide && x.has(lane.group + 8), chunk, end, mine, lane);
  }
  put_sums<Tiles>(shared, d, lane);
  __syncthreads();
  finish_sums<Tiles>(shared, cut, x.tokens, finish);
}

// One number for all rows (step 0) or one per row (step 1); none at all is 1.
struct RowScale {
  const float* at;
  int step;
  KT_INLINE float operator[](int n) const { return at ? at[n * step] : 1.0f; }
};

// y [M, N] BF16 = sums * scale.
struct ScaledBf16 {
  RowScale scale;
  uint16_t* y;
  int rows;
  KT_INLINE void put(int token, int n, float value) const {
    if (n < rows) y[(long long)token * rows + n] = float_to_bf16(value * scale[n]);
  }
  KT_INLINE void operator()(int token, int n, const float2 (&sum)[1]) const {
    put(token, n, sum[0].x);
    put(token, n + 1, sum[0].y);
  }
};

template <int F, bool Wide>
KT_KERNEL(256, Wide ? 2 : 3) gemm_low_latency_kernel(const void* w, Stored x, ScaledBf16 finish, Cut cut) {
  grid_launch_dependents();
  skinny_gemm<F, 1, Wide>(w, finish.rows, 0, x, cut, finish);
}

}  // namespace kilotok

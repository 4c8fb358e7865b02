// attention_decode on the GPU: split-KV decode over an E4M3 cache, combined through the shared memory of a cluster.
//
// What it is: one cluster of eight blocks per kv head and 16 query rows. Each warp takes 16 positions at a time: scores by mma in
// BF16, online softmax, values by mma in F16; a lane's 16 bytes of a key, and 16 dims of four values, are fragments as they
// lie, because positions and dims may be numbered freely. What the cache held before this step is loaded before the wait.
// What it refuses to be: paged, or for another head size than 128; Triton serves those.
// Run it: compiled by engine_plugins/ops/compile.py; emulated by tests/engine_plugins/test_gpu_ops.py.
#pragma once
#include "gemm_low_latency/kernel.cuh"

namespace kilotok {

constexpr int kHeadDim = 128, kAttentionWarps = 8, kSplits = 8, kPositions = 16, kRows = 16;
constexpr int kSumsRow = kHeadDim + 16;  // floats, with a gap of four behind every 32: a warp's stores meet no bank twice
constexpr int kAttentionShared = kAttentionWarps * kRows * kSumsRow * 4;
constexpr float kLog2E = 1.4426950408889634f;

struct Attention {
  const uint8_t* q_MHD;  // BF16, rows of `q_stride` values
  const uint8_t *k_SGD, *v_SGD;
  const int64_t* position_M;     // made before the kernel before
  uint16_t* y_MHD;               // BF16, or
  uint8_t* y8_MHD;               // E4M3 when not null
  const float* inv_out_scale;
  float k_scale, v_scale;
  int tokens, heads, kv_heads, q_stride, chunk_size;
};

struct Row {  // of one kv head: token-major, its query heads inside
  int token, head;
  KT_INLINE Row(const Attention& a, int index) {
    const int group = a.heads / a.kv_heads;
    token = index / group;
    head = blockIdx.y * group + index % group;
  }
};

// The 16 dims (32 bytes) from `dim` on of a query row; a row behind the last is zero.
KT_INLINE void load_query(uint4 (&q)[2], const Attention& a, int index, int dim) {
  const Row row(a, index);
  const uint8_t* at = a.q_MHD + ((long long)row.token * a.q_stride + row.head * kHeadDim + dim) * 2;
  for (int i = 0; i < 2; ++i) q[i] = row.token < a.tokens ? load_activation(at + i * 16) : zero16();
}

// Scores of kPositions positions for 16 rows: d[j] is [row g or g + 8][positions 4t + 2j, 4t + 2j + 1].
KT_INLINE void score(float (&d)[2][4], const uint4 (&q)[2][2][2], const uint4 (&key)[2][2]) {
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // four dims of a lane: words 2i, 2i + 1 of a query's eight, one word of the key
        const uint32_t four = word_of(key[j][half], i);
        const uint4 &low = q[0][half][i / 2], &high = q[1][half][i / 2];
        mma<kBf16>(d[j], word_of(low, i % 2 * 2), word_of(high, i % 2 * 2), word_of(low, i % 2 * 2 + 1), word_of(high, i % 2 * 2 + 1),
                   e4m3x2_to_bf16x2(four & 0xFFFFu), e4m3x2_to_bf16x2(four >> 16));
      }
}

struct Softmax {
  float top[2], mass[2];  // of rows g and g + 8, in powers of two
};

// What a lane reads of 16 positions from `start` on; behind the last it is zero. Column g of score tile j is position 4 (g / 2) + 2 j + g % 2.
struct Tile {
  uint4 key[2][2], value[4];

  KT_INLINE void load(const uint8_t* keys, const uint8_t* values, long long start, long long end, int stride, const Lane& lane) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const long long at = start + lane.group / 2 * 4 + 2 * j + lane.group % 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) key[j][half] = at < end ? load_activation(keys + at * stride + half * 64 + lane.member * 16) : zero16();
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const long long at = start + lane.member * 4 + i;
      value[i] = at < end ? load_activation(values + at * stride + lane.group * 16) : zero16();
    }
  }
};

KT_INLINE int place_of(int row, int dim) { return row * kSumsRow + dim + dim / 32 * 4; }

// What each block keeps of all blocks' sums: of its share of the rows.
constexpr int kShare = kRows / kSplits;
struct Parts {
  float4 sums[kSplits][kShare][kHeadDim / 4];
  float4 stats[kSplits][kShare];  // top, mass
};

// The warps' sums of a block, scaled to the block's top, go to the block that finishes the row. A thread has eight dims of one.
KT_INLINE void combine_block(const float* sums, const float2* stats, Parts& parts, int rank) {
  constexpr int each = 8, sharers = kHeadDim / each;
  static_assert(kRows * sharers == kWarp * kAttentionWarps, "one row per thread");
  const int row = threadIdx.x / sharers, dim = threadIdx.x % sharers * each;
  const float* at = sums + place_of(row, dim);
  float2 part[kAttentionWarps];
  float top = -INFINITY, mass = 0.0f, sum[each] = {};
#pragma unroll
  for (int warp = 0; warp < kAttentionWarps; ++warp) {
    part[warp] = stats[warp * kRows + row];
    top = fmaxf(top, part[warp].x);
  }
  const float base = top == -INFINITY ? 0.0f : top;
#pragma unroll
  for (int warp = 0; warp < kAttentionWarps; ++warp) {
    const float factor = exp2f(part[warp].x - base);
    mass = fmaf(part[warp].y, factor, mass);
#pragma unroll
    for (int i = 0; i < each; ++i) sum[i] = fmaf(at[warp * kRows * kSumsRow + i], factor, sum[i]);
  }
  cluster_wait();  // for the blocks to have started
#pragma unroll
  for (int i = 0; i < each / 4; ++i)
    store_remote(&parts.sums[rank][row % kShare][dim / 4 + i], row / kShare, float4{sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]});
  if (threadIdx.x % sharers == 0) store_remote(&parts.stats[rank][row % kShare], row / kShare, float4{top, mass, 0.0f, 0.0f});
}

// Each block finishes its share of the rows.
KT_INLINE void combine_cluster(const Attention& a, const Parts& parts, int first_row, int rank) {
  static_assert(kShare * kHeadDim == kWarp * kAttentionWarps, "one output per thread");
  const int share = threadIdx.x / kHeadDim, dim = threadIdx.x % kHeadDim;
  float top = -INFINITY, mass = 0.0f, sum = 0.0f;
#pragma unroll
  for (int split = 0; split < kSplits; ++split) top = fmaxf(top, parts.stats[split][share].x);
#pragma unroll
  for (int split = 0; split < kSplits; ++split) {
    const float4 stats = parts.stats[split][share];
    const float factor = exp2f(stats.x - top);
    mass = fmaf(stats.y, factor, mass);
    sum = fmaf(((const float*)parts.sums[split][share])[dim], factor, sum);
  }
  const Row place(a, first_row + rank * kShare + share);
  if (place.token >= a.tokens) return;
  const long long at = ((long long)place.token * a.heads + place.head) * kHeadDim + dim;
  const float y = sum / mass * a.v_scale;
  if (a.y8_MHD)
    a.y8_MHD[at] = (uint8_t)pack_e4m3(y * a.inv_out_scale[0], 0.0f, 0.0f, 0.0f);
  else
    a.y_MHD[at] = float_to_bf16(y);
}

// Grid (kSplits, kv heads, tiles of 16 rows); a cluster is the kSplits blocks of one x.
KT_KERNEL(kWarp * kAttentionWarps, 1) attention_decode_kernel(Attention a) {
  KT_LAUNCH_SHARED(float, sums);                               // [warp][row][dim]
  KT_SHARED(float2, stats, kAttentionWarps * kRows);           // [warp][row] top, mass
  KT_SHARED(Parts, parts, 1);
  cluster_arrive();
  const Lane lane;
  const int rank = cluster_rank(), first_row = blockIdx.z * kRows, stride = a.kv_heads * kHeadDim;
  const uint8_t *keys = a.k_SGD + blockIdx.y * kHeadDim, *values = a.v_SGD + blockIdx.y * kHeadDim;
  const int step = kSplits * kAttentionWarps * kPositions, mine = (rank * kAttentionWarps + lane.warp) * kPositions;
  // Before the wait: the positions, and of the cache all that was there before this step.
  long long sees[2], chunk[2], last = 0, first = 1ll << 62;
  for (int m = 0; m < a.tokens; ++m) {
    const long long at = a.position_M[m];
    last = at > last ? at : last;
    first = at < first ? at : first;
  }
  const long long fresh = first;
  first = a.chunk_size > 0 ? first / a.chunk_size * a.chunk_size : 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const Row row(a, first_row + lane.group + r * 8);
    sees[r] = row.token < a.tokens ? a.position_M[row.token] : -1;
    chunk[r] = a.chunk_size > 0 ? sees[r] / a.chunk_size * a.chunk_size : 0;
  }
  Tile now, next;
  const bool early = first + mine + kPositions <= fresh;
  if (early) now.load(keys, values, first + mine, last + 1, stride, lane);
  grid_wait();
  if (!early) now.load(keys, values, first + mine, last + 1, stride, lane);
  uint4 q[2][2][2];  // [row g, g + 8][half of the head][16 bytes]
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int half = 0; half < 2; ++half) load_query(q[r][half], a, first_row + lane.group + r * 8, half * 64 + lane.member * 16);
  const float scale = a.k_scale * kLog2E / sqrtf((float)kHeadDim);
  Softmax soft = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
  float out[kHeadDim / 8][4] = {};
  for (long long start = first + mine; start <= last; start += step) {
    next.load(keys, values, start + step, last + 1, stride, lane);
    float d[2][4] = {};
    score(d, q, now.key);
    uint32_t p[2][2];  // [row g, g + 8][positions 4t and 4t + 1, 4t + 2 and 4t + 3]
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = soft.top[r];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& s = d[i / 2][r * 2 + i % 2];
        const long long at = start + lane.member * 4 + i;
        s = at <= sees[r] && at >= chunk[r] ? s * scale : -INFINITY;
        top = fmaxf(top, s);
      }
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
      const float base = top == -INFINITY ? 0.0f : top, shrink = exp2f(soft.top[r] - base);
      float e[4], mass = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) mass += e[i] = exp2f(d[i / 2][r * 2 + i % 2] - base);
      soft.mass[r] = soft.mass[r] * shrink + mass;
      soft.top[r] = top;
      p[r][0] = pack_f16(e[0], e[1]);
      p[r][1] = pack_f16(e[2], e[3]);
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        out[n][r * 2] *= shrink;
        out[n][r * 2 + 1] *= shrink;
      }
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n)  // column g of tile n is dim 16 g + n
      mma<kF16>(out[n], p[0][0], p[1][0], p[0][1], p[1][1], e4m3x2_to_f16x2(two_bytes(word_of(now.value[0], n / 4), word_of(now.value[1], n / 4), n % 4)),
                e4m3x2_to_f16x2(two_bytes(word_of(now.value[2], n / 4), word_of(now.value[3], n / 4), n % 4)));
    now = next;
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    soft.mass[r] += __shfl_xor_sync(0xFFFFFFFFu, soft.mass[r], 1);
    soft.mass[r] += __shfl_xor_sync(0xFFFFFFFFu, soft.mass[r], 2);
    const int row = lane.warp * kRows + lane.group + r * 8;
    if (lane.member == 0) stats[row] = float2{soft.top[r], soft.mass[r]};
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; n += 4)
        *(float4*)(sums + place_of(row, (lane.member * 2 + i) * 16 + n)) =
            float4{out[n][r * 2 + i], out[n + 1][r * 2 + i], out[n + 2][r * 2 + i], out[n + 3][r * 2 + i]};
  }
  __syncthreads();
  combine_block(sums, stats, *parts, rank);
  cluster_arrive();
  cluster_wait();
  combine_cluster(a, *parts, first_row, rank);
}

}  // namespace kilotok

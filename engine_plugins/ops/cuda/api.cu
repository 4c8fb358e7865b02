// The C ABI over the kernels: one function per op, asynchronous on the caller's stream.
//
// What it is: how each grid is cut, and the launch with programmatic dependent launch. Nothing allocates, nothing
// synchronizes: every call may be captured in a CUDA graph. Returns 0, or the CUDA error.
// What it refuses to be: a check of shapes; the Python side has the contract.
// Run it: compiled by engine_plugins/ops/compile.py; loaded by engine_plugins/ops/library.py.
#include "allreduce_rmsnorm/kernel.cuh"
#include "attention_decode/kernel.cuh"
#include "moe_top1/kernel.cuh"
#include "qkv_attn_scaling/kernel.cuh"

using namespace kilotok;

#ifdef __CUDACC__
template <class... Wanted, class... Given>
static int launch(void (*kernel)(Wanted...), dim3 grid, int threads, int shared, unsigned cluster, void* stream, Given... given) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = (cudaStream_t)stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  // All kernels want the same split of an SM's memory: a change of it would wait until the SM is empty.
  cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (!refused && shared > 48 << 10) refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  return (int)(refused ? refused : cudaLaunchKernelEx(&config, kernel, Wanted(given)...));
}
#endif

// Warps on a row. Measured on an H200: eight to ten chunks each are best when a few blocks fill the GPU, a long share when there
// are many, and only too few blocks want more than eight warps. `streams` rows one after the other are a warp's share. No more
// shared memory than is used: the next kernel wants some.
static Cut cut_for(int tiles, int row_bytes, int tokens, int streams) {
  constexpr int kHalfOfSms = 66, kFewWarps = 8 * 132, kManyWarps = 2048;
  constexpr int kSharedMemory = 227 << 10;  // of a block, on Hopper and Blackwell
  Cut cut = {1, (row_bytes + kChunkBytes - 1) / kChunkBytes, kStages};
  auto wants_more = [&] {
    const int share = cut.chunks / cut.slices, warps = tiles * cut.slices;
    if (share < 8 || Ring::bytes(tokens, kStages) * 2 * cut.slices > kSharedMemory) return false;
    if (cut.slices >= 8) return cut.slices < kMaxWarps && tiles < kHalfOfSms;
    return warps < kFewWarps || (share > 10 && warps < kManyWarps) || share > 40;
  };
  while (wants_more()) cut.slices *= 2;
  const int share = streams * ((cut.chunks + cut.slices - 1) / cut.slices);
  cut.stages = share >= kStages ? kStages : share < 2 ? 2 : share;  // two hold the sums
  return cut;
}

// A kernel on `skinny_gemm`'s plan; `slots` matrices beside each other.
template <class Finish, class... Wanted, class... Given>
static int launch_cut(void (*kernel)(Wanted...), int row_bytes, int tokens, int rows, int slots, int streams, void* stream, Given... given) {
  const int tiles = (rows + Finish::kRows - 1) / Finish::kRows;
  const Cut cut = cut_for(tiles * slots, row_bytes, tokens, streams);
  return launch(kernel, dim3(tiles, slots), kWarp * cut.slices, Ring::bytes(tokens, cut.stages) * cut.slices, 1, stream, given..., cut);
}

extern "C" {

int kt_gemm_low_latency(int format, const void* x, const void* w, const float* scale, int scale_step, void* y, int tokens, int rows,
                        int row_bytes, void* stream) {
  const Stored activations{(const uint8_t*)x, tokens, row_bytes};
  const ScaledBf16 finish{{scale, scale_step}, (uint16_t*)y, rows};
  const bool wide = tokens > kNarrowTokens;
  auto kernel = format == kE4m3 ? (wide ? gemm_low_latency_kernel<kE4m3, true> : gemm_low_latency_kernel<kE4m3, false>)
                                : (wide ? gemm_low_latency_kernel<kBf16, true> : gemm_low_latency_kernel<kBf16, false>);
  return launch_cut<ScaledBf16>(kernel, row_bytes, tokens, rows, 1, 1, stream, w, activations, finish);
}

int kt_qkv_attn_scaling(int format, const void* x, const void* w, const float* scale, int scale_step, const int64_t* position_M,
                        const void* cos_sin, void* y, int tokens, int rows, int row_bytes, int q_rows, int k_rows, int head_dim,
                        float floor_scale, float attn_scale, void* k_SGD, void* v_SGD, float inv_k_scale, float inv_v_scale,
                        void* stream) {
  const Stored activations{(const uint8_t*)x, tokens, row_bytes};
  const Positioned finish{{{scale, scale_step}, (uint16_t*)y, rows}, position_M, (const float2*)cos_sin, q_rows, k_rows, head_dim,
                          floor_scale, attn_scale, (uint8_t*)k_SGD, (uint8_t*)v_SGD, inv_k_scale, inv_v_scale};
  auto kernel = format == kE4m3 ? qkv_attn_scaling_kernel<kE4m3> : qkv_attn_scaling_kernel<kBf16>;
  return launch_cut<ScaledBf16>(kernel, row_bytes, tokens, rows, 1, 1, stream, w, activations, finish);
}

int kt_fc13_swiglu(int format, const void* x, const void* w, const float* scale, int scale_step, const float* inv_out_scale, void* h,
                   int tokens, int width, int row_bytes, void* stream) {
  const Stored activations{(const uint8_t*)x, tokens, row_bytes};
  const RowScale scales{scale, scale_step};
  return format == kE4m3 ? launch_cut<Gated<kE4m3>>(fc13_swiglu_kernel<kE4m3>, row_bytes, tokens, width, 1, 1, stream, w, activations,
                                                  Gated<kE4m3>{scales, inv_out_scale, (uint8_t*)h, width})
                         : launch_cut<Gated<kBf16>>(fc13_swiglu_kernel<kBf16>, row_bytes, tokens, width, 1, 1, stream, w, activations,
                                                  Gated<kBf16>{scales, inv_out_scale, (uint8_t*)h, width});
}

int kt_router(const void* x, const void* w, float* logits_ME, int tokens, int experts, int hidden, void* stream) {
  const Stored activations{(const uint8_t*)x, tokens, hidden * 2};
  return launch(router_kernel, dim3(experts), kRouterThreads, 0, 1, stream, (const uint8_t*)w, activations, experts, logits_ME);
}

int kt_moe_top1(const Moe* arguments, void* stream) {
  const Moe& a = *arguments;
  int failed = launch(moe_route_kernel, dim3(a.tokens), kRouteThreads, 0, 1, stream, a);
  if (!failed) failed = launch_cut<GatedOfExpert>(moe_fc13_kernel, a.hidden, a.tokens, a.width, 1 + a.tokens, 1, stream, a);
  if (failed) return failed;
  return launch_cut<ScaledBf16>(moe_fc2_kernel, a.width, a.tokens, a.hidden, 1, 1 + a.tokens, stream, a);
}

int kt_attention_decode(const Attention* arguments, void* stream) {
  const Attention& a = *arguments;
  const int rows = a.tokens * (a.heads / a.kv_heads);
  return launch(attention_decode_kernel, dim3(kSplits, a.kv_heads, (rows + kRows - 1) / kRows), kWarp * kAttentionWarps, kAttentionShared,
                kSplits, stream, a);
}

int kt_allreduce_rmsnorm(const Norm* arguments, const Exchange* exchange, int tokens, void* stream) {
  const int threads = (arguments->hidden / kPerThread + kWarp - 1) / kWarp * kWarp;
  return launch(allreduce_rmsnorm_kernel, dim3(tokens), threads, 0, 1, stream, *arguments, *exchange);
}

}  // extern "C"

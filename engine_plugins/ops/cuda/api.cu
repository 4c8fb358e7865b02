// The C ABI over the kernels: one function per op, asynchronous on the caller's stream.
//
// What it is: how each grid is cut, and the launch with programmatic dependent launch. Nothing allocates, nothing
// synchronizes: every call may be captured in a CUDA graph. Returns 0, or the CUDA error.
// What it refuses to be: a check of shapes; the Python side has the contract.
// Run it: compiled by engine_plugins/ops/compile.py; loaded by engine_plugins/ops/library.py.
#include "allreduce_rmsnorm/kernel.cuh"
#include "moe_top1/kernel.cuh"
#include "qkv_attn_scaling/kernel.cuh"

using namespace kilotok;

#ifdef __CUDACC__
template <class... Wanted, class... Given>
static int launch(void (*kernel)(Wanted...), dim3 grid, int threads, void* stream, Given... given) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = (cudaStream_t)stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return (int)cudaLaunchKernelEx(&config, kernel, Wanted(given)...);
}
#endif

// Slices until a warp's share fits its registers; the warps that are left take more tiles, unless SMs would idle.
static Cut cut_for(int rows, int row_bytes, int batch) {
  constexpr int num_sms = 132;  // of an H100 or H200; a B200 has 148, which moves no shape here over a threshold
  Cut cut = {1, kMaxWarps, (row_bytes + kChunkBytes - 1) / kChunkBytes};
  while (cut.slices < kMaxWarps && (cut.chunks + cut.slices - 1) / cut.slices > batch) cut.slices *= 2, cut.tiles /= 2;
  while (cut.tiles > 1 && (rows + kTileRows * cut.tiles - 1) / (kTileRows * cut.tiles) < num_sms) cut.tiles /= 2;
  return cut;
}

static dim3 grid_for(const Cut& cut, int rows, int slots = 1) {
  return dim3((rows + kTileRows * cut.tiles - 1) / (kTileRows * cut.tiles), slots);
}

static int threads_for(const Cut& cut) { return kWarp * cut.slices * cut.tiles; }

extern "C" {

int kt_gemm_low_latency(int format, const void* x, const void* w, const float* scale, int scale_step, void* y, int tokens, int rows,
                        int row_bytes, void* stream) {
  const Cut cut = cut_for(rows, row_bytes, kBatch);
  const Stored activations{(const uint8_t*)x, tokens, row_bytes};
  const ScaledBf16 finish{{scale, scale_step}, (uint16_t*)y, rows};
  const bool wide = tokens > kNarrowTokens;
  auto kernel = format == kE4m3 ? (wide ? gemm_low_latency_kernel<kE4m3, true> : gemm_low_latency_kernel<kE4m3, false>)
                                : (wide ? gemm_low_latency_kernel<kBf16, true> : gemm_low_latency_kernel<kBf16, false>);
  return launch(kernel, grid_for(cut, rows), threads_for(cut), stream, w, activations, finish, cut);
}

int kt_qkv_attn_scaling(const void* x, const void* w, const float* scale, int scale_step, const int64_t* position_M,
                        const void* cos_sin, void* y, int tokens, int rows, int hidden, int q_rows, int k_rows, int head_dim,
                        float floor_scale, float attn_scale, void* stream) {
  const Cut cut = cut_for(rows, hidden, kBatch);
  const Stored activations{(const uint8_t*)x, tokens, hidden};
  const Positioned finish{{{scale, scale_step}, (uint16_t*)y, rows}, position_M, (const float2*)cos_sin, q_rows, k_rows, head_dim,
                          floor_scale, attn_scale};
  return launch(qkv_attn_scaling_kernel, grid_for(cut, rows), threads_for(cut), stream, w, activations, finish, cut);
}

int kt_fc13_swiglu(const void* x, const void* w, const float* scale, int scale_step, const float* inv_out_scale, void* h, int tokens,
                   int width, int hidden, void* stream) {
  const Cut cut = cut_for(width, hidden, kBatch);
  const Stored activations{(const uint8_t*)x, tokens, hidden};
  return launch(fc13_swiglu_kernel, grid_for(cut, width), threads_for(cut), stream, w, activations,
                Gated{{scale, scale_step}, inv_out_scale, (uint8_t*)h, width}, cut);
}

int kt_router(const void* x, const void* w, float* logits_ME, int tokens, int experts, int hidden, void* stream) {
  const Stored activations{(const uint8_t*)x, tokens, hidden * 2};
  return launch(router_kernel, dim3(experts), kRouterThreads, stream, (const uint8_t*)w, activations, experts, logits_ME);
}

int kt_moe_top1(const Moe* arguments, void* stream) {
  const Moe& a = *arguments;
  const Cut first = cut_for(a.width, a.hidden, kBatch), second = cut_for(a.hidden, a.width, kMoeBatch);
  const int failed = launch(moe_fc13_kernel, grid_for(first, a.width, 1 + a.tokens), threads_for(first), stream, a, first);
  return failed ? failed : launch(moe_fc2_kernel, grid_for(second, a.hidden), threads_for(second), stream, a, second);
}

int kt_allreduce_rmsnorm(const Norm* arguments, const Exchange* exchange, int tokens, void* stream) {
  const int threads = (arguments->hidden / kPerThread + kWarp - 1) / kWarp * kWarp;
  return launch(allreduce_rmsnorm_kernel, dim3(tokens), threads, stream, *arguments, *exchange);
}

}  // extern "C"

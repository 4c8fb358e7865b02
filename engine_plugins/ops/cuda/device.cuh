// What the kernels need from the machine: 16-byte loads, formats, mma, programmatic dependent launch.
//
// What it is: inline PTX on the device; under a C++ compiler the same names come from an emulator (the tests'), so that every
// index a kernel computes is run without a GPU.
// What it refuses to be: a library of tricks. One name per instruction that the kernels really use.
// Run it: compiled by engine_plugins/ops/compile.py; emulated by tests/engine_plugins/test_gpu_ops.py.
#pragma once
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define KT_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define KT_INLINE __device__ __forceinline__
#define KT_EVERYWHERE __host__ __device__ __forceinline__
#define KT_SHARED(type, name, count) __shared__ alignas(16) type name[count]
#define KT_LAUNCH_SHARED(type, name) extern __shared__ __align__(16) type name[]
#else
#include "emulator.h"
#endif

namespace kilotok {

constexpr int kWarp = 32;
constexpr int kMaxTokens = 16;    // rows of one mma
constexpr int kNarrowTokens = 8;  // all that a verify step needs; only gemm_low_latency takes more
constexpr float kE4m3Max = 448.0f;

enum Format { kE4m3 = 0, kBf16 = 1, kF16 = 2 };

KT_INLINE float bf16_to_float(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// Round to nearest even; what is not a number stays so.
KT_INLINE uint16_t float_to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  return (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// A device function as the runtime's math gives it: expf, not __expf, because one step of E4M3 is all that is allowed.
KT_INLINE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

#ifdef __CUDACC__

// Weights are read once: past L1, and in lines that the next warp's load wants too.
KT_INLINE uint4 load_weight(const void* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at));
  return v;
}

// What an earlier kernel wrote: from L2, where every SM sees the same.
KT_INLINE uint4 load_activation(const void* at) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
  return v;
}

// A place in shared memory, in one register instead of two.
using SharedAt = uint32_t;
KT_INLINE SharedAt shared_at(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
KT_INLINE uint4 load_shared(SharedAt at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}
KT_INLINE void store_shared(SharedAt at, const uint2& v) { asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(v.x), "r"(v.y) : "memory"); }

// 16 bytes on their way there, no register held meanwhile. `stage_wait<N>` waits until all of this thread's have come but those
// of the last N commits. Weights in lines that the next chunk wants too.
KT_INLINE void stage(SharedAt to, const void* at) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(at) : "memory"); }
KT_INLINE void stage_weight(SharedAt to, const void* at) { asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(at) : "memory"); }
KT_INLINE void stage_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
KT_INLINE void stage_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// A hint only: what it names may still be written, and is read again after grid_wait.
KT_INLINE void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

// Programmatic dependent launch: waits until the kernel before has finished and its writes are seen, then lets the kernel behind
// start, once every block has come here or left. What runs before the wait may read what was made two kernels before. Letting
// the next one start earlier puts a third on the GPU, whose blocks settle where there is room, not evenly: measured, it costs
// more than its prefetch brings.
KT_INLINE void grid_wait() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Four floats to E4M3, saturated at +-448; the first is the lowest byte.
KT_INLINE uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return (uint32_t)low | ((uint32_t)high << 16);
}

// Two E4M3 values as two F16 or BF16 ones, exactly; the first is the low half.
KT_INLINE uint32_t e4m3x2_to_f16x2(uint32_t pair) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((uint16_t)pair));
  return halves;
}
KT_INLINE uint32_t e4m3x2_to_bf16x2(uint32_t pair) {
  const uint32_t halves = e4m3x2_to_f16x2(pair);
  uint32_t both;
  asm("{.reg .f16 l, h; .reg .f32 a, b; mov.b32 {l, h}, %1; cvt.f32.f16 a, l; cvt.f32.f16 b, h; cvt.rn.bf16x2.f32 %0, b, a;}" : "=r"(both) : "r"(halves));
  return both;
}
KT_INLINE uint32_t pack_f16(float a, float b) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
  return both;
}
// Byte `index` (0..3) of two words, side by side.
KT_INLINE uint32_t two_bytes(uint32_t first, uint32_t second, int index) { return __byte_perm(first, second, index | (index + 4) << 4) & 0xFFFFu; }

// Blocks of one cluster: a barrier in two halves, and a write to another block's shared memory at this block's address of it.
KT_INLINE int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
KT_INLINE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
KT_INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
KT_INLINE void store_remote(float4* mine, int rank, const float4& v) {
  asm volatile("{.reg .u32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.v4.f32 [there], {%2, %3, %4, %5};}" ::"r"(shared_at(mine)), "r"(rank),
               "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// d [16 tokens x 8 rows] += a [16 x k] b [k x 8], k = 32 E4M3 or 16 BF16 or F16 values; a fragment word holds 4 (or 2). Lane
// (g, t) = (lane / 4, lane % 4) gives tokens g and g + 8, row g, and gets rows 2t and 2t + 1 of tokens g and g + 8.
// E4M3 unpacks to F16 and multiplies there, exactly, on sm_90a and sm_100a alike: sums are fp32, not Hopper's short ones.
template <int F>
KT_INLINE void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (F == kE4m3)
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else if constexpr (F == kF16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Eight bytes that arrive together: four of data and the epoch that says they are there. Two of them per access.
KT_INLINE void store_flagged(void* at, uint32_t first, uint32_t second, uint32_t epoch) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(first), "r"(epoch), "r"(second), "r"(epoch) : "memory");
}

KT_INLINE bool load_flagged(const void* at, uint32_t epoch, uint32_t& first, uint32_t& second) {
  uint32_t flag_a, flag_b;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(first), "=r"(flag_a), "=r"(second), "=r"(flag_b) : "l"(at) : "memory");
  return flag_a == epoch && flag_b == epoch;
}

#endif

KT_INLINE float warp_sum(float value) {
  for (int offset = kWarp / 2; offset; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  return value;
}

}  // namespace kilotok

// gemm_low_latency on the CPU: a few rows times FP8 or BF16 weights in kernel layout.
//
// What it is: register tiles of MR rows x NG groups of 16 outputs. Weights stream once, are decoded in registers, and each
// product is added to its row's own accumulator in the order of k: a row's result has the same bits whatever M is, which is
// why speculation cannot change greedy output.
// What it refuses to be: blocked for large M; rows beyond a tile reread the group's weights from the cache.
// Run it: compiled by engine_plugins/native/compiler.py; measured by `python -m engine_plugins.native.bench --ops`.
#pragma once
#include "vec.h"

namespace KILOTOK_NAMESPACE {

template <int DT, int MR, int NG>
KT_INLINE void gemm_tile(const uint8_t* w, size_t group_bytes, int pairs, const float* const* x, float* out, int ldo) {
  constexpr int step = DT == kFp8 ? 32 : 64;
  V acc[NG][MR];
  for (int g = 0; g < NG; ++g)
    for (int m = 0; m < MR; ++m) acc[g][m] = vzero();
  for (int p = 0; p < pairs; ++p) {
#pragma GCC unroll 2
    for (int g = 0; g < NG; ++g) {
      const uint8_t* at = w + g * group_bytes + (size_t)p * step;
      if (MR <= 4) _mm_prefetch((const char*)(at + 768), _MM_HINT_T0);
      V even, odd;
      if (DT == kFp8) vdecode_fp8(at, even, odd);
      else vdecode_bf16(at, even, odd);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) acc[g][m] = vfma(vset1(x[m][2 * p]), even, acc[g][m]);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) acc[g][m] = vfma(vset1(x[m][2 * p + 1]), odd, acc[g][m]);
    }
  }
  for (int g = 0; g < NG; ++g)
    for (int m = 0; m < MR; ++m) vstore(out + m * ldo + g * kLanes, acc[g][m]);
}

template <int DT, int MR>
static void gemm_groups(const uint8_t* w, size_t group_bytes, int groups, int pairs, const float* const* x, float* out, int ldo) {
  constexpr int NG = (kWide ? MR <= 8 : MR <= 2) ? 2 : 1;
  int g = 0;
  for (; g + NG <= groups; g += NG) gemm_tile<DT, MR, NG>(w + g * group_bytes, group_bytes, pairs, x, out + g * kLanes, ldo);
  for (; g < groups; ++g) gemm_tile<DT, MR, 1>(w + g * group_bytes, group_bytes, pairs, x, out + g * kLanes, ldo);
}

// Raw sums (no scale) of `rows` rows (any number) for `groups` groups starting at w.
template <int DT>
static void gemm_rows(const uint8_t* w, size_t group_bytes, int groups, int pairs, const float* const* x, int rows, float* out,
                      int ldo) {
  while (rows > 0) {
    int take = rows < kMaxTileRows ? rows : kMaxTileRows;
    switch (take) {
      case 1: gemm_groups<DT, 1>(w, group_bytes, groups, pairs, x, out, ldo); break;
      case 2: gemm_groups<DT, 2>(w, group_bytes, groups, pairs, x, out, ldo); break;
      case 3: gemm_groups<DT, 3>(w, group_bytes, groups, pairs, x, out, ldo); break;
      case 4: gemm_groups<DT, 4>(w, group_bytes, groups, pairs, x, out, ldo); break;
#ifdef __AVX512F__
      case 5: gemm_groups<DT, 5>(w, group_bytes, groups, pairs, x, out, ldo); break;
      case 6: gemm_groups<DT, 6>(w, group_bytes, groups, pairs, x, out, ldo); break;
      case 7: gemm_groups<DT, 7>(w, group_bytes, groups, pairs, x, out, ldo); break;
      case 8: gemm_groups<DT, 8>(w, group_bytes, groups, pairs, x, out, ldo); break;
#endif
      default: break;
    }
    rows -= take;
    x += take;
    out += take * ldo;
  }
}

// y[m][0 .. 16*groups) = sum(x w) * scale for groups g0 .. g0+groups of one matrix of a stack.
static void gemm_low_latency(const Matrix& m, int index, int g0, int groups, const float* const* x, int rows, float* out, int ldo) {
  const int pairs = m.k / 2;
  const size_t group_bytes = (size_t)pairs * (m.dtype == kFp8 ? 32 : 64);
  const uint8_t* w = m.data + ((size_t)index * (m.n / kLanes) + g0) * group_bytes;
  if (m.dtype == kFp8) gemm_rows<kFp8>(w, group_bytes, groups, pairs, x, rows, out, ldo);
  else gemm_rows<kBf16>(w, group_bytes, groups, pairs, x, rows, out, ldo);
  if (!m.scale) return;
  const float* scale = m.scale + (size_t)index * m.n + g0 * kLanes;
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < groups * kLanes; c += kLanes) vstore(out + r * ldo + c, vmul(vload(out + r * ldo + c), vload(scale + c)));
}

}  // namespace KILOTOK_NAMESPACE

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

constexpr int kRounded = 2;  // FP8 weights whose rows are on the E4M3 grid too (vstore_rounded)

// How far ahead of a load to prefetch: 2 KiB, and from there to a group's end into the same place of the tile after it. Groups of
// small matrices are little longer than that, and what follows one of them is its neighbour, which the tile reads anyway.
struct Ahead {
  ptrdiff_t in_group, in_next;
  int turn;  // the pair from which on the distance leaves the group
  KT_INLINE_MEMBER Ahead(size_t group_bytes, int groups, int pairs, int step) {
    const ptrdiff_t size = (ptrdiff_t)pairs * step;
    in_group = size < 2048 ? size : 2048;
    in_next = in_group - size + (ptrdiff_t)(group_bytes * groups);
    turn = (int)((size - in_group) / step);
  }
  KT_INLINE_MEMBER ptrdiff_t at(int pair) const { return pair < turn ? in_group : in_next; }
};

template <int DT, int MR, int NG>
KT_INLINE void gemm_tile(const uint8_t* w, size_t group_bytes, int pairs, const float* const* rows, float* out, int ldo) {
  constexpr int step = DT == kBf16 ? 64 : 32;
  const Ahead distance(group_bytes, NG, pairs, step);
  Register acc[NG][MR][kRegisters], weights[kRegisters];
  const float* x[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) x[m] = rows[m];
#pragma GCC unroll 8
  for (int g = 0; g < NG; ++g)
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) vsplit(vzero(), acc[g][m]);
  for (int p = 0; p < pairs; ++p) {
    const ptrdiff_t ahead = distance.at(p);
#pragma GCC unroll 8
    for (int g = 0; g < NG; ++g) {
      const uint8_t* at = w + g * group_bytes + (size_t)p * step;
      if (kWide || MR <= 4) _mm_prefetch((const char*)(at + ahead), _MM_HINT_T0);
#pragma GCC unroll 2
      for (int odd = 1; odd >= 0; --odd) {  // one after the other: decoded side by side they need more registers than there are
        if (DT == kBf16) vdecode_bf16(at, odd, weights);
        else if (DT == kRounded) vdecode_rounded(at, odd, weights);
        else vdecode_fp8(at, odd, weights);
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) vmac(acc[g][m], x[m] + 2 * p + odd, weights);
        if (!kWide) asm volatile("" ::: "memory");  // inputs that are loaded earlier push a sum to the stack, and it waits there
      }
    }
  }
#pragma GCC unroll 8
  for (int g = 0; g < NG; ++g)
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) vstore(out + m * ldo + g * kLanes, DT == kRounded ? vjoin_rounded(acc[g][m]) : vjoin(acc[g][m]));
}

#ifdef __AVX512BF16__
// Two groups by MR rows: a row's input is broadcast once for both. More at a time, and the sums would no longer fit the registers.
template <int DT, int MR, int NG, int G>
KT_INLINE void dot_pair(V (&acc)[NG][MR], const float* (&x)[MR], int pair, __m512bh left, __m512bh right) {
  if constexpr (DT == kRounded) {
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const __m512bh input = (__m512bh)_mm512_set1_epi32(((const int32_t*)x[m])[pair]);
      acc[G][m] = _mm512_dpbf16_ps(acc[G][m], left, input);
      if (G + 1 < NG) acc[G + 1][m] = _mm512_dpbf16_ps(acc[G + 1][m], right, input);
    }
  } else {
#pragma GCC unroll 2
    for (int odd = 1; odd >= 0; --odd) {
      const V l = vhalf_bf16(left, odd), r = vhalf_bf16(right, odd);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const V input = vset1(x[m][2 * pair + odd]);
        acc[G][m] = vfma(input, l, acc[G][m]);
        if (G + 1 < NG) acc[G + 1][m] = vfma(input, r, acc[G + 1][m]);
      }
    }
  }
}

// The groups from G on, over one or (Two) two pairs of inputs.
template <int DT, int MR, int NG, bool Two, int G = 0>
KT_INLINE void dot_groups(const DotTables& tables, const uint8_t* w, size_t group_bytes, ptrdiff_t ahead, V (&acc)[NG][MR],
                          const float* (&x)[MR], int pair) {
  __m512bh first[2], second[2];
#pragma GCC unroll 2
  for (int g = 0; g < 2 && G + g < NG; ++g) {
    const uint8_t* at = w + (G + g) * group_bytes;
    if (Two) _mm_prefetch((const char*)(at + ahead), _MM_HINT_T0);
    vdecode_dot(tables, Two ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi64(0x0F, at), first[g], second[g]);
  }
  dot_pair<DT, MR, NG, G>(acc, x, pair, first[0], first[1]);
  if (Two) dot_pair<DT, MR, NG, G>(acc, x, pair + 1, second[0], second[1]);
  if constexpr (G + 2 < NG) {
    asm volatile("" ::: "memory");  // broadcast again instead of keeping all rows' inputs in registers
    dot_groups<DT, MR, NG, Two, G + 2>(tables, w, group_bytes, ahead, acc, x, pair);
  }
}

template <int DT, int MR, int NG>
KT_INLINE void dot_tile(const DotTables& tables, const uint8_t* w, size_t group_bytes, int pairs, const float* const* rows, float* out,
                        int ldo) {
  V acc[NG][MR];
  const float* x[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) x[m] = rows[m];
#pragma GCC unroll 8
  for (int g = 0; g < NG; ++g)
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) acc[g][m] = vzero();
  const Ahead distance(group_bytes, NG, pairs, 32);
  int p = 0;
  for (; p + 2 <= pairs; p += 2) dot_groups<DT, MR, NG, true>(tables, w + (size_t)p * 32, group_bytes, distance.at(p), acc, x, p);
  if (p < pairs) dot_groups<DT, MR, NG, false>(tables, w + (size_t)p * 32, group_bytes, 0, acc, x, p);
#pragma GCC unroll 8
  for (int g = 0; g < NG; ++g)
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) vstore(out + m * ldo + g * kLanes, acc[g][m]);
}
#endif

// As many groups side by side as registers hold: more independent sums hide the latency of the multiply.
template <int DT, int MR, int NG>
static void gemm_groups(const uint8_t* w, size_t group_bytes, int groups, int pairs, const float* const* x, float* out, int ldo) {
  int g = 0;
#ifdef __AVX512BF16__
  if constexpr (DT != kBf16) {
    const DotTables tables = dot_tables();
    for (; g + NG <= groups; g += NG) dot_tile<DT, MR, NG>(tables, w + g * group_bytes, group_bytes, pairs, x, out + g * kLanes, ldo);
  }
#endif
  if constexpr (DT == kBf16 || !kDot)
    for (; g + NG <= groups; g += NG) gemm_tile<DT, MR, NG>(w + g * group_bytes, group_bytes, pairs, x, out + g * kLanes, ldo);
  if constexpr (NG > 1)
    if (g < groups) gemm_groups<DT, MR, NG / 2>(w + g * group_bytes, group_bytes, groups - g, pairs, x, out + g * kLanes, ldo);
}

template <int DT, int MR>
static void gemm_row_tile(const uint8_t* w, size_t group_bytes, int groups, int pairs, const float* const* x, float* out, int ldo) {
  constexpr int dot = MR == 1 ? 4 : MR <= 4 ? 4 : 2, wide = MR <= 4 ? 4 : 2, narrow = MR == 1 ? 4 : MR == 2 ? 2 : 1;
  gemm_groups<DT, MR, kDot && DT != kBf16 ? dot : kWide ? wide : narrow>(w, group_bytes, groups, pairs, x, out, ldo);
}

// Raw sums (no scale) of `rows` rows (any number) for `groups` groups starting at w.
template <int DT>
static void gemm_rows(const uint8_t* w, size_t group_bytes, int groups, int pairs, const float* const* x, int rows, float* out,
                      int ldo) {
  while (rows > 0) {
    int take = rows < kMaxTileRows ? rows : kMaxTileRows;
    switch (take) {
      case 1: gemm_row_tile<DT, 1>(w, group_bytes, groups, pairs, x, out, ldo); break;
      case 2: gemm_row_tile<DT, 2>(w, group_bytes, groups, pairs, x, out, ldo); break;
      case 3: gemm_row_tile<DT, 3>(w, group_bytes, groups, pairs, x, out, ldo); break;
      case 4: gemm_row_tile<DT, 4>(w, group_bytes, groups, pairs, x, out, ldo); break;
#ifdef __AVX512F__
      case 5: gemm_row_tile<DT, 5>(w, group_bytes, groups, pairs, x, out, ldo); break;
      case 6: gemm_row_tile<DT, 6>(w, group_bytes, groups, pairs, x, out, ldo); break;
      case 7: gemm_row_tile<DT, 7>(w, group_bytes, groups, pairs, x, out, ldo); break;
      case 8: gemm_row_tile<DT, 8>(w, group_bytes, groups, pairs, x, out, ldo); break;
#endif
      default: break;
    }
    rows -= take;
    x += take;
    out += take * ldo;
  }
}

// y[m][0 .. 16*groups) = sum(x w) * scale for groups g0, g0 + every, ... of one matrix of a stack.
static void gemm_low_latency(const Matrix& m, int index, int g0, int groups, const float* const* x, int rows, float* out, int ldo,
                             int every = 1) {
  const int pairs = m.k / 2;
  const size_t one_group = (size_t)pairs * (m.dtype == kFp8 ? 32 : 64), group_bytes = one_group * every;
  const uint8_t* w = m.data + ((size_t)index * (m.n / kLanes) + g0) * one_group;
  if (m.dtype == kFp8 && m.inv_input_scale > 0) gemm_rows<kRounded>(w, group_bytes, groups, pairs, x, rows, out, ldo);
  else if (m.dtype == kFp8) gemm_rows<kFp8>(w, group_bytes, groups, pairs, x, rows, out, ldo);
  else gemm_rows<kBf16>(w, group_bytes, groups, pairs, x, rows, out, ldo);
  if (!m.scale) return;
  const float* scale = m.scale + (size_t)index * m.n + g0 * kLanes;
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < groups * kLanes; c += kLanes) vstore(out + r * ldo + c, vmul(vload(out + r * ldo + c), vload(scale + c * every)));
}

}  // namespace KILOTOK_NAMESPACE

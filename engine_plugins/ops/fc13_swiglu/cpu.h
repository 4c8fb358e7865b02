// fc13_swiglu on the CPU: one pass over alternating gate and up groups, SwiGLU and rounding while the tile is in L1.
//
// What it is: column groups [c0, c1) of silu(x gate) * (x up) for any rows.
// What it refuses to be: the down projection.
// Run it: compiled by engine_plugins/native/compiler.py.
#pragma once
#include "gemm_low_latency/cpu.h"

namespace KILOTOK_NAMESPACE {

// out rows are given by pointers, so that routed rows may lie anywhere; inv_scale > 0 rounds for the down projection.
static void fc13_swiglu(const Matrix& m, int index, int c0, int c1, const float* const* x, int rows, float inv_scale, float* const* out) {
  float tile[kMaxTileRows * 2 * kLanes];
  for (int r = 0; r < rows; r += kMaxTileRows) {
    const int take = rows - r < kMaxTileRows ? rows - r : kMaxTileRows;
    for (int c = c0; c < c1; ++c) {
      gemm_low_latency(m, index, 2 * c, 2, x + r, take, tile, 2 * kLanes);
      for (int i = 0; i < take; ++i) {
        V h = vmul(vsilu(vload(tile + i * 2 * kLanes)), vload(tile + i * 2 * kLanes + kLanes));
        if (inv_scale > 0) vstore_rounded(out[r + i], c * kLanes, vquantize(h, inv_scale));
        else vstore(out[r + i] + c * kLanes, h);
      }
    }
  }
}

}  // namespace KILOTOK_NAMESPACE

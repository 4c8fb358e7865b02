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
  constexpr int kColumns = 4;  // gate and up of four columns are eight groups: enough sums side by side for one row
  float tile[kMaxTileRows * kColumns * 2 * kLanes];
  for (int r = 0; r < rows; r += kMaxTileRows) {
    const int take = rows - r < kMaxTileRows ? rows - r : kMaxTileRows;
    for (int c = c0; c < c1; c += kColumns) {
      const int columns = c1 - c < kColumns ? c1 - c : kColumns, width = columns * 2 * kLanes;
      gemm_low_latency(m, index, 2 * c, 2 * columns, x + r, take, tile, width);
      for (int i = 0; i < take * columns; ++i) {
        const float* both = tile + (i / columns) * width + (i % columns) * 2 * kLanes;
        float* row = out[r + i / columns];
        const int at = (c + i % columns) * kLanes;
        V h = vmul(vsilu(vload(both)), vload(both + kLanes));
        if (inv_scale > 0) vstore_rounded(row, at, vquantize(h, inv_scale));
        else vstore(row + at, h);
      }
    }
  }
}

}  // namespace KILOTOK_NAMESPACE

// allreduce_rmsnorm on the CPU: RMSNorm of the residual stream, rounded for the next GEMM.
//
// What it is: one process, one part, so the all-reduce and the residual add sit in the GEMM's epilogue (step.cpp) and each
// thread normalizes the rows it needs itself: cheaper than a barrier.
// What it refuses to be: a collective.
// Run it: compiled by engine_plugins/native/compiler.py.
#pragma once
#include "vec.h"

namespace KILOTOK_NAMESPACE {

// y = x / sqrt(mean(x^2) + eps) * weight, then E4M3 in units of the input scale when inv_scale > 0. Multiples of 16.
static void rmsnorm(const float* x, const float* weight, int size, float eps, float inv_scale, float* y) {
  V sum = vzero();
  for (int i = 0; i < size; i += kLanes) {
    V v = vload(x + i);
    sum = vfma(v, v, sum);
  }
  const V factor = vset1(1.0f / sqrtf(vsum(sum) / (float)size + eps));
  if (inv_scale > 0) {
    for (int i = 0; i < size; i += kLanes) vstore_rounded(y, i, vquantize(vmul(vmul(vload(x + i), factor), vload(weight + i)), inv_scale));
  } else {
    for (int i = 0; i < size; i += kLanes) vstore(y + i, vmul(vmul(vload(x + i), factor), vload(weight + i)));
  }
}

// Writes x * factor at y[at ...], on the E4M3 grid when inv_scale > 0; y is the row's begin. May work in place when at is 0.
static void quantize_row(const float* x, float factor, float inv_scale, int size, float* y, int at = 0) {
  const V f = vset1(factor);
  for (int i = 0; i < size; i += kLanes) {
    V v = vmul(vload(x + i), f);
    if (inv_scale > 0) vstore_rounded(y, at + i, vquantize(v, inv_scale));
    else vstore(y + at + i, v);
  }
}

}  // namespace KILOTOK_NAMESPACE

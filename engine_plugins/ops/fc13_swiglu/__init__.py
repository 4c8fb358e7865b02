"""fc13_swiglu: gate and up projections in one pass, SwiGLU in the epilogue, FP8 out."""

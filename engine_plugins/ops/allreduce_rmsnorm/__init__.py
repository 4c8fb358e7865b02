"""allreduce_rmsnorm: sum over ranks, residual, RMSNorm and FP8 rounding in one step."""

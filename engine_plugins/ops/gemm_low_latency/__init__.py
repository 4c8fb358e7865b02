"""gemm_low_latency: FP8 (or BF16) weights times a few rows. The reference is `reference.py`, the CPU source `cpu.h`."""

"""Contract of allreduce_rmsnorm: residual += sum(parts); y = rmsnorm(residual) rounded to FP8.

What it refuses to be: a general collective. On one CPU process there is one part. Run it: `python -m
engine_plugins.native.bench --ops`.
"""

from engine_plugins.contract import Axis, OpContract

CONTRACT = OpContract(
    name="allreduce_rmsnorm",
    does="one-shot all-reduce + residual + RMSNorm + FP8 quantize",
    axes={"M": Axis(1, 4096), "H": Axis(2, 1 << 20, 2), "R": Axis(1, 8)},
    inputs={"part_RMH": "fp32", "residual_MH": "fp32", "weight_H": "fp32"},
    outputs={"y_MH": "fp32 on the E4M3 grid", "residual_MH": "fp32"},
    gpu_axes={"M": Axis(1, 8), "H": Axis(8, 8192, 8)},
)

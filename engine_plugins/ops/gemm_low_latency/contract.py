"""Contract of gemm_low_latency: y = quantize(x) @ dequantize(w).T for a handful of rows.

What it refuses to be: a general GEMM; above 16 rows a library is as good. Run it: `python -m
engine_plugins.native.bench --ops`.
"""

from engine_plugins.contract import Axis, OpContract

CONTRACT = OpContract(
    name="gemm_low_latency",
    does="FP8 x FP8 -> FP32 rows, M <= 16 (any M works in tiles)",
    axes={"M": Axis(1, 4096), "N": Axis(1, 1 << 20), "K": Axis(2, 1 << 20, 2)},
    inputs={"x_MK": "fp32, rounded to E4M3 by the caller", "w_NK": "e4m3 or bf16", "scale_N": "fp32"},
    outputs={"y_MN": "fp32"},
    notes="each row is summed over k in order, whatever M is: batch invariant",
    gpu_axes={"M": Axis(1, 16), "K": Axis(16, 1 << 17, 16)},
)

"""Contract of fc13_swiglu: silu(x @ gate.T) * (x @ up.T), rounded to FP8 for the next GEMM.

What it refuses to be: the down projection. Run it: `python -m engine_plugins.native.bench --ops`.
"""

from engine_plugins.contract import Axis, OpContract

CONTRACT = OpContract(
    name="fc13_swiglu",
    does="gate and up in one pass, SwiGLU, FP8 out",
    axes={"M": Axis(1, 4096), "K": Axis(2, 1 << 20, 2), "F": Axis(1, 1 << 20)},
    inputs={"x_MK": "fp32 on the E4M3 grid", "gate_FK": "e4m3 or bf16", "up_FK": "e4m3 or bf16"},
    outputs={"h_MF": "fp32 on the E4M3 grid of the down projection's input scale"},
    gpu_axes={"M": Axis(1, 8), "K": Axis(16, 1 << 17, 16)},
)

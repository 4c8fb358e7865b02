"""Contract of moe_top1: shared expert plus the chosen one.

What it refuses to be: weighted sums over several experts. Run it: `python -m engine_plugins.native.bench --ops`.
"""

from engine_plugins.contract import Axis, OpContract

CONTRACT = OpContract(
    name="moe_top1",
    does="FC13 + SwiGLU + FC2 of each row's expert on score * x, plus the shared expert on x",
    axes={"M": Axis(1, 4096), "K": Axis(2, 1 << 20, 2), "E": Axis(1, 1024), "F": Axis(1, 1 << 20)},
    inputs={"x_MK": "fp32", "expert_M": "int", "score_M": "fp32"},
    outputs={"y_MK": "fp32"},
    gpu_axes={"M": Axis(1, 8), "K": Axis(16, 1 << 17, 16), "F": Axis(16, 1 << 17, 16)},
)

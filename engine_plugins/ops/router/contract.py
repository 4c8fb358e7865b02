"""Contract of router: logits of every expert, top-1 choice and its sigmoid score.

What it refuses to be: top-k for k > 1. Run it: `python -m engine_plugins.native.bench --ops`.
"""

from engine_plugins.contract import Axis, OpContract

CONTRACT = OpContract(
    name="router",
    does="expert logits, the best expert, sigmoid of its logit",
    axes={"M": Axis(1, 4096), "K": Axis(2, 1 << 20, 2), "E": Axis(1, 1024)},
    inputs={"x_MK": "fp32, not quantized", "w_EK": "bf16"},
    outputs={"expert_M": "int", "score_M": "fp32"},
    gpu_axes={"M": Axis(1, 8), "K": Axis(8, 1 << 16, 8)},
)

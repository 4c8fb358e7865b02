"""Contract of attention_decode: softmax(q k / sqrt(D)) v over the positions a row may see.

What it refuses to be: a prefill kernel for long prompts. Run it: `python -m engine_plugins.native.bench --ops`.
"""

from engine_plugins.contract import Axis, OpContract

CONTRACT = OpContract(
    name="attention_decode",
    does="decode attention, FP8 or BF16 KV, same chunk and causal, or causal only",
    axes={"M": Axis(1, 4096), "D": Axis(16, 256, 16), "S": Axis(1, 1 << 20)},
    inputs={"q_MHD": "fp32", "k_SHD": "e4m3 or bf16 cache", "v_SHD": "e4m3 or bf16 cache"},
    outputs={"o_MHD": "fp32"},
    gpu_axes={"M": Axis(1, 8), "D": Axis(16, 256, 16)},
)

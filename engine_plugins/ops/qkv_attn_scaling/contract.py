"""Contract of qkv_attn_scaling: one GEMM whose epilogue positions Q and K.

What it refuses to be: attention. Run it: `python -m engine_plugins.native.bench --ops`.
"""

from engine_plugins.contract import Axis, OpContract

CONTRACT = OpContract(
    name="qkv_attn_scaling",
    does="FC_QKV + RoPE (RoPE layers) or temperature scaling of Q (NoPE layers)",
    axes={"M": Axis(1, 4096), "H": Axis(2, 1 << 20, 2), "D": Axis(16, 256, 16)},
    inputs={"x_MH": "fp32", "position_M": "int"},
    outputs={"q_MHD": "fp32", "k_MHD": "fp32", "v_MHD": "fp32"},
    gpu_axes={"M": Axis(1, 8), "H": Axis(16, 1 << 17, 16)},
)

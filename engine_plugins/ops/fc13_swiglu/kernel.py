"""fc13_swiglu in Triton: gate and up tiles in one program, SwiGLU and E4M3 before they leave it.

What it refuses to be: the down projection. Run it: `python -m pytest tests/engine_plugins/test_gpu_ops.py`.
Legend: M tokens, K inputs, F intermediate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine_plugins.ops.gemm_low_latency.kernel import gemm_low_latency
from engine_plugins.ops.tiles import ROWS, dot_rows, scale_step, to_e4m3

BLOCK_F, BLOCK_K = 16, 256


@triton.jit
def swiglu(gate, up, scale, step, F, f, inv_out_scale):
    """E4M3 of silu(gate) * up, both times their row scales."""
    gate = gate * tl.load(scale + f * step, mask=f < F, other=0.0)[None, :]
    up = up * tl.load(scale + (F + f) * step, mask=f < F, other=0.0)[None, :]
    return to_e4m3(gate / (1.0 + tl.exp(-gate)) * up * tl.load(inv_out_scale))


@triton.jit
def fc13_kernel(x, w, scale, h, M, F, K, inv_out_scale, scale_step, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr):
    m, first = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_F
    f = first + tl.arange(0, BLOCK_F)
    gate = dot_rows(x, m < M, w, F, K, first, BLOCK_F, BLOCK_K)
    up = dot_rows(x, m < M, w + F.to(tl.int64) * K, F, K, first, BLOCK_F, BLOCK_K)
    value = swiglu(gate, up, scale, scale_step, F, f, inv_out_scale)
    tl.store(h + m[:, None] * F + f[None, :], value, mask=(m < M)[:, None] & (f < F)[None, :])


def fc13_swiglu(
    x_MK: torch.Tensor, w_2FK: torch.Tensor, scale: torch.Tensor | None, inv_out_scale: torch.Tensor | None
) -> torch.Tensor:
    """E4M3 [M, F]; `inv_out_scale` [1] is 1 / the down projection's input scale. BF16 gives BF16, in two kernels."""
    if scale is None or inv_out_scale is None:
        gate, up = gemm_low_latency(x_MK, w_2FK, scale).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate.float()).mul_(up).bfloat16()
    (M, K), F = x_MK.shape, w_2FK.shape[0] // 2
    h_MF = torch.empty((M, F), dtype=torch.float8_e4m3fn, device=x_MK.device)
    fc13_kernel[(triton.cdiv(F, BLOCK_F),)](
        x_MK, w_2FK, scale, h_MF, M, F, K, inv_out_scale, scale_step(scale), BLOCK_F=BLOCK_F, BLOCK_K=BLOCK_K
    )
    return h_MF

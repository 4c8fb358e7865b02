"""gemm_low_latency in Triton, [N, K] weights as they are in the checkpoint.

What it refuses to be: the fastest (`kernel.cuh` is). Run it: `python -m pytest tests/engine_plugins/test_gpu_ops.py`.
Legend: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine_plugins.ops.tiles import ROWS, dot_rows, scale_step, to_bf16

BLOCK_N, BLOCK_K, BF16_BLOCK_K = 16, 256, 128


@triton.jit
def gemm_kernel(
    x, w, scale, y, M, N, K, scale_step, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SCALED: tl.constexpr
):
    m, first = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    sums = dot_rows(x, m < M, w, N, K, first, BLOCK_N, BLOCK_K)
    if SCALED:
        sums = sums * tl.load(scale + n * scale_step, mask=n < N, other=0.0)[None, :]
    if y.dtype.element_ty == tl.bfloat16:
        sums = to_bf16(sums)
    tl.store(y + m[:, None] * N + n[None, :], sums, mask=(m < M)[:, None] & (n < N)[None, :])


def gemm_low_latency(x_MK: torch.Tensor, w_NK: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """BF16 [M, N]; E4M3 or BF16 operands, both the same."""
    (M, K), N = x_MK.shape, w_NK.shape[0]
    y_MN = torch.empty((M, N), dtype=torch.bfloat16, device=x_MK.device)
    gemm_kernel[(triton.cdiv(N, BLOCK_N),)](
        x_MK,
        w_NK,
        w_NK if scale is None else scale,
        y_MN,
        M,
        N,
        K,
        scale_step(scale),
        BLOCK_N=BLOCK_N,
        BLOCK_K=BF16_BLOCK_K if w_NK.dtype == torch.bfloat16 else BLOCK_K,
        SCALED=scale is not None,
    )
    return y_MN

"""router in Triton: BF16 logits of every expert; the plain GEMM with an fp32 output.

What it refuses to be: the choice of an expert (`tiles.route`). Run it: `python -m pytest
tests/engine_plugins/test_gpu_ops.py`. Legend: M tokens, K inputs, E experts.
"""

from __future__ import annotations

import torch
import triton

from engine_plugins.ops.gemm_low_latency.kernel import BF16_BLOCK_K, BLOCK_N, gemm_kernel


def router(x_MK: torch.Tensor, w_EK: torch.Tensor) -> torch.Tensor:
    """fp32 logits [M, E]."""
    (M, K), E = x_MK.shape, w_EK.shape[0]
    logits_ME = torch.empty((M, E), dtype=torch.float32, device=x_MK.device)
    grid = (triton.cdiv(E, BLOCK_N),)
    gemm_kernel[grid](x_MK, w_EK, w_EK, logits_ME, M, E, K, 0, BLOCK_N=BLOCK_N, BLOCK_K=BF16_BLOCK_K, SCALED=False)
    return logits_ME

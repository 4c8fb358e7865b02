"""qkv_attn_scaling in Triton: even and odd rows of a head as two dot products, so that pairs meet in registers.

What it refuses to be: the cache's writer; torch's kernels are.
Run it: `python -m pytest tests/engine_plugins/test_gpu_ops.py`.
Legend: M tokens, N rows [q | k | v], K inputs, S positions, P pairs of a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine_plugins.ops.qkv_attn_scaling.reference import write_cache
from engine_plugins.ops.tiles import ROWS, dot, scale_step, to_bf16

BLOCK_P, BLOCK_K = 16, 256


@triton.jit
def qkv_kernel(
    x, w, scale, position, cos_sin, y, M, N, K, q_rows, rotated_rows, head_dim, floor_scale, attn_scale,
    scale_step, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, ROPE: tl.constexpr, TEMPERATURE: tl.constexpr,
):  # fmt: skip
    m, pair = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n, live = 2 * pair, m < M
    even, odd = tl.zeros((ROWS, BLOCK_P), tl.float32), tl.zeros((ROWS, BLOCK_P), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + m[:, None] * K + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
        at = w + n[None, :] * K + k[:, None]
        inside = (n < N)[None, :] & (k < K)[:, None]
        even = dot(a, tl.load(at, mask=inside, other=0.0), even)
        odd = dot(a, tl.load(at + K, mask=inside, other=0.0), odd)
    even = even * tl.load(scale + n * scale_step, mask=n < N, other=0.0)[None, :]
    odd = odd * tl.load(scale + (n + 1) * scale_step, mask=n < N, other=0.0)[None, :]
    if ROPE:
        at_position = tl.load(position + m, mask=live, other=0)
        turned = (n < rotated_rows)[None, :] & live[:, None]
        entry = cos_sin + at_position[:, None] * head_dim + (n % head_dim)[None, :]
        cos, sin = tl.load(entry, mask=turned, other=1.0), tl.load(entry + 1, mask=turned, other=0.0)
        even, odd = even * cos - odd * sin, even * sin + odd * cos
    if TEMPERATURE:
        at_position = tl.load(position + m, mask=live, other=0)
        factor = tl.log(tl.floor((at_position.to(tl.float32) + 1.0) / floor_scale) + 1.0) * attn_scale + 1.0
        factor = tl.where((n < q_rows)[None, :], factor[:, None], 1.0)
        even, odd = even * factor, odd * factor
    out, kept = y + m[:, None] * N + n[None, :], live[:, None] & (n < N)[None, :]
    tl.store(out, to_bf16(even), mask=kept)
    tl.store(out + 1, to_bf16(odd), mask=kept)


def qkv_attn_scaling(
    x_MK: torch.Tensor,
    w_NK: torch.Tensor,
    scale: torch.Tensor | None,
    position_M: torch.Tensor | None,
    cos_sin_SP2: torch.Tensor | None,
    q_rows: int,
    k_rows: int,
    head_dim: int,
    floor_scale: float,
    attn_scale: float,
    k_SGD: torch.Tensor | None = None,
    v_SGD: torch.Tensor | None = None,
    inv_k_scale: float = 1.0,
    inv_v_scale: float = 1.0,
) -> torch.Tensor:
    """BF16 [M, N]; rotated with a table, scaled with a floor_scale above 0. The cache is written by torch's kernels."""
    (M, K), N = x_MK.shape, w_NK.shape[0]
    y_MN = torch.empty((M, N), dtype=torch.bfloat16, device=x_MK.device)
    scale = torch.ones(1, device=x_MK.device) if scale is None else scale
    table = scale if cos_sin_SP2 is None else cos_sin_SP2
    position = x_MK if position_M is None else position_M
    qkv_kernel[(triton.cdiv(N // 2, BLOCK_P),)](
        *(x_MK, w_NK, scale, position, table, y_MN, M, N, K, q_rows, q_rows + k_rows, head_dim),
        *(floor_scale, attn_scale, scale_step(scale)),
        BLOCK_P=BLOCK_P,
        BLOCK_K=BLOCK_K,
        ROPE=cos_sin_SP2 is not None,
        TEMPERATURE=floor_scale > 0,
    )
    if k_SGD is not None and v_SGD is not None and position_M is not None:
        write_cache(y_MN[:, q_rows:], position_M, (k_SGD, v_SGD), (inv_k_scale, inv_v_scale))
    return y_MN


qkv_attn_scaling_cache = qkv_attn_scaling

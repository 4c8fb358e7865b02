"""attention_decode in Triton: split-KV over the positions a step's rows can see, then one combination.

What it is: E4M3 keys and values unpacked exactly, softmax in fp32, probabilities in FP16. The number of splits is fixed
and their bounds come from the positions on the device, so one CUDA graph serves every context length.
What it refuses to be: paged, or the fastest at a head size of 128, which is CUDA's. The native engine's cache is one
slot's [positions, kv heads, head size].
Run it: `python -m pytest tests/engine_plugins/test_triton.py`.
Legend: M rows, H query heads, G kv heads, D head size, S positions, R = M * H / G rows that share a kv head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine_plugins.ops.tiles import dot, to_bf16, to_e4m3

SPLITS, BLOCK_S = 16, 64


@triton.jit
def split_kernel(
    q, k, v, position, sums, stats, M, G, q_stride, score_scale, chunk, GROUP: tl.constexpr, D: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(0), tl.program_id(1)
    r, d, m = tl.arange(0, BLOCK_R), tl.arange(0, D), tl.arange(0, BLOCK_M)
    live = r < M * GROUP
    places = tl.load(position + m, mask=m < M, other=0)
    last = tl.max(places, axis=0)
    first = tl.min(tl.where(m < M, places, last), axis=0)
    first = tl.where(chunk > 0, first // tl.maximum(chunk, 1) * tl.maximum(chunk, 1), 0)
    per = tl.cdiv(tl.cdiv(last + 1 - first, SPLITS), BLOCK_S) * BLOCK_S
    at = tl.load(position + r // GROUP, mask=live, other=-1)
    row = (r // GROUP) * (G * GROUP) + head * GROUP + r % GROUP
    of_row = (r // GROUP) * q_stride + (head * GROUP + r % GROUP) * D
    query = tl.load(q + of_row[:, None] + d[None, :], mask=live[:, None], other=0.0)
    top = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    mass, total = tl.zeros((BLOCK_R,), tl.float32), tl.zeros((BLOCK_R, D), tl.float32)
    end = tl.minimum(first + (split + 1) * per, last + 1)
    for start in range(first + split * per, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        inside = (s < end)[:, None]
        cache = (s[:, None].to(tl.int64) * G + head) * D + d[None, :]
        keys = tl.load(k + cache, mask=inside, other=0.0).to(tl.bfloat16)
        scores = dot(query, tl.trans(keys), tl.zeros((BLOCK_R, BLOCK_S), tl.float32)) * score_scale
        seen = (s[None, :] <= at[:, None]) & (s < end)[None, :]
        if chunk > 0:
            seen = seen & (s[None, :] // chunk == at[:, None] // chunk)
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # a row that has seen nothing yet
        weights, shrink = tl.exp(scores - base[:, None]), tl.exp(top - base)
        values = tl.load(v + cache, mask=inside, other=0.0).to(tl.float16)
        total = total * shrink[:, None] + tl.dot(weights.to(tl.float16), values)
        mass = mass * shrink + tl.sum(weights, axis=1)
        top = higher
    out = row * SPLITS + split
    tl.store(sums + out[:, None] * D + d[None, :], total, mask=live[:, None])
    tl.store(stats + out * 2, top, mask=live)
    tl.store(stats + out * 2 + 1, mass, mask=live)


@triton.jit
def combine_kernel(
    sums, stats, out, v_scale, inv_out_scale, D: tl.constexpr, SPLITS: tl.constexpr, ROUND: tl.constexpr
):
    row, d, s = tl.program_id(0), tl.arange(0, D), tl.arange(0, SPLITS)
    top, mass = tl.load(stats + (row * SPLITS + s) * 2), tl.load(stats + (row * SPLITS + s) * 2 + 1)
    factor = tl.exp(top - tl.max(top, axis=0))
    total = tl.sum(tl.load(sums + (row * SPLITS + s)[:, None] * D + d[None, :]) * factor[:, None], axis=0)
    y = total / tl.sum(mass * factor, axis=0) * v_scale
    if ROUND:
        tl.store(out + row * D + d, to_e4m3(y * tl.load(inv_out_scale)))
    else:
        tl.store(out + row * D + d, to_bf16(y))


def attention_decode(
    q_MHD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGD: torch.Tensor,
    position_M: torch.Tensor,
    k_scale: float,
    v_scale: float,
    chunk_size: int,
    inv_out_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """BF16 [M, H, D], or E4M3 with `inv_out_scale` [1]; keys and values are E4M3 in units of their scales.
    `q_MHD` may be a slice of wider rows."""
    (M, H, D), G = q_MHD.shape, k_SGD.shape[1]
    sums = torch.empty((M * H, SPLITS, D), dtype=torch.float32, device=q_MHD.device)
    stats = torch.empty((M * H, SPLITS, 2), dtype=torch.float32, device=q_MHD.device)
    out_MHD = q_MHD.new_empty((M, H, D), dtype=torch.bfloat16 if inv_out_scale is None else torch.float8_e4m3fn)
    split_kernel[(G, SPLITS)](
        *(q_MHD, k_SGD, v_SGD, position_M, sums, stats, M, G, q_MHD.stride(0), D**-0.5 * k_scale, chunk_size),
        GROUP=H // G,
        D=D,
        SPLITS=SPLITS,
        BLOCK_R=max(16, triton.next_power_of_2(M * H // G)),
        BLOCK_M=triton.next_power_of_2(M),
        BLOCK_S=BLOCK_S,
    )
    inverse = stats if inv_out_scale is None else inv_out_scale
    rounded = inv_out_scale is not None
    combine_kernel[(M * H,)](sums, stats, out_MHD, v_scale, inverse, D=D, SPLITS=SPLITS, ROUND=rounded)
    return out_MHD

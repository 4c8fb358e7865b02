"""The functions of gpu_kernels.py in Triton, one kernel each. Imported only where a tensor is on a GPU.

What it refuses to be: the reference; that is the torch code beside each call.
Run it: `python -m pytest tests/engine_plugins/test_gpu_backend.py` runs it in Triton's interpreter.
Legend: M rows, N outputs, H query heads, G kv heads, D head size, P = D/2 pairs, S positions, F intermediate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine_plugins.native.gpu_kernels import Positioning, Settled
from engine_plugins.ops.tiles import MAX_TOKENS, to_bf16, to_e4m3

BLOCK = 1024


@triton.jit
def round_kernel(x, y, inv_scale, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < size, other=0.0).to(tl.float32) * tl.load(inv_scale)
    tl.store(y + i, to_e4m3(value), mask=i < size)


def to_e4m3_rows(x: Tensor, inv_scale: Tensor) -> Tensor:
    """E4M3 of x * inv_scale [1]."""
    y = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    round_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, y, inv_scale, x.numel(), BLOCK=BLOCK)
    return y


@triton.jit
def silu_mul_kernel(gate_up, y, width, BLOCK: tl.constexpr):
    row, f = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = gate_up + row * 2 * width + f
    gate = tl.load(at, mask=f < width, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=f < width, other=0.0).to(tl.float32)
    tl.store(y + row * width + f, to_bf16(gate / (1.0 + tl.exp(-gate)) * up), mask=f < width)


def silu_mul(gate_up_M2F: Tensor) -> Tensor:
    """BF16 [M, F]."""
    M, F = gate_up_M2F.shape[0], gate_up_M2F.shape[1] // 2
    y_MF = gate_up_M2F.new_empty((M, F))
    silu_mul_kernel[(M, triton.cdiv(F, BLOCK))](gate_up_M2F, y_MF, F, BLOCK=BLOCK)
    return y_MF


@triton.jit
def store_pair(cache, at, even, odd, inv_scale):
    if cache.dtype.element_ty == tl.float8e4nv:
        tl.store(cache + at, to_e4m3(even * inv_scale))
        tl.store(cache + at + 1, to_e4m3(odd * inv_scale))
    else:
        tl.store(cache + at, to_bf16(even))
        tl.store(cache + at + 1, to_bf16(odd))


@triton.jit
def place_kernel(
    qkv, k, v, q, position, write, cos_sin, inv_k, inv_v, eps, floor_scale, attn_scale,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr,
    ROPE: tl.constexpr, NORM: tl.constexpr, TEMPERATURE: tl.constexpr,
):  # fmt: skip
    row, head, pair = tl.program_id(0), tl.program_id(1), tl.arange(0, P)
    at = (row * (H + 2 * G) + head) * 2 * P + 2 * pair
    even, odd = tl.load(qkv + at).to(tl.float32), tl.load(qkv + at + 1).to(tl.float32)
    place = tl.load(position + row)
    if head < H + G:
        if ROPE:
            entry = cos_sin + (place * P + pair) * 2
            cos, sin = tl.load(entry), tl.load(entry + 1)
            turned = even * cos - odd * sin
            odd = even * sin + odd * cos
            even = turned
        if NORM:
            factor = 1.0 / tl.sqrt(tl.sum(even * even + odd * odd, axis=0) / (2 * P) + eps)
            even, odd = even * factor, odd * factor
    if head < H:
        if TEMPERATURE:
            warmth = tl.log(tl.floor((place.to(tl.float32) + 1.0) / floor_scale) + 1.0) * attn_scale + 1.0
            even, odd = even * warmth, odd * warmth
        out = q + (row * H + head) * 2 * P + 2 * pair
        tl.store(out, to_bf16(even))
        tl.store(out + 1, to_bf16(odd))
    else:
        kept = (tl.load(write + row) * G + (head - H) % G) * 2 * P + 2 * pair
        if head < H + G:
            store_pair(k, kept, even, odd, inv_k)
        else:
            store_pair(v, kept, even, odd, inv_v)


def place_qkv(
    qkv_MN: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    position_M: Tensor,
    write_M: Tensor,
    inv_scales: tuple[float, float],
    how: Positioning,
) -> Tensor:
    """BF16 queries [M, H, D]; keys and values into the caches."""
    M, (G, D) = qkv_MN.shape[0], k_SGD.shape[1:]
    H = qkv_MN.shape[1] // D - 2 * G
    q_MHD = qkv_MN.new_empty((M, H, D))
    table = qkv_MN if how.cos_sin_SP2 is None else how.cos_sin_SP2
    place_kernel[(M, H + 2 * G)](
        *(qkv_MN, k_SGD, v_SGD, q_MHD, position_M, write_M, table),
        *(float(inv_scales[0]), float(inv_scales[1]), how.norm_eps, how.floor_scale, how.attn_scale),
        H=H,
        G=G,
        P=D // 2,
        ROPE=how.cos_sin_SP2 is not None,
        NORM=how.norm_eps > 0,
        TEMPERATURE=how.floor_scale > 0,
        num_warps=1,
    )
    return q_MHD


@triton.jit
def plan_kernel(state, out, S, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, BLOCK)
    num_drafts = tl.load(state + 1)
    source = tl.minimum(row, num_drafts)
    position = tl.load(state) + source
    tl.store(out + row, tl.load(state + 2 + source, mask=row <= K, other=0), mask=row <= K)
    tl.store(out + K + 1 + row, position, mask=row <= K)
    tl.store(out + 2 * (K + 1) + row, tl.where(row <= num_drafts, position, S + row), mask=row <= K)


def plan_rows(state: Tensor, max_seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token, position, write) [k + 1]."""
    rows = len(state) - 2
    out = state.new_empty((3, rows))
    plan_kernel[(1,)](state, out, max_seq_len, K=rows - 1, BLOCK=MAX_TOKENS, num_warps=1)
    return out[0], out[1], out[2]


@triton.jit
def settle_kernel(logits, chosen, count, state, result, out, V, S, K: tl.constexpr, BLOCK: tl.constexpr):
    """One warp: the state is read before it is written."""
    row = tl.arange(0, BLOCK)
    live = row <= K
    first = tl.load(logits + row.to(tl.int64) * V, mask=live, other=0.0).to(tl.float32)
    broken = tl.sum(tl.where(tl.abs(first) <= 3e38, 0, 1), axis=0)
    number = tl.where(broken > 0, 0, tl.load(count).to(tl.int64))
    token = tl.load(chosen + row, mask=live, other=-1)
    before = tl.load(state)
    after, last = before + number, tl.maximum(number - 1, 0)
    room = tl.minimum(tl.maximum(S - 1 - after, 0), K)
    position, chain = tl.minimum(before + row, S - 1), tl.minimum(after + row - 1, S - 1)
    tl.store(out + row, tl.minimum(tl.maximum(token, 0), V - 1), mask=live)
    tl.store(out + (K + 1) + row, position, mask=live)
    tl.store(out + 2 * (K + 1) + row, tl.where(row < number, position, S + row), mask=live)
    tl.store(out + 3 * (K + 1) + row, chain, mask=live)
    tl.store(out + 4 * (K + 1) + row, tl.where(row < room, chain, S + row), mask=live)
    tl.store(out + 5 * (K + 1), last)
    tl.store(result, number)
    tl.store(result + 1 + row, token, mask=live)
    tl.store(state, after)
    tl.store(state + 1, room)
    tl.store(state + 2, tl.sum(tl.where(row == last, token, 0), axis=0))


def settle(
    logits_RV: Tensor, chosen: Tensor, count: Tensor, state: Tensor, result: Tensor, max_seq_len: int
) -> Settled:
    """Moves `state` and `result` on; what the draft passes need."""
    rows, V = logits_RV.shape
    out = state.new_empty(5 * rows + 1)
    settle_kernel[(1,)](
        logits_RV, chosen, count, state, result, out, V, max_seq_len, K=rows - 1, BLOCK=MAX_TOKENS, num_warps=1
    )
    return Settled(*out.split(rows))

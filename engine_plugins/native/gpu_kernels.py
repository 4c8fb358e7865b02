"""What stands between two fused ops on the GPU: queries, keys and values to their places, roundings, SwiGLU in BF16,
and what a cycle decides about rows and positions.

What it is: five small functions, each one Triton kernel on a GPU (in torch it would be ten) and plain torch on
the CPU, which is their reference.
What it refuses to be: an op of its own; nothing here reads a weight.
Run it: `python -m pytest tests/engine_plugins/test_gpu_backend.py`.
Legend: M rows, N outputs, H query heads, G kv heads, D head size, P = D/2 pairs, S positions, F intermediate.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine_plugins.ops.formats import E4M3_MAX
from engine_plugins.ops.qkv_attn_scaling.reference import attention_temperature, l2_norm, rotate

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Positioning:
    """What is still to be done to a row's heads; nothing by default."""

    cos_sin_SP2: Tensor | None = None  # rotate queries and keys
    norm_eps: float = 0.0  # above 0: normalize queries and keys after that
    floor_scale: float = 0.0  # above 0: scale queries by their position
    attn_scale: float = 0.0


class Settled(NamedTuple):
    """What a cycle's draft passes need: int64, [k + 1] each; the catch-up rows first, then chain step i at index i."""

    next_token: Tensor
    position: Tensor
    write: Tensor
    chain_position: Tensor
    chain_write: Tensor
    last: Tensor  # [1]: the last accepted row


def _triton() -> Any:
    return importlib.import_module("engine_plugins.native.gpu_triton")


def to_e4m3(x: Tensor, inv_scale: Tensor | float) -> Tensor:
    """E4M3 of x times `inv_scale` (a tensor holds one number), saturating."""
    if x.is_cuda:
        return _triton().to_e4m3_rows(x, inv_scale)
    return (x.float() * inv_scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def silu_mul(gate_up_M2F: Tensor) -> Tensor:
    """BF16 silu(gate) * up from one row [gate | up]."""
    if gate_up_M2F.is_cuda:
        return _triton().silu_mul(gate_up_M2F)
    gate, up = gate_up_M2F.float().chunk(2, dim=1)
    return (F.silu(gate) * up).bfloat16()


def place_qkv(
    qkv_MN: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    position_M: Tensor,
    write_M: Tensor,
    inv_scales: tuple[float, float],
    how: Positioning,
) -> Tensor:
    """Rows [q | k | v] -> BF16 queries [M, H, D]; keys and values to rows `write_M` of the caches, in their format."""
    if qkv_MN.is_cuda:
        return _triton().place_qkv(qkv_MN, k_SGD, v_SGD, position_M, write_M, inv_scales, how)
    kv_heads, head_dim = k_SGD.shape[1:]
    heads_MHD = qkv_MN.float().unflatten(1, (-1, head_dim))
    turned, values = heads_MHD[:, :-kv_heads], heads_MHD[:, -kv_heads:]
    if how.cos_sin_SP2 is not None:
        cos, sin = how.cos_sin_SP2[position_M][:, None].unbind(-1)
        turned = rotate(turned, cos, sin, interleaved=True)
    if how.norm_eps > 0:
        turned = l2_norm(turned, how.norm_eps)
    queries, keys = turned[:, :-kv_heads], turned[:, -kv_heads:]
    if how.floor_scale > 0:
        queries = queries * attention_temperature(position_M, how.floor_scale, how.attn_scale)[:, None, None]
    for cache, rows, inv_scale in ((k_SGD, keys, inv_scales[0]), (v_SGD, values, inv_scales[1])):
        if cache.dtype == E4M3:
            cache.view(torch.uint8).index_copy_(0, write_M, to_e4m3(rows, inv_scale).view(torch.uint8))
        else:
            cache.index_copy_(0, write_M, rows.bfloat16())
    return queries.bfloat16().contiguous()


def plan_rows(state: Tensor, max_seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token, position, write) [k + 1] of a cycle's target rows, from a slot's [position, drafts, last token, drafts].

    A row without a draft repeats the last that has one, and writes to scratch behind the cache.
    """
    if state.is_cuda:
        return _triton().plan_rows(state, max_seq_len)
    row = torch.arange(len(state) - 2)
    source = torch.minimum(row, state[1])
    position = state[0] + source
    return state[2:][source], position, torch.where(row <= state[1], position, max_seq_len + row)


def settle(
    logits_RV: Tensor, chosen: Tensor, count: Tensor, state: Tensor, result: Tensor, max_seq_len: int
) -> Settled:
    """Move a slot on by what was accepted, in place: `state` but its drafts, and `result` [count, chosen ...].

    The count becomes 0 when a row's first logit is NaN or infinite: either in a hidden state reaches every logit.
    """
    if state.is_cuda:
        return _triton().settle(logits_RV, chosen, count, state, result, max_seq_len)
    row, end = torch.arange(len(chosen)), max_seq_len - 1
    number = count.long()[0] * (logits_RV[:, 0].abs() <= 3e38).all()
    after, last = state[0] + number, (number - 1).clamp(min=0)
    room = (end - after).clamp(0, len(chosen) - 1)
    position, chain = (state[0] + row).clamp(max=end), (after + row - 1).clamp(max=end)
    write = torch.where(row < number, position, max_seq_len + row)
    chain_write = torch.where(row < room, chain, max_seq_len + row)
    result[0], result[1:] = number, chosen
    state[:3] = torch.stack((after, room, chosen[last]))
    return Settled(chosen.clamp(0, logits_RV.shape[1] - 1), position, write, chain, chain_write, last[None])

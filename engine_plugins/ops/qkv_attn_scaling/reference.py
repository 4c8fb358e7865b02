"""Reference of qkv_attn_scaling in plain torch fp32.

What it refuses to be: fast. Run it: `python -m pytest tests/engine_plugins`.
Legend: M rows, H hidden or heads, D head size. Formulas: transformers' Llama4TextAttention (RoPE, then L2 norm, then
temperature); "Scalable-Softmax", arXiv 2501.19399, for the temperature.
"""

from __future__ import annotations

import torch

from engine_plugins.ops.formats import E4M3_MAX, Linear


def apply_rope(
    x_MHD: torch.Tensor, position_M: torch.Tensor, inv_freq: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotate every head by its position's angles."""
    angle_M1F = (position_M.float()[:, None] * inv_freq[None, :])[:, None, :]
    return rotate(x_MHD, angle_M1F.cos(), angle_M1F.sin(), interleaved)


def rotate(x_MHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate pairs (2i, 2i+1) when interleaved (Llama 4), else (i, i + D/2) (Llama 3); angles are [M, 1, D/2]."""
    if interleaved:
        even, odd = x_MHD[..., 0::2], x_MHD[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    first, second = x_MHD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention_temperature(position_M: torch.Tensor, floor_scale: float, attn_scale: float) -> torch.Tensor:
    """log(floor((position + 1) / floor_scale) + 1) * attn_scale + 1."""
    return torch.log1p(torch.floor((position_M.float() + 1.0) / floor_scale)) * attn_scale + 1.0


def l2_norm(x_MHD: torch.Tensor, eps: float) -> torch.Tensor:
    """Scout's qk_norm: RMS normalization without a weight."""
    return x_MHD * torch.rsqrt(x_MHD.pow(2).mean(-1, keepdim=True) + eps)


def qkv_attn_scaling(
    x_MH: torch.Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    position_M: torch.Tensor,
    *,
    head_dim: int,
    inv_freq: torch.Tensor | None,
    interleaved: bool,
    qk_norm_eps: float | None,
    temperature: tuple[float, float] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v as [M, heads, D]. `inv_freq` None means NoPE; `temperature` is (floor_scale, attn_scale) on NoPE
    layers."""
    rows = x_MH.shape[0]
    q_MHD, k_MHD, v_MHD = (linear(x_MH).view(rows, -1, head_dim) for linear in (q, k, v))
    if inv_freq is not None:
        q_MHD, k_MHD = (apply_rope(t, position_M, inv_freq, interleaved) for t in (q_MHD, k_MHD))
        if qk_norm_eps is not None:
            q_MHD, k_MHD = l2_norm(q_MHD, qk_norm_eps), l2_norm(k_MHD, qk_norm_eps)
    elif temperature is not None:
        q_MHD = q_MHD * attention_temperature(position_M, *temperature)[:, None, None]
    return q_MHD, k_MHD, v_MHD


def write_cache(
    kv_MN: torch.Tensor,
    position_M: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    inverse: tuple[float, float],
) -> None:
    """Keys and values, rows [k | v], to E4M3 in units of their scales, at their positions of [S, G, D] caches."""
    for part_MN, cache_SGD, inv_scale in zip(kv_MN.float().chunk(2, dim=-1), caches, inverse, strict=True):
        codes = (part_MN * inv_scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        cache_SGD.view(torch.uint8).flatten(1).index_copy_(0, position_M, codes)

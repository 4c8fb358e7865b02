"""Reference of attention_decode in plain torch fp32.

What it refuses to be: fast. Run it: `python -m pytest tests/engine_plugins`.
Legend: M query rows, S cached positions, H heads, D head size.
"""

from __future__ import annotations

import torch


def visible(position_M: torch.Tensor, num_positions: int, chunk_size: int) -> torch.Tensor:
    """[M, S] bool: causal, and in the same chunk when chunk_size > 0."""
    key_S = torch.arange(num_positions)
    mask = key_S[None, :] <= position_M[:, None]
    if chunk_size:
        mask &= (key_S[None, :] // chunk_size) == (position_M[:, None] // chunk_size)
    return mask


def attention_decode(
    q_MHD: torch.Tensor, k_SHD: torch.Tensor, v_SHD: torch.Tensor, position_M: torch.Tensor, chunk_size: int = 0
) -> torch.Tensor:
    """[M, H, D] from keys and values as the cache holds them (already rounded to its format)."""
    group = q_MHD.shape[1] // k_SHD.shape[1]
    k_SHD, v_SHD = k_SHD.repeat_interleave(group, dim=1), v_SHD.repeat_interleave(group, dim=1)
    scores_HMS = torch.einsum("mhd,shd->hms", q_MHD, k_SHD) * q_MHD.shape[-1] ** -0.5
    scores_HMS = scores_HMS.masked_fill(~visible(position_M, k_SHD.shape[0], chunk_size)[None], float("-inf"))
    return torch.einsum("hms,shd->mhd", torch.softmax(scores_HMS, dim=-1), v_SHD)

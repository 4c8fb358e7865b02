"""Reference of allreduce_rmsnorm in plain torch fp32.

What it refuses to be: fast. Run it: `python -m pytest tests/engine_plugins`.
Legend: M rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine_plugins.ops.formats import fake_quantize_e4m3


def rmsnorm(x_MH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x_MH * torch.rsqrt(x_MH.pow(2).mean(-1, keepdim=True) + eps) * weight_H


def allreduce_rmsnorm(
    parts: Sequence[torch.Tensor],
    residual_MH: torch.Tensor,
    weight_H: torch.Tensor,
    eps: float,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rounded norm [M, H], new residual [M, H]); the parts are summed in rank order."""
    residual_MH = residual_MH + sum(parts)
    return fake_quantize_e4m3(rmsnorm(residual_MH, weight_H, eps), scale), residual_MH
